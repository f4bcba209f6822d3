"""Per-image transforms in loader workers: file -> PIL image -> uint8 tensor [C, H, W].

Normalisation and erasing come later, for the whole batch on its device (augment/batch.py). Randomness comes from the
global generators of random, numpy and torch, which util.seed.sample_rng sets per sample.
"""

import os
import stat
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from timm.data.transforms import ResizeKeepRatio
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from util.data_specs import IMAGENET_MEAN

PRESETS = ("mae", "photo", "light", "pretrain", "none")
RATIO = (3 / 4, 4 / 3)
# Area fraction of the random resized crop: MAE's fine-tuning and pretraining, and the photo-folder recipe.
SCALES = {"mae": (0.08, 1.0), "light": (0.08, 1.0), "pretrain": (0.2, 1.0), "photo": (0.7, 1.0)}
# What is decoded, whatever a file's name says. Pillow would also hand PostScript to Ghostscript, a program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "MPO", "JPEG2000", "AVIF", "DIB")
LARGEST_ASPECT = 16


def open_image(path: str, in_chans: int) -> Image.Image:
    """Decode an image file (an animation's first frame), upright, as `L` (in_chans 1) or `RGB` (3)."""
    with open_file(path) as image:
        return to_channels(image, in_chans)


def open_file(path: str) -> Image.Image:
    """Pillow's Image.open for regular files (a pipe or device would be waited for without end) in one of FORMATS.

    Pillow refuses more than 179 million pixels (Image.MAX_IMAGE_PIXELS x 2) before decoding any.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("not a regular file")
    Image.init()
    return Image.open(path, formats=[f for f in FORMATS if f in Image.OPEN])


def to_channels(image: Image.Image, in_chans: int) -> Image.Image:
    """An image of any mode, turned upright by its EXIF orientation, as 8-bit `L` (in_chans 1) or `RGB` (3).

    Transparency is composited over white, as a page shows it; the colours hidden under it are arbitrary.
    Integers beyond 8 bits count as 0..65535; floats as 0..1 if none exceeds 1, else as 0..255.
    What is longer than 16 times its breadth keeps its middle 16 : 1: resized to cover a square, all of it would take
    memory without bound, to be cropped away.
    """
    if in_chans not in (1, 3):
        raise ValueError(f"in_chans {in_chans}: image files have 1 or 3 channels")
    image = limit_aspect(ImageOps.exif_transpose(image))
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image).astype(np.float64)
        if image.mode == "F":
            values = values * 255.0 if np.nanmax(values) <= 1.0 else values
        else:
            values = values / 257.0
        image = Image.fromarray(np.nan_to_num(values).round().clip(0, 255).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    mode = "L" if in_chans == 1 else "RGB"
    if image.mode != mode:
        image = image.convert(mode)
    image.load()
    return image


def limit_aspect(image: Image.Image) -> Image.Image:
    """The image, or the middle of one beyond LARGEST_ASPECT : 1 either way."""
    w, h = image.size
    side = LARGEST_ASPECT * min(w, h)
    if side >= max(w, h):
        return image
    new_w, new_h = min(w, side), min(h, side)
    left, top = (w - new_w) // 2, (h - new_h) // 2
    return image.crop((left, top, left + new_w, top + new_h))


def build_train_transform(
    size: tuple[int, int],
    preset: str = "mae",
    *,
    aa: str | None = None,
    color_jitter: float | None = None,
    interpolation: str = "bicubic",
    hflip: float = 0.5,
    vflip: float = 0.0,
    scale: tuple[float, float] | None = None,
    ratio: tuple[float, float] = RATIO,
    mean: tuple[float, ...] = IMAGENET_MEAN,
) -> Callable[[Image.Image], torch.Tensor]:
    """PIL image -> uint8 [C, h, w] with size = (h, w), randomly augmented.

    Presets:
        mae       random resized crop (8-100 % of the area), flip, then RandAugment `aa` or, without it, colour
                  jitter: timm's create_transform, as MAE fine-tunes.
        photo     crop of 70-100 %, flip, rotation to 15 degrees, shift to 10 %, zoom 0.9-1.1, colour jitter 0.3 (hue
                  0.05): for a folder of photos. Rotation, shift and zoom are one affine map and one resampling.
        light     crop and flip.          pretrain   MAE's pretraining: crop of 20-100 % and flip.
        none      what evaluation sees, without its border cut.

    aa: timm's policy string, `mae` only. color_jitter: strength for `mae` (without aa) and `photo`.
    hflip, vflip: probability of a mirror image, of one upside down. scale, ratio: the crop's area fraction, and its
    aspect over size's. mean: pixel mean in [0, 1] per channel; geometric operations fill uncovered corners with it.
    """
    if preset not in PRESETS:
        raise ValueError(f"aug {preset!r}: must be one of {', '.join(PRESETS)}")
    if aa and preset != "mae":
        raise ValueError(f"aa {aa!r}: belongs to aug mae, not to {preset}")
    if color_jitter and preset not in ("mae", "photo"):
        raise ValueError(f"color_jitter {color_jitter}: belongs to aug mae or photo, not to {preset}")
    if preset == "none":
        return build_eval_transform(size, crop_pct=1.0, interpolation=interpolation)
    scale = scale or SCALES[preset]
    # The crop's aspect varies around the input's own: a wide input must not stretch square crops.
    ratio = tuple(r * size[1] / size[0] for r in ratio)
    if preset != "photo":
        return create_transform(
            tuple(size), is_training=True, scale=scale, ratio=ratio, hflip=hflip, vflip=vflip,
            color_jitter=color_jitter, auto_augment=aa, interpolation=interpolation, mean=mean, normalize=False,
        )  # fmt: skip
    strength = 0.3 if color_jitter is None else color_jitter
    fill = [round(255 * m) for m in mean]
    # A resize of the whole image before the crop, as the method's reference has, would resample twice: the crop's
    # box is a fraction of the image, and the same with or without it.
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale, ratio, InterpolationMode(interpolation)),
            transforms.RandomHorizontalFlip(hflip),
            transforms.RandomVerticalFlip(vflip),
            transforms.RandomAffine(15, (0.1, 0.1), (0.9, 1.1), interpolation=InterpolationMode.BILINEAR, fill=fill),
            transforms.ColorJitter(strength, strength, strength, 0.05),
            transforms.PILToTensor(),
        ]
    )


def default_crop_pct(size: tuple[int, int]) -> float:
    """The share of the resized side that evaluation keeps, as MAE evaluates: 224/256 up to 224 pixels, 1 above."""
    return 224 / 256 if max(size) <= 224 else 1.0


def build_eval_transform(
    size: tuple[int, int], crop_pct: float | None = None, *, interpolation: str = "bicubic"
) -> Callable[[Image.Image], torch.Tensor]:
    """PIL image -> uint8 [C, h, w] with size = (h, w): resize to cover size / crop_pct, aspect ratio kept; centre crop.

    crop_pct: share of the resized side that is kept (default: default_crop_pct).
    """
    crop_pct = default_crop_pct(size) if crop_pct is None else crop_pct
    if not 0.0 < crop_pct <= 1.0:
        raise ValueError(f"crop_pct {crop_pct}: must be in (0, 1]")
    cover = tuple(int(s / crop_pct) for s in size)
    if cover[0] == cover[1]:
        resize = transforms.Resize(cover[0], InterpolationMode(interpolation))  # the shorter side
    else:
        resize = ResizeKeepRatio(cover, interpolation=interpolation)
    return transforms.Compose([resize, transforms.CenterCrop(size), transforms.PILToTensor()])
