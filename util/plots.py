"""The pictures a run leaves behind. Matplotlib without a display."""

from contextlib import contextmanager

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from util.checkpoint import write_atomic
from util.log import read_log, survive

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
