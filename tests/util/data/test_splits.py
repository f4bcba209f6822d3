"""Stratified splits and folds."""

import pytest
import torch

from util.cli.settings import Data
from util.data.splits import kfold_split, load_data, stratified_split, stratified_subset
from util.dist import World
from util.errors import UserError


def test_stratified_splits_are_disjoint_complete_seeded_and_balanced():
    targets = torch.tensor([0] * 40 + [1] * 20)
    train, val = stratified_split(targets, 0.25, seed=3)
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(60))
    assert torch.bincount(targets[val]).tolist() == [10, 5]
    assert (
        stratified_split(targets, 0.25, seed=3)[1].tolist()
        == val.tolist()
        != stratified_split(targets, 0.25, seed=4)[1].tolist()
    )
    folds = [kfold_split(targets, 5, k, seed=0)[1] for k in range(5)]
    assert sorted(torch.cat(folds).tolist()) == list(range(60))
    assert all(torch.bincount(targets[f]).tolist() == [8, 4] for f in folds)
    with pytest.raises(UserError, match=r"--kfold 30: class 'rare' has 20 images; needs at least 30"):
        kfold_split(targets, 30, 0, seed=0, classes=["common", "rare"])
    with pytest.raises(UserError, match=r"--val_split 0.5: class 'single' has 1 image; needs at least 2"):
        stratified_split(torch.tensor([0, 0, 1]), 0.5, seed=0, classes=["double", "single"])
    with pytest.raises(UserError, match=r"--val_split 0.1: .*test_size = 1"):
        stratified_split(torch.tensor([0, 1] * 4), 0.1, seed=0)


def test_a_subset_is_stratified_and_seeded():
    targets = torch.tensor([0] * 600 + [1] * 300 + [2] * 100)
    kept = stratified_subset(targets, 50, seed=3)
    assert torch.bincount(targets[kept]).tolist() == [30, 15, 5] and len(set(kept.tolist())) == 50
    assert torch.equal(kept, stratified_subset(targets, 50, seed=3))
    assert not torch.equal(kept, stratified_subset(targets, 50, seed=4))
    assert torch.equal(stratified_subset(targets, 1000, seed=0), torch.arange(1000))
    for number, words in ((2, "3 .* to 1000"), (1001, "3 .* to 1000"), (999, "--train_subset 999")):
        with pytest.raises(UserError, match=words):
            stratified_subset(targets, number, seed=0)
    with pytest.raises(UserError, match="--train_subset 5: would leave no image of class 'rare'; give more"):
        stratified_subset(torch.tensor([0] * 500 + [1] * 5), 5, seed=0, classes=["common", "rare"])
    train, _ = load_data(Data(dataset="digits", train_subset=100, split_seed=1), World())
    assert len(train) == 100 and torch.bincount(train.targets).min() >= 9
