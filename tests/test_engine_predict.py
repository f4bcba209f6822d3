"""What prediction refuses of its networks' answers."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine_predict import require_finite
from util.errors import UserError


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_the_member_and_the_image_of_the_first_answer_that_is_no_number_are_named(bad):
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
