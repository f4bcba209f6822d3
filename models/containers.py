"""Finds a model's tensors in a file from elsewhere: which dict, which prefix, whose names."""

import inspect
import re
import sys
from collections import Counter
from dataclasses import dataclass

import timm
import torch
from torch import nn

from util.errors import UserError

State = dict[str, torch.Tensor]

# Averaged weights in timm, MAE-like trainers, Lightning, DINO; preferred among equals if averages are wanted.
EMA = {"ema", "model_ema", "ema_model", "state_dict_ema", "ema_state_dict", "teacher"}
NO_WEIGHTS = {"optimizer", "scaler", "rng", "args", "meta", "lr_scheduler"}
# torch.compile, FSDP and activation checkpointing insert these into names; no module has such a name.
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Trainers' usual prefixes. Others are found by the names that follow them.
_ATTRIBUTES = {"module", "model", "net", "network", "backbone", "encoder", "student", "teacher"}
# BEiT's pretraining has one relative position table for all blocks.
SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"
TABLE = "relative_position_bias_table"


@dataclass
class Weights:
    """The choice of `find_weights`: tensors by the model's names, the same as in the file, and their place there."""

    state: State
    raw: State
    source: str  # e.g. "ema", "teacher, backbone."; "" for a plain state dict
    outside: State  # other tensors in the same dict, which lack the prefix


def tensor_dicts(content: dict, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], State]]:
    """Every dict in the file that contains tensors, with the keys that lead to it, outermost first."""
    state = {_WRAPPERS.sub(r"\1", str(k)): v for k, v in content.items() if isinstance(v, torch.Tensor)}
    found = [(path, state)] if state else []
    for key, value in content.items():
        if isinstance(key, str) and key not in NO_WEIGHTS and isinstance(value, dict) and len(path) < 4:
            found += tensor_dicts(value, (*path, key))
    return found


def tensor_names(content: dict) -> set[str]:
    """Names of all tensors in the file, also with leading parts removed."""
    names = {name for _, state in tensor_dicts(content) for name in state}
    return {".".join(parts[i:]) for parts in (name.split(".") for name in names) for i in range(len(parts))}


def find_weights(content: dict, path: str, trunk: State, ema: bool = True, convert=None) -> Weights:
    """The dict and prefix whose tensors fit best; among equals the averaged weights, or with ema=False the others.

    trunk: the model's tensors without its head. convert: the model's `family_filter`, tried if no dict fits directly.
    UserError for a file without tensors, and for tensors that are not dense and real.
    """
    dicts = tensor_dicts(content)
    if not dicts:
        raise UserError(f"{path}: contains no tensors")
    candidates = []
    for keys, state in dicts:
        for prefix in _prefixes(state, trunk):
            raw = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            outside = {k: v for k, v in state.items() if not k.startswith(prefix)}
            source = ", ".join([*keys, prefix] if prefix else keys)
            raw = _spread_shared_table(raw, trunk)
            candidates.append(Weights(raw, raw, source, outside))
    if convert is not None and not any(_fit(c.state, trunk) == len(trunk) for c in candidates):
        candidates = [c for one in candidates for c in (_converted(one, convert, path), one) if c is not None]

    def rank(c: Weights):
        return _fit(c.state, trunk), bool(EMA & set(re.split(r"\W+", c.source))) == ema

    best = max(candidates, key=rank)  # the first among equals
    return Weights(plain(best.state, path), plain(best.raw, path), best.source, best.outside)


def _prefixes(state: State, trunk: State) -> list[str]:
    """Possible prefixes: none, those of trainers, and whatever precedes the model's names."""
    known, found = [""], Counter[str]()
    for name in state:
        parts = name.split(".")
        for i in range(1, len(parts)):
            prefix = ".".join(parts[:i]) + "."
            if all(part in _ATTRIBUTES for part in parts[:i]):
                known.append(prefix)
            if name.removeprefix(prefix) in trunk:
                found[prefix] += 1
    most = max(found.values(), default=0)
    return list(dict.fromkeys([*known, *(p for p, n in found.items() if 2 * n > most)]))


def _fit(state: State, trunk: State) -> int:
    """How many of the trunk's tensors `state` has; positions count in any shape."""
    return sum(
        k in state and (state[k].shape == v.shape or k == "pos_embed" or k.endswith(TABLE)) for k, v in trunk.items()
    )


def _converted(candidate: Weights, convert, path: str) -> Weights | None:
    try:
        state = convert(plain(candidate.state, path))
    except Exception:  # timm's function does not know the names or shapes: the file is from another publisher
        return None
    tensors = isinstance(state, dict) and all(isinstance(v, torch.Tensor) for v in state.values())
    return Weights(state, candidate.raw, candidate.source, candidate.outside) if tensors else None


def _spread_shared_table(state: State, trunk: State) -> State:
    """Copy the table shared in BEiT's pretraining to each block that has its own, as BEiT's fine-tuning does."""
    if SHARED_TABLE not in state or SHARED_TABLE in trunk:
        return state
    tables = [k for k in trunk if k.endswith(TABLE) and k not in state]
    shared = state[SHARED_TABLE]
    return (
        {**{k: v for k, v in state.items() if k != SHARED_TABLE}, **dict.fromkeys(tables, shared)} if tables else state
    )


def plain(state: State, path: str) -> State:
    """The same tensors, 8-bit floats as float32, which torch can compute with. UserError for unusable ones."""
    done = {}
    for key, value in state.items():
        if value.layout != torch.strided or value.is_quantized or value.is_complex():
            raise UserError(f"{path}: {key} is a {value.dtype} {value.layout} tensor; weights should be dense and real")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            # Zero strides: any operation would expand a small file to the whole shape.
            raise UserError(f"{path}: {key} claims the shape {list(value.shape)} with less data than that")
        if value.is_floating_point() and value.element_size() == 1:
            try:
                value = value.float()
            except (RuntimeError, NotImplementedError):  # packed 4-bit floats
                kind = str(value.dtype).removeprefix("torch.")
                raise UserError(f"{path}: {key} holds {kind}; save it as float16, bfloat16 or float32") from None
        done[key] = value
    return done


def family_filter(model: nn.Module):
    """timm's conversion of the publishers' names and shapes for this model's family, state -> state, or None."""
    architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture", "")
    modules = [type(model).__module__]
    if architecture and timm.is_model(architecture):
        modules.insert(0, timm.model_entrypoint(architecture).__module__)  # hybrids and DeiT-3 use the ViT class
    for module in modules:
        for name in ("checkpoint_filter_fn", "_filter_fn", "_filter_torchvision_pretrained"):
            function = getattr(sys.modules[module], name, None)
            if function is not None:
                known = inspect.signature(function).parameters
                keywords = {"adapt_layer_scale": True} if "adapt_layer_scale" in known else {}  # DeiT-3's gamma_1
                model_too = (model,) if "model" in known else ()
                return lambda state: function(dict(state), *model_too, **keywords)
    return None
