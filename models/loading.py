"""Weights from elsewhere: MAE's .pth files, this project's checkpoints, safetensors, plain state dicts."""

import os
from dataclasses import dataclass, field

import torch
from torch import nn

from models.vit import patch_grid, resize_pos_embed
from util.checkpoint import read_file
from util.errors import UserError


@dataclass
class LoadReport:
    """What `load_pretrained` did with each key: lists of parameter names, in the model's naming."""

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        def show(keys: list[str]) -> str:
            return f"{len(keys)}" + (f" ({', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''})" if keys else "")

        return (
            f"loaded {len(self.loaded)}, resized {show(self.resized)}, missing {show(self.missing)}, "
            f"unexpected {show(self.unexpected)}"
        )


def state_dict_in(content: dict, path: str, ema: bool = True) -> dict[str, torch.Tensor]:
    """The model's tensors in a checkpoint's dict: EMA weights first if there are any, then model, then plain."""
    for key in ("ema", "model_ema", "state_dict_ema") if ema else ():
        if isinstance(content.get(key), dict) and content[key]:
            content = content[key]
            break
    else:
        for key in ("model", "state_dict", "module"):
            if isinstance(content.get(key), dict):
                content = content[key]
                break
    state = {str(k).removeprefix("module."): v for k, v in content.items() if isinstance(v, torch.Tensor)}
    if not state:
        raise UserError(f"{path}: no tensors in it")
    for key, value in state.items():
        if value.layout != torch.strided or value.is_quantized or value.is_complex():
            raise UserError(f"{path}: {key} is a {value.dtype} {value.layout} tensor; weights should be dense and real")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            # Zero strides: a file of a kilobyte that any operation would blow up to its shape.
            raise UserError(f"{path}: {key} claims the shape {list(value.shape)} with less data than that")
    return state


def load_pretrained(model: nn.Module, path: str | os.PathLike, *, ema: bool = True) -> LoadReport:
    """Fill `model` from the file and say what happened. Encoder-only files (pretraining) leave the head fresh.

    Position embeddings are resized to the model's grid. A classifier of another class count stays at its
    initialisation. Any other shape mismatch, NaN weights, and a file that shares nothing with the model are errors.
    """
    path = os.fspath(path)
    state = state_dict_in(read_file(path), path, ema)
    own = model.state_dict()
    report = LoadReport()
    head = classifier_prefixes(model)
    accepted: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        if key not in own:
            report.unexpected.append(key)
            continue
        if value.shape != own[key].shape:
            if any(key == h or key.startswith(h + ".") for h in head):
                report.missing.append(key)
                continue
            if (
                key.endswith("pos_embed")
                and value.ndim == 3
                and patch_grid(model)
                and value.shape[2] == own[key].shape[2]
            ):
                prefix = getattr(model, "num_prefix_tokens", 1)
                grid = patch_grid(model)
                target_prefix = own[key].shape[1] - grid[0] * grid[1]
                # A square number of positions has no class position in it, one more has.
                num_prefix = target_prefix if _is_grid(value.shape[1] - target_prefix) else min(prefix, value.shape[1])
                if value.shape[0] != 1 or value.shape[1] <= num_prefix:
                    raise UserError(f"{path}: {key} is {list(value.shape)}, not one row of positions")
                value = resize_pos_embed(value, grid, num_prefix, target_prefix)
                report.resized.append(key)
            elif "relative_position" in key or "attn_mask" in key or key.endswith("relative_coords_table"):
                report.missing.append(key)  # window geometry, rebuilt by the model for its own size
                continue
            else:
                raise UserError(
                    f"{path}: {key} is {list(value.shape)} but the model's is {list(own[key].shape)}; "
                    "give the --model, --input_size and --in_chans that it was trained with"
                )
        if own[key].is_floating_point() and not value.is_floating_point():
            raise UserError(f"{path}: {key} holds {str(value.dtype).removeprefix('torch.')}, not weights")
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise UserError(f"{path}: {key} holds NaN or infinite values")
        accepted[key] = value
    report.loaded = list(accepted)
    seen = set(report.loaded) | set(report.missing)
    report.missing += [k for k in own if k not in seen]
    parameters = {n for n, _ in model.named_parameters()}
    if not parameters & set(report.loaded):
        raise UserError(
            f"{path}: shares no parameter with the model ({next(iter(state))} ... against {next(iter(own))} ...)"
        )
    model.load_state_dict(accepted, strict=False)
    for name in head:
        fresh = model.get_submodule(name) if f"{name}.weight" in report.missing else None
        if isinstance(fresh, nn.Linear):
            # MAE's start for a new head on trained features: logits near 0, loss near log C. A family's own
            # initialisation can be loud enough to shake the features it should read.
            nn.init.trunc_normal_(fresh.weight, std=2e-5)
            nn.init.zeros_(fresh.bias)
    return report


def _is_grid(n: int) -> bool:
    return n > 0 and int(n**0.5) ** 2 == n


def classifier_prefixes(model: nn.Module) -> list[str]:
    """Module names of the final classifier (timm's `default_cfg['classifier']`), e.g. ['head'] or ['head.fc']."""
    name = getattr(model, "default_cfg", {}).get("classifier") or "head"
    return [name] if isinstance(name, str) else list(name)
