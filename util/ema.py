"""Exponential moving average of the weights: timm's ModelEmaV3, which warms up and leaves integer buffers alone."""

import torch
from timm.utils import ModelEmaV3
from torch import nn


class Ema(ModelEmaV3):
    @torch.no_grad()
    def update(self, model: nn.Module, step: int, skipped: torch.Tensor | None = None) -> None:
        """After `step` updates of `model`; skipped: bool, 0-d: whether the last one was not made; then nothing is averaged.

        ModelEmaV3's own update, with its weight as a tensor on the device: no step waits for it.
        """
        pairs = list(zip(self.module.state_dict().values(), model.state_dict().values()))
        averages, values = zip(*[(a, v) for a, v in pairs if a.is_floating_point()])
        weight = averages[0].new_full((), 1.0 - self.get_decay(step))
        weight = weight if skipped is None else torch.where(skipped, 0.0, weight)
        torch._foreach_lerp_(averages, values, [weight] * len(averages))
        for average, value in pairs:
            if not average.is_floating_point():
                average.copy_(value)


def build_ema(model: nn.Module, decay: float) -> Ema | None:
    """None for decay 0. Warm-up: after n updates the decay is at most 1 - (1 + n) ** (-2 / 3)."""
    if not decay:
        return None
    return Ema(model, decay=decay, use_warmup=True, warmup_power=2 / 3)
