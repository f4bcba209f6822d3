"""MAE's learning-rate schedule (He et al., CVPR 2022, appendix A): linear warm-up, then half a cosine."""

import math


def lr_at(epoch: float, *, lr: float, min_lr: float, warmup_epochs: float, epochs: float) -> float:
    """Learning rate at a fractional epoch (0 <= epoch <= epochs), before any layer-decay scale.

    Warm-up: lr * epoch / warmup_epochs. Then min_lr + (lr - min_lr) (1 + cos(pi r)) / 2 with r from 0 to 1.
    """
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    # A run that is all warm-up has no cosine part; it stays at the peak.
    r = (epoch - warmup_epochs) / (epochs - warmup_epochs) if epochs > warmup_epochs else 0.0
    return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * r))


def set_lr(optimizer, lr: float) -> float:
    """Set every parameter group's lr to lr times its lr_scale (layer decay); returns lr."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return lr
