"""Resolves what the flags leave open from the checkpoint, the model's configuration and the data set.

The result is `meta`, which every checkpoint stores: it is enough to rebuild a classifier without flags.
"""

import argparse
import os
from dataclasses import dataclass
from typing import Any, TypeVar

import timm

from augment.image import default_crop_pct
from util.choices import MAE_NAMES, is_mae_name
from util.cli.flags import Options
from util.cli.parser import default_path
from util.cli.settings import Input, Model
from util.data_specs import DATASETS, IMAGENET_MEAN, IMAGENET_STD, IN_MEMORY
from util.errors import UserError

Own = TypeVar("Own", bound=Options)

DEFAULT_MODEL = "vit_large_patch16"  # MAE's default


# For the weights published under MAE's names, by MAE and, for the small sizes, DeiT.
MAE_CONFIG = {"input_size": (3, 224, 224), "mean": IMAGENET_MEAN, "std": IMAGENET_STD}


@dataclass(frozen=True)
class Source:
    """Where a network's input size, and the mean and standard deviation of its pixels, come from."""

    size: str
    values: str

    def words(self, meta: dict) -> str:
        """Text for a run's first line."""
        mean, std = (" ".join(f"{v:.4g}" for v in meta[key]) for key in ("mean", "std"))
        shape = " x ".join(map(str, (meta["in_chans"], *meta["img_size"])))
        return f"input {shape} ({self.size}), mean {mean}, std {std} ({self.values})"


def resolve_meta(
    model: Model,
    given: Input,
    dataset: str,
    classes: list[str],
    source: dict | None = None,
    *,
    weights: str = "",
    evaluating: bool = False,
) -> tuple[dict, Source]:
    """(meta, source of its input): model, input and classes of a run on images of `classes`.

    source: the meta of the checkpoint with the weights. weights: the file of the weights, '' for none.
    Precedence: the flag; `source`; for the input, the configuration that weights from elsewhere were trained with; the
    data set.
    """
    source = source or {}
    name = model.model or source.get("model") or DEFAULT_MODEL
    same = source if name == source.get("model") else {}
    size, in_chans, mean, std, origin = resolve_input(
        given, name, dataset, source, foreign_weights=bool(model.pretrained or (weights and not source))
    )
    if not (model.model or source) and any(side % 16 for side in size):
        fits = next((p for p in (16, 8, 4, 2) if not any(side % p for side in size) and min(size) // p >= 4), 1)
        raise UserError(
            f"--model: is not given, and the default {DEFAULT_MODEL} does not take {size[0]} x {size[1]} pixels "
            f"(the data set's); give for instance --model vit_tiny_patch{fits}, or --input_size 224"
        )
    # Evaluation crops files as it did for the checkpoint; at another input size only if nothing is trained.
    crop_pct = given.crop_pct
    if crop_pct is None and (evaluating or size == _pair(source.get("img_size"))):
        crop_pct = source.get("crop_pct")

    if model.nb_classes is not None and model.nb_classes < len(classes):
        raise UserError(f"--nb_classes {model.nb_classes}: the data has {len(classes)} classes")
    outputs = source["num_classes"] if source.get("classes") == list(classes) else len(classes)
    return {
        "kind": "finetune",
        "model": name,
        "model_kwargs": {**same.get("model_kwargs", {}), **dict(model.model_kwargs)},
        "global_pool": same.get("global_pool", True) if model.global_pool is True else bool(model.global_pool),
        "img_size": list(size),
        "in_chans": in_chans,
        "num_classes": model.nb_classes or outputs,
        "classes": list(classes),
        "mean": list(mean),
        "std": list(std),
        "crop_pct": float(crop_pct or default_crop_pct(size)),
        "dataset": dataset,
    }, origin


def resolve_input(given: Input, model: str, dataset: str, source: dict, *, foreign_weights: bool):
    """((height, width), channels, mean, std, their source)."""
    spec = DATASETS[dataset]
    config: dict = {}
    if is_mae_name(model):
        config = MAE_CONFIG if model in MAE_NAMES else {}
    elif timm.is_model(model):
        try:
            pretrained_cfg = timm.get_pretrained_cfg(model)
        except RuntimeError as error:  # timm has the name but not the tag
            raise UserError(f"--model {model}: {error}") from None
        config = pretrained_cfg.to_dict() if pretrained_cfg else {}
    own_size = config["input_size"][1:] if config else None

    candidates: list[tuple[str, Any]] = [
        ("--input_size", given.size),
        ("the checkpoint's", _pair(source.get("img_size"))),
        ("the weights'", own_size if foreign_weights else None),
        ("the model's", own_size if spec.img_size >= 224 or config.get("fixed_input_size") else None),
        ("the data set's", (spec.img_size, spec.img_size)),
    ]
    size_from, size = next(c for c in candidates if c[1] is not None)
    in_chans = given.in_chans or source.get("in_chans")
    in_chans = in_chans or (config.get("input_size", (3,))[0] if foreign_weights else spec.in_chans)

    if source.get("mean") and len(source["mean"]) == in_chans:
        values_from, values = "the checkpoint's", (source["mean"], source["std"])
    elif foreign_weights and config.get("mean"):
        values_from, values = "the weights'", (config["mean"], config["std"])
    else:
        values_from, values = "the data set's", spec.normalisation(in_chans)
    if own := [flag for flag, value in (("--mean", given.mean), ("--std", given.std)) if value is not None]:
        values_from = " and ".join(own if len(own) == 2 else [*own, values_from])
    mean, std = given.normalisation(in_chans, values)
    return size, in_chans, mean, std, Source(size_from, values_from)


def resolve_data(options: Own, content: dict) -> Own:
    """The options with the checkpoint's data settings where flags give none.

    content: the checkpoint's meta and args, or {}. Its folder is used if it still exists; its split of train/, if the
    data are the same and no flag splits them.
    """
    known, saved, given = (content.get("meta") or {}).get("dataset"), content.get("args") or {}, options.flat()
    known = known if isinstance(known, str) and known in DATASETS else None
    dataset, path = given["dataset"] or known or "folder", given["data_path"]
    before = saved.get("data_path") if dataset == known else None
    before = before if isinstance(before, str) else ""
    exists = os.path.isdir(before)
    if path is None and before and not exists and dataset not in IN_MEMORY:
        raise UserError(f"--data_path: give it; the checkpoint was trained on {before}, which does not exist")
    if path is None:
        path = before if exists else default_path(dataset)
    options = options.having(dataset=dataset, data_path=path)
    divided = any(given.get(flag) for flag in ("val_split", "kfold", "split_seed"))
    if dataset != known or divided or (exists and os.path.realpath(path) != os.path.realpath(before)):
        return options
    split = {k: saved[k] for k in ("val_split", "kfold", "fold", "split_seed") if k in given and k in saved}
    try:
        return options.having(**{k: options.flags()[k].argparse.get("type", str)(str(v)) for k, v in split.items()})
    except argparse.ArgumentTypeError as error:
        raise UserError(f"--{' --'.join(split)}: the checkpoint's are not usable ({error})") from None


def _pair(size) -> tuple[int, int] | None:
    return None if size is None else (int(size[0]), int(size[1]))
