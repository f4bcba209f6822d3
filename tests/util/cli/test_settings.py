"""What a group of settings makes of its flags."""

import pytest

from util.cli.settings import Input
from util.errors import UserError

COLOUR = (0.1, 0.2, 0.6), (0.2, 0.4, 0.3)


@pytest.mark.parametrize(
    "given,in_chans,default,expected",
    [
        ({}, 3, COLOUR, COLOUR),
        ({}, 1, COLOUR, ((0.3,), (0.3,))),  # of grey images, what the channels have in the mean
        ({}, 3, ((0.3,), (0.4,)), ((0.3,) * 3, (0.4,) * 3)),
        ({"mean": [0.5]}, 3, COLOUR, ((0.5,) * 3, COLOUR[1])),
        ({"std": [0.7, 0.8, 0.9]}, 3, COLOUR, (COLOUR[0], (0.7, 0.8, 0.9))),
    ],
)
def test_normalisation_has_a_value_per_channel(given, in_chans, default, expected):
    mean, std = Input(**given).normalisation(in_chans, default)
    assert mean == pytest.approx(expected[0]) and std == pytest.approx(expected[1])


@pytest.mark.parametrize("given,in_chans", [([0.1, 0.2], 3), ([0.1, 0.2, 0.6], 1)])
def test_as_many_values_as_channels_or_one(given, in_chans):
    with pytest.raises(UserError, match=f"give 1 or {in_chans} values"):
        Input(mean=given).normalisation(in_chans, COLOUR)
