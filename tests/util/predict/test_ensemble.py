"""Weights and stacking of an ensemble, against scikit-learn and hand-made numbers."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import gmean
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.utils.class_weight import compute_sample_weight

from tests.harness.prediction import CLASSES, probabilities, save_folds, save_head
from util.errors import UserError
from util.predict.calibration import scores
from util.predict.ensemble import Stacked, Weighted, build_combiners, geometric_mean, read_oof, validation_scores
from util.predict.members import Member, find_members


def save_oof(folder, fold: int, ids, true, p, classes=CLASSES) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [",".join(["ID", "fold", "True", *classes])]
    lines += [",".join([name, str(fold), CLASSES[t], *(f"{v:.6f}" for v in row)]) for name, t, row in zip(ids, true, p)]
    (folder / "oof.csv").write_text("\n".join(lines) + "\n")


def two_kfold_runs(tmp_path, n: int = 60, **args) -> tuple[list[Member], np.ndarray, np.ndarray]:
    """Two runs of two folds with oof files, the second's columns in another order; (members, targets, p [2, n, 3])."""
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 3, n)
    # The first run is mostly right; the second says the same things of the wrong images.
    p = [0.5 * np.eye(3)[said] + 0.5 * probabilities(s, n) for s, said in ((1, targets), (2, rng.permutation(targets)))]
    p = np.round(p, 6)
    order = [2, 0, 1]
    for run, classes, columns in (("a", CLASSES, [0, 1, 2]), ("b", [CLASSES[i] for i in order], order)):
        save_folds(tmp_path / run, (0, 1), 2, classes, **args)
        for fold in (0, 1):
            rows = np.arange(fold, n, 2)[:: 1 if run == "a" else -1]
            save_oof(
                tmp_path / run / f"fold-{fold}",
                fold,
                [f"x/{i:02d}.jpg" for i in rows],
                targets[rows],
                p["ab".index(run), rows][:, columns],
                classes,
            )
    return find_members([str(tmp_path / "a"), str(tmp_path / "b")])[0], targets, p


# Weights


def test_weights_average_probabilities():
    a, b = probabilities(0, 5), probabilities(1, 5)
    np.testing.assert_allclose(Weighted([1, 1])(np.stack([a, b])), (a + b) / 2)
    np.testing.assert_allclose(Weighted([90, 60])(np.stack([a, b])), 0.6 * a + 0.4 * b)


def test_validation_weights_take_the_best_epoch_and_average_over_folds(tmp_path):
    save_head(tmp_path / "log" / "checkpoint-best.pth", best=90.0, best_epoch=1, eval_metric="acc1")
    lines = [{"epoch": e, "val_acc1": 80.0 + 5 * e, "val_balanced_acc": 70.0 + e} for e in (0, 1, 2)]
    (tmp_path / "log" / "log.txt").write_text("\n".join(map(json.dumps, lines)))
    save_folds(tmp_path / "folds", (0, 1), 2, best=60.0, eval_metric="balanced_acc")
    save_head(tmp_path / "folds" / "fold-1" / "checkpoint-best.pth", best=66.0, eval_metric="balanced_acc", kfold=2)
    members, _ = find_members([str(tmp_path / "log"), str(tmp_path / "folds")])
    assert validation_scores(members) == ("balanced_acc", [71.0, 63.0])
    assert build_combiners(members, CLASSES, "val").ways["val"].weights == pytest.approx([71 / 134, 63 / 134])
    save_head(tmp_path / "alone.pth", best=88.0, eval_metric="acc1")  # no log: only the score it was selected by
    assert validation_scores(find_members([str(tmp_path / "log"), str(tmp_path / "alone.pth")])[0]) == (
        "acc1",
        [90.0, 88.0],
    )
    save_head(tmp_path / "by_loss.pth", best=-0.3, eval_metric="loss")
    members = find_members([str(tmp_path / "log"), str(tmp_path / "by_loss.pth")])[0]
    with pytest.raises(UserError, match=r"--weights val: .*by_loss\.pth has no validation accuracy"):
        build_combiners(members, CLASSES, "val")
    assert "val" not in build_combiners(members, CLASSES, "equal").ways


