"""A search by Optuna: it chooses the values of each trial from those so far, and stops trials that promise little."""

import itertools
import os
import random
import re
import warnings
from typing import Any

import optuna
import sqlalchemy
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, Trial, TrialState

from util.cli.settings import Sweep
from util.errors import UserError
from util.sweep.grid import Stage, check_axis, parse_axis
from util.sweep.jobs import Job, check, plan, read_records
from util.sweep.results import epoch_of, job_of, less_is_better, lines_of, points_of

_RANGE = re.compile(r"(lin|log)\(([^,()]+),([^,()]+)\)")
STATES = {"finished": TrialState.COMPLETE, "pruned": TrialState.PRUNED}


class Search:
    """Trials in Optuna's own database, .sweep/optuna.db, which its dashboard reads; the same line goes on with them.

    Sampler: TPE (Bergstra et al., NeurIPS 2011), aware of the trials that are running. Pruner: a trial stops at an
    epoch where its best value so far is worse than the median of earlier trials; the first five run to their end.
    """

    def __init__(self, settings: Sweep, stages: list[Stage]):
        self.settings, self.stages = settings, stages
        self.metric = settings.metric[0]
        self.name = self.metric.rpartition(".")[2]  # in log.txt
        self.space: dict[str, BaseDistribution] = {}
        ends: dict[str, list[str]] = {}
        for text in settings.grid[0]:
            key, self.space[key], ends[key] = parse_space(text, stages)
        self.made: dict[tuple[str, str], Job] = {}
        first = {key: values[0] for key, values in ends.items()}
        arms = [{**first, key: value} for key, values in ends.items() for value in values]
        self.ends = [job for chain in plan(arms, stages, settings.output_dir).values() for job in chain]
        check(self.ends)
        job_of(plan(arms[:1], stages, settings.output_dir)[0], self.metric)
        self.open: dict[int, tuple[Trial, list[Job]]] = {}  # trials that run, by number
        self.sizes: dict[str, int] = {}  # of the log.txt read last
        self.full = False  # no more trials

    def start(self) -> None:
        """Open the database and take up the trials that an interrupted start left."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", module="optuna")  # epochs that a resumed run reports again
        os.makedirs(os.path.join(self.settings.output_dir, ".sweep"), exist_ok=True)
        path = os.path.abspath(os.path.join(self.settings.output_dir, ".sweep", "optuna.db"))
        self.study = optuna.create_study(
            storage=str(sqlalchemy.URL.create("sqlite", database=path)),
            study_name=self.metric,
            direction="minimize" if less_is_better(self.metric) else "maximize",
            pruner=optuna.pruners.MedianPruner(),
            load_if_exists=True,
        )
        # A sampler that starts anew with the same seed would repeat its first draws.
        self.study.sampler = optuna.samplers.TPESampler(seed=len(self.study.trials), constant_liar=True)
        before = next((trial for trial in self.trials() if trial.distributions != self.space), None)
        if before is not None:
            raise UserError(
                f"--output_dir {self.settings.output_dir}: a search over {', '.join(before.params)} with other ranges "
                "is there; choose another one"
            )
        for trial in self.study.get_trials(states=(TrialState.RUNNING,)):
            self._open(Trial(self.study, trial._trial_id))
        if self.settings.retry:
            tried = [t.params for t in self.trials() if t.state != TrialState.FAIL]
            for trial in self.trials():
                if trial.state == TrialState.FAIL and trial.params not in tried:
                    self.study.enqueue_trial(trial.params)
                    tried.append(trial.params)

    def trials(self) -> list[FrozenTrial]:
        """All trials but those that repeat the values of another one, which are not run."""
        return [t for t in self.study.trials if t.params and "repeats" not in t.user_attrs]

    @property
    def best(self) -> FrozenTrial | None:
        return self.study.best_trial if self.study.get_trials(states=(TrialState.COMPLETE,)) else None

    @staticmethod
    def arm_of(trial: Trial | FrozenTrial) -> dict[str, str]:
        return {key: f"{v:.6g}" if isinstance(v, float) else str(v) for key, v in trial.params.items()}

    def jobs(self) -> list[Job]:
        return [job for _, chain in self.open.values() for job in chain]

    def ask(self) -> list[Job]:
        self.settle()
        if self.full:
            return []
        enqueued = any(t.state == TrialState.WAITING for t in self.study.trials)
        if enqueued or len(self.trials()) < self.settings.trials:
            trial = self.study.ask(self.space)
            if enqueued or not self.same(trial):
                return self._open(trial)
            trial.set_user_attr("repeats", self.same(trial)[0].number)
            self.study.tell(trial, state=TrialState.FAIL)
            if rest := self.untried():
                self.study.enqueue_trial(random.Random(trial.number).choice(rest))
                return self.ask()
        self.full = True
        return []

    def same(self, trial: Trial) -> list[FrozenTrial]:
        return [t for t in self.trials() if t.params == trial.params and t.number != trial.number]

    def untried(self) -> list[dict[str, Any]]:
        """The combinations left of a space without continuous ranges."""
        lists: list[Any] = []
        for d in self.space.values():
            if isinstance(d, CategoricalDistribution):
                lists.append(d.choices)
            elif isinstance(d, IntDistribution):
                lists.append(range(d.low, d.high + 1))
            else:
                return []
        tried = [t.params for t in self.trials()]
        return [c for c in (dict(zip(self.space, v)) for v in itertools.product(*lists)) if c not in tried]

    def _open(self, trial: Trial) -> list[Job]:
        chain = plan([self.arm_of(trial)], self.stages, self.settings.output_dir, self.made)[0]
        try:
            check(chain)
            read_records(chain, self.settings.retry)
        except UserError as error:  # a combination that its script refuses
            trial.set_user_attr("reason", str(error))
            self.study.tell(trial, state=TrialState.FAIL)
            return self.ask()
        trial.set_user_attr("folder", job_of(chain, self.metric).folder)
        self.open[trial.number] = (trial, chain)
        return chain

    def hopeless(self, job: Job) -> bool:
        """Report new epochs of its log.txt; whether the pruner would stop it."""
        trial = next((trial for trial, chain in self.open.values() if job_of(chain, self.metric) is job), None)
        path = os.path.join(job.folder, "log.txt")
        size = os.path.getsize(path) if trial is not None and os.path.isfile(path) else 0
        if trial is None or size == self.sizes.get(path, 0):
            return False
        self.sizes[path] = size
        for epoch, value in points_of(lines_of(job.folder), self.name):
            trial.report(value, epoch)
        return trial.should_prune()

    def settle(self) -> None:
        """Tell Optuna how the ended trials ended."""
        for number, (trial, chain) in list(self.open.items()):
            ended = next((job.state for job in chain if job.state in ("failed", "skipped", "pruned")), chain[-1].state)
            if ended not in ("finished", "failed", "skipped", "pruned"):
                continue
            lines = lines_of(job_of(chain, self.metric).folder)
            points = points_of(lines, self.name)
            for epoch, value in points:
                trial.report(value, epoch)
            chosen = dict(points).get(epoch_of(lines, self.name, self.settings.pick)) if lines else None
            state = TrialState.FAIL if chosen is None else STATES.get(ended, TrialState.FAIL)
            self.study.tell(trial, chosen if state == TrialState.COMPLETE else None, state=state)
            del self.open[number]


def parse_space(text: str, stages: list[Stage]) -> tuple[str, BaseDistribution, list[str]]:
    """(axis, Optuna's distribution, values at its ends or all of its list) of NAME=VALUES."""
    name, _, values = text.partition("=")
    found = _RANGE.fullmatch(values)
    axis = parse_axis(f"{name}={found[2]},{found[3]}" if found else text)
    check_axis(axis, stages)
    if found:
        try:
            low, high = map(float, axis.values)
            return axis.key, FloatDistribution(low, high, log=found[1] == "log"), list(axis.values)
        except ValueError:
            raise UserError(f"--grid {text}: should be {found[1]}(LOW,HIGH), LOW below HIGH, log above 0") from None
    if ".." in values:
        low, high = int(axis.values[0]), int(axis.values[-1])
        return axis.key, IntDistribution(low, high), [axis.values[0], axis.values[-1]]
    return axis.key, CategoricalDistribution(axis.values), list(axis.values)
