"""From the host to the device."""

import torch


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """x on `device`; the host does not wait for it.

    CUDA copies from pageable memory only after all that the device was given to do before; from pinned memory in turn.
    """
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)
