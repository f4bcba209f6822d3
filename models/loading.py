"""Weights from elsewhere: MAE's .pth files, this project's checkpoints, safetensors, plain state dicts."""

import os
import re
from dataclasses import dataclass, field

import torch
from torch import nn

from models.containers import TABLE, State, Weights, family_filter, find_weights, plain
from models.factory import create_model
from models.positions import Grid, fit_positions, fit_tables
from models.vit import classifier_prefixes, patch_grid, without_weights
from util.checkpoint import own_meta, peek_meta, read_file
from util.errors import ParameterError, UserError, reason_of

# Between trunk and classifier, initialised with it. MAE's average pooling has a norm that its pretraining lacks.
_POOLING = ("fc_norm", "attn_pool", "pre_logits")
_DECODER = re.compile(r"decoder|mask_token|encoder_head\.")  # in a pretraining file: not part of the encoder
_TOKENS = (
    "cls_token",
    "dist_token",
    "reg_token",
)  # a model may have more tokens than the file: they keep their initialisation
_STATISTICS = ("running_mean", "running_var")
# Tensors that are computed, not learned; which of them a file contains depends on the model's version.
_COMPUTED = re.compile(
    r"(^|\.)(relative_position_index|attn_mask|relative_coords_table|attention_bias_idxs|num_batches_tracked|k_bias)$"
    r"|rope|inv_freq|periods|bias_mask"
)
# Optional parts of a trunk: without them the other weights compute something else.
_OPTIONAL = ("pos_embed", "norm_pre", "rel_pos_bias")


@dataclass
class LoadReport:
    """What `load_pretrained` did with each key: lists of the model's parameter names."""

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    source: str = ""  # the dict and prefix used in the file, e.g. "ema"
    kept_classes: list[str] = field(default_factory=list)  # classifier rows matched by name
    new_classes: list[str] = field(default_factory=list)  # classifier rows left at their initialisation

    def __str__(self) -> str:
        def show(keys: list[str]) -> str:
            return f"{len(keys)}" + (f" ({', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''})" if keys else "")

        decoder = [k for k in self.unexpected if _DECODER.match(k)]
        text = (
            f"loaded {len(self.loaded)}{f' from {self.source}' if self.source else ''}, resized {show(self.resized)}, "
            f"missing {show(self.missing)}, unexpected {show([k for k in self.unexpected if k not in decoder])}"
        )
        if decoder:
            text += f"; {len(decoder)} decoder tensors left out"
        if self.kept_classes or self.new_classes:
            text += f"; classes of the head by name: kept {show(self.kept_classes)}, new {show(self.new_classes)}"
        return text


