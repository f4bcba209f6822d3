"""Reports of training: pretraining's table of losses and what it says of them; the folds of a k-fold run."""

import json

import pytest

from tests.harness.training import new_run
from util.cli.finetune import FinetuneOptions
from util.report.training import write_kfold_report, write_pretrain_report
from util.train.folds import Summary


@pytest.fixture
def report(tmp_path):
    """report(losses of sigma 80 and 0.002 per epoch, weighting) -> its text."""

    def write(epochs: list[tuple[float, float]], loss_weighting: str) -> str:
        lines = [
            {"epoch": e, "train_loss": a + b, "train_loss_0": a, "train_loss_1": b, "train_lr": 1e-3, "seconds": 2.0}
            for e, (a, b) in enumerate(epochs)
        ]
        (tmp_path / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (tmp_path / "reconstruction_epoch_0.png").write_bytes(b"")
        noprop = {"sigma_data": 0.5, "loss_weighting": loss_weighting}
        meta = {"dataset": "digits", "sigmas": [80.0, 0.002, 0.0], "noprop": noprop}
        write_pretrain_report(str(tmp_path), new_run(kind="pretrain").options, meta, [])
        return (tmp_path / "report.md").read_text()

    return write


def table(text: str) -> list[str]:
    return [line for line in text.partition("## Settings")[0].splitlines() if line.startswith("|")]


def test_a_report_of_one_epoch_has_one_column(report):
    text = report([(0.75, 1.0)], "edm")
    assert table(text) == [
        "| loss | epoch 0 |",
        "|---|---|",
        "| σ = 80 | 0.75 |",
        "| σ = 0.002 | 1 |",
        "| sum | 1.75 |",
    ]
    assert "\n1 epoch, 2 s of training; T = 2 levels.\n\n|" in text


def test_a_report_of_more_epochs_compares_the_first_with_the_last(report):
    rows = table(report([(0.75, 1.25), (0.5, 1.0), (0.25, 1.0)], "edm"))
    assert [rows[0], *rows[2:]] == [
        "| loss | epoch 0 | epoch 2 |",
        "| σ = 80 | 0.75 | 0.25 |",
        "| σ = 0.002 | 1.25 | 1 |",
        "| sum | 2 | 1.25 |",
    ]


def test_a_report_without_log_has_no_table(report):
    assert not table(report([], "edm"))


@pytest.mark.parametrize(
    "weighting,lowest,said",
    [
        ("edm", 1.01, "stays near 1,"),
        ("none", 3.9e-6, "stays near 4e-06,"),  # E|c_skip (x + sigma eps) - x|^2 = 1 / (1/0.5^2 + 1/0.002^2)
        ("edm", 0.5, None),
        ("none", 1.0, None),
    ],
)
def test_report_says_why_the_lowest_level_hardly_learns_where_it_does_not(report, weighting, lowest, said):
    text = report([(1.0, 2.0), (0.5, lowest)], weighting)
    assert (said is None) == ("cannot be told from texture" not in text)
    assert said is None or f"The loss of σ = 0.002 {said} that of a level that predicts nothing" in text


def test_report_says_what_the_numbers_below_the_picture_are(report):
    before, after = report([(1.0, 1.0)], "edm").split("(reconstruction_epoch_0.png)")
    assert "PSNR on masked patches. It can fall while the steps add detail" in after and "PSNR" not in before


def test_the_report_of_folds_has_the_mean_the_deviation_and_each_fold_and_is_printed(tmp_path, capsys):
    scores = {"val_acc1": {"mean": 92.0, "std": 2.6458, "folds": [90.0, 91.0, 95.0]}}
    options = FinetuneOptions.of(kfold=3, output_dir=str(tmp_path))
    write_kfold_report(options, Summary(scores, 3, ["grey images"]))
    said, printed = (tmp_path / "report.md").read_text(), capsys.readouterr().out
    assert said.startswith("# 3-fold run\n") and "3-fold run</h1>" in (tmp_path / "report.html").read_text()
    for text in (said, printed):
        assert "| score | mean | std | fold 0 | fold 1 | fold 2 |\n|---|---|---|---|---|---|\n" in text
        assert "| acc1 | 92.00 | 2.65 | 90.00 | 91.00 | 95.00 |" in text
        assert "probabilities of 3 images" in text and "\n- grey images\n" in text
