"""Resizes learned positions of a file to a model's grid: absolute embeddings and relative tables.

The file's grid comes from its own description, from the number of rows, or from the user; if several grids are
possible, that is an error.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import resize_rel_pos_bias_table
from torch import nn

from models.containers import TABLE, State
from models.vit import patch_grid
from util.errors import ParameterError, UserError

Grid = tuple[int, int]  # rows, columns
_REGISTERS = ("reg_token", "register_tokens", "storage_tokens")
_TOKENS = {"cls": ("cls_token",), "dist": ("dist_token",), "reg": _REGISTERS}


def fit_positions(
    raw: State, model: nn.Module, path: str, described: nn.Module | None = None, pos_grid: Grid | None = None
) -> tuple[State, list[str]]:
    """(tensors that replace the file's, names of the resized ones) for the model's absolute position embedding.

    The patch part is resampled (bicubic, as in MAE). Positions of class, distillation and register tokens go to the
    same token. If the model has no position for a token, the file's is added to the token: the blocks get the same sum.
    raw: the file's tensors. described: the model described by the file's meta.
    """
    own, target = model.state_dict(), patch_grid(model)
    old, new = raw.get("pos_embed"), own.get("pos_embed")
    if old is not None and old.ndim == 2:
        old = old[None]  # saved without the batch dimension
    if old is None or new is None or target is None or new.ndim != 3 or old.ndim != 3 or old.shape[2] != new.shape[2]:
        return {}, []
    new_kinds = _prefix_kinds(new.shape[1] - target[0] * target[1], own)
    if new_kinds is None:
        return {}, []  # not positions of a grid of patches
    if old.shape[0] != 1 or old.shape[1] == 0:
        raise UserError(f"{path}: pos_embed is {list(old.shape)}, not one row of positions")
    grid, old_kinds = _read(old.shape[1], raw, model, path, described, pos_grid)
    prefix = dict(zip(old_kinds, old[0].float()))
    patches = _resample(old[:, len(old_kinds) :].float(), grid, target)
    rows = [prefix.pop(k, _without(k, n, raw)) for k, n in zip(new_kinds, new[0].float())]
    done = {"pos_embed": torch.cat([torch.stack(rows)[None], patches], 1) if rows else patches}
    for kind in ("cls", "dist", "reg"):
        name, token = _TOKENS[kind][0], next((raw[n] for n in _TOKENS[kind] if n in raw), None)
        positions = [v for k, v in prefix.items() if k.startswith(kind)]
        if name in own and token is not None and token.shape == own[name].shape:
            done[name] = token.float() + torch.stack(positions) if positions else token
    return done, [] if grid == target and old_kinds == new_kinds else ["pos_embed"]


def _resample(patches: torch.Tensor, old: Grid, new: Grid) -> torch.Tensor:
    """[1, N, D] -> [1, H W, D], bicubic. Before version 1.0.20, timm's function mistakes 4 x 16 for 8 x 8."""
    if old == new:
        return patches
    image = rearrange(patches, "1 (h w) d -> 1 d h w", h=old[0])
    image = F.interpolate(image, size=new, mode="bicubic", align_corners=False)
    return rearrange(image, "1 d h w -> 1 (h w) d")


def _without(kind: str, own: torch.Tensor, raw: State) -> torch.Tensor:
    """The position of a token without one in the file: 0 if the file has the token, else the model's initial one."""
    present = any(n in raw for n in _TOKENS[kind.rstrip("0123456789")])
    return torch.zeros_like(own) if present else own


def _counts(state: State) -> tuple[int, int, int]:
    """Numbers of class, distillation and register tokens in a state dict."""
    present = [[state[n] for n in names if n in state and state[n].ndim == 3] for names in _TOKENS.values()]
    cls, dist, reg = (tokens[0].shape[1] if tokens else 0 for tokens in present)
    return cls, dist, reg


def _prefix_kinds(number: int, state: State) -> list[str] | None:
    """The tokens that the first `number` positions belong to; None if no set of tokens has this size.

    Possible sets: all tokens, the class token (and the distillation token) without registers, or none.
    """
    cls, dist, reg = _counts(state)
    names = ["cls"] * min(cls, 1) + ["dist"] * min(dist, 1) + [f"reg{i}" for i in range(reg)]
    if number == len(names):
        return names
    if 0 <= number <= cls + dist:
        return names[:number]
    return None


def _read(n: int, raw: State, model: nn.Module, path: str, described, pos_grid) -> tuple[Grid, list[str]]:
    """(grid, prefix tokens) of a file's n positions. UserError if several readings are possible, or none."""
    known = pos_grid or (patch_grid(described) if described is not None else None)
    if known is not None:
        kinds = _prefix_kinds(n - known[0] * known[1], raw) or _uncounted(n - known[0] * known[1], raw)
        if kinds is not None:
            return tuple(known), kinds
        if pos_grid:
            raise ParameterError(
                f"<pos_grid> {known[0]} {known[1]}: {path} has {n} positions, which are not {known[0] * known[1]} "
                "patches with or without its class and register tokens"
            )
    cls, dist, reg = _counts(raw)
    counted = {0, cls, cls + dist, cls + dist + reg}
    readings = _readings(n, counted, model) if cls + dist + reg else []
    readings = readings or _readings(n, {0, 1, 2, reg, 1 + reg} | counted, model)
    if len(readings) == 1:
        grid, number = readings[0]
        kinds = _prefix_kinds(number, raw) or _uncounted(number, raw)
        if kinds is not None:
            return grid, kinds
    could = (
        f"could be {_several(readings)}"
        if len(readings) > 1
        else "are not a square, with or without class and register tokens"
    )
    raise ParameterError(
        f"{path}: its {n} positions {could}; give the patch grid of its training with <pos_grid> ROWS COLUMNS"
    )


def _readings(n: int, prefixes: set[int], model: nn.Module) -> list[tuple[Grid, int]]:
    """Possible (grid, number of prefix positions): squares, and the model's grid in either orientation.

    Families whose published weights have a rectangular grid in timm: that rectangle.
    """
    own, published = patch_grid(model), _published_grid(model)
    assert own is not None, "asked for models with a grid"
    found = []
    for prefix in sorted(p for p in prefixes if p < n):
        m = n - prefix
        if published and published[0] * published[1] == m:
            return [(published, prefix)]
        side = int(m**0.5 + 0.5)
        grids = [(side, side)] if side * side == m else []
        if own[0] * own[1] == m:
            grids += [own, own[::-1]]
        found += [(g, prefix) for g in dict.fromkeys(grids)]
    return found


def _uncounted(number: int, raw: State) -> list[str] | None:
    """Prefix positions whose tokens are not in the file: class, then distillation."""
    _, _, reg = _counts(raw)
    registers = [f"reg{i}" for i in range(reg)]
    return {0: [], 1: ["cls"], 2: ["cls", "dist"], reg: registers, 1 + reg: ["cls", *registers]}.get(number)


def _several(readings: list[tuple[Grid, int]]) -> str:
    return " or ".join(f"{g[0]} x {g[1]}" + (f" after {p} of tokens" if p else "") for g, p in readings)


def _published_grid(model: nn.Module) -> Grid | None:
    """The grid of the family's published weights if it is a rectangle (Sapiens); None for squares."""
    size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
    embed: Any = model.patch_embed
    if not size or size[1] == size[2] or not getattr(embed, "img_size", None):
        return None
    rows, columns = (s * g // i for s, g, i in zip(size[1:], embed.grid_size, embed.img_size))
    return rows, columns


def fit_tables(
    raw: State,
    model: nn.Module,
    path: str,
    described: nn.Module | None = None,
    pos_grid: Grid | None = None,
    partial: bool = False,
) -> tuple[State, list[str], list[str]]:
    """(replacing tensors, names of the resized ones, names of those left out) for learned relative position tables.

    Uses timm's interpolation, from the file's attention window. partial: leave out tables whose window is unknown.
    """
    own, done = model.state_dict(), {}
    resized, left_out = list[str](), list[str]()
    for key in (k for k in own if k.endswith(TABLE) and k in raw):
        old, new = raw[key], own[key]
        name = key.removesuffix(TABLE).removesuffix(".")
        window = getattr(model.get_submodule(name), "window_size", None)
        if window is None or old.ndim != new.ndim:
            continue
        window = tuple(window)
        old_window: Grid | None
        heads, extra = new.shape[-1], len(new) - (2 * window[0] - 1) * (2 * window[1] - 1)
        if old.ndim == 3:  # [heads, 2 rows - 1, 2 columns - 1] shows its window by its shape
            heads, extra, old_window = len(new), 0, ((old.shape[1] + 1) // 2, (old.shape[2] + 1) // 2)
        else:
            old_window = _window(len(old) - extra, window, name, model, described, pos_grid)
        if old_window is None and partial:
            left_out.append(key)
            continue
        if old_window is None:
            raise ParameterError(
                f"{path}: {key} has {len(old)} rows, which do not determine the attention window of its training; "
                "give the patch grid that the file was trained on with <pos_grid> ROWS COLUMNS"
            )
        if old_window == window or old.shape[0 if old.ndim == 3 else -1] != heads:
            done[key] = old  # another number of heads: refused later, like any other shape
            continue
        # timm's function reads the file's window from three dimensions; with two it assumes a square.
        rows, columns = (2 * s - 1 for s in old_window)
        table = old if old.ndim == 3 else rearrange(old[: rows * columns], "(r c) heads -> heads r c", r=rows)
        shape = (heads, 2 * window[0] - 1, 2 * window[1] - 1)
        table = resize_rel_pos_bias_table(table.float(), new_window_size=window, new_bias_shape=shape)
        table = table.reshape(shape)  # timm 1.0.15 returns the heads' tables below each other
        if old.ndim == 2:
            table = torch.cat([rearrange(table, "heads r c -> (r c) heads"), old[rows * columns :].float()])
        done[key] = table
        resized.append(key)
    return done, resized, left_out


def _window(rows: int, window: Grid, name: str, model: nn.Module, described, pos_grid) -> Grid | None:
    """The window (h, w) of a table of (2 h - 1)(2 w - 1) rows; None if it is unknown."""
    known = []
    twin: Any = dict(described.named_modules()).get(name) if described is not None else None
    if hasattr(twin, "window_size"):
        known.append(tuple(twin.window_size))
    if pos_grid is not None and patch_grid(model) in (window, tuple(pos_grid)):
        # The window is the whole grid (BEiT), or the file has the model's grid and therefore its windows.
        known.insert(0, tuple(pos_grid) if window == patch_grid(model) else window)
    for h, w in known:
        if (2 * h - 1) * (2 * w - 1) == rows:
            return h, w
    side = int(max(rows, 0) ** 0.5 + 0.5)
    readings = {((side + 1) // 2,) * 2} if side % 2 and side * side == rows else set()
    if (2 * window[0] - 1) * (2 * window[1] - 1) == rows:
        readings |= {window, window[::-1]}
    return readings.pop() if len(readings) == 1 else None
