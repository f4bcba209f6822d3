"""Reads the named data sets: their images, targets and classes.

Small ones become an ArrayDataset (one uint8 tensor), others a FileDataset (paths, decoded in loader processes).
"""

import os
import re
from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from einops import rearrange

from util.data.image_files import Found, Paths, class_folders, class_name, find_images, images_beside, kinds
from util.errors import UserError, listed, reason_of
from util.files import printable
from util.folder import is_output

# Folders that are splits, not classes.
TRAIN_FOLDERS, HELD_OUT_FOLDERS = {"train", "training"}, {"val", "valid", "validation", "test", "testing"}
# The same words inside a longer name: seg_train beside seg_test, training_set beside test_set, Train beside Dev.
TRAIN_LIKE, HELD_OUT_LIKE = (
    re.compile(rf"(?<![a-z])({names})(set|data|images)?(?![a-z])")
    for names in ("train|training", "val|valid|validation|test|testing|dev|eval|evaluation|holdout")
)


@dataclass
class ArrayDataset:
    """Images as one uint8 tensor [N, C, H, W], targets int64 [N]."""

    images: torch.Tensor
    targets: torch.Tensor
    classes: list[str]
    names: list[str] | None = None  # sample names for reports

    def __len__(self) -> int:
        return len(self.targets)

    def subset(self, index: torch.Tensor) -> "ArrayDataset":
        return ArrayDataset(self.images[index], self.targets[index], self.classes, [self.name(int(i)) for i in index])

    def name(self, i: int) -> str:
        return self.names[i] if self.names else str(i)


