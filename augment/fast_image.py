"""Random resized crops of JPEG files, decoded at the scale that the crop needs and resized in uint8.

OpenCV decodes (Pillow's pixels, bit for bit, in two thirds of the time) and computes RandAugment (opencv_ops.py).
The random draws, and so the boxes, flips and operations, are those of the PIL pipeline in augment/image.py. Only the
pixels of a crop are computed differently:

    large crop     libjpeg decodes at 1/2, 1/4 or 1/8 (it drops the high frequencies of each 8 x 8 block), the largest
                   reduction at which the crop has at least the output's pixels; Pillow resizes it further
    small crop     decoded in full size, resized by torch's vectorised kernel: Pillow's filter, within a level or two

Pillow reads all files other than plain upright JPEGs with the right number of channels.
"""

import os
from collections.abc import Callable

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageFile
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TVF

from augment.decoding import LARGEST_ASPECT, ImageError, decoding, open_file, orientation, to_channels
from augment.opencv_ops import decode_jpeg, on_arrays

REDUCTIONS = (8, 4, 2)  # libjpeg's scales that Pillow offers
END_OF_IMAGE = b"\xff\xd9"
_FLIPS = (transforms.RandomHorizontalFlip, transforms.RandomVerticalFlip)


class FastTrainTransform:
    """path -> uint8 [C, h, w], like `transform(open_image(path))` in about half the time.

    transform: a pipeline of build_train_transform that begins with a random resized crop; in_chans: 1 or 3. ImageError
    if the file, or its JPEG data for OpenCV, cannot be decoded.
    """

    def __init__(self, transform: transforms.Compose, in_chans: int):
        self.transform, self.in_chans = transform, in_chans
        self.crop, *rest = transform.transforms
        if not isinstance(self.crop, (transforms.RandomResizedCrop, RandomResizedCropAndInterpolation)):
            raise ValueError(f"transform: must begin with a random resized crop, got {type(self.crop).__name__}")
        # Flips also work on tensors; the steps between them and the last one need a PIL image.
        while rest and isinstance(rest[0], _FLIPS):
            rest.pop(0)
        self.flips = transform.transforms[1 : len(transform.transforms) - len(rest)]
        self.on_images = transforms.Compose(rest) if len(rest) > 1 else None
        self.on_arrays = on_arrays(rest[0]) if len(rest) == 2 else None

    def __call__(self, path: str) -> torch.Tensor:
        with open_file(path) as image:
            if not is_plain_jpeg(image, self.in_chans):
                return self.transform(to_channels(image, self.in_chans))
            box = self.crop.get_params(image, self.crop.scale, self.crop.ratio)
            x = decode_crop(image, box, tuple(self.crop.size), self.crop.interpolation)
        for flip in self.flips:
            x = flip(x)
        pixels = to_array(x)
        if self.on_images is not None and self.on_arrays is None:
            return self.on_images(Image.fromarray(pixels))
        return to_tensor(pixels if self.on_arrays is None else self.on_arrays(pixels))


def to_array(x: torch.Tensor) -> np.ndarray:
    """uint8 [C, h, w] as [h, w] or [h, w, 3]; no copy if the channels are interleaved in memory."""
    return (x[0] if len(x) == 1 else rearrange(x, "c h w -> h w c")).contiguous().numpy()


def to_tensor(x: np.ndarray) -> torch.Tensor:
    """Inverse of to_array, contiguous: OpenCV separates channels ten times as fast as torch.stack."""
    out = np.empty((1 if x.ndim == 2 else 3, *x.shape[:2]), np.uint8)
    cv2.split(x, list(out))
    return torch.from_numpy(out)


def can_be_fast(transform: Callable) -> bool:
    """Whether the pipeline begins with the crop that FastTrainTransform replaces (every preset but `none`)."""
    first = getattr(transform, "transforms", [None])[0]
    return isinstance(first, (transforms.RandomResizedCrop, RandomResizedCropAndInterpolation))


def is_plain_jpeg(image: ImageFile.ImageFile, in_chans: int) -> bool:
    """Whether an opened file is a complete JPEG for which to_channels would do nothing but decode."""
    return (
        image.format == "JPEG"
        and image.mode == ("L" if in_chans == 1 else "RGB")
        and max(image.size) <= LARGEST_ASPECT * min(image.size)
        and orientation(image) == 1
        and ends_properly(image.fp)
    )


def ends_properly(file) -> bool:
    """Whether the file is complete. OpenCV silently fills missing data at the end; Pillow reports it."""
    with decoding():
        file.seek(-2, os.SEEK_END)
        return file.read() == END_OF_IMAGE


def reduction(box_h: int, box_w: int, size: tuple[int, int]) -> int:
    """The largest of libjpeg's reductions at which a box has at least size = (h, w) pixels; 1 for none."""
    return next((s for s in REDUCTIONS if box_h >= s * size[0] and box_w >= s * size[1]), 1)


def decode_crop(
    image: ImageFile.ImageFile, box: tuple[int, int, int, int], size: tuple[int, int], interpolation: InterpolationMode
) -> torch.Tensor:
    """Box (top, left, h, w) of an opened JPEG, in its full-size pixels, resized to `size` (h, w): uint8 [C, h, w].

    ImageError if OpenCV cannot decode it.
    The channels are interleaved in memory, which makes torch's kernel and RandAugment several times as fast.
    """
    top, left, h, w = box
    scale = reduction(h, w, size)
    assert image.fp is not None
    with decoding():
        image.fp.seek(0)
        data = image.fp.read()
    pixels = decode_jpeg(data, scale, grey=image.mode == "L")
    if pixels.shape[:2] != tuple(-(-side // scale) for side in image.size[::-1]):
        raise ImageError("OpenCV decodes a size other than the header's")
    if scale == 1:
        crop = pixels[top : top + h, left : left + w]
        x = rearrange(torch.from_numpy(crop), "h w ... -> 1 (...) h w")
        x = x.contiguous(memory_format=torch.channels_last)  # torch keeps the layout only of dense tensors
        return F.interpolate(x, size=size, mode=interpolation.value, antialias=True)[0]
    # Pillow takes the box in fractions of the reduced image's pixels.
    corners = (
        left / scale,
        top / scale,
        min((left + w) / scale, pixels.shape[1]),
        min((top + h) / scale, pixels.shape[0]),
    )
    resample = getattr(Image.Resampling, interpolation.name)
    return TVF.pil_to_tensor(Image.fromarray(pixels).resize(size[::-1], resample, box=corners))
