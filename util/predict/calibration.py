"""Scores and calibration of probabilities: accuracy, log loss, calibration error, the reliability diagram."""

import numpy as np
from scipy.stats import binomtest

from util.metrics import BINS, scores_from_confusion


def scores(probabilities: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Scores of probabilities [n, C] for class numbers [n]: accuracy, balanced accuracy, macro F1 and ECE in percent,
    and the mean log loss in nats (probabilities clipped at float64's epsilon, as in scikit-learn)."""
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
    """Wilson's 95 % interval, in percent, of the accuracy right / images; also valid at 0 and 100 %."""
    interval = binomtest(right, images).proportion_ci(0.95, method="wilson")
    return 100.0 * interval.low, 100.0 * interval.high


def interval_sentence(accuracy: float, images: int) -> str:
    """A report's sentence with the interval of an accuracy in percent."""
    right = round(accuracy / 100.0 * images)
    low, high = accuracy_interval(right, images)
    return f"{right} of {images} images are right: 95 % interval {low:.1f} to {high:.1f} % (Wilson)."


def confusion_counts(probabilities: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Counts [C, C], one row per true class."""
    C = probabilities.shape[1]
    return np.bincount(targets * C + probabilities.argmax(1), minlength=C * C).reshape(C, C)


def reliability(
    probabilities: np.ndarray, targets: np.ndarray, bins: int = BINS
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(images, mean confidence, share right) per bin ((k - 1)/bins, k/bins] of the top probability; NaN if empty."""
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
