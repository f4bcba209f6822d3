"""A checkpoint back into a model: everything needed is in its meta."""

import torch
from torch import nn

from models import create_model
from models.loading import LoadReport, load_pretrained
from models.vit import reason
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
        drop_path=drop_path,
        alpha_blend=alpha_blend,
        **{"global_pool": meta.get("global_pool", True), **meta.get("model_kwargs", {})},
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
    lacking = report.missing or report.new_classes
    if lacking:
        raise UserError(f"{path}: lacks weights of this model ({', '.join(lacking[:4])}); cannot be evaluated")


@torch.no_grad()
def try_forward(net: nn.Module, meta: dict, batch: int) -> None:
    """One forward pass of `batch` grey images in net's own mode: what a family cannot compute ends here in one line.

    Running statistics and generators stay as they were.
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
    except Exception as error:  # a family's own code, at a size or with keywords that it was not written for
        if "more than 1 value per channel" in str(error):
            raise UserError(
                f"--batch_size {batch}: the BatchNorm of {name} has one value per channel to normalise at {size}; "
                "give 2 or more, a larger --input_size, or --freeze_bn"
            ) from None
        raise UserError(f"--model {name}: cannot compute images of {size} ({reason(error)}); see --input_size and --model_kwargs") from None  # fmt: skip
    if not isinstance(logits, torch.Tensor) or logits.shape != (batch, meta["num_classes"]):
        got = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise UserError(
            f"--model {name}: gives {got} for {batch} images, not {meta['num_classes']} numbers for each; see --model_kwargs"
        )
