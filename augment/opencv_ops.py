"""timm's RandAugment operations on uint8 arrays, computed by OpenCV: [h, w, 3] or, for grey images, [h, w].

timm draws the operations and their magnitudes (AugmentOp, RandAugment); only the pixels are computed elsewhere. Tables
are Pillow's to the level, colour and sharpness within one. OpenCV's affine maps round where Pillow truncates, blend the fill
into the image over one pixel at its border where Pillow cuts, and their bicubic kernel is a little less sharp (a = -0.75;
Pillow's transform: -1).
"""

import copy
import math
import random

import cv2
import numpy as np
from timm.data import auto_augment
from torchvision.transforms import InterpolationMode

cv2.setNumThreads(0)  # images are small; loader processes are what works side by side

_INTERPOLATION = {"nearest": cv2.INTER_NEAREST, "bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13  # Pillow's ImageFilter.SMOOTH
_LEVELS = np.arange(256)


def decode_jpeg(data: bytes, scale: int = 1, grey: bool = False) -> np.ndarray:
    """uint8 [h, w, 3] in RGB order, or [h, w]: Pillow's pixels, at 1/scale (1, 2, 4 or 8) of the file's size.

    The orientation in EXIF is ignored. OSError for what cannot be decoded; a file that ends too early is filled up grey.
    """
    reduced = {1: 0, 2: 16, 4: 32, 8: 64}[scale]  # cv2.IMREAD_REDUCED_GRAYSCALE_*
    colour = cv2.IMREAD_GRAYSCALE if grey else cv2.IMREAD_COLOR_RGB
    x = cv2.imdecode(np.frombuffer(data, np.uint8), colour | reduced | cv2.IMREAD_IGNORE_ORIENTATION)
    if x is None:
        raise OSError("OpenCV cannot decode it")
    return x


def _affine(x: np.ndarray, matrix, fillcolor, resample) -> np.ndarray:
    """Image.transform(AFFINE): output pixel (x, y) shows input matrix @ (x, y, 1), pixel centres at .5."""
    if isinstance(resample, (list, tuple)):
        resample = random.choice(resample)  # timm's draw
    a, b, c, d, e, f = matrix
    shifted = np.array([[a, b, c + (a + b - 1) / 2], [d, e, f + (d + e - 1) / 2]])  # pixel centres at 0
    flags = _INTERPOLATION[InterpolationMode[resample.name].value] | cv2.WARP_INVERSE_MAP
    fill = fillcolor if isinstance(fillcolor, (list, tuple)) else (fillcolor,) * 3
    return cv2.warpAffine(x, shifted, x.shape[1::-1], flags=flags, borderValue=fill)


def _rotate(x: np.ndarray, degrees: float, fillcolor=None, resample=None) -> np.ndarray:
    cos, sin = math.cos(-math.radians(degrees)), math.sin(-math.radians(degrees))
    cx, cy = x.shape[1] / 2, x.shape[0] / 2
    return _affine(x, (cos, sin, cx - cos * cx - sin * cy, -sin, cos, cy + sin * cx - cos * cy), fillcolor, resample)


def _shear_x(x, factor, fillcolor=None, resample=None):
    return _affine(x, (1, factor, 0, 0, 1, 0), fillcolor, resample)


def _shear_y(x, factor, fillcolor=None, resample=None):
    return _affine(x, (1, 0, 0, factor, 1, 0), fillcolor, resample)


def _translate_x(x, pixels, fillcolor=None, resample=None):
    return _affine(x, (1, 0, pixels, 0, 1, 0), fillcolor, resample)


def _translate_y(x, pixels, fillcolor=None, resample=None):
    return _affine(x, (1, 0, 0, 0, 1, pixels), fillcolor, resample)


def _lookup(x: np.ndarray, table: np.ndarray) -> np.ndarray:
    """table: levels for every channel, [256], or a row per channel, [C, 256]; clipped and truncated to 8 bits."""
    table = np.clip(table, 0, 255).astype(np.uint8)
    return cv2.LUT(x, np.ascontiguousarray(table.T)[:, None] if table.ndim == 2 and len(table) > 1 else table.ravel())


def _histograms(x: np.ndarray) -> np.ndarray:
    """Counts of each level, int64 [C, 256]."""
    channels = 1 if x.ndim == 2 else x.shape[2]
    return np.stack([cv2.calcHist([x], [c], None, [256], [0, 256]).ravel() for c in range(channels)]).astype(np.int64)


def _auto_contrast(x: np.ndarray, **_) -> np.ndarray:
    tables = []
    for histogram in _histograms(x):
        low, high = np.flatnonzero(histogram)[[0, -1]]
        scale = 255.0 / (high - low) if high > low else 1.0
        tables.append(_LEVELS * scale - low * scale if high > low else _LEVELS)
    return _lookup(x, np.stack(tables))


def _equalize(x: np.ndarray, **_) -> np.ndarray:
    tables = []
    for histogram in _histograms(x):
        step = (histogram.sum() - histogram[np.flatnonzero(histogram)[-1]]) // 255
        below = histogram.cumsum() - histogram
        tables.append((below + step // 2) // step if step else _LEVELS)
    return _lookup(x, np.stack(tables))


def _invert(x: np.ndarray, **_) -> np.ndarray:
    return cv2.bitwise_not(x)


def _solarize(x: np.ndarray, threshold: float, **_) -> np.ndarray:
    return _lookup(x, np.where(threshold > _LEVELS, _LEVELS, 255 - _LEVELS))


def _solarize_add(x: np.ndarray, add: int, threshold: int = 128, **_) -> np.ndarray:
    return _lookup(x, np.where(threshold > _LEVELS, _LEVELS + add, _LEVELS))


def _posterize(x: np.ndarray, bits: int, **_) -> np.ndarray:
    return _lookup(x, _LEVELS & ~((1 << (8 - min(bits, 8))) - 1))


def _grey(x: np.ndarray) -> np.ndarray:
    return x if x.ndim == 2 else cv2.cvtColor(x, cv2.COLOR_RGB2GRAY)


def _blend(degenerate: np.ndarray, x: np.ndarray, factor: float) -> np.ndarray:
    """Image.blend: degenerate + factor (x - degenerate), clipped and truncated (OpenCV alone would round)."""
    return cv2.addWeighted(x, factor, degenerate, 1 - factor, 1e-3 - 0.5)


def _brightness(x: np.ndarray, factor: float, **_) -> np.ndarray:
    return _lookup(x, np.float32(factor) * _LEVELS.astype(np.float32))


def _contrast(x: np.ndarray, factor: float, **_) -> np.ndarray:
    mean = np.float32(int(cv2.mean(_grey(x))[0] + 0.5))
    return _lookup(x, mean + np.float32(factor) * (_LEVELS.astype(np.float32) - mean))


def _color(x: np.ndarray, factor: float, **_) -> np.ndarray:
    return x if x.ndim == 2 else _blend(cv2.cvtColor(_grey(x), cv2.COLOR_GRAY2RGB), x, factor)


def _sharpness(x: np.ndarray, factor: float, **_) -> np.ndarray:
    smooth = cv2.filter2D(x, -1, _SMOOTH)
    for edge in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):  # not smoothed by Pillow
        smooth[edge] = x[edge]
    return _blend(smooth, x, factor)


_TWINS = {
    auto_augment.auto_contrast: _auto_contrast,
    auto_augment.equalize: _equalize,
    auto_augment.invert: _invert,
    auto_augment.rotate: _rotate,
    auto_augment.posterize: _posterize,
    auto_augment.solarize: _solarize,
    auto_augment.solarize_add: _solarize_add,
    auto_augment.color: _color,
    auto_augment.contrast: _contrast,
    auto_augment.brightness: _brightness,
    auto_augment.sharpness: _sharpness,
    auto_augment.shear_x: _shear_x,
    auto_augment.shear_y: _shear_y,
    auto_augment.translate_x_abs: _translate_x,
    auto_augment.translate_y_abs: _translate_y,
    auto_augment.translate_x_rel: lambda x, part, **k: _translate_x(x, part * x.shape[1], **k),
    auto_augment.translate_y_rel: lambda x, part, **k: _translate_y(x, part * x.shape[0], **k),
}


def on_arrays(policy: auto_augment.RandAugment) -> auto_augment.RandAugment | None:
    """The policy with OpenCV's operations in place of Pillow's, and the same draws; None if one has no twin here."""
    if not isinstance(policy, auto_augment.RandAugment) or any(op.aug_fn not in _TWINS for op in policy.ops):
        return None
    policy = copy.deepcopy(policy)
    for op in policy.ops:
        op.aug_fn = _TWINS[op.aug_fn]
    return policy
