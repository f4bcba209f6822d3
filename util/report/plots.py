"""Plots of a run, with Matplotlib and without a display."""

from collections.abc import Sequence
from contextlib import contextmanager
from itertools import cycle

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter

from util.files import survive, write_atomic
from util.log import read_log
from util.metrics import BINS
from util.predict.calibration import expected_calibration_error, reliability
from util.report.pictures import sigma_name

NAMES = dict(parse_math=False)  # for tick labels: a class named $a$ is not a formula
# Okabe and Ito's colours, safe for the colour-blind.
COLORS = ("#0072b2", "#e69f00", "#000000", "#009e73", "#cc79a7", "#d55e00")
LEVELS = "loss of each noise level"
STYLES = ("-", "--", ":", "-.")


@contextmanager
def drawing(path: str, rows: int = 1, columns: int = 1, **how):
    """Axes as from plt.subplots; the PNG is written atomically at the end."""
    figure, axes = plt.subplots(rows, columns, **how)
    try:
        with survive(path):
            yield axes
            write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=120, bbox_inches="tight"))
    finally:
        plt.close(figure)


def plot_curves(log_path: str, path: str, sigmas: Sequence[float] = ()) -> None:
    """curves.png from log.txt: losses, scores in percent, the learning rate. sigmas: pretraining's levels."""
    lines = read_log(log_path)
    panels = curve_panels(list(lines[-1]) if lines else [], sigmas)
    if not panels:
        return
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = -(-len(panels) // columns)
    size = (4.6 * columns, 3.6 * rows)
    with drawing(path, rows, columns, figsize=size, squeeze=False, layout="constrained") as axes:
        for axis in axes.flat[len(panels) :]:
            axis.set_axis_off()
        for axis, (title, names) in zip(axes.flat, panels.items()):
            for how, (key, label) in zip(curve_styles(len(names)), names.items()):
                points = [(line["epoch"], line[key]) for line in lines if line.get(key) is not None]
                marker = "o" if len(points) < 16 else None
                axis.plot(*zip(*points), label=label, marker=marker, **how)
            low, high = axis.dataLim.intervaly
            if title == LEVELS and low > 0 and high > 4 * low:
                axis.set_yscale("log")
                axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
                axis.yaxis.set_major_formatter("{x:g}")
                axis.yaxis.set_minor_locator(NullLocator())
            else:
                axis.ticklabel_format(axis="y", scilimits=(-2, 4), useOffset=False)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            if len(lines) == 1:
                axis.set_xlim(lines[0]["epoch"] - 0.5, lines[0]["epoch"] + 0.5)
                axis.set_xticks([lines[0]["epoch"]])
            axis.set(xlabel="epoch", title=title)
            axis.grid(alpha=0.3)
            if len(names) > 1:  # below the axes, clear of the curves
                where = dict(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4)
                axis.legend(**where, fontsize=9, frameon=False, handlelength=3, columnspacing=1.2)


def curve_panels(keys: list[str], sigmas: Sequence[float] = ()) -> dict[str, dict[str, str]]:
    """{title: {key of log.txt: label}}; curves of a panel share a scale, so acc5 and sums of losses have their own."""
    parts = {k: loss_name(k, sigmas) for k in keys if k.startswith("train_loss_")}
    panels = {
        LEVELS: parts,
        "sum of these losses" if parts else "loss": {"train_loss": "training", "val_loss": "validation"},
        "validation score (%)": {f"val_{k}": k for k in ("acc1", "balanced_acc", "macro_f1")},
        "validation acc5 (%)": {"val_acc5": "acc5"},
        "calibration error (%)": {"val_ece": "ece"},
        "learning rate": {"train_lr": "lr"},
    }
    there = {title: {k: label for k, label in names.items() if k in keys} for title, names in panels.items()}
    return {title: names for title, names in there.items() if names}


def loss_name(key: str, sigmas: Sequence[float]) -> str:
    """Label of a loss in pretraining's log.txt: train_loss_2 is the loss of the third level."""
    name = key.removeprefix("train_loss_")
    return sigma_name(sigmas[int(name)]) if name.isdigit() and int(name) < len(sigmas) else name


def curve_styles(n: int) -> list[dict]:
    """Styles for n curves that may coincide: each is thinner than those below it and has its own dashes."""
    colors = COLORS if n <= len(COLORS) else [matplotlib.colormaps["viridis"](x) for x in np.linspace(0, 0.95, n)]
    widths = np.linspace(2.6, 1.3, n) if n > 1 else [1.8]
    return [
        dict(color=color, linestyle=style, linewidth=width, markersize=2.2 * width)
        for color, style, width in zip(colors, cycle(STYLES), widths)
    ]


def plot_confusion(confusion: np.ndarray, classes: list[str], path: str) -> None:
    """confusion.png: counts [C, C], one row per true class, shaded by row; with numbers for up to 20 classes."""
    C, right, images = len(classes), np.trace(confusion), confusion.sum()
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    side = min(16, max(4, 0.45 * C + 2))
    with drawing(path, figsize=(side, side)) as axis:
        # Shaded by the square root, so that confusions of a few percent are visible.
        shades = axis.imshow(share, cmap="Blues", norm=PowerNorm(0.5, 0, 1))
        if C <= 50:
            fits = 0.1 * max(map(len, classes)) < 0.75 * side / C  # inches: a name, a cell
            rotation = 0 if fits else 90
            axis.set_xticks(range(C), classes, rotation=rotation, **NAMES)
            axis.set_yticks(range(C), classes, **NAMES)
        if C <= 20:
            for i, j in np.argwhere(confusion):
                color = "white" if share[i, j] > 0.36 else "black"
                axis.text(j, i, int(confusion[i, j]), ha="center", va="center", fontsize=9, color=color)
        colorbar = axis.figure.colorbar(shades, fraction=0.046, pad=0.03, format=PercentFormatter(1, 0, " %"))
        colorbar.set_label("share of the true class's images")
        unit = "" if C <= 50 else " (number of the class)"
        title = f"{right} of {images} right ({100 * right / max(images, 1):.1f} %)"
        axis.set(xlabel=f"predicted{unit}", ylabel=f"true{unit}", title=title)


def plot_reliability(probabilities: np.ndarray, targets: np.ndarray, path: str) -> None:
    """reliability.png: accuracy against confidence with the gap shaded; below, the number of images in each bin."""
    count, confidence, right = reliability(probabilities, targets)
    ece = expected_calibration_error(probabilities, targets)
    left, width, seen = np.arange(BINS) / BINS, 1 / BINS, count > 0
    middle = left + width / 2
    with drawing(path, 2, figsize=(5, 5.6), sharex=True, height_ratios=[4, 1]) as (top, bottom):
        top.bar(middle[seen], right[seen], width, color="#8fa9d0", edgecolor="white", label="share right")
        low, high = np.minimum(right, confidence)[seen], np.maximum(right, confidence)[seen]
        gap = dict(color="none", edgecolor="#b8383d", linewidth=0.8, hatch="////", label="gap to the mean confidence")
        top.bar(middle[seen], high - low, width * 0.96, low, **gap)
        top.plot([0, 1], [0, 1], color="0.3", linestyle="--", linewidth=1)
        top.set(xlim=(0, 1), ylim=(0, 1), ylabel="share right")
        top.set_title(f"{len(targets)} images, ECE {100 * ece:.1f} %", pad=26, fontsize=11)
        top.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=8, frameon=False)
        bottom.bar(middle, count, width, color="0.6", edgecolor="white")
        bottom.set(xlabel="confidence", ylabel="images")


