"""From the host to the device."""

import torch


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """x on `device`, without waiting.

    From pageable memory, a copy to CUDA makes the host wait for all earlier work; from pinned memory it is queued.
    """
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)
