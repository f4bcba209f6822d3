"""Exponential moving average of the weights: timm's ModelEmaV3, which warms up and leaves integer buffers alone."""

from timm.utils import ModelEmaV3
from torch import nn


def build_ema(model: nn.Module, decay: float) -> ModelEmaV3 | None:
    """None for decay 0. Warm-up: after n updates the decay is at most 1 - (1 + n) ** (-2 / 3)."""
    if not decay:
        return None
    return ModelEmaV3(model, decay=decay, use_warmup=True, warmup_power=2 / 3)
