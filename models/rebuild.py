"""A checkpoint back into a model: everything needed is in its meta."""

from torch import nn

from models import create_model
from models.loading import LoadReport, load_pretrained
from util.checkpoint import peek_meta
from util.errors import UserError


def create_from_meta(
    meta: dict, *, num_classes: int | None = None, drop_path: float = 0.0, alpha_blend=None
) -> nn.Module:
    """The classifier (or, from a pretraining checkpoint, its encoder under a fresh head) that `meta` describes."""
    return create_model(
        meta["model"],
        num_classes=meta.get("num_classes", 0) if num_classes is None else num_classes,
        img_size=tuple(meta["img_size"]),
        in_chans=meta["in_chans"],
        global_pool=meta.get("global_pool", True),
        drop_path=drop_path,
        alpha_blend=alpha_blend,
        **meta.get("model_kwargs", {}),
    )


def load_classifier(path: str, *, ema: bool = True) -> tuple[nn.Module, dict]:
    """(model in eval mode, meta) of a fine-tuned checkpoint; every weight must be in the file."""
    meta = peek_meta(path)
    if meta is None:
        raise UserError(f"{path}: not a checkpoint of this project")
    if meta.get("kind") != "classifier":
        raise UserError(
            f"{path}: a {meta.get('kind')} checkpoint without a classifier; fine-tune it with main_finetune.py"
        )
    model = create_from_meta(meta)
    require_complete(load_pretrained(model, path, ema=ema), path)
    return model.eval(), meta


def require_complete(report: LoadReport, path: str) -> None:
    """For evaluation: a model with weights missing would score at chance without a word."""
    if report.missing:
        raise UserError(f"{path}: lacks weights of this model ({', '.join(report.missing[:4])}); cannot be evaluated")