@dataclass
class FileDataset:
    """Images as files. `targets` int64 [N]; -1 where there is no label. `root` shortens the names in reports.

    notes: what was found beside the images but not read, for the log and the report.
    """

    paths: Paths  # any sequence of strings is converted
    targets: torch.Tensor
    classes: list[str] = field(default_factory=list)
    root: str = ""
    notes: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.paths = self.paths if isinstance(self.paths, Paths) else Paths(self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def subset(self, index: torch.Tensor) -> "FileDataset":
        return FileDataset(self.paths.take(index.numpy()), self.targets[index], self.classes, self.root, self.notes)

    def name(self, i: int) -> str:
        return os.path.relpath(self.paths[i], self.root) if self.root else self.paths[i]


Dataset = ArrayDataset | FileDataset


def notes_of(*data: Dataset | None) -> list[str]:
    """The notes of several splits, without duplicates."""
    return list(dict.fromkeys(note for d in data for note in getattr(d, "notes", ())))


def read_class_folder(root: str, classes: list[str] | None = None, only: Collection[str] | None = None) -> FileDataset:
    """root/class/**/image files. only: names of the classes to read (default: all).

    classes: the training set's, to read its validation set. Classes without images are noted; a class that is not
    among them is a UserError.
    """
    folders: dict[str, list[str]] = defaultdict(list)
    for folder in class_folders(root):
        folders[class_name(folder)].append(folder)
    if only is not None:
        folders = {name: folders[name] for name in only if name in folders}
    if not folders:
        raise UserError(f"{root}: has no class folders; expected {root}/<class>/<images>")
    paths, counts, total = [], {}, Found()
    for name in sorted(folders):
        found = Found()
        for folder in folders[name]:
            found += find_images(os.path.join(root, folder), is_data=False)
        counts[name] = len(found.paths)
        if not found.paths and not found.outputs and classes is None:
            left_out = f"; its files are {kinds(found.left_out)}" if found.left_out else ""
            raise UserError(f"{os.path.join(root, folders[name][0])}: class folder without images{left_out}")
        paths.append(Paths(found.paths))
        found.paths = []
        total += found
    present = [name for name in counts if counts[name]]
    notes = total.notes(root)
    if stray := images_beside(root):
        notes.append(f"{printable(root)}: left out, {stray} images outside the class folders")
    if classes is None:
        classes = present
    if unknown := sorted(set(present) - set(classes)):
        raise UserError(f"{root}: its class folders differ from the training classes: unknown {listed(unknown)}")
    if not present:
        raise UserError(f"{root}: none of its class folders has images; expected {root}/<class>/<images>")
    if lacking := [name for name in classes if name not in present]:
        notes.append(
            f"{printable(root)}: has no images of {listed(lacking)}; scored on the other {len(present)} classes"
        )
    targets = [torch.full((counts[name],), classes.index(name)) for name in present]
    return FileDataset(Paths.joined(paths), torch.cat(targets), list(classes), root, notes)


def read_unlabelled(root: str, without: Collection[str] = ()) -> FileDataset:
    """Every image below root, without labels, for pretraining and prediction. without: folders in root to leave out."""
    if not os.path.isdir(root):
        raise UserError(f"--data_path {root}: no such folder")
    found = find_images(root, without=without)
    if not found.paths:
        left_out = f" (but {kinds(found.left_out)})" if found.left_out else ""
        raise UserError(f"{root}: has no images{left_out}")
    notes = found.notes(root)
    if without:
        notes.append(f"{printable(root)}: left out, validation or test data: {', '.join(map(printable, without))}")
    return FileDataset(Paths(found.paths), torch.full((len(found.paths),), -1), [], root, notes)


def _is_part(folder: str) -> bool:
    """Whether the folder exists and has data, not only a run's output."""
    if not os.path.isdir(folder) or not is_output(os.listdir(folder)):
        return os.path.isdir(folder)
    return any(find_images(os.path.join(folder, c), is_data=False).paths for c in class_folders(folder))


def _splits_in(root: str, labelled: bool) -> list[str]:
    """Folders that look like splits, in a root without train/: two such names, or one that is unambiguous."""
    folders = [f for f in class_folders(root) if _is_part(os.path.join(root, f))]
    found = [f for f in folders if f.casefold() in TRAIN_FOLDERS | HELD_OUT_FOLDERS]
    alone = HELD_OUT_FOLDERS - {"valid"}  # a class, beside `invalid`
    if len(found) > 1 or any(f.casefold() in alone for f in found):
        return found
    training, held_out = ([f for f in folders if like.search(f.casefold())] for like in (TRAIN_LIKE, HELD_OUT_LIKE))
    held_out = [f for f in held_out if f not in training]
    # `toy train` beside `test tube` are classes; splits of a labelled set contain class folders.
    if labelled:
        training = [f for f in training if len(class_folders(os.path.join(root, f))) > 1]
    return training + held_out if training and held_out else []


def _read_folder(root: str, split: str, labelled: bool, classes: list[str] | None = None) -> FileDataset | None:
    """data_path/{train,val}/class/*; without train/, data_path itself holds the classes. None if there is no val/."""
    if not os.path.isdir(root):
        raise UserError(f"--data_path {root}: no such folder")
    has_train = _is_part(os.path.join(root, "train"))
    folder = os.path.join(root, split) if has_train or split != "train" else root
    if folder != root and not _is_part(folder):
        return None
    splits = _splits_in(root, labelled) if folder == root else []
    if not labelled:
        return read_unlabelled(folder, [f for f in splits if not TRAIN_LIKE.search(f.casefold())])
    if splits:
        raise UserError(
            f"--data_path {root}: has no train/ folder, and {', '.join(splits)}, which look like splits, not "
            f"classes; expected {root}/train/<class>/<images> and {root}/val, or give --data_path one of them with "
            "--val_split 0.2"
        )
    if split != "train" and classes is None:
        classes = read_class_folder(os.path.join(root, "train") if has_train else root).classes
    return read_class_folder(folder, classes)


def _read_imagenet(
    root: str,
    split: str,
    labelled: bool,
    classes: list[str] | None = None,
    only: set[str] | None = None,
    name: str = "imagenet",
) -> FileDataset:
    if not all(os.path.isdir(os.path.join(root, s)) for s in ("train", "val")):
        raise UserError(
            f"--dataset {name} --data_path {root}: put the images at {root}/train/<wnid>/*.JPEG and "
            f"{root}/val/<wnid>/*.JPEG (it cannot be downloaded without an account)"
        )
    if split != "train" and classes is None:
        classes = read_class_folder(os.path.join(root, "train"), only=only).classes
    return read_class_folder(os.path.join(root, split), classes, only)


def read_wnids(path: str) -> set[str]:
    """The WordNet IDs in a text file, which may contain other words; all its words if it has no IDs."""
    text = Path(path).read_text("utf-8-sig", "replace")
    return set(re.findall(r"(?<![^\W_])n\d{3,}(?![^\W_])", text) or text.split())


def _read_imagenet100(root: str, split: str, labelled: bool, classes: list[str] | None = None) -> FileDataset:
    """A folder of the 100 classes, or all of ImageNet with an imagenet100.txt (a wnid per line)."""
    listing = os.path.join(root, "imagenet100.txt")
    only = read_wnids(listing) if os.path.isfile(listing) else None
    data = _read_imagenet(root, split, labelled, classes, only, "imagenet-100")
    if only is not None and (lacking := sorted(only - set(data.classes))):
        raise UserError(f"{listing}: {data.root} has no images of its {listed(lacking)}")
    if len(data.classes) != 100:
        raise UserError(
            f"--dataset imagenet-100 --data_path {root}: has {len(data.classes)} classes; "
            f"list the 100 wnids to use in {listing}, or use --dataset folder"
        )
    return data


def _read_tiny_imagenet(root: str, split: str, labelled: bool, classes: list[str] | None = None) -> FileDataset:
    """train/<wnid>/images/*.JPEG; val/images/*.JPEG with val_annotations.txt (file, wnid, box), or val/<wnid>/."""
    inner = os.path.join(root, "tiny-imagenet-200")
    base = next((b for b in (root, inner) if os.path.isdir(os.path.join(b, "train"))), inner)
    if not os.path.isdir(os.path.join(base, "train")):
        url, md5 = "http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"

        def fetch():
            from torchvision.datasets.utils import download_and_extract_archive

            download_and_extract_archive(url, root, md5=md5, remove_finished=True)

        _download("tiny-imagenet", fetch, f"unpack {url} in {root}")
    if split == "train" or classes is None:
        train = read_class_folder(os.path.join(base, "train"))
        if split == "train":
            return train
        classes = train.classes
    val = os.path.join(base, "val")
    listing, images = os.path.join(val, "val_annotations.txt"), os.path.join(val, "images")
    names = set(os.listdir(images)) if os.path.isfile(listing) and os.path.isdir(images) else set()
    if not names:  # some copies have class folders, with or without the list
        if (
            not os.path.isfile(listing)
            and os.path.isdir(images)
            and "images" not in classes
            and find_images(images).paths
        ):
            raise UserError(f"--data_path {root}: {listing}, which lists the classes of {images}, is missing")
        return read_class_folder(val, classes)
    # Separated by tabs, or by spaces if an editor replaced them.
    rows = [line.split()[:2] for line in Path(listing).read_text("utf-8-sig", "replace").splitlines() if line.strip()]
    if short := [row for row in rows if len(row) < 2]:
        raise UserError(f"{listing}: its line {short[0][0]!r} should be a file name and a wnid")
    unknown = sorted({wnid for _, wnid in rows} - set(classes))
    if unknown:
        raise UserError(f"{listing}: class {unknown[0]} is not in {base}/train")
    if lacking := sorted({name for name, _ in rows} - names):
        raise UserError(f"{listing}: names {lacking[0]}, which is not in {images}")
    number = {c: i for i, c in enumerate(classes)}
    paths = [os.path.join(images, name) for name, _ in rows]
    extra = sorted(name for name in names - {name for name, _ in rows} if not name.startswith("."))
    notes = [f"{listing}: {len(extra)} files of {images} are not in it and left out, e.g. {extra[0]}"] if extra else []
    return FileDataset(Paths(paths), torch.tensor([number[wnid] for _, wnid in rows]), classes, val, notes)


def _read_torchvision(name: str, root: str, split: str, *_) -> ArrayDataset:
    """CIFAR-10/100 and Fashion-MNIST through torchvision, which checks the files' digests; downloads if it must."""
    from torchvision import datasets

    cls = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "fashion-mnist": datasets.FashionMNIST}[name]
    inner = getattr(cls, "base_folder", "FashionMNIST/raw")
    # --data_path may be the inner folder or one on the way to it.
    whole = os.path.abspath(root)
    above = [whole] + [os.path.normpath(os.path.join(whole, *[".."] * k)) for k in range(1, inner.count("/") + 2)]
    fits = (a for a in above if f"{a}/{inner}/".startswith(f"{whole}/") and os.path.isdir(os.path.join(a, inner)))
    root = next(fits, root)
    where = os.path.join(root, inner)
    try:
        data = cls(root, train=split == "train", download=False)
    except RuntimeError:  # not found or corrupted
        _download(name, lambda: cls(root, train=True, download=True), f"put its files in {where}")
        data = cls(root, train=split == "train", download=False)
    images = torch.as_tensor(data.data)
    images = images.unsqueeze(1) if images.ndim == 3 else rearrange(images, "n h w c -> n c h w")
    return ArrayDataset(images.contiguous(), torch.as_tensor(data.targets), [str(c) for c in data.classes])


