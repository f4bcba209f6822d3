"""Scores and calibration against scikit-learn, torchmetrics and hand-made numbers."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, log_loss
from torchmetrics.functional.classification import multiclass_calibration_error

from tests.harness.prediction import probabilities
from util.predict.calibration import accuracy_interval, expected_calibration_error, reliability, scores


def test_scores_are_scikit_learns():
    p, targets = probabilities(3, 200), np.random.default_rng(4).integers(0, 3, 200)
    p[0], targets[0] = [0.0, 0.0, 1.0], 1  # infinitely wrong: cut at float64's epsilon
    ours, predicted = scores(p, targets), p.argmax(1)
    assert ours["accuracy"] == pytest.approx(100 * accuracy_score(targets, predicted))
    assert ours["balanced_accuracy"] == pytest.approx(100 * balanced_accuracy_score(targets, predicted))
    assert ours["macro_f1"] == pytest.approx(100 * f1_score(targets, predicted, average="macro"))
    assert ours["log_loss"] == pytest.approx(log_loss(targets, p, labels=range(3)))
    theirs = multiclass_calibration_error(torch.from_numpy(p), torch.from_numpy(targets), 3, n_bins=15, norm="l1")
    assert ours["ece"] == pytest.approx(100 * float(theirs), rel=1e-5)


def test_calibration_error_by_hand():
    """Four images in two bins: (0.8, 0.8667] holds two at 0.85, one right; (0.5333, 0.6] 0.6 right and 0.55 wrong."""
    p = np.array([[0.85, 0.15], [0.15, 0.85], [0.6, 0.4], [0.45, 0.55]])
    targets = np.array([0, 0, 0, 0])
    count, confidence, right = reliability(p, targets)
    assert count[12] == 2 and count[8] == 2 and count.sum() == 4 and math.isnan(right[0])
    assert (confidence[12], right[12]) == pytest.approx((0.85, 0.5)) and (confidence[8], right[8]) == pytest.approx(
        (0.575, 0.5)
    )
    assert expected_calibration_error(p, targets) == pytest.approx(0.5 * 0.35 + 0.5 * 0.075)


@pytest.mark.parametrize("right,images", [(0, 1), (1, 1), (0, 12), (12, 12), (77, 101), (1, 40000)])
def test_interval_of_an_accuracy_is_wilsons(right, images):
    """The accuracies a for which |right / images - a| is at most 1.96 standard errors sqrt(a (1 - a) / images): roots
    of a quadratic (Wilson 1927)."""
    p, z2 = right / images, 1.959963984540054**2
    expected = np.sort(np.roots([1 + z2 / images, -(2 * p + z2 / images), p * p]))
    np.testing.assert_allclose(accuracy_interval(right, images), 100 * expected, atol=1e-6)
