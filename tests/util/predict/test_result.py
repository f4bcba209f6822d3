"""What prediction computes, put together from parts."""

import numpy as np

from util.predict.result import Prediction


def test_parts_of_a_prediction_are_joined_in_image_order():
    one, many, geometric = np.random.default_rng(0).random((3, 2, 7, 4))  # members, images, classes
    numbers = np.array([2, 3, 5, 7, 11, 13, 17])
    cut = [[5, 0], [6], [3, 1, 4, 2]]
    parts = [(numbers[rows], one[:, rows], many[:, rows], geometric[:, rows]) for rows in cut]
    joined = Prediction.joined([0, 4], parts, {8: "late", 1: "early"})
    assert joined.views == [0, 4] and list(joined.bad) == [1, 8] and np.array_equal(joined.index, numbers)
    for got, expected in ((joined.one_view, one), (joined.all_views, many), (joined.geometric, geometric)):
        assert np.array_equal(got, expected)
