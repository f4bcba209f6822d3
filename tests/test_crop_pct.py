"""What evaluation sees of a file: one rule, which the checkpoint carries to --eval, the probe and prediction."""

import csv
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

import main_finetune
import main_linprobe
import main_predict
from tests.harness.runs import VIT, finetune, save_member
from tests.harness.training import resolve
from util.checkpoint import peek_meta
from util.data import loader
from util.errors import UserError
from util.meta import check_meta

QUICK = ["--device", "cpu", "--num_workers", "0", "--amp", "off"]
NET = ["--model", "vit_custom_patch8", "--model_kwargs", "embed_dim=24", "depth=1", "num_heads=3", "--input_size", "32"]


@pytest.fixture(scope="module")
def photo_folder(tmp_path_factory):
    """{train,val}/{blue,red}/*.png: the middle has the class's colour, the border the other's."""
    root, rng = tmp_path_factory.mktemp("middles"), np.random.default_rng(0)
    for split, n in (("train", 16), ("val", 6)):
        for label, name in enumerate(("blue", "red")):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 120, (44, 40, 3), dtype=np.uint8)
                pixels[..., 2 * label] += 120
                pixels[12:32, 10:30] = pixels[12:32, 10:30, ::-1]
                Image.fromarray(pixels).save(root / split / name / f"{i:02d}.png")
    return root


@pytest.fixture(scope="module")
def folds(photo_folder, tmp_path_factory):
    """A run of two folds that was validated on the middle of each photo."""
    out = tmp_path_factory.mktemp("folds")
    line = [
        "--data_path",
        photo_folder / "train",
        "--kfold",
        2,
        "--crop_pct",
        0.4,
        "--epochs",
        3,
        "--lr",
        "3e-3",
        "--scale",
        0.1,
        0.2,
    ]
    assert finetune(*line, "--batch_size", 8, "--warmup_epochs", 0, *NET, *QUICK, "--output_dir", out) == 0
    return out


def rows_of(path) -> dict[str, list[str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return {row[0]: row[1:] for row in list(csv.reader(file))[1:]}


@pytest.mark.slow
def test_validation_and_view_1_give_the_same_probabilities(folds, photo_folder, tmp_path, capsys):
    assert peek_meta(str(folds / "fold-0" / "checkpoint-best.pth"))["crop_pct"] == 0.4
    line = ["--checkpoints", folds, "--data_path", photo_folder / "train", "--out_of_fold", "--views", 1]
    assert main_predict.main([*map(str, line), *QUICK, "--output_dir", str(tmp_path)]) == 0
    predicted, validated = rows_of(tmp_path / "predictions.csv"), rows_of(folds / "oof.csv")
    assert predicted.keys() == validated.keys() and len(predicted) == 32
    p, q = (np.array([[float(v) for v in table[n][-2:]] for n in predicted]) for table in (predicted, validated))
    np.testing.assert_allclose(p, q, atol=1e-6)


def test_eval_scores_what_view_1_sees(folds, photo_folder, tmp_path, capsys):
    path = folds / "fold-0" / "checkpoint-best.pth"
    line = ["--checkpoints", path, "--data_path", photo_folder / "val", "--views", 1, "--output_dir", tmp_path]
    assert main_predict.main([*map(str, line), *QUICK]) == 0
    predicted = json.loads((tmp_path / "results.json").read_text())["results"][0]
    losses = {}
    for crop in ("", "--crop_pct 1"):
        capsys.readouterr()
        line = ["--eval", "--resume", path, "--data_path", photo_folder, *crop.split()]
        assert main_finetune.main([*map(str, line), *QUICK]) == 0
        losses[crop] = float(re.search(r"\bloss: ([\d.]+)", capsys.readouterr().out)[1])
    assert losses[""] == pytest.approx(predicted["log_loss"], abs=1e-4)
    assert abs(losses["--crop_pct 1"] - losses[""]) > 1e-3  # another crop is another score


def test_the_linear_probe_sees_what_the_checkpoint_was_validated_on(folds, photo_folder, monkeypatch):
    seen, real = [], loader.build_eval_transform
    monkeypatch.setattr(loader, "build_eval_transform", lambda *a: seen.append(a) or real(*a))
    line = ["--checkpoint", str(folds / "fold-0" / "checkpoint-best.pth"), "--data_path", str(photo_folder)]
    assert main_linprobe.main([*line, *QUICK]) == 0
    assert seen == [((32, 32), 0.4)] * 2


@pytest.mark.parametrize(
    "argv,source,expected",
    [
        (["--input_size", "224"], {}, 0.875),
        (["--input_size", "225"], {}, 1.0),
        (["--input_size", "96", "288"], {}, 1.0),
        (["--input_size", "96", "--crop_pct", "0.5"], {"crop_pct": 0.7}, 0.5),
        (["--finetune", "x.pth"], {"img_size": [96, 96], "crop_pct": 0.7}, 0.7),  # the net goes on at its size
        (["--finetune", "x.pth", "--input_size", "288"], {"img_size": [96, 96], "crop_pct": 0.7}, 1.0),
        (["--eval", "--resume", "x.pth", "--input_size", "288"], {"img_size": [96, 96], "crop_pct": 0.7}, 0.7),
        (["--eval", "--resume", "x.pth"], {"img_size": [288, 288]}, 1.0),  # from before the checkpoint said it
    ],
)
def test_the_flag_wins_then_the_checkpoint_then_the_size(argv, source, expected):
    assert resolve(["--model", "vit_tiny_patch16", *argv], ["a", "b"], source)[0]["crop_pct"] == expected


@pytest.mark.parametrize("value", [0, 1e-9, 1.5, "1", None, float("nan"), [1.0], True])
def test_a_checkpoint_with_another_share_is_refused(value):
    with pytest.raises(UserError, match=r"x\.pth: .*crop_pct is .*should be 0\.1 to 1"):
        check_meta({"crop_pct": value}, "x.pth")


def test_in_memory_sets_are_whole_in_the_checkpoint(tmp_path):
    line = "--dataset digits --model vit_custom_patch4 --model_kwargs embed_dim=12 depth=1 num_heads=2".split()
    assert finetune(*line, "--epochs", 1, "--batch_size", 512, *QUICK, "--output_dir", tmp_path) == 0
    assert peek_meta(str(tmp_path / "checkpoint-best.pth"))["crop_pct"] == 1.0


def test_meta_of_any_share_loads(tmp_path):
    save_member(tmp_path / "x.pth", VIT, crop_pct=1)
    torch.load(tmp_path / "x.pth", weights_only=True)
    assert peek_meta(str(tmp_path / "x.pth"))["crop_pct"] == 1