def _download(name: str, fetch, by_hand: str) -> None:
    """Run torchvision's downloader quietly; if it fails, one line says what to do by hand."""
    import contextlib
    import io

    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            fetch()
    except Exception as error:  # URLError, HTTPError, wrong digests, a read-only folder: the same to the user
        why = reason_of(error)
        raise UserError(f"--dataset {name}: not found, and its download failed ({why}); {by_hand}") from None


def _read_digits(root: str, split: str, *_) -> ArrayDataset:
    """scikit-learn's 1,797 8x8 digits; a fixed stratified fifth is the validation split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy((digits.images * (255 / 16)).round().astype("uint8")).unsqueeze(1)
    targets = torch.from_numpy(digits.target).long()
    train, val = train_test_split(range(len(targets)), test_size=0.2, stratify=digits.target, random_state=0)
    index = torch.tensor(sorted(train if split == "train" else val))
    return ArrayDataset(
        images[index], targets[index], [str(c) for c in range(10)], [f"digit-{i:04d}" for i in index.tolist()]
    )


# For each data set: (root, split, labelled, classes) -> its images; None if it lacks the split.
READERS: dict[str, Callable[..., Dataset | None]] = {
    "folder": _read_folder,
    "digits": _read_digits,
    "imagenet": _read_imagenet,
    "imagenet-100": _read_imagenet100,
    "tiny-imagenet": _read_tiny_imagenet,
    **{name: partial(_read_torchvision, name) for name in ("cifar10", "cifar100", "fashion-mnist")},
}


def read_split(
    name: str, root: str, split: str, labelled: bool = True, classes: list[str] | None = None
) -> Dataset | None:
    """The `train` or `val` split of a data set in DATASETS; None for a folder without val/.

    labelled=False (pretraining) takes any folder of images, with or without class folders. classes: the training
    split's, to read `val`, if known.
    """
    return READERS[name](root, split, labelled, classes)


def to_channels(data: ArrayDataset, in_chans: int) -> ArrayDataset:
    """Grey images repeated to three channels, or colour images reduced to luma (ITU-R 601, as PIL's convert('L'))."""
    if data.images.shape[1] == in_chans:
        return data
    if data.images.shape[1] == 1:
        images = data.images.expand(-1, in_chans, -1, -1).contiguous()
    else:
        from torchvision.transforms.v2.functional import rgb_to_grayscale

        images = rgb_to_grayscale(data.images)
    return ArrayDataset(images, data.targets, data.classes, data.names)
