"""Scores of a classifier from its confusion matrix."""

from dataclasses import dataclass

import numpy as np

BINS = 15  # of the calibration error


@dataclass
class Evaluation:
    """Scores in percent, mean loss, confusion counts [C, C] (rows: true), and per-sample probabilities if requested."""

    acc1: float
    acc5: float | None
    loss: float
    balanced_acc: float
    macro_f1: float
    ece: float
    confusion: np.ndarray
    index: np.ndarray | None = None
    probabilities: np.ndarray | None = None

    def scores(self) -> dict[str, float]:
        names = ("loss", "acc1", "acc5", "balanced_acc", "macro_f1", "ece")
        return {n: getattr(self, n) for n in names if getattr(self, n) is not None}


def scores_from_confusion(confusion: np.ndarray) -> tuple[float, float]:
    """(balanced accuracy, macro F1) in percent, as scikit-learn computes them.

    The accuracy is averaged over classes that occur, the F1 over classes that occur or are predicted.
    """
    right, true, predicted = np.diag(confusion).astype(float), confusion.sum(1), confusion.sum(0)
    recall = right[true > 0] / true[true > 0]
    seen = (true + predicted) > 0
    f1 = 2 * right[seen] / (true + predicted)[seen]
    return 100.0 * float(recall.mean()) if len(recall) else 0.0, 100.0 * float(f1.mean()) if len(f1) else 0.0
