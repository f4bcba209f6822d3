"""Pillow's image operations on uint8 batches [B, C, H, W], C = 1 or 3, each sample with its own strength.

They use Pillow's integer arithmetic (truncation included), so a batch on the device gets the same colours as with
timm's and torchvision's per-image augmentations; only `affine` may differ, by one level. Arguments are on x's device
unless stated otherwise.
"""

from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F

from augment.transfer import to_device

# ---- Formulas for lookup tables, for tensors and numpy arrays (augment/opencv_ops.py): new values of the levels 0..255
# (the last dimension) before truncation to 8 bits.

Array = TypeVar("Array", torch.Tensor, np.ndarray)


def blend(degenerate, value: Array, factor) -> Array:
    """Image.blend."""
    return degenerate + factor * (value - degenerate)


def autocontrast(levels: Array, low: Array, high: Array) -> Array:
    """Stretch low..high to 0..255; a flat channel stays."""
    scale = 255.0 / (high - low).clip(1)
    return (high > low) * (levels * scale - low * scale) + (high <= low) * levels


def equalize(levels: Array, histogram: Array, step: Array) -> Array:
    """ImageOps.equalize. step: (pixels - pixels of the brightest level that occurs) // 255."""
    below = histogram.cumsum(-1) - histogram
    return (step > 0) * ((below + step // 2) // step.clip(1)) + (step <= 0) * levels


def posterize(levels: Array, bits) -> Array:
    """Keep the upper 0..8 bits."""
    return levels & ~((1 << (8 - bits)) - 1)


def solarize(levels: Array, threshold) -> Array:
    """Invert the levels from the threshold (0..256) up."""
    return levels + (levels >= threshold) * (255 - 2 * levels)


def solarize_add(levels: Array, add, threshold=128) -> Array:
    """Add to the levels below the threshold."""
    return levels + (levels < threshold) * add


# ---- Lookup tables: operations that map each level of a channel to another, uint8 [B, C or 1, 256]


TABLES = ("AutoContrast", "Equalize", "Invert", "Posterize", "Solarize", "SolarizeAdd", "Contrast", "Brightness")


def lookup_table(name: str, x: torch.Tensor, argument: torch.Tensor) -> torch.Tensor:
    """One of TABLES for each sample of x. argument [B]: bits 0..8, thresholds 0..256, additions or factors."""
    levels, a = torch.arange(256, device=x.device), argument.view(-1, 1, 1)
    match name:
        case "AutoContrast":
            # float64 as in Pillow, if the device has it; float32 may make a level that is a whole number one lower.
            dtype = torch.float32 if x.device.type == "mps" else torch.float64
            low, high = (extreme(x.flatten(2), 2, keepdim=True).to(dtype) for extreme in (torch.amin, torch.amax))
            table = autocontrast(levels, low, high)
        case "Equalize":
            flat = x.flatten(2).long()
            histogram = flat.new_zeros(*flat.shape[:2], 256).scatter_add_(2, flat, torch.ones_like(flat))
            brightest = histogram.gather(2, flat.amax(2, keepdim=True))
            table = equalize(levels, histogram, (flat.shape[2] - brightest) // 255)
        case "Invert":
            table = (255 - levels).expand(len(x), 1, 256)
        case "Posterize":
            table = posterize(levels, a)
        case "Solarize":
            table = solarize(levels, a)
        case "SolarizeAdd":
            table = solarize_add(levels, a)
        case "Contrast":  # the distance from the image's mean grey
            table = blend(mean_grey(x).float().view(-1, 1, 1), levels.float(), a)
        case _:  # Brightness
            table = blend(0.0, levels.float(), a)
    return _to_uint8(table)


def apply_table(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Look up every pixel in its sample's and channel's table, uint8 [B, C or 1, 256]."""
    table = table.expand(-1, x.shape[1], -1)
    return table.gather(2, x.flatten(2).long()).view_as(x)


def _to_uint8(x: torch.Tensor) -> torch.Tensor:
    """Clipped and truncated to 8 bits."""
    return x.clamp(0, 255).to(torch.uint8)


def grey(x: torch.Tensor) -> torch.Tensor:
    """Luma of Image.convert('L'): int64 [B, 1, H, W], 0..255 (ITU-R 601-2 in 16-bit fixed point)."""
    if x.shape[1] == 1:
        return x.long()
    r, g, b = x.int().unbind(1)
    return ((r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16).unsqueeze(1).long()


def mean_grey(x: torch.Tensor) -> torch.Tensor:
    """Mean luma rounded half up, int64 [B]; in integers, so that it is equal on every device."""
    pixels = x.shape[2] * x.shape[3]
    return (2 * grey(x).flatten(1).sum(1) + pixels) // (2 * pixels)


# ---- Operations that use more than one channel or pixel


def color(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Saturation: distance from the pixel's grey value times factor [B]. Grey images do not change."""
    if x.shape[1] == 1:
        return x
    return _to_uint8(blend(grey(x).float(), x.float(), factor.view(-1, 1, 1, 1)))


def sharpness(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Distance from the 3x3 smoothed image times factor [B]. The border is not smoothed, so it stays."""
    if min(x.shape[2:]) < 3:
        return x
    value = x.float()
    smooth = value.clone()
    rows = value[..., :-2, :] + value[..., 1:-1, :] + value[..., 2:, :]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4.0 * value[..., 1:-1, 1:-1]  # centre 5, others 1
    smooth[..., 1:-1, 1:-1] = total.div_(13.0).add_(0.5).floor_()
    return _to_uint8(blend(smooth, value, factor.view(-1, 1, 1, 1)))


def affine(x: torch.Tensor, matrix: torch.Tensor, fill: list[int]) -> torch.Tensor:
    """Image.transform(AFFINE) with bilinear interpolation: output pixel (x, y) shows input matrix @ (x, y, 1).

    matrix: float64 [B, 2, 3] in pixels, pixel centres at .5, best on the CPU. fill: level per channel outside x.
    """
    H, W = x.shape[-2:]
    xs = torch.arange(W, device=matrix.device, dtype=torch.float64) + 0.5
    ys = torch.arange(H, device=matrix.device, dtype=torch.float64)[:, None] + 0.5
    m = matrix[..., None, None]  # [B, 2, 3, 1, 1]
    # Input coordinates in grid_sample's units, -1..1 from edge to edge: the terms of rows and columns in float64,
    # then one sum per pixel.
    parts = (
        m[:, 0, 0] * xs * (2 / W),  # [B, 1, W]
        (m[:, 0, 1] * ys + m[:, 0, 2]) * (2 / W) - 1,  # [B, H, 1]
        m[:, 1, 0] * xs * (2 / H),
        (m[:, 1, 1] * ys + m[:, 1, 2]) * (2 / H) - 1,
    )
    terms = [to_device(t.float(), x.device) for t in parts]
    u, v = terms[0] + terms[1], terms[2] + terms[3]  # [B, H, W]
    grid = torch.stack([u, v], dim=-1)
    y = F.grid_sample(x.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    outside = (torch.maximum(u.abs_(), v.abs_()) > 1.0).unsqueeze(1)  # [B, 1, H, W]
    colour = to_device(torch.tensor(fill, dtype=torch.float32).view(1, -1, 1, 1), x.device)
    y = torch.where(outside, colour, y)
    # Pillow truncates; the small offset keeps flat areas from losing a level by float32 rounding.
    return y.add_(1e-3).to(torch.uint8)