def load_pretrained(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    ema: bool = True,
    partial: bool = False,
    classes: list[str] | None = None,
    pos_grid: Grid | None = None,
) -> LoadReport:
    """Load the file into `model` and report what was loaded. Encoder-only files leave the head at its initialisation.

    Position embeddings and relative position tables are resized to the model's grid. A classifier with another number
    of classes keeps its initialisation. Other shape mismatches, NaN weights, and files that fit only part of the trunk
    are errors.

    classes: the model's, in order. If the file names its classes, the classifier's rows are matched by name.
    partial: load what fits of the trunk and leave the rest at its initialisation.
    pos_grid: rows and columns of patches that the file was trained on, if it does not say so itself.
    """
    path = os.fsdecode(path)
    content = read_file(path)
    meta = own_meta(content, path)
    own, heads = model.state_dict(), classifier_prefixes(model)
    names = {n for n, _ in model.named_parameters()} | {n for n in own if n.endswith(_STATISTICS)}
    tops = {h.split(".")[0] for h in heads} | set(_POOLING)
    trunk = {k: v for k, v in own.items() if k in names and k.split(".")[0] not in tops}
    weights = find_weights(content, path, trunk, ema, family_filter(model))
    state, report = dict(weights.state), LoadReport(source=weights.source)
    _take_head_beside(state, weights, model, path)
    if not set(trunk) & set(state):
        raise UserError(
            f"{path}: shares no parameter with the model "
            f"({next(iter(state), 'nothing')} ... against {next(iter(own))} ...)"
        )
    if not partial:
        _refuse_part(path, trunk, set(own), set(state), tops)
    placed = _take_positions(state, weights.raw, model, meta, path, pos_grid, partial, report)
    if meta and "img_size" in meta:
        _refuse_turned(set(state) & set(trunk) - placed, meta, getattr(model, "built_for", None), path)
    for name in classifier_layers(model):
        if f"{name}.weight" not in state:
            state.pop(f"{name}.bias", None)  # initialised together with its weight
    if classes and meta and meta.get("classes"):
        _move_head_rows(state, own, list(classifier_layers(model)), meta, list(classes), report)

    accepted: State = {}
    for key, value in state.items():
        if key not in own:
            report.unexpected.append(key)
            continue
        if value.shape != own[key].shape:
            if any(key == h or key.startswith(h + ".") for h in heads):
                report.missing.append(key)
                continue
            if key not in names and _COMPUTED.search(key):
                continue  # window geometry, which the model computes for its size
            raise ParameterError(
                f"{path}: {key} is {list(value.shape)} but the model's is {list(own[key].shape)}; "
                "give the <model>, <img_size> and <in_chans> that it was trained with"
            )
        if own[key].is_floating_point() and not value.is_floating_point():
            raise UserError(f"{path}: {key} holds {str(value.dtype).removeprefix('torch.')}, not weights")
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise UserError(f"{path}: {key} holds NaN or infinite values")
        if value.shape != weights.raw.get(key, value).shape and key not in report.resized:
            report.resized.append(key)
        accepted[key] = value
    report.loaded = list(accepted)
    computed = {k for k in own if k not in names and _COMPUTED.search(k)}
    report.missing += [k for k in own if k not in accepted and k not in report.missing and k not in computed]
    report.unexpected += [k for k, v in weights.outside.items() if not any(v is taken for taken in accepted.values())]
    model.load_state_dict(accepted, strict=False)
    for name, layer in classifier_layers(model).items():
        if f"{name}.weight" in report.missing:
            init_head(layer.weight, layer.bias)
    return report


def _take_head_beside(state: State, weights: Weights, model: nn.Module, path: str) -> None:
    """If the file has a classifier beside `backbone.`, under the model's names, add it to `state`."""
    prefix = weights.source.rpartition(", ")[2]
    parent = prefix.removesuffix(".").rpartition(".")[0]
    keys = [f"{name}.{part}" for name in classifier_layers(model) for part in ("weight", "bias")]
    beside = {k: weights.outside.get(f"{parent}.{k}" if parent else k) for k in keys}
    if not any(k in state for k in keys):
        state.update(plain({k: v for k, v in beside.items() if v is not None}, path))


def _take_positions(state: State, raw: State, model, meta, path: str, pos_grid, partial: bool, report) -> set[str]:
    """Resize the file's learned positions to the model's grid, in place; returns their names."""
    learned = any(k == "pos_embed" or k.endswith(TABLE) for k in raw if k in state)
    described = None
    if meta and learned:
        try:
            described = _described(meta, path)
        except UserError:
            if not pos_grid:
                raise
    said = described and patch_grid(described)
    if pos_grid and said and tuple(pos_grid) != said:
        raise ParameterError(
            f"<pos_grid> {pos_grid[0]} {pos_grid[1]}: {path} says that it was trained on {said[0]} x {said[1]} "
            "patches; omit the flag"
        )
    fitted, resized = fit_positions(raw, model, path, described, pos_grid)
    tables, resized_tables, left_out = fit_tables(raw, model, path, described, pos_grid, partial)
    state.update({**fitted, **tables})
    report.resized += resized + resized_tables
    for key in left_out:
        del state[key]
    return {*fitted, *tables}


