"""Restores the running statistics of normalisation layers after a bad step."""

import torch
from torch import nn


class RunningStatistics:
    """Buffers that a training forward pass updates, such as BatchNorm's running statistics.

    They are updated before a step is known to be bad. `keep` copies them before the step, `put_back` restores the copy
    if the step was bad; neither waits for the device. They are the saved buffers of modules in training mode: a net
    without any (ViTs), or with all of them frozen, costs nothing.
    """

    def __init__(self, net: nn.Module):
        saved = {id(value) for value in net.state_dict(keep_vars=True).values()}
        self.groups: dict[torch.dtype, list[tuple[nn.Module, str]]] = {}  # copied in one piece
        for module in net.modules():
            for name, buffer in module.named_buffers(recurse=False) if module.training else ():
                if id(buffer) in saved and buffer.numel():
                    self.groups.setdefault(buffer.dtype, []).append((module, name))
        self.kept: list[torch.Tensor] = []

    def _buffers(self) -> list[list[torch.Tensor]]:
        return [[getattr(module, name) for module, name in group] for group in self.groups.values()]

    @torch.no_grad()
    def keep(self) -> None:
        self.kept = [torch.cat([b.flatten() for b in group]) for group in self._buffers()]

    @torch.no_grad()
    def put_back(self, bad: torch.Tensor) -> None:
        """bad: bool, 0-d, on the device."""
        for group, before in zip(self._buffers(), self.kept):
            now = torch.cat([b.flatten() for b in group])
            parts = torch.where(bad, before, now).split([b.numel() for b in group])
            torch._foreach_copy_(group, [part.view_as(b) for part, b in zip(parts, group)])
