"""Training and validation splits of a data set: its own, a stratified split, or a fold."""

import numpy as np
import torch

from util.cli.settings import Data
from util.data.datasets import Dataset, read_split
from util.dist import World, barrier
from util.errors import UserError, reason_of
from util.files import printable


def stratified_split(
    targets: torch.Tensor, val_split: float, seed: int, classes: list[str] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices (train, val), the same share of each class. UserError if a class is too small to be in both."""
    from sklearn.model_selection import train_test_split

    check_class_sizes(targets, 2, f"--val_split {val_split}", classes)
    try:
        train, val = train_test_split(np.arange(len(targets)), test_size=val_split, stratify=targets, random_state=seed)
    except ValueError as error:
        raise UserError(f"--val_split {val_split}: {error}") from None
    return torch.from_numpy(np.sort(train)), torch.from_numpy(np.sort(val))


def stratified_subset(targets: torch.Tensor, number: int, seed: int, classes: list[str] | None = None) -> torch.Tensor:
    """Indices of `number` samples with the classes' frequencies kept. UserError if a class would have none."""
    from sklearn.model_selection import train_test_split

    flag = f"--train_subset {number}"
    present = int((torch.bincount(targets) > 0).sum())
    if not present <= number <= len(targets):
        raise UserError(f"{flag}: should be {present} (the classes) to {len(targets)} (the training images)")
    if number == len(targets):
        return torch.arange(number)
    try:
        kept, _ = train_test_split(np.arange(len(targets)), train_size=number, stratify=targets, random_state=seed)
    except ValueError as error:
        raise UserError(f"{flag}: {reason_of(error)}") from None
    kept = torch.from_numpy(np.sort(kept))
    if lacking := set(targets.unique().tolist()) - set(targets[kept].tolist()):
        name = repr(printable(classes[min(lacking)])) if classes else f"number {min(lacking)}"
        raise UserError(f"{flag}: would leave no image of class {name}; give more")
    return kept


def kfold_split(
    targets: torch.Tensor, kfold: int, fold: int, seed: int, classes: list[str] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices (train, val) of fold 0..kfold-1 of scikit-learn's StratifiedKFold, shuffled by seed."""
    from sklearn.model_selection import StratifiedKFold

    check_class_sizes(targets, kfold, f"--kfold {kfold}", classes)
    folds = StratifiedKFold(kfold, shuffle=True, random_state=seed).split(np.zeros(len(targets)), targets)
    train, val = list(folds)[fold]
    return torch.from_numpy(train), torch.from_numpy(val)


def check_class_sizes(targets: torch.Tensor, needed: int, flag: str, classes: list[str] | None = None) -> None:
    counts = torch.bincount(targets, minlength=len(classes or ()))
    if counts.min() < needed:
        smallest, n = int(counts.argmin()), int(counts.min())
        name = repr(printable(classes[smallest])) if classes else f"number {smallest}"
        raise UserError(f"{flag}: class {name} has {n} image{'s' * (n != 1)}; needs at least {needed}")


def read_splits(data: Data, world: World, *, labelled: bool = True) -> tuple[Dataset, Dataset | None]:
    """The data set's own (train, val); val is None without val/. Rank 0 reads first, so that it alone downloads."""
    root = data.data_path or "data"
    if not world.is_main:
        barrier()
    train = read_split(data.dataset, root, "train", labelled)
    assert train is not None  # only val/ may be missing
    val = read_split(data.dataset, root, "val", labelled, train.classes)
    if world.is_main:
        barrier()
    barrier()  # an output folder may be created among the images only after all ranks have read them
    return train, val


def load_data(data: Data, world: World) -> tuple[Dataset, Dataset]:
    """Labelled (train, val) data sets, split as the settings say."""
    train, val = read_splits(data, world)
    if len(train.classes) < 2:
        raise UserError(
            f"--data_path {data.data_path}: one class ({train.classes[0]}); a classifier needs at least two"
        )
    targets, seed, classes = train.targets, data.split_seed, train.classes
    if data.kfold:
        train_index, val_index = kfold_split(targets, data.kfold, int(data.fold), seed, classes)
        train, val = train.subset(train_index), train.subset(val_index)
    elif data.val_split:
        train_index, val_index = stratified_split(targets, data.val_split, seed, classes)
        train, val = train.subset(train_index), train.subset(val_index)
    elif val is None:
        raise UserError(
            f"--data_path {data.data_path}: has no val/ folder; add one, or give --val_split 0.2 or --kfold 5"
        )
    if data.train_subset is not None:
        train = train.subset(stratified_subset(train.targets, data.train_subset, seed, classes))
    return train, val