def _refuse_turned(names: set[str], meta: dict, size: Grid | None, path: str) -> None:
    """UserError if one of these depends on image positions and the image has another shape with as many pixels.

    The tensors' shapes are equal then (LeViT, Hiera, CrossViT, MLP-Mixer), so no other check would notice.
    """
    old = tuple(meta["img_size"])
    if size is None or old == size or old[0] * old[1] != size[0] * size[1]:
        return
    try:
        sizes = (old, (old[0], 2 * old[1]))
        here, wider = (_described({**meta, "img_size": s}, path).state_dict() for s in sizes)
    except UserError:
        return  # a family that only takes squares
    turned = sorted(k for k in names if k in here and k in wider and here[k].shape != wider[k].shape)
    if turned:
        raise ParameterError(
            f"{path}: {turned[0]} depends on positions in images of {old[0]} x {old[1]} pixels, "
            f"not of {size[0]} x {size[1]}; give <img_size> {old[0]} {old[1]}"
        )


def _described(meta: dict, path: str) -> nn.Module:
    """The network described by a checkpoint's meta, without memory for weights, to read its grid and windows."""
    try:
        return without_weights(lambda: create_from_meta(meta, num_classes=meta.get("num_classes") or 1))
    except Exception as error:  # keywords of another version
        raise ParameterError(
            f"{path}: its meta describes no model ({reason_of(error)}), so its grid is unknown; "
            "give it with <pos_grid> ROWS COLUMNS"
        ) from None


def _refuse_part(path: str, trunk: State, own: set[str], in_file: set[str], tops: set[str]) -> None:
    """UserError if part of the model's trunk would stay random, or part of the file's trunk would be dropped.

    MAE's two poolings normalise at different places, with `norm` or `fc_norm`: either may be missing.
    """

    def few(names: list[str]) -> str:
        return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"

    norms = {"norm.weight", "norm.bias"} if "fc_norm.weight" in in_file else set()
    lacking = [k for k in trunk if k not in in_file and k not in norms and k not in _TOKENS]
    roots = {k.split(".")[0] for k in trunk if "." in k and k.split(".")[0] != "norm"} | set(_OPTIONAL)
    foreign = [k for k in sorted(in_file - own) if k.split(".")[0] in roots - tops and not _COMPUTED.search(k)]
    if lacking or foreign:
        has = f"lacks {few(lacking)} of its parameters" if lacking else ""
        more = f"has {few(foreign)} that it does not know" if foreign else ""
        raise ParameterError(
            f"{path}: fits only part of the model: {' and '.join(filter(None, (has, more)))}; give the <model> and "
            "<model_kwargs> that it was trained with (or <partial>, which initialises the rest)"
        )


def _move_head_rows(
    state: State, own: State, layers: list[str], meta: dict, new: list[str], report: LoadReport
) -> None:
    """Reorder the classifier's rows from the file's classes to the model's, in place; other rows are initialised."""
    old = list(meta["classes"])
    keys = [k for name in layers for k in (f"{name}.weight", f"{name}.bias") if k in own and k in state]
    keys = [k for k in keys if state[k].ndim and len(state[k]) == meta["num_classes"]]
    if not keys or (old == new and all(state[k].shape == own[k].shape for k in keys)):
        return
    index = {name: i for i, name in enumerate(old)}
    both = [(i, index[name]) for i, name in enumerate(new) if name in index]
    for key in keys:
        if not both or state[key].shape[1:] != own[key].shape[1:]:
            del state[key]  # initialised as a whole
            continue
        fresh = own[key].float().clone()
        init_head(*((fresh, None) if key.endswith("weight") else (None, fresh)))
        to, from_ = map(list, zip(*both))
        fresh[to] = state[key][from_].float()
        state[key] = fresh
    report.kept_classes = [new[i] for i, _ in both]
    report.new_classes = [name for name in new if name not in index]


