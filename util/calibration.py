"""How good and how honest probabilities are: scores, calibration error, the reliability diagram."""

import numpy as np
from scipy.stats import binomtest

from engine_finetune import scores_from_confusion
from util.plots import NAMES, drawing

BINS = 15


def scores(probabilities: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Of probabilities [n, C] against class numbers [n]: accuracy, balanced accuracy, macro F1 and ECE in percent, and
    the mean log loss in nats (probabilities cut at float64's epsilon, as scikit-learn does)."""
    confusion = confusion_counts(probabilities, targets)
    balanced, f1 = scores_from_confusion(confusion)
    true = probabilities[np.arange(len(targets)), targets]
    return {
        "accuracy": 100.0 * float(np.trace(confusion)) / len(targets),
        "balanced_accuracy": balanced,
        "macro_f1": f1,
        "log_loss": float(-np.log(np.clip(true, np.finfo(np.float64).eps, 1.0)).mean()),
        "ece": 100.0 * expected_calibration_error(probabilities, targets),
    }


def accuracy_interval(right: int, images: int) -> tuple[float, float]:
    """The 95 % interval in percent of an accuracy of right / images, Wilson's, which holds at 0 and 100 % too."""
    interval = binomtest(right, images).proportion_ci(0.95, method="wilson")
    return 100.0 * interval.low, 100.0 * interval.high


def confusion_counts(probabilities: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """[C, C] counts, rows the true class."""
    C = probabilities.shape[1]
    return np.bincount(targets * C + probabilities.argmax(1), minlength=C * C).reshape(C, C)


def reliability(
    probabilities: np.ndarray, targets: np.ndarray, bins: int = BINS
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(images, mean confidence, share right) per bin ((k - 1)/bins, k/bins] of the highest probability; NaN where empty."""
    confidence = probabilities.max(1)
    right = (probabilities.argmax(1) == targets).astype(float)
    k = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(k, minlength=bins)
    with np.errstate(invalid="ignore"):
        return count, np.bincount(k, confidence, bins) / count, np.bincount(k, right, bins) / count


def expected_calibration_error(probabilities: np.ndarray, targets: np.ndarray, bins: int = BINS) -> float:
    """sum_k n_k / n |share right - mean confidence| in [0, 1]: Guo et al., On Calibration of Modern Neural Networks,
    ICML 2017, equation 5."""
    count, confidence, right = reliability(probabilities, targets, bins)
    return float(np.nansum(count * np.abs(right - confidence)) / count.sum())


def plot_reliability(probabilities: np.ndarray, targets: np.ndarray, path: str) -> None:
    """reliability.png: share right against confidence, the gap to honesty shaded; below, how many images each bin has."""
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
    """class_distribution.png: images per class, predicted and true [C]; the `most` frequent ones where there are more."""
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
