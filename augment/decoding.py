"""Image files of any kind to upright 8-bit PIL images. What a file is, its bytes tell, whatever its name says."""

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
MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # Pillow's own limit: 179 million
# What Pillow knows and does not decode itself: PostScript, which is handed to Ghostscript, a program, and Windows'
# metafiles, to Windows; formats without a decoder; Microsoft's containers, such as Thumbs.db; text about pictures.
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
    """A file that cannot be decoded: the file's fault, and no other error is."""


@contextmanager
def decoding() -> Iterator[None]:
    """What Pillow raises on a broken file, which is anything, as ImageError. Only Pillow's own calls belong in here."""
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
    """Images beyond `max_pixels` are refused before any pixel is decoded, in this process and those that it forks."""
    # Pillow warns above its limit, and refuses above twice as much.
    Image.MAX_IMAGE_PIXELS = max_pixels / 2  # type: ignore[assignment]
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@cache
def _register() -> None:
    """Pillow's plugins and, where it is installed, pillow-heif's, for the photos of telephones."""
    Image.init()
    with suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()


def _format_of(path: str) -> str | None:
    """The format that the file's extension stands for; None for one that Pillow does not know."""
    _register()
    return Image.EXTENSION.get(os.path.splitext(path)[1].lower())


@cache
def _formats(named: str | None) -> tuple[str, ...]:
    """The formats to try for a file: its extension's, then all that know themselves by their first bytes."""
    signed = (f for f, (_, accept) in Image.OPEN.items() if accept is not None)
    candidates = dict.fromkeys([named, *signed] if named in Image.OPEN else signed)
    return tuple(f for f in candidates if f not in NOT_DECODED)


def is_known(extension: str) -> bool:
    """Whether Pillow knows an extension, such as .jpg, in lower case."""
    _register()
    return extension in Image.EXTENSION


def is_image(path: str) -> bool:
    """Whether a file is read as an image: by its extension where Pillow knows it, without opening the file.

    With any other extension, or none: by its first bytes and its header.
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
    """Pillow's Image.open for regular files (a pipe or device would be waited for without end). ImageError."""
    with decoding():
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError("not a regular file")
        return Image.open(path, formats=_formats(_format_of(path)))


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none that can be read."""
    try:
        value = image.getexif().get(ORIENTATION)
        return value if value in _TURNS else 1
    except Exception:  # EXIF of any bytes; the pixels are there all the same
        return 1


def to_channels(image: Image.Image, in_chans: int) -> Image.Image:
    """An image of any mode, turned upright by its EXIF orientation, as 8-bit `L` (in_chans 1) or `RGB` (3).

    Transparency is composited over white, as a page shows it; the colours hidden under it are arbitrary.
    Integers beyond 8 bits count as 0..65535; floats as 0..1 if no finite one is far above 1, else as 0..255.
    What is longer than 16 times its breadth keeps its middle 16 : 1: resized to cover a square, all of it would take
    memory without bound, to be cropped away. ImageError if a file's image cannot be decoded.
    """
    if in_chans not in (1, 3):
        raise ValueError(f"in_chans {in_chans}: image files have 1 or 3 channels")
    with decoding():
        image.load()
        # Not ImageOps.exif_transpose: it writes the other EXIF values anew, and fails where one of them is odd.
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
    with decoding():  # there are modes that Pillow reads and does not convert, such as LAB
        return image if image.mode == mode else image.convert(mode)


def to_levels(values: np.ndarray) -> np.ndarray:
    """Floats as levels 0..255. NaN and -inf are black, inf is white.

    Up to 1.5 they count as 0..1: resampling and sharpening overshoot 1, and as levels such a picture would be black.
    """
    highest = values[np.isfinite(values)].max(initial=0.0)
    return np.nan_to_num(values * (255.0 if highest <= 1.5 else 1.0), nan=0.0)


def limit_aspect(image: Image.Image) -> Image.Image:
    """The image, or the middle of one beyond LARGEST_ASPECT : 1 either way."""
    w, h = image.size
    side = LARGEST_ASPECT * min(w, h)
    if side >= max(w, h):
        return image
    new_w, new_h = min(w, side), min(h, side)
    left, top = (w - new_w) // 2, (h - new_h) // 2
    return image.crop((left, top, left + new_w, top + new_h))