def init_head(weight: torch.Tensor | None, bias: torch.Tensor | None) -> None:
    """MAE's initialisation of a new head on trained features: logits near 0, loss near log C.

    A family's own initialisation can be large enough to damage the features.
    """
    if weight is not None:
        nn.init.trunc_normal_(weight, std=2e-5)
    if bias is not None:
        nn.init.zeros_(bias)


def classifier_layers(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers (linear or convolution) that compute the logits, by name; two for a net with two heads."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    inside = [[n for n in layers if n == p or n.startswith(p + ".")] for p in classifier_prefixes(model)]
    return {names[-1]: layers[names[-1]] for names in inside if names}


def create_from_meta(
    meta: dict, *, num_classes: int | None = None, drop_path: float = 0.0, alpha_blend=None
) -> nn.Module:
    """The classifier described by `meta`; for a pretraining checkpoint, its encoder with a new head."""
    return create_model(
        meta["model"],
        num_classes=meta.get("num_classes", 0) if num_classes is None else num_classes,
        img_size=tuple(meta["img_size"]),
        in_chans=meta["in_chans"],
        drop_path=drop_path,
        alpha_blend=alpha_blend,
        **{"global_pool": meta.get("global_pool", True), **meta.get("model_kwargs", {})},
    )


def load_classifier(path: str, *, ema: bool = True) -> tuple[nn.Module, dict]:
    """(model in eval mode, meta) of a fine-tuned checkpoint; every weight must be in the file."""
    meta = peek_meta(path)
    if meta is None:
        raise UserError(f"{path}: not a checkpoint of this project")
    require_classifier(meta, path)
    model = create_from_meta(meta)
    require_complete(load_pretrained(model, path, ema=ema), path)
    return model.eval(), meta


def require_classifier(meta: dict, path: str) -> None:
    """UserError unless `meta` is of a checkpoint of main_finetune.py."""
    if meta.get("kind") != "finetune":
        raise UserError(
            f"{path}: a {meta.get('kind')} checkpoint without a classifier; fine-tune it with main_finetune.py"
        )


def require_complete(report: LoadReport, path: str) -> None:
    """For evaluation: with missing weights a model would silently score at chance."""
    lacking = report.missing or report.new_classes
    if lacking:
        raise UserError(f"{path}: lacks weights of this model ({', '.join(lacking[:4])}); cannot be evaluated")


@torch.no_grad()
def try_forward(net: nn.Module, meta: dict, batch: int) -> None:
    """One forward pass of `batch` grey images in net's mode; UserError if the network cannot compute them.

    Restores running statistics and generators.
    """
    name, shape = meta["model"], (batch, meta["in_chans"], *meta["img_size"])
    images = torch.zeros(shape, device=next(net.parameters()).device)
    buffers = {k: v.clone() for k, v in net.named_buffers()}
    size = " x ".join(map(str, shape[1:]))
    try:
        with torch.random.fork_rng([images.device] if images.is_cuda else []):
            logits = torch.func.functional_call(net, buffers, (images,))
    except UserError:
        raise
    except (
        Exception
    ) as error:  # the family's code may fail in any way at a size or with keywords that it does not support
        if "more than 1 value per channel" in str(error):
            raise ParameterError(
                f"<batch_size> {batch}: the BatchNorm of {name} has one value per channel to normalise at {size}; "
                "give 2 or more, a larger <img_size>, or <freeze_bn>"
            ) from None
        raise ParameterError(
            f"<model> {name}: cannot compute images of {size} ({reason_of(error)}); see <img_size> and <model_kwargs>"
        ) from None
    if not isinstance(logits, torch.Tensor) or logits.shape != (batch, meta["num_classes"]):
        got = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ParameterError(
            f"<model> {name}: gives {got} for {batch} images, not {meta['num_classes']} numbers for each; "
            "see <model_kwargs>"
        )
