"""What the flags leave open, decided from the checkpoint, the model's own configuration and the data set.

The result is `meta`: all that rebuilds a classifier without a flag. It goes into every checkpoint.
"""

import timm

from augment.image import default_crop_pct
from util.choices import is_mae_name
from util.data_specs import DATASETS
from util.errors import UserError
from util.options import choose_normalisation, image_size

DEFAULT_MODEL = "vit_large_patch16"  # MAE's default


def resolve_meta(args, classes: list[str], source: dict | None = None) -> dict:
    """Model, input and classes of a fine-tuning run.

    Order of precedence: the flag; the checkpoint named by --finetune or --resume (`source`, its meta); timm's
    configuration of a model whose weights are timm's; the data set.
    """
    source = source or {}
    spec = DATASETS[args.dataset]
    model = args.model or source.get("model") or DEFAULT_MODEL
    same_model = model == source.get("model")
    kwargs = {**(source.get("model_kwargs", {}) if same_model else {}), **dict(args.model_kwargs)}

    config = {}
    if not is_mae_name(model) and timm.is_model(model):
        pretrained_cfg = timm.get_pretrained_cfg(model)
        config = pretrained_cfg.to_dict() if pretrained_cfg else {}
    named_file = args.finetune or (getattr(args, "eval", False) and args.resume)
    foreign_weights = bool(args.pretrained or (named_file and not source))

    size = image_size(args.input_size) or _pair(source.get("img_size"))
    if size is None and config and (foreign_weights or spec.img_size >= 224 or config.get("fixed_input_size")):
        size = tuple(config["input_size"][1:])
    size = size or (spec.img_size, spec.img_size)
    in_chans = (
        args.in_chans
        or source.get("in_chans")
        or (config.get("input_size", (3,))[0] if foreign_weights else spec.in_chans)
    )

    if source.get("mean") and len(source["mean"]) == in_chans:
        normalisation = (source["mean"], source["std"])
    elif foreign_weights and config.get("mean"):
        normalisation = (config["mean"], config["std"])
    else:
        normalisation = spec.normalisation(in_chans)
    mean, std = choose_normalisation(args, in_chans, normalisation)

    # What evaluation sees of a file stays what it was for the checkpoint, at another size when it is only evaluated.
    crop_pct = getattr(args, "crop_pct", None)
    if crop_pct is None and (getattr(args, "eval", True) or size == _pair(source.get("img_size"))):
        crop_pct = source.get("crop_pct")

    if args.nb_classes is not None and args.nb_classes < len(classes):
        raise UserError(f"--nb_classes {args.nb_classes}: the data has {len(classes)} classes")
    return {
        "kind": "classifier",
        "model": model,
        "model_kwargs": kwargs,
        "global_pool": bool(args.global_pool),
        "img_size": list(size),
        "in_chans": in_chans,
        "num_classes": args.nb_classes or len(classes),
        "classes": list(classes),
        "mean": list(mean),
        "std": list(std),
        "crop_pct": float(crop_pct or default_crop_pct(size)),
        "dataset": args.dataset,
    }


def _pair(size) -> tuple[int, int] | None:
    return None if size is None else (int(size[0]), int(size[1]))