def log_loss_of(weights, biases, logs, targets, image_weights) -> torch.Tensor:
    """The penalised loss of stacking, written with torch: logs [M, n, C]."""
    logits = torch.einsum("m,mnc->nc", weights, logs) + biases
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return (image_weights * loss).sum() + (weights.square().sum() + biases.square().sum()) / 2


@pytest.mark.parametrize("class_weights", ["none", "balanced"])
def test_stacking_minimises_its_penalised_loss(tmp_path, class_weights):
    members, targets, p = two_kfold_runs(tmp_path, class_weights=class_weights)
    combiners = build_combiners(members, CLASSES, "stacked")
    stacked, logs = combiners.ways["stacked"], torch.from_numpy(np.log(p.clip(1e-6)))
    found = [torch.tensor(v, requires_grad=True) for v in (stacked.weights, stacked.biases)]
    image_weights = compute_sample_weight("balanced" if class_weights == "balanced" else None, targets)
    log_loss_of(*found, logs, torch.from_numpy(targets), torch.from_numpy(image_weights)).backward()
    assert all(v.grad.abs().max() < 1e-3 for v in found)  # it is convex: the minimum is where it is flat
    new = np.stack([probabilities(7, 20), probabilities(8, 20)])
    logits = (
        stacked.weights[0] * np.log(new[0].clip(1e-6)) + stacked.weights[1] * np.log(new[1].clip(1e-6)) + stacked.biases
    )
    np.testing.assert_allclose(stacked(new), np.exp(logits) / np.exp(logits).sum(1, keepdims=True))
    accuracy = {
        k: accuracy_score(targets, q.argmax(1)) for k, q in (("stacked", combiners.cross_stacked), ("equal", p.mean(0)))
    }
    assert accuracy["stacked"] > accuracy["equal"] + 0.1, accuracy  # it finds out whom to believe


def test_stacking_two_classes_is_scikit_learns_regression_on_log_odds():
    """With a column sqrt(2) for the two biases: their difference counts, and the squares of both are penalised."""
    rng = np.random.default_rng(0)
    q = rng.uniform(0.02, 0.98, (2, 300))
    targets = (rng.random(300) < q[0] ** 2 / (q[0] ** 2 + (1 - q[0]) ** 2)).astype(int)  # the first is too timid
    p = np.stack([1 - q, q], axis=-1)
    columns = np.column_stack([*np.log(q / (1 - q)), np.full(300, math.sqrt(2))])
    for balanced in (False, True):
        model = LogisticRegression(
            fit_intercept=False, class_weight="balanced" if balanced else None, tol=1e-8, max_iter=1000
        )
        stacked = Stacked(p, targets, balanced=balanced)
        np.testing.assert_allclose(stacked(p), model.fit(columns, targets).predict_proba(columns), atol=1e-5)
        np.testing.assert_allclose(stacked.weights, model.coef_[0, :2], atol=1e-4)
    assert stacked.weights[0] == pytest.approx(2, abs=0.5) and abs(stacked.weights[1]) < 0.3


def test_stacking_stays_calibrated_on_means_over_networks_and_views():
    """Single networks see the true logits under noise of their own, as in out-of-fold files; what is predicted is the
    mean of 5 networks x 12 views. The mean of their probabilities is far too flat for a regression fitted on one."""
    rng = np.random.default_rng(0)
    truth = 2.0 * rng.normal(size=(6000, 4))
    targets = (truth + rng.gumbel(size=truth.shape)).argmax(1)
    networks = softmax(truth[:, None, None] * 2 + rng.normal(size=(6000, 5, 12, 4)), axis=-1)  # over-confident
    stacked = Stacked(networks[None, :3000, 0, 0], targets[:3000], balanced=False)
    new, true = networks[3000:], targets[3000:]
    geometric, arithmetic = stacked(geometric_mean(new, (1, 2))[None]), stacked(new.mean((1, 2))[None])
    single = stacked(new[None, :, 0, 0])
    loss, ece = ([scores(p, true)[k] for p in (single, geometric, arithmetic)] for k in ("log_loss", "ece"))
    assert loss[1] < loss[2] - 0.01 and loss[2] < loss[0]  # the mean is worth more than one network, the geometric most
    assert ece[0] < 4 and ece[1] < ece[2] - 3
    np.testing.assert_allclose(
        geometric_mean(new, (1, 2)), gmean(new.clip(1e-6), (1, 2)) / gmean(new.clip(1e-6), (1, 2)).sum(1, keepdims=True)
    )


