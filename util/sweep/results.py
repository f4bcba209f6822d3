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
    """An arm: the values that its runs share; by the pairing axis's value, each run's jobs and its result."""

    values: dict[str, str]
    chains: dict[str, list[Job]] = field(default_factory=dict)
    runs: dict[str, float] = field(default_factory=dict)
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
        return [chain[-1] for chain in self.chains.values() if chain[-1].state != "finished"]

    @property
    def seconds(self) -> float:
        return sum(seconds_of(job) for chain in self.chains.values() for job in chain if job.state == "finished")


def less_is_better(metric: str) -> bool:
    return any(word in metric for word in DOWNWARDS)


def group(arms: list[dict[str, str]], chains: dict[int, list[Job]], settings: Sweep) -> list[ArmResult]:
    """Arms without the pairing axis, the base first. UserError if --paired or --base is not among them."""
    paired = settings.paired
    if paired is not None and not all(paired in arm for arm in arms):
        raise UserError(f"--paired {paired}: should be an axis of every --grid; there are {', '.join(arms[0])}")
    results: dict[tuple, ArmResult] = {}
    for number, arm in enumerate(arms):
        values = {k: v for k, v in arm.items() if k != (paired or "seed")}
        result = results.setdefault(tuple(values.items()), ArmResult(values))
        result.chains[arm.get(paired or "seed", str(number))] = chains[number]
    found = list(results.values())
    base = base_of(found, settings.base)
    return [base, *(r for r in found if r is not base)]


def collect(results: list[ArmResult], settings: Sweep) -> None:
    """Read the finished runs' results and compare each arm with the base, which is the first."""
    for result in results:
        for key, chain in result.chains.items():
            job = chain[-1]
            if job.state != "finished":
                continue
            curve = curve_of(job.folder, settings.metric)
            if not curve:
                there = known(job.folder)
                raise UserError(f"--metric {settings.metric}: {job.folder}/log.txt has none; there are {there}")
            best = (min if less_is_better(settings.metric) else max)(curve, key=lambda point: point[1])
            result.runs[key] = (best if settings.pick == "best" else curve[-1])[1]
            result.curves.append(curve)
    base, *others = results
    for result in others:
        result.comparison = compare(result.runs, base.runs, settings.paired is not None)
    holm([r.comparison for r in others if r.comparison is not None])


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
