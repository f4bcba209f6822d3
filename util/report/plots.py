"""The pictures a run leaves behind. Matplotlib without a display."""

from contextlib import contextmanager

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from util.files import survive, write_atomic
from util.log import read_log
from util.predict.calibration import BINS, expected_calibration_error, reliability

NAMES = dict(parse_math=False)  # of tick labels: a class named $a$ is no formula


@contextmanager
def drawing(path: str, rows: int = 1, columns: int = 1, **how):
    """Axes to draw on, as plt.subplots gives them; at the end the PNG is written whole or not at all."""
    figure, axes = plt.subplots(rows, columns, **how)
    try:
        with survive(path):
            yield axes
            write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=120, bbox_inches="tight"))
    finally:
        plt.close(figure)


def plot_curves(log_path: str, path: str) -> None:
    """curves.png from log.txt: losses, scores in percent, and the learning rate against epochs."""
    lines = read_log(log_path)
    keys = [k for k in lines[-1] if k.startswith(("train_", "val_"))] if lines else []
    panels = {
        "loss": [k for k in keys if "loss" in k],
        "score (%)": [k for k in keys if k.split("_", 1)[1] in ("acc1", "acc5", "balanced_acc", "macro_f1")],
        "learning rate": [k for k in keys if k == "train_lr"],
    }
    panels = {title: names for title, names in panels.items() if names}
    if not panels:
        return
    with drawing(path, 1, len(panels), figsize=(5 * len(panels), 3.6), squeeze=False) as axes:
        for axis, (title, names) in zip(axes[0], panels.items()):
            for name in names:
                points = [(line["epoch"] + 1, line[name]) for line in lines if line.get(name) is not None]
                axis.plot(*zip(*points), label=name, marker="." if len(points) < 30 else None)
            if title == "loss" and len(names) > 2:
                axis.set_yscale("log")
            axis.set(xlabel="epoch", title=title)
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)


def plot_confusion(confusion: np.ndarray, classes: list[str], path: str) -> None:
    """confusion.png: counts [C, C], rows the true class, shaded by row; numbers up to 20 classes."""
    C = len(classes)
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    side = min(16, max(4, 0.45 * C + 2))
    with drawing(path, figsize=(side, side)) as axis:
        axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
        if C <= 50:
            axis.set_xticks(range(C), classes, rotation=90, **NAMES)
            axis.set_yticks(range(C), classes, **NAMES)
        if C <= 20:
            for i in range(C):
                for j in range(C):
                    color = "white" if share[i, j] > 0.6 else "black"
                    axis.text(j, i, int(confusion[i, j]), ha="center", va="center", fontsize=7, color=color)
        axis.set(xlabel="predicted", ylabel="true", title=f"{np.trace(confusion)} of {confusion.sum()} right")


def plot_reliability(probabilities: np.ndarray, targets: np.ndarray, path: str) -> None:
    """reliability.png: share right against confidence, the gap between them shaded; below, the images in each bin."""
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
