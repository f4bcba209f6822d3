"""Ways to combine members: equal weights, weights by validation score, or stacking on out-of-fold predictions.

Probabilities are float64 [M, N, C]: members, images, classes in the first member's order.
"""

import csv
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from util.data.labels import without_apostrophe
from util.errors import UserError
from util.files import composed
from util.log import read_log
from util.predict.members import Member

VAL_SCORES = ("balanced_acc", "acc1")  # scores for --weights val: the first that every member has
SMALLEST = (
    1e-6  # probabilities are clipped here: one view or network that is sure and wrong must not outvote the others
)


def log_probabilities(p: np.ndarray) -> np.ndarray:
    return np.log(np.clip(p, SMALLEST, 1.0))


def geometric_mean(p: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    """Normalised geometric mean of probabilities [..., C] over `axis`.

    For stacking: its regression is linear in log-probabilities, so the mean of its logits over views and networks
    equals its logits for this mean. The arithmetic mean is flatter than the single networks it was fitted on.
    """
    return softmax(log_probabilities(p).mean(axis), axis=-1)


class Weighted:
    """sum_m w_m p_m with w >= 0 and sum w = 1: [M, N, C] -> [N, C]."""

    def __init__(self, weights):
        self.weights = np.asarray(weights, dtype=np.float64) / np.sum(weights)

    def __call__(self, probabilities: np.ndarray) -> np.ndarray:
        return sum(w * p for w, p in zip(self.weights, probabilities))


class Stacked:
    """Logistic regression on the members' log-probabilities, fitted on out-of-fold predictions: [M, N, C] -> [N, C].

    softmax_c(sum_m w_m log p_mc + b_c): the members' weighted geometric mean, sharpened or softened (w), with a bias
    per class (b). A matrix per member instead of one weight would overfit single networks and fail where it is applied:
    on means over views and folds. Penalty 1/2 |(w, b)|^2, scikit-learn's default. balanced: each class has the same
    total weight.
    """

    def __init__(self, probabilities: np.ndarray, targets: np.ndarray, *, balanced: bool):
        logs = log_probabilities(probabilities)
        M, n, C = logs.shape
        counts = np.bincount(targets, minlength=C)
        weight = (n / (C * counts) if balanced else np.ones(C))[targets]  # [n]
        true = np.eye(C)[targets]  # [n, C]

        def loss_and_gradient(parameters: np.ndarray) -> tuple[float, np.ndarray]:
            log_p = log_softmax(np.tensordot(parameters[:M], logs, 1) + parameters[M:], axis=1)
            error = weight[:, None] * (np.exp(log_p) - true)
            gradient = np.concatenate([np.tensordot(logs, error, 2), error.sum(0)])
            loss = -(weight * (log_p * true).sum(1)).sum() + parameters @ parameters / 2
            return loss, gradient + parameters

        start = np.concatenate([np.full(M, 1 / M), np.zeros(C)])
        found = minimize(loss_and_gradient, start, jac=True, method="L-BFGS-B").x
        self.weights, self.biases, self.images = found[:M], found[M:], n

    def __str__(self) -> str:
        weights = ", ".join(f"{w:.2f}" for w in self.weights)
        return f"fitted on one view of {self.images} out-of-fold images (weights {weights})"

    def __call__(self, probabilities: np.ndarray) -> np.ndarray:
        return softmax(np.tensordot(self.weights, log_probabilities(probabilities), 1) + self.biases, axis=1)


@dataclass
class Combiners:
    """The members, every way to combine them that their files allow, and notes on why others are missing."""

    members: list[Member]
    classes: list[str]
    wanted: str  # the way used for predictions.csv
    ways: dict[str, Weighted | Stacked]  # equal, val, stacked
    notes: list[str]
    val_score: str = ""  # the score behind the weights of `val`, and its percent per member
    val_scores: list[float] | None = None
    oof: "OutOfFold | None" = None
    balanced: bool = False  # class weights of the stacked regression
    cross_stacked: np.ndarray | None = None  # [N, C] for oof's images, each fold by a regression fitted on the others

    def cross_fit(self, ids: list[str], folds: np.ndarray, probabilities: np.ndarray) -> None:
        """Fit stacking for training images, so that no regression predicts images it was fitted on.

        ids, folds int64 [n], probabilities [M, n, C]: what will be combined. Each fold's regression is fitted on the
        other folds' probabilities, with the same views. If that is impossible, a UserError if stacking is `wanted`;
        otherwise it is dropped from the comparison.
        """
        if "stacked" not in self.ways or self.oof is None:
            return
        same_views = OutOfFold(ids, folds, self.oof.targets[self.oof.rows(ids)], probabilities, self.oof.classes)
        try:
            self.ways["stacked"] = CrossStacked(same_views, balanced=self.balanced)
        except UserError as error:
            if self.wanted == "stacked":
                raise
            del self.ways["stacked"]
            self.notes.append(f"not compared: {error}")


def build_combiners(members: list[Member], classes: list[str], wanted: str) -> Combiners:
    """UserError if the files do not allow the `wanted` way; others are dropped from the comparison.

    The stacked regression balances classes if a member was trained with --class_weights balanced: otherwise it would
    learn the class frequencies again.
    """
    balanced = any(head["args"].get("class_weights") == "balanced" for m in members for head in m.heads)
    result = Combiners(members, classes, wanted, {"equal": Weighted([1.0] * len(members))}, [], balanced=balanced)

    def val():
        result.val_score, result.val_scores = validation_scores(members)
        return Weighted(result.val_scores)

    def stacked():
        result.oof = read_oof(members, classes)
        return result.oof.stack(balanced=balanced)

    for name, build in (("val", val), ("stacked", stacked)):
        try:
            result.ways[name] = build()
        except UserError as error:
            if name == wanted:
                raise
            if len(members) > 1:
                result.notes.append(f"not compared: {error}")
    oof = result.oof if "stacked" in result.ways else None
    if oof is not None and oof.same_folds and len(set(oof.folds)) > 1:
        try:
            result.cross_stacked = CrossStacked(oof, balanced=balanced)(oof.probabilities)
        except UserError as error:
            result.notes.append(f"stacking is not scored out of fold: {error}")
    return result


def validation_scores(members: list[Member]) -> tuple[str, list[float]]:
    """(name of the score, percent per member): each checkpoint's best epoch, averaged over folds.

    From log.txt beside the checkpoint, else from the checkpoint, which stores the score it was selected by.
    """
    found = [[_scores_beside(path, head) for path, head in zip(m.paths, m.heads)] for m in members]
    for name in VAL_SCORES:
        if all(name in scores for member in found for scores in member):
            return name, [float(np.mean([scores[name] for scores in member])) for member in found]
    path = next(p for m, f in zip(members, found) for p, s in zip(m.paths, f) if VAL_SCORES[-1] not in s)
    raise UserError(
        f"--weights val: {path} has no validation accuracy; keep the run's log.txt beside it, "
        "or train with --eval_metric acc1 or balanced_acc"
    )


def _scores_beside(path: str, head: dict) -> dict[str, float]:
    progress = head["progress"]
    lines = read_log(os.path.join(os.path.dirname(path), "log.txt"))
    line = next((x for x in lines if x["epoch"] == progress.get("best_epoch")), {})
    scores = {name: line[f"val_{name}"] for name in VAL_SCORES if line.get(f"val_{name}") is not None}
    metric = head["args"].get("eval_metric")
    if metric in VAL_SCORES and progress.get("best") is not None:
        scores[metric] = progress["best"]
    return scores


@dataclass
class OutOfFold:
    """Out-of-fold predictions of the members: probabilities [M, N, C], targets and folds [N]."""

    ids: list[str]
    folds: np.ndarray
    targets: np.ndarray
    probabilities: np.ndarray
    classes: list[str]
    same_folds: bool = True  # all members have the same folds

    def rows(self, ids: list[str]) -> np.ndarray:
        """Row of each image, int64 [n], -1 if missing. Compares composed names: copying may change Unicode's form."""
        exact = {name: i for i, name in enumerate(self.ids)}
        same = {composed(name): i for name, i in exact.items()}
        return np.array([exact.get(name, same.get(composed(name), -1)) for name in ids])

    def stack(self, *, balanced: bool, without: int | None = None) -> Stacked:
        """Stacking fitted on all images, or on all but fold `without`. UserError if they lack a class."""
        rows = self.folds != without
        for c, name in enumerate(self.classes):
            if c not in self.targets[rows]:
                where = "" if without is None else f" outside fold {without}"
                raise UserError(f"--weights stacked: no out-of-fold image of class {name}{where}")
        return Stacked(self.probabilities[:, rows], self.targets[rows], balanced=balanced)


class CrossStacked(Stacked):
    """Stacking for out-of-fold scores: each fold of `oof` is predicted by a regression fitted on the others.

    [M, N, C] -> [N, C], rows in the order of oof.
    """

    def __init__(self, oof: OutOfFold, *, balanced: bool):
        self.folds = oof.folds
        self.fitted = {fold: oof.stack(balanced=balanced, without=fold) for fold in sorted(set(oof.folds.tolist()))}

    def __str__(self) -> str:
        return "fitted for each fold on the other folds with the same views"

    def __call__(self, probabilities: np.ndarray) -> np.ndarray:
        out = np.empty(probabilities.shape[1:])
        for fold, fitted in self.fitted.items():
            inside = self.folds == fold
            out[inside] = fitted(probabilities[:, inside])
        return out


def read_oof(members: list[Member], classes: list[str], flag: str = "--weights stacked") -> OutOfFold:
    """The members' oof.csv files, matched by image; all must have the same images and labels."""
    tables = [_oof_of(member, classes, flag) for member in members]
    first = tables[0]
    for member, table in zip(members[1:], tables[1:]):
        differing = sorted(set(first) ^ set(table))
        if differing:
            raise UserError(
                f"{flag}: oof.csv of {members[0].name} and {member.name} have different images "
                f"({len(differing)} in only one, e.g. {differing[0]}); train both on the same --data_path"
            )
        relabelled = [i for i in first if first[i][1] != table[i][1]]
        if relabelled:
            raise UserError(f"{flag}: {relabelled[0]} has different labels in {members[0].name} and {member.name}")
    ids = sorted(first)
    return OutOfFold(
        ids,
        np.array([first[i][0] for i in ids]),
        np.array([first[i][1] for i in ids]),
        np.array([[table[i][2] for i in ids] for table in tables]),
        list(classes),
        all(table[i][0] == first[i][0] for table in tables for i in ids),
    )


def _oof_of(member: Member, classes: list[str], flag: str) -> dict[str, tuple[int, int, list[float]]]:
    """image -> (fold, class number, probabilities), from oof.csv beside each of the member's checkpoints."""
    table: dict[str, tuple[int, int, list[float]]] = {}
    for checkpoint, meta in zip(member.paths, member.metas):
        path = os.path.join(os.path.dirname(checkpoint), "oof.csv")
        if not os.path.isfile(path):
            raise UserError(
                f"{flag}: {member.name} has no out-of-fold file ({path}); "
                "train it with main_finetune.py --kfold 5 and give that --output_dir"
            )
        try:
            for name, fold, true, p in _rows_of(path, classes, meta.get("num_classes", len(classes))):
                if name in table:
                    raise ValueError(f"{name} is listed twice")
                table[name] = fold, true, p
        except (ValueError, KeyError, csv.Error) as error:
            reason = f"unknown class {error}" if isinstance(error, KeyError) else error
            raise UserError(f"{flag}: {path}: not readable as an out-of-fold file ({reason})") from None
    if not table:
        raise UserError(f"{flag}: the out-of-fold files of {member.name} are empty")
    return table


def _rows_of(path: str, classes: list[str], outputs: int) -> Iterator[tuple[str, int, int, list[float]]]:
    """(image, fold, class number, probabilities in the order of `classes`) per line of an oof.csv.

    Earlier versions wrote six decimals, an apostrophe before names such as -1, and all `outputs` of a network that has
    more outputs than classes.
    """
    with open(path, encoding="utf-8", newline="") as file:
        header, *rows = list(csv.reader(file)) or [[]]
    old = all(len(value) == 8 and value[1] == "." for row in rows for value in row[3:])
    plain = without_apostrophe if old else str
    number = {c: i for i, c in enumerate(classes)}
    order = [number[plain(name)] for name in header[3:]]
    if sorted(order) != list(range(len(classes))):
        raise ValueError("its columns are not the members' classes")
    for name, fold, true, *values in rows:
        p = np.array([float(value) for value in values])
        if len(p) not in (len(order), outputs) or not ((p >= 0) & (p <= 1)).all() or p[: len(order)].sum() == 0:
            raise ValueError(f"{plain(name)} lacks a probability for some class")
        if len(p) > len(order):
            p = p[: len(order)] / p[: len(order)].sum()
        yield plain(name), int(fold), number[plain(true)], p[np.argsort(order)].tolist()
