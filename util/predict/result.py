"""What prediction computes."""

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Prediction:
    """Probabilities float64 [M, n, C] of the n readable images.

    one_view, all_views: each member's mean over its networks, with view 1 alone and over the views. geometric: the
    geometric mean over networks and views, for stacking. index: int64 [n], ascending, into the data. bad: image number ->
    why it cannot be read.
    """

    index: np.ndarray
    one_view: np.ndarray
    all_views: np.ndarray
    geometric: np.ndarray
    bad: dict[int, str] = field(default_factory=dict)
