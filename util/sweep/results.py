"""Results of a sweep: values by arm, comparisons with the base arm, learning curves."""

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

from util.cli.settings import Sweep
from util.errors import UserError
from util.log import read_log
from util.sweep.jobs import Job, seconds_of
from util.sweep.statistics import Comparison, compare, holm, mean_interval

DOWNWARDS = ("loss", "seconds", "ece", "frechet")  # metrics with these words: less is better


@dataclass
class Score:
    """A metric of an arm: its runs' values by the pairing axis's value, and their curves, points (epoch, value)."""

    runs: dict[str, float] = field(default_factory=dict)
    curves: list[list[tuple[int, float]]] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)  # finished runs without a value: names and reasons
    comparison: Comparison | None = None

    @property
    def summary(self) -> tuple[float, float, float]:
        """Mean over the runs and its 95 % interval."""
        return mean_interval(list(self.runs.values())) if self.runs else (math.nan,) * 3


@dataclass
class ArmResult:
    """An arm: the values that its runs share, their jobs by the pairing axis's value, and a Score per metric."""

    values: dict[str, str]
    chains: dict[str, list[Job]] = field(default_factory=dict)
    scores: dict[str, Score] = field(default_factory=dict)
    base: "ArmResult | None" = None  # what it is compared with; None: it is a base

    @property
    def name(self) -> str:
        return " ".join(f"{k}={v}" for k, v in self.values.items()) or "all runs"

    @property
    def missing(self) -> list[Job]:
        """The last job of each chain that has no result."""
        return [chain[-1] for chain in self.chains.values() if chain[-1].state != "finished"]

    @property
    def seconds(self) -> float:
        return sum(seconds_of(job) for chain in self.chains.values() for job in chain if job.state == "finished")


def less_is_better(metric: str) -> bool:
    return any(word in metric for word in DOWNWARDS)


def group(arms: list[dict[str, str]], chains: dict[int, list[Job]], settings: Sweep) -> list[ArmResult]:
    """Arms without the pairing axis, those with the same value of --within together, their base first.

    UserError if --paired, --within, --base or --metric does not fit.
    """
    paired, within = settings.paired, settings.within
    if paired is not None and not all(paired in arm for arm in arms):
        raise UserError(f"--paired {paired}: should be an axis of every --grid; there are {', '.join(arms[0])}")
    for metric in settings.metric:
        job_of(chains[0], metric)
    results: dict[tuple, ArmResult] = {}
    for number, arm in enumerate(arms):
        values = {k: v for k, v in arm.items() if k != (paired or "seed")}
        result = results.setdefault(tuple(values.items()), ArmResult(values))
        result.chains[arm.get(paired or "seed", str(number))] = chains[number]
    if within is not None and not all(within in result.values for result in results.values()):
        raise UserError(f"--within {within}: should be an axis of every --grid, and not that of --paired")
    blocks: dict[str, list[ArmResult]] = {}
    for result in results.values():
        blocks.setdefault(result.values[within] if within else "", []).append(result)
    ordered = []
    for block in blocks.values():
        base = base_of(block, settings.base)
        others = [result for result in block if result is not base]
        for result in others:
            result.base = base
        ordered += [base, *others]
    return ordered


def collect(results: list[ArmResult], settings: Sweep) -> None:
    """Read the finished runs' results and compare each arm with its base.

    With --pick best, a stage's first metric chooses the epoch that its other metrics are read at.
    """
    for result in results:
        result.scores = {metric: Score() for metric in settings.metric}
        for key, chain in result.chains.items():
            at: dict[str, int] = {}  # the epoch of each stage
            for metric, score in result.scores.items():
                job = job_of(chain, metric)
                if job.state != "finished":
                    continue
                name, lines = metric.rpartition(".")[2], lines_of(job.folder)
                if not any(name in line for line in lines):
                    raise UserError(f"--metric {metric}: {job.folder} has none; there are {known(lines)}")
                curve = points_of(lines, name)
                epoch = at.setdefault(job.stage.key, epoch_of(lines, name, settings.pick))
                if epoch in dict(curve):
                    score.runs[key] = dict(curve)[epoch]
                else:
                    score.lost.append(f"{job.name}: {metric} is not finite in epoch {epoch}")
                score.curves.append(curve)
    for result in results:
        if result.base is None:
            continue
        for metric, score in result.scores.items():
            score.comparison = compare(score.runs, result.base.scores[metric].runs, settings.paired is not None)
    holm([score.comparison for r in results for score in r.scores.values() if score.comparison is not None])


def job_of(chain: list[Job], metric: str) -> Job:
    """The job whose log has the metric: the last stage's, or that of STAGE in STAGE.NAME."""
    stage, _, _ = metric.rpartition(".")
    found = [job for job in chain if job.stage.key == stage] if stage else chain[-1:]
    if not found:
        keys = ", ".join(job.stage.key for job in chain)
        raise UserError(f"--metric {metric}: no stage is named {stage}; there are {keys}")
    return found[0]


def base_of(results: list[ArmResult], wanted: list[str] | None) -> ArmResult:
    """The arm of --base (default: the first)."""
    if not wanted:
        return results[0]
    values = dict(text.partition("=")[::2] for text in wanted)
    fits = [r for r in results if all(r.values.get(k) == v for k, v in values.items())]
    if len(fits) != 1:
        names = "; ".join(r.name for r in results[:6])
        raise UserError(f"--base {' '.join(wanted)}: fits {len(fits)} arms, should fit one of: {names}")
    return fits[0]


def points_of(lines: list[dict], metric: str) -> list[tuple[int, float]]:
    """(epoch, value) where it is finite."""
    return [(line["epoch"], line[metric]) for line in lines if isinstance(line.get(metric), (int, float))]


def epoch_of(lines: list[dict], metric: str, pick: str) -> int:
    """The epoch to read a run at: its last one, or its best by the metric."""
    points = points_of(lines, metric)
    if pick == "last" or not points:
        return lines[-1]["epoch"]
    return (min if less_is_better(metric) else max)(points, key=lambda point: point[1])[0]


def lines_of(folder: str) -> list[dict]:
    """The lines of log.txt, a k-fold run's as the mean of its folds' at each epoch; of a prediction, the row of
    results.json that predictions.csv was made from."""
    results = Path(folder, "results.json")
    if results.is_file():
        return [{"epoch": 0, **row} for row in json.loads(results.read_text("utf-8"))["results"] if row["chosen"]]
    folds = [read_log(str(path)) for path in sorted(Path(folder).glob("fold-*/log.txt"))]
    if folds:  # they may have stopped at different epochs
        rows = [{k: v for k, v in line.items() if isinstance(v, (int, float))} for lines in folds for line in lines]
        epochs = [e for e in sorted({row["epoch"] for row in rows}) if sum(r["epoch"] == e for r in rows) == len(folds)]
        at = {epoch: [row for row in rows if row["epoch"] == epoch] for epoch in epochs}
        shared = {epoch: [k for k in same[0] if all(k in row for row in same)] for epoch, same in at.items()}
        return [{**{k: sum(row[k] for row in at[e]) / len(folds) for k in shared[e]}, "epoch": e} for e in epochs]
    return read_log(os.path.join(folder, "log.txt"))


def known(lines: list[dict]) -> str:
    return ", ".join(k for k, v in lines[-1].items() if isinstance(v, float)) if lines else "no lines"
