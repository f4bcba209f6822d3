"""The result of a prediction."""

from dataclasses import dataclass

import numpy as np


@dataclass
class Prediction:
    """Probabilities float64 [M, n, C] of the n readable images.

    one_view, all_views: each member's mean over its networks, with view 1 only and over all `views` (numbers 0..11, see
    augment/views.py). geometric: the geometric mean over networks and views, for stacking. index: int64 [n],
    ascending indices into the data. bad: image number -> why it cannot be read.
    """

    views: list[int]
    index: np.ndarray
    one_view: np.ndarray
    all_views: np.ndarray
    geometric: np.ndarray
    bad: dict[int, str]

    @classmethod
    def joined(cls, views: list[int], parts: list[tuple[np.ndarray, ...]], bad: dict[int, str]) -> "Prediction":
        """From parts (index, one_view, all_views, geometric) in any order."""
        index = np.concatenate([part[0] for part in parts])
        order = np.argsort(index)
        one, many, geometric = (np.concatenate([part[k] for part in parts], axis=1)[:, order] for k in (1, 2, 3))
        return cls(views, index[order], one, many, geometric, dict(sorted(bad.items())))
