"""Finds image files in folders and counts the files that are left out."""

import os
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from util.errors import UserError, listed, reason_of
from util.files import composed, printable
from util.folder import is_output

# Folders that file managers, NAS boxes and archives create; names that start with a dot are left out as well.
SYSTEM_FOLDERS = {
    "@eadir",
    "__macosx",
    "#recycle",
    "#snapshot",
    "$recycle.bin",
    "recycler",
    "lost+found",
    "system volume information",
}
THUMBNAILS = {"thumbs", "thumbnails"}  # only beside images: a class may have this name


def class_name(folder: str) -> str:
    """The class name of a folder."""
    return composed(printable(folder))


class Paths(Sequence):
    """A sequence of paths, stored in arrays that loader processes share.

    A list of strings would be copied into every process: reading a Python object changes its reference count, and the
    system copies shared memory when it is written to.
    """

    def __init__(self, paths: Iterable[str] = ()):
        import numpy as np

        encoded = [os.fsencode(path) for path in paths]
        ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)
        self.text = np.frombuffer(b"".join(encoded), np.uint8)
        self.start, self.stop = np.append(0, ends)[:-1], ends

    @classmethod
    def joined(cls, parts: Sequence["Paths"]) -> "Paths":
        """Concatenate."""
        import numpy as np

        whole, shift = cls(), np.cumsum([0, *(len(part.text) for part in parts)])
        whole.text = np.concatenate([part.text for part in parts])
        whole.start, whole.stop = (
            np.concatenate([getattr(part, ends) + s for part, s in zip(parts, shift)]) for ends in ("start", "stop")
        )
        return whole

    def take(self, index) -> "Paths":
        """The paths numbered in `index`; the text is shared."""
        part = Paths.__new__(Paths)
        part.text, part.start, part.stop = self.text, self.start[index], self.stop[index]
        return part

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, i):
        return self.take(i) if isinstance(i, slice) else os.fsdecode(self.text[self.start[i] : self.stop[i]].tobytes())

    def __eq__(self, other) -> bool:
        return list(self) == list(other)


@dataclass
class Found:
    """Image files below a folder, sorted, and what was not read there.

    left_out: counts of other files by extension. guessed: counts of images with an unknown extension. hidden: counts of
    hidden and system folders. outputs: folders that runs wrote.
    """

    paths: list[str] = field(default_factory=list)
    left_out: Counter = field(default_factory=Counter)
    guessed: Counter = field(default_factory=Counter)
    hidden: Counter = field(default_factory=Counter)
    outputs: list[str] = field(default_factory=list)

    def __iadd__(self, other: "Found") -> "Found":
        self.paths += other.paths
        self.left_out.update(other.left_out)
        self.guessed.update(other.guessed)
        self.hidden.update(other.hidden)
        self.outputs += other.outputs
        return self

    def notes(self, root: str) -> list[str]:
        """A line for each kind of file or folder that was left out."""
        notes, root_name = [], printable(root)
        if self.left_out:
            heif = "; `pip install pillow-heif` reads .heic" if {".heic", ".heif"} & set(self.left_out) else ""
            notes.append(f"{root_name}: left out, not images: {kinds(self.left_out)}{heif}")
        if self.guessed:
            notes.append(f"{root_name}: recognised as images by their first bytes: {kinds(self.guessed)}")
        if self.hidden:
            notes.append(f"{root_name}: left out, hidden and system folders: {kinds(self.hidden)}")
        if self.outputs:
            names = [printable(os.path.relpath(path, root)) for path in self.outputs]
            notes.append(f"{root_name}: left out, the output of runs: {listed(names, 4)}")
        return notes


def kinds(counts: Counter) -> str:
    """`15 .xml, 3 .heic`, most frequent first."""
    return listed([f"{n} {printable(kind)}" for kind, n in counts.most_common()], 8)


def _unreadable(error: OSError) -> NoReturn:
    """Called by os.walk, which would otherwise skip the folder silently."""
    raise UserError(f"--data_path: {printable(os.fspath(error.filename))}: cannot be read ({reason_of(error)})")


def is_hidden(folder: str) -> bool:
    return folder.startswith(".") or folder.casefold() in SYSTEM_FOLDERS


def find_images(root: str, *, is_data: bool = True, without: Collection[str] = ()) -> Found:
    """Every image file (augment.decoding.is_image) below `root`, sorted; symbolic links are followed, loops once.

    Left out: hidden and system folders, folders that runs wrote (but not root if is_data), and folders directly in root
    that `without` names. UserError for an unreadable folder.
    """
    from augment.decoding import is_image, is_known

    found, seen = Found(), set()
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=_unreadable):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        if not (is_data and folder == root) and is_output(files):
            if any(
                is_image(os.path.join(folder, n)) for n in files if not n.lower().endswith(".png")
            ):  # a run's pictures are .png
                raise UserError(
                    f"{printable(folder)}: contains photos and the output of a run; move one of them elsewhere"
                )
            found.outputs.append(folder)
            subfolders.clear()
            continue
        images = []
        for name in files:
            if name.startswith("."):
                continue
            path = os.path.join(folder, name)
            extension = os.path.splitext(name)[1].lower()
            if read := is_image(path):
                images.append(path)
            if not read or not is_known(extension):
                count = found.guessed if read else found.left_out
                count[printable(extension[:16]) or "without extension"] += 1
        found.paths += images
        skipped = [f for f in subfolders if is_hidden(f) or (images and f.casefold() in THUMBNAILS)]
        found.hidden.update(skipped)
        skipped += without if folder == root else ()
        subfolders[:] = sorted(set(subfolders).difference(skipped))
    found.paths.sort()
    return found


def class_folders(root: str) -> list[str]:
    """Names of the folders in root, sorted, without hidden and system ones."""
    if not os.path.isdir(root):
        raise UserError(f"--data_path {root}: no such folder")
    try:
        return sorted(e.name for e in os.scandir(root) if e.is_dir() and not is_hidden(e.name))
    except OSError as error:
        _unreadable(error)


def images_beside(root: str) -> int:
    """Number of images directly in root, where class folders are expected."""
    from augment.decoding import is_image

    files = (e for e in os.scandir(root) if not e.name.startswith(".") and not e.is_dir())
    return sum(is_image(e.path) for e in files)


def refuse_output_among_images(flag: str, output: str | None, data_path: str) -> None:
    """UserError if `output` is a folder of images at or below --data_path.

    The run's pictures would be read as photos, or the photos would never be read again. A folder without images is
    allowed there: it is left out of the data.
    """
    if not output or not os.path.isdir(output):
        return
    folder, data = os.path.realpath(output), os.path.realpath(data_path)
    if os.path.commonpath([folder, data]) != data:
        return
    if folder == data or (not is_output(os.listdir(folder)) and find_images(folder, is_data=False).paths):
        raise UserError(f"{flag} {output}: contains images of --data_path; choose another folder")
