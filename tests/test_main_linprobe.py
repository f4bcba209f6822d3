"""main_linprobe.py as users run it."""

import json
import os

import numpy as np
import pytest
from PIL import Image

import main_linprobe
from bench.ranks import Ranks
from util.cli.script import run_main
from util.errors import UserError
from util.probe import features

KEYWORDS = dict(embed_dim=24, depth=2, num_heads=3, mlp_ratio=2.0)


@pytest.mark.slow
def test_two_ranks_score_as_one(tmp_path, capsys):
    one, two = tmp_path / "one", tmp_path / "two"
    line = [
        "--model",
        "vit_custom_patch2",
        "--random_init",
        "--model_kwargs",
        *[f"{k}={v}" for k, v in KEYWORDS.items()],
        *"--dataset digits --device cpu --amp off".split(),
    ]
    assert main_linprobe.main([*line, "--output_dir", str(one)]) == 0
    out = capsys.readouterr().out
    result = json.loads((one / "log.txt").read_text())
    assert f"k-NN accuracy (k 20, temperature 0.07): {result['knn_acc1']:.2f}%" in out
    assert f"linear probe accuracy: {result['linear_acc1']:.2f}%" in out
    assert (result["n_train"], result["n_val"], result["feature_dim"]) == (1437, 360, 24)
    assert min(result["linear_acc1"], result["knn_acc1"]) > 20.0  # chance is 10
    assert Ranks(2, lambda: main_linprobe.main([*line, "--output_dir", str(two)])).exit_codes() == [0, 0]
    other = json.loads((two / "log.txt").read_text())
    for key in ("knn_acc1", "linear_acc1", "linear_l2"):
        assert other[key] == pytest.approx(result[key], abs=0.3)
    report, right = (two / "report.md").read_text(), round(3.6 * other["linear_acc1"])
    low, high = (100 * p for p in wilson(right, 360))
    assert "| linear probe |" in report
    assert f"{right} of 360 images are right: 95 % interval {low:.1f} to {high:.1f} % (Wilson)" in report


def test_training_images_of_which_one_class_is_readable_are_one_line(tmp_path):
    for i, name in enumerate(("red", "blue")):
        for split, n in (("train", 3), ("val", 1)):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for j in range(n):
                Image.new("RGB", (9, 9), name).save(folder / f"{j}.png")
                if split == "train" and i:
                    (folder / f"{j}.png").write_bytes(b"")
    line = [
        "--model",
        "vit_custom_patch2",
        "--random_init",
        "--model_kwargs",
        *[f"{k}={v}" for k, v in KEYWORDS.items()],
        "--data_path",
        str(tmp_path),
        *"--input_size 8 --device cpu --num_workers 0".split(),
    ]
    with pytest.raises(UserError, match="its 3 readable training images have one class"):
        main_linprobe.main([*line, "--on_bad_image", "skip"])


def wilson(right: int, n: int) -> np.ndarray:
    """Where |p - right / n| is 1.96 standard errors of p: the roots of a quadratic (Wilson 1927)."""
    z2, p = 1.959963984540054**2, right / n
    return np.sort(np.roots([1 + z2 / n, -2 * p - z2 / n, p * p]))


def test_a_rank_whose_features_are_not_finite_ends_all_in_one_line(tmp_path, monkeypatch):
    real = features.pooled_features

    def broken_on_rank_1(model, images, pool):
        return real(model, images, pool) * (float("nan") if os.environ.get("RANK") == "1" else 1.0)

    monkeypatch.setattr(features, "pooled_features", broken_on_rank_1)
    line = """
        --model vit_custom_patch4 --random_init --model_kwargs embed_dim=12 depth=1 num_heads=2 --dataset digits
        --device cpu --amp off
    """.split()

    def call() -> None:
        run_main(lambda: main_linprobe.main(line))

    assert Ranks(2, call, tmp_path / "said.txt").exit_codes() == [2, 2]
    said = (tmp_path / "said.txt").read_text()
    assert said.count("NaN or infinite") == 2 and "another rank" not in said, said