def plot_noise_curve(curve: list[dict[str, float]], path: str) -> None:
    """noise_curve.png: accuracy and agreement against dB of noise in evaluation; below, what the noise moves."""
    points = [point for point in curve if np.isfinite(point["snr"])]
    snr, clean = [point["snr"] for point in points], curve[0]["acc1"]
    with drawing(path, 2, figsize=(6, 5.6), sharex=True, height_ratios=[3, 2]) as (top, bottom):
        top.plot(snr, [point["acc1"] for point in points], "o-", color="#0072B2", label="acc1")
        top.plot(
            snr, [point["agreement"] for point in points], "s--", color="#D55E00", label="same class as without noise"
        )
        top.axhline(clean, color="0.4", linestyle=":", label=f"acc1 without noise, {clean:.1f}")
        top.set(ylabel="%", ylim=(0, 102))
        top.legend(fontsize=8, frameon=False)
        bottom.plot(snr, [point["change"] for point in points], "o-", color="#009E73", label="probability moved")
        bottom.plot(
            snr, [point["distance"] for point in points], "s--", color="#CC79A7", label="distance of the tokens"
        )
        bottom.set(xlabel="signal-to-noise ratio where it is added, dB", ylim=(0, None))
        bottom.invert_xaxis()
        bottom.legend(fontsize=8, frameon=False)


def plot_class_distribution(
    classes: list[str], predicted: np.ndarray, true: np.ndarray | None, path: str, most: int = 40
) -> None:
    """class_distribution.png: images per class, predicted and true [C], of the `most` frequent classes."""
    shown = np.argsort(-(predicted + (0 if true is None else true)), kind="stable")[:most]
    if len(classes) <= most:
        shown = np.arange(len(classes))
    y, height = np.arange(len(shown)), 0.8 if true is None else 0.4
    parts = [("predicted", predicted, "#4c72b0")] + ([] if true is None else [("true", true, "#bbbbbb")])
    with drawing(path, figsize=(6, 1.2 + 0.32 * len(shown))) as axis:
        for k, (name, values, color) in enumerate(parts):
            bars = axis.barh(
                y + (k - 0.5) * height * (true is not None), values[shown], height, label=name, color=color
            )
            axis.bar_label(bars, fontsize=7, padding=2)
        axis.set_yticks(y, [classes[i] for i in shown], fontsize=8, **NAMES)
        axis.invert_yaxis()
        axis.margins(x=0.08)
        title = "" if len(shown) == len(classes) else f"the {len(shown)} most frequent of {len(classes)} classes"
        axis.set(xlabel="images", title=title)
        axis.spines[["top", "right"]].set_visible(False)
        if true is not None:
            axis.legend(fontsize=8, frameon=False)
