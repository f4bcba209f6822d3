"""k-fold members on their own training images: each image is predicted by networks that have not seen it.

This shows what views, weights and the ensemble gain on new images, without a test set.
"""

import os
import re

import numpy as np

from util.data.datasets import FileDataset
from util.data.views import ViewReader
from util.errors import UserError
from util.predict.ensemble import read_oof
from util.predict.members import Member


def fold_of_nets(members: list[Member]) -> list[int]:
    """Validation fold of each network, in the order of load_nets."""
    folds = []
    for member in members:
        for path in member.paths:
            match = re.fullmatch(r"fold-(\d+)", os.path.basename(os.path.dirname(path)))
            if match is None:
                raise UserError(
                    f"--out_of_fold: {member.name} is a single network; give the --output_dir of main_finetune.py "
                    "--kfold"
                )
            folds.append(int(match[1]))
    return folds


def fold_of_images(members: list[Member], classes: list[str], data: FileDataset, ids: list[str]) -> np.ndarray:
    """Validation fold of each image, int64 [N]; -1 for unreadable images, which training left out.

    UserError if the members have different folds, or a readable image is in no fold.
    """
    oof = read_oof(members, classes, "--out_of_fold")
    if not oof.same_folds:
        raise UserError("--out_of_fold: the members have different folds; train them with the same --split_seed")
    rows = oof.rows(ids)
    folds = np.where(rows < 0, -1, oof.folds[rows])
    reader = ViewReader(data, [(8, 8, 3)], [0])
    for i in np.flatnonzero(folds < 0).tolist():
        if reader[i][1]:
            raise UserError(
                f"--out_of_fold: {ids[i]} is in no fold of {members[0].name}; --data_path should be its training set"
            )
    if folds.max() < 0:
        raise UserError(f"--data_path: none of its {len(ids)} images can be read")
    return folds
