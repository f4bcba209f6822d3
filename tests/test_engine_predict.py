"""Which network predicts which image, and what is refused of the answers; main_predict.py's tests have the numbers."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import engine_predict
from engine_predict import predict_out_of_fold, require_finite
from util.data.datasets import ArrayDataset
from util.dist import World
from util.errors import UserError
from util.predict.result import Prediction


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_the_first_nan_prediction_names_its_member_and_image(bad):
    """Networks 0 and 1 are the first member's folds; images 4, 9 and 2 are in the batch."""
    nets = [SimpleNamespace(member=member) for member in (0, 0, 1)]
    data, index = SimpleNamespace(name=lambda i: f"image {i}"), torch.tensor([4, 9, 2])
    p = np.full((3, 3, 2, 5), 0.2)  # [nets, b, V, C]
    require_finite(p, nets, data, index)
    p[2, 1, 1, 3] = bad
    with pytest.raises(UserError, match=r"^--checkpoints: member 2 gives NaN or infinity for image 9; try --amp off$"):
        require_finite(p, nets, data, index)
    p[1, 2, 0, 0] = bad
    with pytest.raises(UserError, match=r"member 1 gives NaN or infinity for image 2;"):
        require_finite(p, nets, data, index)


def test_each_fold_is_predicted_by_its_networks_at_its_images(monkeypatch):
    """Six images of folds 1, 0, 2, -1 (unreadable), 0, 1; three folds of two members, networks 0 to 5."""
    asked_for = {}

    def predicted(nets, data, asked, reading, world):
        """Each image's number, of all but the unreadable one."""
        number = data.images[:, 0, 0, 0].numpy()
        asked_for[tuple(nets)] = number.tolist()
        read = np.flatnonzero(number != 3)
        one, many, geometric = (np.full((2, len(read), 1), 10.0 * k) + number[read, None] for k in (1, 2, 3))
        return Prediction([0], read, one, many, geometric, {int(i): "broken" for i in np.flatnonzero(number == 3)})

    monkeypatch.setattr(engine_predict, "predict", predicted)
    data = ArrayDataset(torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1), torch.zeros(6, dtype=torch.long), ["a"])
    folds = np.array([1, 0, 2, -1, 0, 1])
    asked = SimpleNamespace(views=[0, 5])
    found = predict_out_of_fold(list(range(6)), [0, 1, 2, 0, 1, 2], data, folds, asked, None, World())
    assert asked_for == {(0, 3): [1, 4], (1, 4): [0, 5], (2, 5): [2, 3]}
    assert (found.views, found.index.tolist(), found.bad) == ([0, 5], [0, 1, 2, 4, 5], {3: "broken"})
    for k, values in enumerate((found.one_view, found.all_views, found.geometric), 1):
        assert values[0, :, 0].tolist() == [10 * k + i for i in (0, 1, 2, 4, 5)]
