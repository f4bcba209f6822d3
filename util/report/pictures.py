"""Pictures of pretraining: grids of images with titles and captions, and PSNR.

Images are normalised, float [B, C, H, W] with C 1 or 3, as the model sees them; mean and std are the data set's.
"""

import os
from collections.abc import Sequence
from functools import lru_cache
from io import BytesIO

import numpy as np
import torch
from einops import rearrange, repeat
from PIL import Image, ImageDraw, ImageFont

from util.files import survive, write_atomic

CELL = 96  # pixels; smaller images are enlarged by a whole factor to at least this size, so that titles fit
GAP, MARGIN = 6, 10
TITLE_SIZE, CAPTION_SIZE = 14, 11
INK, FAINT = (20, 20, 20), (90, 90, 90)


def denormalize(x: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Normalised [B, C, H, W] -> float32 clipped to [0, 1]. mean, std: per channel."""
    m, s = (torch.as_tensor(v, dtype=torch.float32, device=x.device).view(-1, 1, 1) for v in (mean, std))
    if x.shape[1] != len(m):
        raise ValueError(f"images have {x.shape[1]} channels, mean has {len(m)}")
    return (x.float() * s + m).clamp(0.0, 1.0)


def to_pixels(x: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Normalised [B, C, H, W] -> uint8 [B, H, W, 3]; grey images get three equal channels."""
    x = denormalize(x.detach(), mean, std).mul(255.0).round().to(torch.uint8)
    return rearrange(x.expand(-1, 3, -1, -1), "b c h w -> b h w c").cpu().numpy()


def pixel_mask(mask: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Mask of square patches [B, N], row by row, 1 = removed -> bool [B, 1, H, W]."""
    side = round((height * width / mask.shape[1]) ** 0.5)
    rows, cols = height // side, width // side
    if (rows * side, cols * side, rows * cols) != (height, width, mask.shape[1]):
        raise ValueError(f"mask: {mask.shape[1]} square patches do not tile {height} x {width} pixels")
    return repeat(mask.bool(), "b (r c) -> b 1 (r h) (c w)", r=rows, h=side, w=side)


def psnr(a: torch.Tensor, b: torch.Tensor, data_range: float = 1.0, mask: torch.Tensor | None = None) -> torch.Tensor:
    """10 log10(data_range^2 / mean squared difference) in dB of each image: [B, C, H, W] twice -> float64 [B].

    mask: bool [B, 1, H, W]; only True pixels count. Equal images give inf, an image without True pixels NaN.
    """
    error = (a.double() - b.double()).square()
    weight = torch.ones_like(error) if mask is None else mask.expand_as(error).double()
    mse = (error * weight).flatten(1).sum(1) / weight.flatten(1).sum(1)
    return 10.0 * torch.log10(data_range**2 / mse)


def reconstruction_grid(
    originals: torch.Tensor,
    out: dict,
    mean: Sequence[float],
    std: Sequence[float],
    path: str | None,
    step_labels: Sequence[float | str],
) -> np.ndarray:
    """A row per image: original | masked | the estimate of each step | final -> uint8 [H, W, 3], also saved as PNG.

    originals: [B, C, H, W]; out: NoPropMAE.reconstruct's result for them. If it has a `mask`, the PSNR on masked
    patches is shown below each step and the final image. step_labels: sigma of each step, or a title. path:
    None saves nothing.
    """
    columns = [originals, out["masked"], *out["steps"], out["final"]]
    if len(step_labels) != len(out["steps"]):
        raise ValueError(f"step_labels: {len(step_labels)} for {len(out['steps'])} steps")
    pixels = [to_pixels(c, mean, std) for c in columns]
    captions, mask = None, out.get("mask")
    if mask is not None:
        hidden, target = pixel_mask(mask, *originals.shape[-2:]), denormalize(originals, mean, std)
        scores = [psnr(denormalize(c, mean, std), target, 1.0, hidden).tolist() for c in columns[2:]]
        captions = [["", "", *(f"{s[row]:.1f} dB" for s in scores)] for row in range(len(originals))]
        captions[0][1] = "PSNR of masked:"
    titles = [label if isinstance(label, str) else sigma_name(label) for label in step_labels]
    rows = [[column[row] for column in pixels] for row in range(len(originals))]
    return draw_grid(rows, path, titles=["original", "masked", *titles, "final"], captions=captions)


def sigma_name(sigma: float) -> str:
    return f"σ = {sigma:.3g}"


def image_grid(
    images: torch.Tensor, mean: Sequence[float], std: Sequence[float], path: str | None, columns: int = 8
) -> np.ndarray:
    """Normalised [B, C, H, W] in rows of `columns`, without text -> uint8 [H, W, 3], also saved as PNG."""
    pixels = list(to_pixels(images, mean, std))
    return draw_grid([pixels[i : i + columns] for i in range(0, len(pixels), columns)], path)


def heat_overlay(pixels: np.ndarray, maps: torch.Tensor, strength: float = 0.65) -> np.ndarray:
    """Overlay maps [B, rows, cols], each scaled to its own range, on grey images: uint8 [B, H, W, 3] -> same."""
    import matplotlib

    maps = maps.float().cpu()
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    maps = (maps - low) / (high - low).clamp(min=1e-12)
    height, width = pixels.shape[1] // maps.shape[1], pixels.shape[2] // maps.shape[2]
    maps = repeat(maps, "b r c -> b (r h) (c w)", h=height, w=width)  # one colour per patch
    heat = np.asarray(matplotlib.colormaps["inferno"](maps.numpy()))[..., :3]
    grey = pixels.mean(axis=3, keepdims=True) / 255.0
    return (255.0 * (strength * heat + (1.0 - strength) * grey)).round().astype(np.uint8)


def draw_grid(
    rows: Sequence[Sequence[np.ndarray]],
    path: str | None,
    *,
    titles: Sequence[str] | None = None,
    captions: Sequence[Sequence[str]] | None = None,
) -> np.ndarray:
    """Images uint8 [h, w, 3] of equal size on white: uint8 [H, W, 3], also saved as PNG unless path is None.

    Small images are enlarged by a whole factor, with square pixels. titles: above columns; captions: below images.
    """
    height, width = rows[0][0].shape[:2]
    scale = max(1, -(-CELL // max(height, width)))
    height, width = height * scale, width * scale
    title_font, caption_font = font(TITLE_SIZE), font(CAPTION_SIZE)
    texts = [(t, title_font) for t in titles or []] + [(c, caption_font) for row in captions or [] for c in row]
    cell_width = max([width] + [int(face.getlength(text)) + 1 for text, face in texts])
    cell_height = height + (CAPTION_SIZE + 6 if captions else 0)
    top = MARGIN + (TITLE_SIZE + 10 if titles else 0)
    columns = max(len(row) for row in rows)
    size = (2 * MARGIN + columns * (cell_width + GAP) - GAP, top + len(rows) * (cell_height + GAP) - GAP + MARGIN)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    middle = [MARGIN + c * (cell_width + GAP) + cell_width // 2 for c in range(columns)]
    for x, title in zip(middle, titles or []):
        draw.text((x, MARGIN), title, INK, title_font, anchor="ma")
    for r, row in enumerate(rows):
        y = top + r * (cell_height + GAP)
        for c, image in enumerate(row):
            tile = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(tile, (middle[c] - width // 2, y))
            if captions:
                draw.text((middle[c], y + height + 2), captions[r][c], FAINT, caption_font, anchor="ma")
    if path is not None:
        save_png(canvas, path)
    return np.array(canvas)


def save_png(image: Image.Image, path: str) -> None:
    """Save atomically; if that fails, warn and continue."""
    with survive(path):
        buffer = BytesIO()
        image.save(buffer, format="png", optimize=True)
        write_atomic(path, lambda file: file.write(buffer.getvalue()))


@lru_cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with Matplotlib: it covers many scripts, Pillow's default font only Latin."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts", "ttf", name), size)
