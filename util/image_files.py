"""Folders of image files: what is found in them, and how their names are shown."""

import os

from util.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


def printable(path: str) -> str:
    """A file name as text: names that are no UTF-8 keep their bytes as escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _unreadable(error: OSError):
    """os.walk's own way is silence: a class would shrink, or a test set, without a word."""
    raise UserError(f"--data_path: {printable(os.fspath(error.filename))}: cannot be read ({error.strerror})")


def find_images(root: str) -> list[str]:
    """Every image file below `root`, sorted; symbolic links are followed, loops once.

    UserError for a folder that cannot be read.
    """
    found, seen = [], set()
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=_unreadable):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders.sort()
        found += [os.path.join(folder, f) for f in files if f.lower().endswith(EXTENSIONS) and not f.startswith(".")]
    return sorted(found)


def class_folders(root: str) -> list[str]:
    if not os.path.isdir(root):
        raise UserError(f"--data_path {root}: no such folder")
    try:
        return sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith("."))
    except OSError as error:
        _unreadable(error)
