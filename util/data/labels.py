"""The images to predict, their IDs in tables, and their labels, if any."""

import csv
import os
from collections import defaultdict
from collections.abc import Callable

import torch

from util.data.datasets import Dataset, FileDataset, notes_of, read_split, read_unlabelled
from util.data.image_files import class_folders, class_name
from util.errors import UserError, listed, reason_of
from util.files import composed, printable


def spreadsheet_safe(text: str) -> str:
    """An apostrophe before = + - @ tab and carriage return, so that spreadsheets do not read the field as a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def without_apostrophe(text: str) -> str:
    """Inverse of spreadsheet_safe; other text does not change."""
    return text[1:] if spreadsheet_safe(text[1:]) == text else text


def class_finder(classes: list[str]) -> Callable[[str], int | None]:
    """text -> number of the named class, or None.

    Exact names come first; then spaces at the ends and spreadsheet_safe's apostrophe are ignored. Accents may be in
    either of Unicode's forms; those of `classes` are composed.
    """
    number = {c: i for i, c in enumerate(classes)}
    stripped = defaultdict(list)
    for i, c in enumerate(classes):
        stripped[c.strip()].append(i)

    def find(text: str) -> int | None:
        text = composed(text)
        bare = text.strip()
        for name in (text, bare, without_apostrophe(text), without_apostrophe(bare)):
            if name in number:
                return number[name]
        same = stripped.get(bare, [])
        return same[0] if len(same) == 1 else None

    return find


def image_id(data: Dataset, i: int) -> str:
    """The path below --data_path, with forward slashes; bytes that are not UTF-8 become escapes."""
    return printable(data.name(i)).replace(os.sep, "/")


def read_images(
    dataset: str, root: str, classes: list[str], labels: str | None = None, *, trained_on: bool = False
) -> tuple[Dataset, list[str], list[str]]:
    """(data sorted by ID, IDs, notes for the report). data.targets: indices into `classes`, -1 without a label.

    A folder is labelled if every image is in a subfolder named after a class; a CSV file of labels takes precedence.
    Other data sets give their labelled test split. trained_on: read the training images instead; the root is then
    train/ if there is one.
    """
    notes: list[str] = []
    data: Dataset | None
    if dataset == "folder" and trained_on:
        data = read_split(dataset, root, "train", classes=classes)
    elif dataset == "folder":
        data = images = read_unlabelled(root)
        images.targets = _folder_targets(images, root, classes, notes) if labels is None else images.targets
    else:
        data = read_split(dataset, root, "train" if trained_on else "val")
        assert data is not None  # only folders may lack a split
        if sorted(data.classes) != sorted(classes):
            odd = sorted(set(data.classes) ^ set(classes))[0]
            raise UserError(f"--dataset {dataset}: its classes differ from those of --checkpoints (e.g. {odd})")
        data.targets = torch.tensor([classes.index(c) for c in data.classes])[data.targets]
    assert data is not None
    ids = [image_id(data, i) for i in range(len(data))]
    order = sorted(range(len(data)), key=ids.__getitem__)
    data, ids = data.subset(torch.tensor(order)), [ids[i] for i in order]
    if labels is not None:
        data.targets = torch.tensor(read_labels(labels, ids, classes, notes))
    data.classes = list(classes)
    return data, ids, notes + notes_of(data)


def _folder_targets(data: FileDataset, root: str, classes: list[str], notes: list[str]) -> torch.Tensor:
    number = {c: i for i, c in enumerate(classes)}
    parts = [os.path.relpath(path, root).split(os.sep) for path in data.paths]
    tops = [number.get(class_name(p[0])) if len(p) > 1 else None for p in parts]
    if None not in tops:
        return torch.tensor(tops)
    folders = [class_name(name) for name in class_folders(root)]
    if set(folders) & set(classes):  # a mistyped class must not look like a folder without labels
        odd = [f for f in folders if f not in number] or ["images outside them"]
        notes.append(f"not scored: besides folders named after classes, {root} has {listed(odd)}")
    return data.targets


def read_labels(path: str, ids: list[str], classes: list[str], notes: list[str]) -> list[int]:
    """Class number per image, -1 without a label, from a CSV file with the columns ID and label.

    An ID is the image's path below --data_path, or its file name if that is unique, with or without extension. Exact
    names come first; then spaces at the ends and an apostrophe before = + - @ are ignored.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:  # -sig: spreadsheets write a byte-order mark
            header, *rows = list(csv.reader(file)) or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--labels {path}: cannot be read ({reason_of(error)})") from None
    columns = [name.strip().lower() for name in header]
    if not {"id", "label"} <= set(columns):
        raise UserError(
            f"--labels {path}: its first line is {','.join(header)[:80]!r}; should have the columns ID,label"
        )
    id_column, label_column = columns.index("id"), columns.index("label")
    class_number, find, targets, unknown = class_finder(classes), _finder(ids, path), [-1] * len(ids), []
    for line, row in enumerate(rows, 2):
        if len(row) <= max(id_column, label_column):
            continue  # a blank line
        name, label = row[id_column], row[label_column]
        number = class_number(label)
        if number is None and not label.strip():
            continue  # an image without a label
        if number is None:
            raise UserError(f"--labels {path}: line {line}: class {label!r} is not one of {listed(classes, 10)}")
        i = find(name)
        if i is None:
            unknown.append(name)
        elif targets[i] not in (-1, number):
            raise UserError(f"--labels {path}: line {line}: {name} already has the label {classes[targets[i]]}")
        else:
            targets[i] = number
    if max(targets) < 0:
        example = f"; it has {unknown[0]!r}, the data has {ids[0]!r}" if unknown else ""
        raise UserError(f"--labels {path}: has no label for any of the {len(ids)} images{example}")
    if unknown:
        notes.append(f"{len(unknown)} lines of {path} name unknown images, e.g. {unknown[0]}")
    return targets


def _finder(ids: list[str], path: str):
    """name -> number of the image, or None. Exact paths come first, then names without folder or extension, then names
    that differ in spaces at the ends or in Unicode's form."""
    levels: list[dict[str, list[int]]] = [defaultdict(list) for _ in range(12)]
    for i, name in enumerate(ids):
        base = name.rsplit("/", 1)[-1]
        keys = [name, os.path.splitext(name)[0], base, os.path.splitext(base)[0]]
        bare = [key.strip() for key in keys]
        for level, key in zip(levels, keys + bare + [composed(key) for key in bare]):
            level[key].append(i)

    def find(name: str) -> int | None:
        bare = name.strip()
        for key in dict.fromkeys((name, bare, bare.removeprefix("./"), without_apostrophe(bare), composed(bare))):
            for level in levels:
                numbers = level.get(key, [])
                if len(numbers) > 1:
                    first, second = (ids[i] for i in numbers[:2])
                    raise UserError(
                        f"--labels {path}: {name} could be {first} or {second}; give the path below --data_path"
                    )
                if numbers:
                    return numbers[0]
        return None

    return find
