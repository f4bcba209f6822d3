"""What a group of settings makes of its flags."""

from dataclasses import fields

import pytest

from augment.alpha_blend import NoiseConfig
from models.noprop_mae import NoPropConfig
from util.cli.settings import Input, Noise, NoProp
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


@pytest.mark.parametrize("flags,prefix,config", [(NoProp(), "", NoPropConfig()), (Noise(), "noise_", NoiseConfig())])
def test_a_network_built_in_python_has_the_flags_defaults(flags, prefix, config):
    """Of all flags but those whose default waits for the data set or for other flags."""
    shared = {f.name: getattr(flags, prefix + f.name, None) for f in fields(config)}
    shared = {name: value for name, value in shared.items() if value is not None}
    for name in ("layer", "timestep") if prefix else ():  # a list of blocks; what the config calls `schedule`
        del shared[name]
    assert len(shared) >= 7
    assert {name: getattr(config, name) for name in shared} == shared
