"""Decodes image files of any kind to upright 8-bit PIL images. Formats are detected by content, not by name."""

import os
import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache

import numpy as np
from PIL import Image, ImageFile

LARGEST_ASPECT = 16
ORIENTATION = 0x0112  # EXIF tag; 1 is upright
MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # Pillow's default: 179 million
# Formats that Pillow knows but does not decode itself: PostScript, which it passes to Ghostscript, and metafiles, to
# Windows; formats without a decoder; Microsoft's containers, such as Thumbs.db; text formats.
NOT_DECODED = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "FPX", "MIC", "IPTC"}
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(OSError):
    """A file that cannot be decoded. No other error means that the file is bad."""


@contextmanager
def decoding() -> Iterator[None]:
    """Turn any error into ImageError: Pillow may raise anything for a broken file. Only for calls of Pillow."""
    try:
        yield
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))
        raise ImageError(
            f"{pixels[0] if pixels else 'its'} pixels, more than --max_pixels {int(2 * (Image.MAX_IMAGE_PIXELS or 0))}"
        ) from error
    except Exception as error:
        raise ImageError(str(error) or type(error).__name__) from error


def limit_pixels(max_pixels: int) -> None:
    """Refuse images with more than `max_pixels` before decoding, in this process and those that it forks."""
    # Pillow warns above its limit and refuses above twice the limit.
    Image.MAX_IMAGE_PIXELS = max_pixels / 2  # type: ignore[assignment]
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@cache
def _register() -> None:
    """Register Pillow's plugins and, if installed, pillow-heif's, for photos of phones."""
    Image.init()
    with suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()


def _format_of(path: str) -> str | None:
    """The format of the file's extension; None if Pillow does not know it."""
    _register()
    return Image.EXTENSION.get(os.path.splitext(path)[1].lower())


@cache
def _formats(named: str | None) -> tuple[str, ...]:
    """The formats to try for a file: its extension's, then all that are detected by their first bytes."""
    signed = (f for f, (_, accept) in Image.OPEN.items() if accept is not None)
    candidates = dict.fromkeys([named, *signed] if named in Image.OPEN else signed)
    return tuple(f for f in candidates if f not in NOT_DECODED)


def is_known(extension: str) -> bool:
    """Whether Pillow knows an extension, such as .jpg, in lower case."""
    _register()
    return extension in Image.EXTENSION


def is_image(path: str) -> bool:
    """Whether a file is an image: by its extension if Pillow knows it, without opening the file.

    For other extensions, or none: by its first bytes and header.
    """
    if named := _format_of(path):
        return named in Image.OPEN and named not in NOT_DECODED
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return False
        with open(path, "rb") as file:
            start = file.read(16).ljust(16, b"\0")
        known = (Image.OPEN[f][1] for f in _formats(None))
        if not any(accept(start) for accept in known if accept is not None):
            return False
        with open_file(path):
            return True
    except ImageError as error:
        return isinstance(error.__cause__, Image.DecompressionBombError)
    except OSError:
        return False


def open_image(path: str, in_chans: int) -> Image.Image:
    """Decode an image file (an animation's first frame), upright, as `L` (in_chans 1) or `RGB` (3). ImageError."""
    with open_file(path) as image:
        return to_channels(image, in_chans)


def open_file(path: str) -> ImageFile.ImageFile:
    """Pillow's Image.open for regular files (reading a pipe or device might never end). ImageError."""
    with decoding():
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError("not a regular file")
        return Image.open(path, formats=_formats(_format_of(path)))


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 if it cannot be read."""
    try:
        value = image.getexif().get(ORIENTATION)
        return value if value in _TURNS else 1
    except Exception:  # broken EXIF; the pixels may still be fine
        return 1


def to_channels(image: Image.Image, in_chans: int) -> Image.Image:
    """An image of any mode, upright by its EXIF orientation, as 8-bit `L` (in_chans 1) or `RGB` (3).

    Transparency is composited over white, as on a page; the colours of transparent pixels are arbitrary.
    Integers of more than 8 bits have the range 0..65535; floats 0..1 if no finite value is far above 1, else 0..255.
    Images longer than 16 times their width are cropped to the middle 16 : 1: resizing the whole image to cover a square
    would need unlimited memory. ImageError if the image cannot be decoded.
    """
    if in_chans not in (1, 3):
        raise ValueError(f"in_chans {in_chans}: image files have 1 or 3 channels")
    with decoding():
        image.load()
        # Not ImageOps.exif_transpose: it rewrites the other EXIF values and fails if one of them is invalid.
        turn = _TURNS.get(orientation(image))
        image = image if turn is None else image.transpose(turn)
    image = limit_aspect(image)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image).astype(np.float64)
        values = to_levels(values) if image.mode == "F" else values / 257.0
        image = Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    mode = "L" if in_chans == 1 else "RGB"
    with decoding():  # Pillow reads but cannot convert some modes, such as LAB
        return image if image.mode == mode else image.convert(mode)


def to_levels(values: np.ndarray) -> np.ndarray:
    """Floats as levels 0..255. NaN and -inf are black, inf is white.

    If all are below 1.5, the range is 0..1: resampling and sharpening overshoot 1, and as levels the image would be
    black.
    """
    highest = values[np.isfinite(values)].max(initial=0.0)
    return np.nan_to_num(values * (255.0 if highest <= 1.5 else 1.0), nan=0.0)


def limit_aspect(image: Image.Image) -> Image.Image:
    """The image, or its middle if its aspect is beyond LARGEST_ASPECT : 1 either way."""
    w, h = image.size
    side = LARGEST_ASPECT * min(w, h)
    if side >= max(w, h):
        return image
    new_w, new_h = min(w, side), min(h, side)
    left, top = (w - new_w) // 2, (h - new_h) // 2
    return image.crop((left, top, left + new_w, top + new_h))
