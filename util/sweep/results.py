"""Results of a sweep: values by arm, comparisons with the base arm, learning curves."""

import math
from dataclasses import dataclass, field

from util.cli.settings import Sweep
from util.errors import UserError
from util.log import read_log
from util.sweep.jobs import Job, seconds_of
from util.sweep.statistics import Comparison, compare, holm, mean_interval

DOWNWARDS = ("loss", "seconds", "ece", "frechet")  # metrics with these words: less is better


@dataclass
class ArmResult:
    """An arm: the values that its runs share, their results by pairing key, their jobs."""

    values: dict[str, str]
    runs: dict[str, float] = field(default_factory=dict)
    jobs: list[list[Job]] = field(default_factory=list)
    curves: list[list[tuple[int, float]]] = field(default_factory=list)
    comparison: Comparison | None = None

    @property
    def name(self) -> str:
        return " ".join(f"{k}={v}" for k, v in self.values.items()) or "all runs"

    @property
    def summary(self) -> tuple[float, float, float]:
        """Mean over the runs and its 95 % interval."""
        return mean_interval(list(self.runs.values())) if self.runs else (math.nan,) * 3

    @property
    def missing(self) -> list[Job]:
        """The last job of each chain that has no result."""
        return [chain[-1] for chain in self.jobs if chain[-1].state != "finished"]

    @property
    def seconds(self) -> float:
        return sum(seconds_of(job) for chain in self.jobs for job in chain if job.state == "finished")


def less_is_better(metric: str) -> bool:
    return any(word in metric for word in DOWNWARDS)


def collect(arms: list[dict[str, str]], chains: dict[int, list[Job]], settings: Sweep) -> list[ArmResult]:
    """Arms without the pairing axis, each with its runs' values, compared with the base."""
    paired = settings.paired
    if paired is not None and not all(paired in arm for arm in arms):
        raise UserError(f"--paired {paired}: should be an axis of every --grid; there are {', '.join(arms[0])}")
    results: dict[tuple, ArmResult] = {}
    for number, arm in enumerate(arms):
        values = {k: v for k, v in arm.items() if k != (paired or "seed")}
        result = results.setdefault(tuple(values.items()), ArmResult(values))
        result.jobs.append(chains[number])
        job = chains[number][-1]
        if job.state != "finished":
            continue
        curve = curve_of(job.folder, settings.metric)
        if not curve:
            raise UserError(f"--metric {settings.metric}: {job.folder}/log.txt has none; there are {known(job.folder)}")
        best = (min if less_is_better(settings.metric) else max)(curve, key=lambda point: point[1])
        result.runs[arm.get(paired or "seed", str(number))] = (best if settings.pick == "best" else curve[-1])[1]
        result.curves.append(curve)
    found = list(results.values())
    base = base_of(found, settings.base)
    for result in found:
        if result is not base:
            result.comparison = compare(result.runs, base.runs, paired is not None)
    holm([r.comparison for r in found if r.comparison is not None])
    return [base, *(r for r in found if r is not base)]


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


def curve_of(folder: str, metric: str) -> list[tuple[int, float]]:
    lines = read_log(f"{folder}/log.txt")
    return [(line["epoch"], line[metric]) for line in lines if isinstance(line.get(metric), (int, float))]


def known(folder: str) -> str:
    lines = read_log(f"{folder}/log.txt")
    return ", ".join(k for k, v in lines[-1].items() if isinstance(v, float)) if lines else "no lines"
