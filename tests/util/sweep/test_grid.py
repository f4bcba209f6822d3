"""Axes, arms and the words of a sweep's lines."""

import numpy as np
import pytest

from util.errors import UserError
from util.sweep.grid import expand, name_of, of_stage, parse_axis, parse_stages, words_of_value

TUNE = [["main_finetune.py", "--dataset", "digits"]]


@pytest.mark.parametrize(
    "text,values",
    [
        ("seed=0..4", ["0", "1", "2", "3", "4"]),
        ("seed=-1..1", ["-1", "0", "1"]),
        ("alpha_blend=0,15, 50", ["0", "15", "50"]),
        ("noise_snr=-,30", ["-", "30"]),
        ("smoothing=lin(0,0.2,3)", ["0", "0.1", "0.2"]),
        ("lr=1e-4", ["1e-4"]),
    ],
)
def test_values_are_lists_ranges_and_points(text, values):
    assert list(parse_axis(text).values) == values


def test_log_points_are_those_of_numpy():
    values = [float(v) for v in parse_axis("lr=log(1e-4,3e-2,7)").values]
    assert np.allclose(values, np.geomspace(1e-4, 3e-2, 7), rtol=1e-5)


def test_values_from_a_file(tmp_path):
    (tmp_path / "lrs.txt").write_text("# tried before\n1e-3\n\n3e-3\n")
    assert parse_axis(f"lr=@{tmp_path / 'lrs.txt'}").values == ("1e-3", "3e-3")


@pytest.mark.parametrize(
    "grid,words",
    [
        (["seed"], "--grid seed: should be NAME=VALUES"),
        (["seed="], "has no values"),
        (["seed=1,1"], "has a value twice"),
        (["seed=3..1"], "should increase"),
        (["lr=log(0,1,3)"], "above 0"),
        (["lr=@nowhere.txt"], "nowhere.txt cannot be read"),
        (["alpha_blnd=0"], "no flag --alpha_blnd; did you mean alpha_blend"),
        (["seed=0", "seed=1"], "is given twice"),
        (["pretrain.T=1"], "no stage is named pretrain; there are finetune"),
    ],
)
def test_a_grid_that_cannot_be_is_one_line(grid, words):
    with pytest.raises(UserError, match=words) as caught:
        expand([grid], parse_stages(TUNE))
    assert "\n" not in str(caught.value)


def test_arms_are_products_and_several_grids_their_union():
    arms = expand([["alpha_blend=0,15", "x", "mixup=0,0.8"], ["noise_snr=20"]], parse_stages(TUNE))
    assert [name_of(arm) for arm in arms] == [
        "alpha_blend=0,mixup=0",
        "alpha_blend=0,mixup=0.8",
        "alpha_blend=15,mixup=0",
        "alpha_blend=15,mixup=0.8",
        "noise_snr=20",
    ]
    with pytest.raises(UserError, match="the arm seed=1 is given twice"):
        expand([["seed=0..1"], ["seed=1"]], parse_stages(TUNE))


def test_each_stage_gets_the_flags_that_it_has():
    stages = parse_stages([["main_pretrain_noprop.py"], ["python3", "main_finetune.py"], ["main_finetune.py"]])
    assert [stage.key for stage in stages] == ["pretrain", "finetune", "finetune2"]
    arm = {"T": "4", "seed": "1", "finetune2.lr": "1e-3"}
    assert [of_stage(arm, stage) for stage in stages] == [
        {"T": "4", "seed": "1"},
        {"seed": "1"},
        {"seed": "1", "lr": "1e-3"},
    ]


def test_words_of_switches_lists_and_values_left_out():
    flags = parse_stages(TUNE)[0].options.flags()
    words = {("freeze_bn", "on"): ["--freeze_bn"], ("freeze_bn", "off"): [], ("noise_snr", "-"): []}
    words |= {("noise_layer", "0+6"): ["--noise_layer", "0", "6"], ("lr", "1e-3"): ["--lr", "1e-3"]}
    assert {(name, value): words_of_value(flags[name], value) for name, value in words} == words
    with pytest.raises(UserError, match="freeze_bn=yes: is a switch; should be on or off"):
        words_of_value(flags["freeze_bn"], "yes")


def test_names_hold_no_character_that_a_folder_could_not():
    assert name_of({"data_path": "a/b c", "lr": "1e-3"}) == "data_path=a_b_c,lr=1e-3"
