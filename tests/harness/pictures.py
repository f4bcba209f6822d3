"""Pictures that operations on pixels are tried on, and their way to Pillow and back."""

import numpy as np
import torch
from PIL import Image


def pictures(channels: int, height: int = 24, width: int = 32) -> torch.Tensor:
    """A smooth picture, noise, a dim low-contrast one, a flat one, and one with two levels: uint8 [5, C, H, W]."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width]
    smooth = np.stack([127 + 120 * np.sin(x / 5 + c) * np.cos(y / 7 - c) for c in range(channels)])
    noise = rng.integers(0, 256, smooth.shape)
    dim = rng.normal(40, 6, smooth.shape)
    flat = np.full(smooth.shape, 77)
    two = np.where(noise > 200, 250, 3)
    return torch.from_numpy(np.stack([smooth, noise, dim, flat, two]).clip(0, 255).astype(np.uint8))


def to_pil(x: torch.Tensor) -> Image.Image:
    return Image.fromarray(x[0].numpy() if len(x) == 1 else x.permute(1, 2, 0).contiguous().numpy())


def to_tensor(image: Image.Image) -> torch.Tensor:
    array = np.asarray(image)
    return torch.from_numpy(array[None].copy() if array.ndim == 2 else array.transpose(2, 0, 1).copy())


def write_image(path, color=(200, 30, 40), size=(12, 9), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).convert(mode).save(path)
