"""curves.png and confusion.png: what their axes, curves and labels are."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure

from util.report import plots
from util.report.plots import plot_confusion, plot_curves


@pytest.fixture
def figure(monkeypatch):
    """figure(): the last one that was drawn."""
    drawn: list[Figure] = []
    monkeypatch.setattr(plots.plt, "close", drawn.append)
    yield lambda: drawn[-1]
    monkeypatch.undo()
    for one in drawn:
        plots.plt.close(one)


@pytest.fixture
def curves(figure, tmp_path):
    """curves(lines, sigmas) -> {title: axes} of the picture."""

    def draw(lines: list[dict], *sigmas: float) -> dict:
        (tmp_path / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
        plot_curves(str(tmp_path / "log.txt"), str(tmp_path / "curves.png"), sigmas)
        return {axis.get_title(): axis for axis in figure().axes}

    return draw


def scores(epoch: int) -> dict:
    loss = {"epoch": epoch, "train_loss": 2.0 / (epoch + 1), "val_loss": 1.5, "train_lr": 1e-3}
    return {**loss, "val_acc1": 40.0 + epoch, "val_acc5": 97.0, "val_balanced_acc": 40.0 + epoch, "val_macro_f1": 38.0}


@pytest.mark.parametrize("epochs", [[0], [0, 1, 2], [7, 8, 9]])
def test_curves_count_epochs_as_log_txt_does(curves, epochs):
    for axis in curves([scores(e) for e in epochs]).values():
        assert all(list(line.get_xdata()) == epochs for line in axis.lines)
        low, high = axis.get_xlim()
        ticks = [t for t in axis.get_xticks() if low <= t <= high]
        assert ticks and all(t == round(t) and epochs[0] <= t <= epochs[-1] for t in ticks)


def test_acc5_does_not_stretch_the_axis_of_acc1(curves):
    axes = curves([scores(e) for e in range(3)])
    acc1 = axes["validation score (%)"]
    assert [line.get_label() for line in acc1.lines] == ["acc1", "balanced_acc", "macro_f1"]
    assert acc1.get_ylim()[1] < 45 and [line.get_label() for line in axes["validation acc5 (%)"].lines] == ["acc5"]


def test_a_curve_that_hides_another_is_thinner_and_broken_in_another_way(curves):
    below, above, _ = curves([scores(e) for e in range(3)])["validation score (%)"].lines
    assert list(below.get_ydata()) == list(above.get_ydata())
    assert below.get_zorder() <= above.get_zorder() and below.get_linewidth() > above.get_linewidth() + 0.5
    assert below.get_markersize() > above.get_markersize() + 1
    assert below.get_linestyle() == "-" and above.get_linestyle() == "--"


@pytest.mark.parametrize("levels", [3, 10])
def test_pretraining_names_the_sigma_of_each_curve_and_the_sum(curves, levels):
    sigmas = [80.0 / 2**i for i in range(levels)]
    losses = {f"train_loss_{i}": 1.0 + i for i in range(levels)}
    total = levels * (levels + 1) / 2 + 0.5
    line = {"epoch": 0, "train_loss": total, **losses, "train_loss_encoder": 0.5, "train_lr": 1e-3}
    axes = curves([line, {**line, "epoch": 1}], *sigmas)
    named = {one.get_label(): list(one.get_ydata()) for one in axes["loss of each noise level"].lines}
    assert list(named) == ["σ = 80", "σ = 40", "σ = 20", "σ = 10", "σ = 5", "σ = 2.5", "σ = 1.25", "σ = 0.625"][
        :levels
    ] + ["σ = 0.312", "σ = 0.156"] * (levels == 10) + ["encoder"]
    assert [named["σ = 40"], named["encoder"]] == [[2.0, 2.0], [0.5, 0.5]]
    assert [list(one.get_ydata()) for one in axes["sum of these losses"].lines] == [[total, total]]
    legend = axes["loss of each noise level"].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == list(named)


def test_losses_that_differ_by_magnitudes_have_a_logarithmic_axis(curves):
    line = {"epoch": 0, "train_loss": 1.0, "train_loss_0": 1.0, "train_loss_1": 4e-6, "train_lr": 0.0}
    axes = curves([line, {**line, "epoch": 1}], 80.0, 0.002)
    assert axes["loss of each noise level"].get_yscale() == "log" and axes["learning rate"].get_yscale() == "linear"


def test_confusion_shows_the_counts_the_share_right_and_no_zeros(figure, tmp_path):
    plot_confusion(np.array([[3, 1], [0, 12]]), ["a", "b"], str(tmp_path / "confusion.png"))
    axis = figure().axes[0]
    assert axis.get_title() == "15 of 16 right (93.8 %)"
    assert {(t.get_position(), t.get_text()) for t in axis.texts} == {((0, 0), "3"), ((1, 0), "1"), ((1, 1), "12")}
    assert np.array_equal(axis.images[0].get_array(), [[0.75, 0.25], [0, 1]])
