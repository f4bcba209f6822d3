"""timm's RandAugment operations in OpenCV, on uint8 arrays [h, w, 3] or, for grey images, [h, w].

Used for image files, in loader processes (augment/fast_image.py): 32 images of 224 pixels take 19 ms of CPU, against
27 ms by the batch and 31 ms with Pillow (bench/rand_augment.py).

timm draws the operations and their magnitudes (AugmentOp, RandAugment); only the pixels are computed here. Lookup
tables (augment/pixel_ops.py) equal Pillow's; colour, sharpness, shears and translations are within one level.
OpenCV's rotation rounds where Pillow truncates. At the border it blends the fill into the image over one pixel, where
Pillow cuts. Its bicubic kernel is a little less sharp (a = -0.75; Pillow's transform: -1).
"""

import copy
import math
import random

import cv2
import numpy as np
from timm.data import auto_augment
from torchvision.transforms import InterpolationMode

from augment import pixel_ops as ops
from augment.decoding import ImageError, decoding
from augment.image import posterize

cv2.setNumThreads(0)  # images are small, and loader processes already run in parallel

_INTERPOLATION = {"nearest": cv2.INTER_NEAREST, "bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13  # Pillow's ImageFilter.SMOOTH
_LEVELS = np.arange(256)
_TRUNCATE = 1e-3 - 0.5  # added before OpenCV rounds, so that it truncates like Pillow


def decode_jpeg(data: bytes, scale: int = 1, grey: bool = False) -> np.ndarray:
    """uint8 [h, w, 3] in RGB order, or [h, w]: Pillow's pixels, at 1/scale (1, 2, 4 or 8) of the file's size.

    EXIF orientation is ignored. ImageError if it cannot be decoded; missing data at the end becomes grey.
    """
    reduced = {1: 0, 2: 16, 4: 32, 8: 64}[scale]  # cv2.IMREAD_REDUCED_GRAYSCALE_*
    colour = cv2.IMREAD_GRAYSCALE if grey else cv2.IMREAD_COLOR_RGB
    with decoding():
        x = cv2.imdecode(np.frombuffer(data, np.uint8), colour | reduced | cv2.IMREAD_IGNORE_ORIENTATION)
    if x is None:
        raise ImageError("OpenCV cannot decode it")
    return x


def _drawn(resample) -> str:
    """Name of the interpolation; drawn as in timm if there are several."""
    resample = random.choice(resample) if isinstance(resample, (list, tuple)) else resample
    return InterpolationMode[resample.name].value


def _fill(x: np.ndarray, fillcolor) -> tuple:
    fill = fillcolor if isinstance(fillcolor, (list, tuple)) else (fillcolor,) * 3
    return tuple(fill)[: 1 if x.ndim == 2 else 3]


def _rotate(x: np.ndarray, degrees: float, fillcolor=None, resample=None) -> np.ndarray:
    cos, sin = math.cos(-math.radians(degrees)), math.sin(-math.radians(degrees))
    cx, cy = (x.shape[1] - 1) / 2, (x.shape[0] - 1) / 2
    matrix = np.array([[cos, sin, cx - cos * cx - sin * cy], [-sin, cos, cy + sin * cx - cos * cy]])
    flags = _INTERPOLATION[_drawn(resample)] | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(x, matrix, x.shape[1::-1], flags=flags, borderValue=_fill(x, fillcolor))


def _taps(d: np.ndarray, interpolation: str) -> np.ndarray:
    """Pillow's weights of pixels -1, 0, 1, 2 for a point d in [0, 1) right of pixel 0's centre: [..., 4]."""
    zero = np.zeros_like(d)
    if interpolation == "nearest":
        taps = [zero, (d < 0.5).astype(d.dtype), (d >= 0.5).astype(d.dtype), zero]
    elif interpolation == "bilinear":
        taps = [zero, 1 - d, d, zero]
    else:  # cubic convolution with a = -1
        taps = [d * (-1 + d * (2 - d)), 1 + d * d * (d - 2), d * (1 + d * (1 - d)), d * d * (d - 1)]
    return np.stack(taps, -1)


def _shift_rows(x: np.ndarray, shift: np.ndarray, fillcolor, resample) -> np.ndarray:
    """Column j of row i shows column j + shift[i] of the same row; enough for shears and translations.

    shift: float64 [h], or [1] for all rows. Equal to Pillow's pixels, and several times as fast as a 2-D remap.
    """
    h, w = x.shape[:2]
    channels = 1 if x.ndim == 2 else x.shape[2]
    whole = np.floor(shift).astype(np.int64)
    taps = _taps(shift - whole, _drawn(resample)).astype(np.float32)  # [h or 1, 4]
    # Rows are padded at both ends so that every tap is inside.
    before, after = max(0, 1 - int(whole.min())), max(0, 2 + int(whole.max()))
    x = cv2.copyMakeBorder(x, 0, 0, before, after, cv2.BORDER_REPLICATE)
    # The fill colour shows outside. A row of it is repeated: assigning it to pixels would cost as much as the rest.
    out = np.empty((h, w * channels), np.uint8)
    out[:] = np.tile(np.array(_fill(x, fillcolor), np.uint8), w)
    out = out.reshape((h, w) + x.shape[2:])
    low, high = (np.ceil(edge - 0.5 - shift).clip(0, w).astype(np.int32) for edge in (0, w))  # columns inside
    if len(shift) == 1:
        y = cv2.filter2D(x, -1, taps, anchor=(1, 0), delta=_TRUNCATE)
        first = before + int(whole[0])
        out[:, low[0] : high[0]] = y[:, first + low[0] : first + high[0]]
        return out
    spans = np.lib.stride_tricks.sliding_window_view(x.reshape(h, -1), (w + 3) * channels, axis=1)
    spans = spans[np.arange(h), (before - 1 + whole) * channels].astype(np.float32)  # [h, (w + 3) channels]
    y = taps[:, :1] * spans[:, : w * channels]
    for k in (1, 2, 3):
        y += taps[:, k : k + 1] * spans[:, k * channels : (k + w) * channels]
    y = cv2.add(y, _TRUNCATE, dtype=cv2.CV_8U)  # type: ignore[call-overload] # a number, too
    y = y.reshape(out.shape)
    column = np.arange(w, dtype=np.int32)
    inside = (column >= low[:, None]) & (column < high[:, None])
    return cv2.copyTo(y, inside.view(np.uint8), out)


def _shear_x(x, factor, fillcolor=None, resample=None):
    return _shift_rows(x, factor * (np.arange(x.shape[0]) + 0.5), fillcolor, resample)


def _shear_y(x, factor, fillcolor=None, resample=None):
    return cv2.transpose(_shear_x(cv2.transpose(x), factor, fillcolor, resample))


def _translate_x(x, pixels, fillcolor=None, resample=None):
    return _shift_rows(x, np.array([float(pixels)]), fillcolor, resample)


def _translate_y(x, pixels, fillcolor=None, resample=None):
    return cv2.transpose(_translate_x(cv2.transpose(x), pixels, fillcolor, resample))


def _lookup(x: np.ndarray, table: np.ndarray) -> np.ndarray:
    """table: levels for every channel, [256], or a row per channel, [C, 256]; clipped and truncated to 8 bits."""
    table = np.clip(table, 0, 255).astype(np.uint8)
    return cv2.LUT(x, np.ascontiguousarray(table.T)[:, None] if table.ndim == 2 and len(table) > 1 else table.ravel())


def _histograms(x: np.ndarray) -> np.ndarray:
    """Counts of each level, int64 [C, 256]."""
    channels = 1 if x.ndim == 2 else x.shape[2]
    return np.stack([cv2.calcHist([x], [c], None, [256], [0, 256]).ravel() for c in range(channels)]).astype(np.int64)


def _auto_contrast(x: np.ndarray, **_) -> np.ndarray:
    present = _histograms(x) > 0
    low, high = present.argmax(1), 255 - present[:, ::-1].argmax(1)
    return _lookup(x, ops.autocontrast(_LEVELS, low[:, None], high[:, None]))


def _equalize(x: np.ndarray, **_) -> np.ndarray:
    histograms = _histograms(x)
    brightest = [histogram[np.flatnonzero(histogram)[-1]] for histogram in histograms]
    step = (histograms.sum(1) - brightest) // 255
    return _lookup(x, ops.equalize(_LEVELS, histograms, step[:, None]))


def _invert(x: np.ndarray, **_) -> np.ndarray:
    return cv2.bitwise_not(x)


def _solarize(x: np.ndarray, threshold: float, **_) -> np.ndarray:
    return _lookup(x, ops.solarize(_LEVELS, threshold))


def _solarize_add(x: np.ndarray, add: int, threshold: int = 128, **_) -> np.ndarray:
    return _lookup(x, ops.solarize_add(_LEVELS, add, threshold))


def _posterize(x: np.ndarray, bits: int, **_) -> np.ndarray:
    return _lookup(x, ops.posterize(_LEVELS, min(bits, 8)))


def _grey(x: np.ndarray) -> np.ndarray:
    return x if x.ndim == 2 else cv2.cvtColor(x, cv2.COLOR_RGB2GRAY)


def _blend(degenerate: np.ndarray, x: np.ndarray, factor: float) -> np.ndarray:
    """Image.blend: degenerate + factor (x - degenerate), clipped and truncated (OpenCV alone would round)."""
    return cv2.addWeighted(x, factor, degenerate, 1 - factor, _TRUNCATE)


def _brightness(x: np.ndarray, factor: float, **_) -> np.ndarray:
    return _lookup(x, ops.blend(0, _LEVELS.astype(np.float32), np.float32(factor)))


def _contrast(x: np.ndarray, factor: float, **_) -> np.ndarray:
    mean = np.float32(int(cv2.mean(_grey(x))[0] + 0.5))
    return _lookup(x, ops.blend(mean, _LEVELS.astype(np.float32), np.float32(factor)))


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
    posterize: _posterize,
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
    """The policy with OpenCV's operations and the same draws; None if an operation is not implemented here."""
    if not isinstance(policy, auto_augment.RandAugment) or any(op.aug_fn not in _TWINS for op in policy.ops):
        return None
    policy = copy.deepcopy(policy)
    for op in policy.ops:
        op.aug_fn = _TWINS[op.aug_fn]
    return policy
