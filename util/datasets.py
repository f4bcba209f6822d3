"""The data sets by name: where their files lie, their classes, their normalisation. Small ones live in memory.

Two kinds come out: ArrayDataset (one uint8 tensor) and FileDataset (paths, decoded in loader workers).
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

from util.errors import UserError
from util.image_files import EXTENSIONS, class_folders, find_images, printable


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
    """Images as files. `targets` int64 [N]; -1 where there is no label. `root` shortens the names in reports."""

    paths: list[str]
    targets: torch.Tensor
    classes: list[str] = field(default_factory=list)
    root: str = ""

    def __len__(self) -> int:
        return len(self.paths)

    def subset(self, index: torch.Tensor) -> "FileDataset":
        return FileDataset([self.paths[int(i)] for i in index], self.targets[index], self.classes, self.root)

    def name(self, i: int) -> str:
        return os.path.relpath(self.paths[i], self.root) if self.root else self.paths[i]


def read_class_folder(root: str, classes: list[str] | None = None) -> FileDataset:
    """root/class/**/image files. `classes` fixes the names and order (validation must match training)."""
    found = class_folders(root)
    if not found:
        raise UserError(f"{root}: no class folders in it; expected {root}/<class>/<images>")
    if classes is not None and found != classes:
        missing, extra = sorted(set(classes) - set(found)), sorted(set(found) - set(classes))
        detail = [f"missing {', '.join(missing[:5])}"] if missing else []
        detail += [f"unknown {', '.join(extra[:5])}"] if extra else []
        raise UserError(f"{root}: its class folders differ from the training classes: {'; '.join(detail)}")
    paths, targets = [], []
    for label, name in enumerate(found):
        images = find_images(os.path.join(root, name))
        if not images:
            raise UserError(
                f"{os.path.join(root, name)}: class folder without images ({', '.join(EXTENSIONS[:3])}, ...)"
            )
        paths += images
        targets += [label] * len(images)
    return FileDataset(paths, torch.tensor(targets), [printable(name) for name in found], root)


def read_unlabelled(root: str) -> FileDataset:
    """Every image below root, without labels: for pretraining and prediction."""
    if not os.path.isdir(root):
        raise UserError(f"--data_path {root}: no such folder")
    paths = find_images(root)
    if not paths:
        raise UserError(f"{root}: no images in it ({', '.join(EXTENSIONS[:3])}, ...)")
    return FileDataset(paths, torch.full((len(paths),), -1), [], root)


def _read_folder(root: str, split: str, labelled: bool) -> FileDataset | None:
    """data_path/{train,val}/class/*; without train/, data_path itself holds the classes. None if there is no val/."""
    if not os.path.isdir(root):
        raise UserError(f"--data_path {root}: no such folder")
    has_train = os.path.isdir(os.path.join(root, "train"))
    folder = os.path.join(root, split) if has_train or split != "train" else root
    if not os.path.isdir(folder):
        return None
    if not labelled:
        return read_unlabelled(folder)
    if split == "train" and not has_train and {"val", "test"} & set(class_folders(root)):
        raise UserError(f"--data_path {root}: has no train/ folder; expected {root}/train/<class>/<images>")
    classes = None if split == "train" else class_folders(os.path.join(root, "train") if has_train else root)
    return read_class_folder(folder, classes)


def _read_imagenet(
    root: str, split: str, labelled: bool, only: set[str] | None = None, name: str = "imagenet"
) -> FileDataset:
    if not all(os.path.isdir(os.path.join(root, s)) for s in ("train", "val")):
        raise UserError(
            f"--dataset {name} --data_path {root}: put the images at {root}/train/<wnid>/*.JPEG and {root}/val/<wnid>/*.JPEG "
            "(it cannot be downloaded without an account)"
        )
    data = read_class_folder(os.path.join(root, split), class_folders(os.path.join(root, "train")))
    if only is not None:
        keep = [c for c in data.classes if c in only]
        if set(keep) != only:
            raise UserError(f"{root}/imagenet100.txt: names classes that {data.root} does not have")
        renumber = torch.tensor([keep.index(c) if c in only else -1 for c in data.classes])
        index = torch.nonzero(renumber[data.targets] >= 0).flatten()
        data = data.subset(index)
        data.targets, data.classes = renumber[data.targets], keep
    return data


def _read_imagenet100(root: str, split: str, labelled: bool) -> FileDataset:
    """A folder of the 100 classes, or the whole ImageNet beside imagenet100.txt (a wnid per line)."""
    listing = os.path.join(root, "imagenet100.txt")
    only = set(Path(listing).read_text().split()) if os.path.isfile(listing) else None
    data = _read_imagenet(root, split, labelled, only, "imagenet-100")
    if len(data.classes) != 100:
        raise UserError(
            f"--dataset imagenet-100 --data_path {root}: has {len(data.classes)} classes; "
            f"list the 100 wnids to use in {listing}, or use --dataset folder"
        )
    return data


def _read_tiny_imagenet(root: str, split: str, labelled: bool) -> FileDataset:
    """train/<wnid>/images/*.JPEG; val/images/*.JPEG with val_annotations.txt (file, wnid, box)."""
    base = root if os.path.isfile(os.path.join(root, "wnids.txt")) else os.path.join(root, "tiny-imagenet-200")
    if not os.path.isfile(os.path.join(base, "wnids.txt")):
        url, md5 = "http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"

        def fetch():
            from torchvision.datasets.utils import download_and_extract_archive

            download_and_extract_archive(url, root, md5=md5, remove_finished=True)

        _download("tiny-imagenet", fetch, f"unpack {url} in {root}")
    train = read_class_folder(os.path.join(base, "train"))
    if split == "train":
        return train
    listing = os.path.join(base, "val", "val_annotations.txt")
    if not os.path.isfile(listing):  # some copies are already sorted into class folders
        return read_class_folder(os.path.join(base, "val"), train.classes)
    number = {c: i for i, c in enumerate(train.classes)}
    rows = [line.split("\t")[:2] for line in Path(listing).read_text().splitlines() if line.strip()]
    unknown = sorted({wnid for _, wnid in rows} - set(number))
    if unknown:
        raise UserError(f"{listing}: class {unknown[0]} is not in {base}/train")
    paths = [os.path.join(base, "val", "images", name) for name, _ in rows]
    return FileDataset(
        paths, torch.tensor([number[wnid] for _, wnid in rows]), train.classes, os.path.join(base, "val")
    )


def _read_torchvision(name: str, root: str, split: str) -> ArrayDataset:
    """CIFAR-10/100 and Fashion-MNIST through torchvision, which checks the files' digests; downloads if it must."""
    from torchvision import datasets

    cls = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "fashion-mnist": datasets.FashionMNIST}[name]
    where = os.path.join(root, getattr(cls, "base_folder", "FashionMNIST/raw"))
    try:
        data = cls(root, train=split == "train", download=False)
    except RuntimeError:  # torchvision's word for "not found or corrupted"
        _download(name, lambda: cls(root, train=True, download=True), f"put its files in {where}")
        data = cls(root, train=split == "train", download=False)
    images = torch.as_tensor(data.data)
    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
    return ArrayDataset(images.contiguous(), torch.as_tensor(data.targets), [str(c) for c in data.classes])


def _download(name: str, fetch, by_hand: str) -> None:
    """Run torchvision's downloader quietly; offline, one line says what to do by hand."""
    import contextlib
    import io

    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            fetch()
    except Exception as error:  # URLError, HTTPError, digests, a read-only folder: all mean the same to the user
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--dataset {name}: not found, and its download failed ({reason}); {by_hand}") from None


def _read_digits(split: str, seed: int = 0) -> ArrayDataset:
    """scikit-learn's 1,797 8x8 digits; a fixed stratified fifth is the validation split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy((digits.images * (255 / 16)).round().astype("uint8")).unsqueeze(1)
    targets = torch.from_numpy(digits.target).long()
    train, val = train_test_split(range(len(targets)), test_size=0.2, stratify=digits.target, random_state=seed)
    index = torch.tensor(sorted(train if split == "train" else val))
    return ArrayDataset(
        images[index], targets[index], [str(c) for c in range(10)], [f"digit-{i:04d}" for i in index.tolist()]
    )


def read_split(name: str, root: str, split: str, labelled: bool = True) -> ArrayDataset | FileDataset | None:
    """The `train` or `val` split of a data set in DATASETS; None where a folder has no val/ of its own.

    labelled=False (pretraining) takes any folder of images, with or without class folders.
    """
    if name == "digits":
        return _read_digits(split)
    if name in ("cifar10", "cifar100", "fashion-mnist"):
        return _read_torchvision(name, root, split)
    readers = {"folder": _read_folder, "imagenet": _read_imagenet, "imagenet-100": _read_imagenet100}
    return {**readers, "tiny-imagenet": _read_tiny_imagenet}[name](root, split, labelled)


def to_channels(data: ArrayDataset, in_chans: int) -> ArrayDataset:
    """Grey images repeated to colour, or colour ones reduced to luma (ITU-R 601, as PIL's convert('L'))."""
    if data.images.shape[1] == in_chans:
        return data
    if data.images.shape[1] == 1:
        images = data.images.expand(-1, in_chans, -1, -1).contiguous()
    else:
        from torchvision.transforms.v2.functional import rgb_to_grayscale

        images = rgb_to_grayscale(data.images)
    return ArrayDataset(images, data.targets, data.classes, data.names)