def test_a_class_missing_from_folds_disables_only_stacking(tmp_path):
    members, targets, p = two_kfold_runs(tmp_path)
    for run, columns in (("a", [0, 1, 2]), ("b", [2, 0, 1])):
        for fold in (0, 1):
            rows = [i for i in range(fold, 60, 2) if fold == 0 or targets[i] != 2]
            save_oof(
                tmp_path / run / f"fold-{fold}",
                fold,
                [f"x/{i:02d}.jpg" for i in rows],
                targets[rows],
                p["ab".index(run), rows][:, columns],
                [CLASSES[i] for i in columns],
            )
    combiners = build_combiners(members, CLASSES, "stacked")  # all images together have every class
    assert set(combiners.ways) == {"equal", "stacked"} and combiners.cross_stacked is None
    assert "not scored out of fold" in combiners.notes[-1] and "class owl outside fold 0" in combiners.notes[-1]
    said = (combiners.oof.ids, combiners.oof.folds, combiners.oof.probabilities)
    with pytest.raises(UserError, match=r"--weights stacked: .* class owl outside fold 0"):
        combiners.cross_fit(*said)
    combiners.wanted = "equal"
    combiners.cross_fit(*said)
    assert set(combiners.ways) == {"equal"} and "class owl" in combiners.notes[-1]

    for run in "ab":
        header, *lines = (tmp_path / run / "fold-0" / "oof.csv").read_text().splitlines(keepends=True)
        (tmp_path / run / "fold-0" / "oof.csv").write_text(header + "".join(s for s in lines if ",owl," not in s))
    combiners = build_combiners(members, CLASSES, "equal")
    assert set(combiners.ways) == {"equal"} and "no out-of-fold image of class owl" in combiners.notes[-1]
    with pytest.raises(UserError, match=r"--weights stacked: no out-of-fold image of class owl$"):
        build_combiners(members, CLASSES, "stacked")


def test_out_of_fold_files_are_matched_by_image_and_class(tmp_path):
    members, targets, p = two_kfold_runs(tmp_path)
    oof = read_oof(members, CLASSES)
    assert oof.ids == [f"x/{i:02d}.jpg" for i in range(60)]
    np.testing.assert_array_equal(oof.targets, targets)
    np.testing.assert_array_equal(oof.folds, np.arange(60) % 2)
    np.testing.assert_allclose(oof.probabilities, p)
    assert oof.rows(["x/07.jpg", "x/60.jpg", "x/00.jpg"]).tolist() == [7, -1, 0]


def test_out_of_fold_files_that_do_not_fit_are_one_line(tmp_path):
    members, targets, _ = two_kfold_runs(tmp_path)
    where = tmp_path / "b" / "fold-1"
    text = (where / "oof.csv").read_text()
    for broken, words in (
        (text.replace("x/01.jpg", "x/99.jpg"), "different images .2 in only one, e.g. x/01.jpg"),
        (
            text.replace(f"x/01.jpg,1,{CLASSES[targets[1]]}", f"x/01.jpg,1,{CLASSES[targets[1] - 1]}"),
            "x/01.jpg has different labels",
        ),
        (text.replace("cat", "cow"), "unknown class 'cow'"),
        (text[:-20], "not readable"),
        (text + text.splitlines()[-1], r"not readable .*x/\d\d\.jpg .*twice"),
        (text.replace("cat,dog", "cat,cat", 1), "not readable .*columns .* the members' classes"),
        (None, "has no out-of-fold file .*--kfold"),
    ):
        (where / "oof.csv").unlink(missing_ok=True)
        if broken is not None:
            (where / "oof.csv").write_text(broken)
        with pytest.raises(UserError, match=f"--weights stacked: .*{words}"):
            build_combiners(members, CLASSES, "stacked")
    combiners = build_combiners(members, CLASSES, "equal")  # nobody asked for it: a note in the report
    assert set(combiners.ways) == {"equal"} and "out-of-fold file" in combiners.notes[-1]
