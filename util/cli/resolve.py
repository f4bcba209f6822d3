"""What the flags leave open, decided from the checkpoint, the model's own configuration and the data set.

The result is `meta`: all that rebuilds a classifier without a flag. It goes into every checkpoint.
"""

import timm

from augment.image import default_crop_pct
from util.choices import MAE_NAMES, is_mae_name
from util.cli.parser import choose_normalisation, image_size
from util.data_specs import DATASETS, IMAGENET_MEAN, IMAGENET_STD
from util.errors import UserError

DEFAULT_MODEL = "vit_large_patch16"  # MAE's default


# Of the weights that MAE, and DeiT for the small sizes, published under MAE's names.
MAE_CONFIG = {"input_size": (3, 224, 224), "mean": IMAGENET_MEAN, "std": IMAGENET_STD}


def resolve_meta(args, classes: list[str], source: dict | None = None) -> dict:
    """Model, input and classes of a fine-tuning run; `source` is the meta of the checkpoint that the weights come from.

    Order of precedence: the flag; `source`; for the input, the configuration that the weights of another origin were
    trained with; the data set.
    """
    source = source or {}
    model = args.model or source.get("model") or DEFAULT_MODEL
    same = source if model == source.get("model") else {}
    size, in_chans, mean, std, _ = _resolve_input(args, model, source)

    # What evaluation sees of a file stays what it was for the checkpoint, at another size when it is only evaluated.
    crop_pct = getattr(args, "crop_pct", None)
    if crop_pct is None and (getattr(args, "eval", True) or size == _pair(source.get("img_size"))):
        crop_pct = source.get("crop_pct")

    if args.nb_classes is not None and args.nb_classes < len(classes):
        raise UserError(f"--nb_classes {args.nb_classes}: the data has {len(classes)} classes")
    outputs = source["num_classes"] if source.get("classes") == list(classes) else len(classes)
    return {
        "kind": "classifier",
        "model": model,
        "model_kwargs": {**same.get("model_kwargs", {}), **dict(args.model_kwargs)},
        "global_pool": same.get("global_pool", True) if args.global_pool is True else bool(args.global_pool),
        "img_size": list(size),
        "in_chans": in_chans,
        "num_classes": args.nb_classes or outputs,
        "classes": list(classes),
        "mean": list(mean),
        "std": list(std),
        "crop_pct": float(crop_pct or default_crop_pct(size)),
        "dataset": args.dataset,
    }


def describe_input(args, meta: dict, source: dict | None = None) -> str:
    """What a run feeds its network, and where that comes from, for its first line."""
    (height, width), in_chans, mean, std, origins = _resolve_input(args, meta["model"], source or {})
    mean, std = (" ".join(f"{v:.4g}" for v in values) for values in (mean, std))
    return f"input {in_chans} x {height} x {width} ({origins[0]}), mean {mean}, std {std} ({origins[1]})"


def _resolve_input(args, model: str, source: dict):
    """(size, channels, mean, std, (where the size comes from, where mean and std come from))."""
    spec = DATASETS[args.dataset]
    config = {}
    if is_mae_name(model):
        config = MAE_CONFIG if model in MAE_NAMES else {}
    elif timm.is_model(model):
        try:
            pretrained_cfg = timm.get_pretrained_cfg(model)
        except RuntimeError as error:  # the name is timm's, its tag is not
            raise UserError(f"--model {model}: {error}") from None
        config = pretrained_cfg.to_dict() if pretrained_cfg else {}
    named_file = args.finetune or (getattr(args, "eval", False) and args.resume)
    foreign_weights = bool(args.pretrained or (named_file and not source))
    own_size = config["input_size"][1:] if config else None

    candidates = [
        ("--input_size", image_size(args.input_size)),
        ("the checkpoint's", _pair(source.get("img_size"))),
        ("the weights'", own_size if foreign_weights else None),
        ("the model's", own_size if spec.img_size >= 224 or config.get("fixed_input_size") else None),
        (f"{args.dataset}'s", (spec.img_size, spec.img_size)),
    ]
    size_from, size = next(c for c in candidates if c[1] is not None)
    in_chans = args.in_chans or source.get("in_chans")
    in_chans = in_chans or (config.get("input_size", (3,))[0] if foreign_weights else spec.in_chans)

    if source.get("mean") and len(source["mean"]) == in_chans:
        values_from, values = "the checkpoint's", (source["mean"], source["std"])
    elif foreign_weights and config.get("mean"):
        values_from, values = "the weights'", (config["mean"], config["std"])
    else:
        values_from, values = f"{args.dataset}'s", spec.normalisation(in_chans)
    if given := [flag for flag, value in (("--mean", args.mean), ("--std", args.std)) if value is not None]:
        values_from = " and ".join(given if len(given) == 2 else [*given, values_from])
    mean, std = choose_normalisation(args, in_chans, values)
    return tuple(size), in_chans, mean, std, (size_from, values_from)


def _pair(size) -> tuple[int, int] | None:
    return None if size is None else (int(size[0]), int(size[1]))
