"""The runs of a sweep, each with its process and folder: started a few at a time, stopped cleanly, resumed."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import BinaryIO, Protocol

from tqdm import tqdm

from util.errors import UserError, listed
from util.files import write_atomic
from util.folder import make_folder
from util.sweep.grid import Stage, name_of, of_stage, words_of_value

TRAININGS = ("pretrain", "finetune")
CHECKPOINT = {"pretrain": "checkpoint-last.pth", "finetune": "checkpoint-best.pth"}
SCRIPTS_AT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
WRITTEN = ("report.md", "report.html", "table.csv", "args.json", "log.txt")  # by a sweep, or by a run and not a sweep
STOPPED = 75  # exit code of a training that saved and stopped (util/train/run.py)


@dataclass
class Job:
    """A run. needs: runs that must be finished before it."""

    stage: Stage
    values: dict[str, str]
    folder: str
    words: list[str]
    record: str  # JSON file beside the folders: the command and how it ended
    needs: list["Job"] = field(default_factory=list)
    state: str = "waiting"  # running, finished, failed, pruned, interrupted, skipped
    saved: float = -1.0  # the time of its newest checkpoint when it last stopped

    @property
    def name(self) -> str:
        return os.path.join(self.stage.key, name_of(self.values))

    @property
    def environment(self) -> dict[str, str]:
        """The run's name and group for its loggers (util/loggers.py)."""
        sweep = os.path.dirname(os.path.dirname(os.path.abspath(self.record)))
        return {
            "NOISEVIT_NAME": self.name,
            "NOISEVIT_GROUP": os.environ.get("NOISEVIT_GROUP") or os.path.basename(sweep),
        }

    @property
    def output(self) -> str:
        return self.record.removesuffix(".json") + ".txt"


class Search(Protocol):
    """What adds runs while others are running: util/sweep/search.py."""

    def ask(self) -> list[Job]:
        """The jobs of one more trial; [] if there are no more."""

    def hopeless(self, job: Job) -> bool:
        """Whether to stop a running job, by what its log has."""


def plan(
    arms: list[dict[str, str]], stages: list[Stage], output_dir: str, made: dict[tuple[str, str], Job] | None = None
) -> dict[int, list[Job]]:
    """The jobs of each arm, by its number, in the order of stages; arms share jobs with equal flags, and those `made`
    before, which the new ones are added to."""
    made = {} if made is None else made
    chains: dict[int, list[Job]] = {}
    for number, arm in enumerate(arms):
        chain: list[Job] = []
        for stage in stages:
            values = of_stage(arm, stage)
            before = {f"{{{job.stage.key}}}": checkpoint(job) for job in chain}
            marks = {f"{{{key}}}": (key, value) for key, value in arm.items()}
            # A later stage runs once for each result that it starts from.
            named = {**values}
            if any(mark in word for word in stage.words for mark in before):
                named = {**{k: v for job in chain for k, v in job.values.items()}, **values}
            named |= dict(pair for mark, pair in marks.items() if any(mark in word for word in stage.words))
            key = (stage.key, name_of(named))
            if key not in made:
                parts = [output_dir, *([stage.key] if len(stages) > 1 else []), name_of(named)]
                folder = os.path.join(*parts)
                words = list(stage.words)
                for name, value in values.items():
                    words += words_of_value(stage.options.flags()[name], value)
                for mark, text in {**before, **{mark: value for mark, (_, value) in marks.items()}}.items():
                    words = [word.replace(mark, text) for word in words]
                words += ["--output_dir", folder]
                words += ["--resume", "auto"] if stage.options.MAIN in TRAININGS else []
                record = os.path.join(output_dir, ".sweep", "-".join(key) + ".json")
                made[key] = Job(stage, named, folder, words, record, list(chain))
            chain.append(made[key])
        chains[number] = chain
    return chains


def checkpoint(job: Job) -> str:
    return os.path.join(job.folder, CHECKPOINT.get(job.stage.options.MAIN, ""))


def check(jobs: list[Job]) -> None:
    """Check every command with its script's parser before the first run starts."""
    for job in jobs:
        module = import_module(f"util.cli.{job.stage.options.MAIN}")
        words = job.words
        for need in job.needs:  # its checkpoint does not exist yet: an existing file stands for it
            words = [word.replace(checkpoint(need), __file__) for word in words]
        try:
            module.get_options(words)
        except UserError as error:
            raise UserError(f"{job.name}: {error}") from None


def claim(output_dir: str, search: bool) -> None:
    """Make the folder. UserError if it holds what a sweep would overwrite and did not write."""
    database = os.path.exists(os.path.join(output_dir, ".sweep", "optuna.db"))
    what = next((name for name in WRITTEN if os.path.exists(os.path.join(output_dir, name))), None)
    if database:
        what = None if search else "a search"
    elif what and os.path.isdir(os.path.join(output_dir, ".sweep")):
        what = "a sweep over a grid" if search else None
    if what:
        raise UserError(f"--output_dir {output_dir}: holds {what}, which would be lost; choose another folder")
    make_folder(output_dir, "--output_dir")


def read_records(jobs: list[Job], retry: bool) -> None:
    """Read the state of an earlier start: finished runs stay finished, failed ones stay failed unless `retry`."""
    for job in jobs:
        record = read_record(job)
        if not record:
            continue
        before, state = record["words"], record["state"]
        if before != job.words:
            raise UserError(
                f"--output_dir {os.path.dirname(os.path.dirname(job.record))}: {job.name} ran there with other flags "
                f"({first_difference(before, job.words)}); choose another one"
            )
        if state in ("finished", "pruned") or (state == "failed" and not retry):
            job.state = state


def first_difference(before: list[str], now: list[str]) -> str:
    i = next((i for i, (a, b) in enumerate(zip(before, now)) if a != b), min(len(before), len(now)))
    return f"{' '.join(before[i : i + 2]) or 'nothing'} then, {' '.join(now[i : i + 2]) or 'nothing'} now"


class Launcher(Protocol):
    """Starts runs. again: a run that was told to stop, not by the sweep, goes on by itself."""

    verb: str
    pause: float  # seconds between two looks at the runs
    again: bool
    at_a_time: int  # runs

    def room(self, running: int) -> int:
        """How many of the ready runs may start."""

    def adopt(self, jobs: list[Job]) -> list:
        """(job, run) of what an earlier start of the sweep has left running."""

    def start(self, jobs: list[Job]) -> list:
        """Runs, each with poll() -> (exit code, seconds) or None while it runs, and `note`, a text about it."""

    def stop(self, runs: list, kill: bool) -> None:
        """Tell them to save and stop, or end them at once."""


def run_all(jobs: list[Job], launcher: Launcher, say: Callable[[str], None], search: Search | None = None) -> bool:
    """Run waiting jobs; True if an interrupt ended it, after every run has saved.

    search: adds jobs to the list when there is room, and stops some early.
    """
    stop: list[int] = []  # the signals received
    sent = 0
    before = {n: signal.signal(n, lambda number, frame: stop.append(number)) for n in (signal.SIGINT, signal.SIGTERM)}
    done = sum(job.state == "finished" for job in jobs)
    bar = tqdm(total=len(jobs), initial=done, unit="run", disable=not sys.stderr.isatty())
    running = launcher.adopt(jobs)
    for job, run in running:
        say(f"goes on: {job.name}{run.note}")
    try:
        while True:
            for job in jobs:
                if job.state == "waiting" and any(need.state in ("failed", "skipped") for need in job.needs):
                    job.state = "skipped"
            room = launcher.at_a_time - len(running)
            while search and not stop and len(ready_of(jobs)) < room and (more := search.ask()):
                jobs += [job for job in more if job not in jobs]
                bar.total = len(jobs)
            ready = [] if stop else ready_of(jobs)[: launcher.room(len(running))]
            for job, run in zip(ready, launcher.start(ready) if ready else ()):
                running.append((job, run))
                say(f"{launcher.verb} {job.name}{run.note}")
            if len(stop) > sent:
                sent = len(stop)
                names = listed([job.name + run.note for job, run in running])
                say(f"{'killing' if sent > 1 else 'telling to save and stop'}: {names}")
                launcher.stop([run for _, run in running], kill=sent > 1)
            if not running:
                return bool(stop)
            for job, run in running:
                if search and job.state == "running" and search.hopeless(job):
                    job.state = "pruned"
                    launcher.stop([run], kill=False)
            ended = [(job, run, end) for job, run in running if (end := run.poll())]
            running = [(job, run) for job, run in running if all(run is not other for _, other, _ in ended)]
            for job, _, (code, seconds) in ended:
                finish(job, code, seconds)
                bar.update(job.state == "finished")
                state = job.state
                if state == "interrupted" and code == STOPPED and launcher.again and not stop:
                    if has_saved(job):
                        job.state, state = "waiting", "stopped and saved:"
                    else:
                        state = "interrupted twice without a new checkpoint, it may need more time:"
                say(f"{state} {job.name} ({seconds:.0f} s)" + told(job))
            time.sleep(launcher.pause)
    finally:
        bar.close()
        for number, handler in before.items():
            signal.signal(number, handler)


def has_saved(job: Job) -> bool:
    """Whether a run that stopped has a newer checkpoint than when it last stopped; True the first time."""
    files = Path(job.folder).rglob("checkpoint*.pth")
    before, job.saved = job.saved, max((path.stat().st_mtime for path in files), default=0.0)
    return job.saved > before


def ready_of(jobs: list[Job]) -> list[Job]:
    return [job for job in jobs if job.state == "waiting" and all(need.state == "finished" for need in job.needs)]


class LocalRun:
    """A process of this machine, in its own session: Ctrl-C reaches only the sweep, which tells its runs to save."""

    note = ""

    def __init__(self, job: Job, environment: dict[str, str]):
        command = command_of(job)
        self.began, variables = time.time(), {**environment, **job.environment}
        with open_output(job, command) as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, env=variables, start_new_session=True)

    def poll(self) -> tuple[int, float] | None:
        code = self.process.poll()
        return None if code is None else (code, time.time() - self.began)


class Local:
    """Starts runs on this machine, which share its cores."""

    verb, pause, again = "started", 0.05, False

    def __init__(self, at_a_time: int):
        self.at_a_time = at_a_time
        threads = max(1, len(os.sched_getaffinity(0)) // at_a_time)
        self.environment = {"OMP_NUM_THREADS": str(threads), **os.environ}

    def room(self, running: int) -> int:
        return self.at_a_time - running

    def adopt(self, jobs: list[Job]) -> list[tuple[Job, LocalRun]]:
        return []

    def start(self, jobs: list[Job]) -> list[LocalRun]:
        for job in jobs:
            job.state = "running"
        return [LocalRun(job, self.environment) for job in jobs]

    def stop(self, runs: list[LocalRun], kill: bool) -> None:
        for run in runs:
            run.process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)


def command_of(job: Job) -> list[str]:
    return [sys.executable, os.path.join(SCRIPTS_AT, job.stage.script), *job.words]


def open_output(job: Job, command: list[str]) -> BinaryIO:
    """The file of what a run prints, behind a line with the command."""
    os.makedirs(os.path.dirname(job.record), exist_ok=True)
    file = open(job.output, "ab")  # noqa: SIM115 (the caller closes it)
    file.write(f"$ {shlex.join(command)}\n".encode())
    file.flush()
    return file


def finish(job: Job, code: int, seconds: float) -> None:
    if job.state != "pruned" or code == 0:
        job.state = "finished" if code == 0 else "interrupted" if code in (STOPPED, 130) or code < 0 else "failed"
    write_record(job, code=code, seconds=round(seconds_of(job) + seconds, 2))


def write_record(job: Job, **more) -> None:
    kept = {"words": job.words, "state": job.state, "values": job.values, "seconds": seconds_of(job)}
    text = json.dumps({**kept, **more}, indent=2).encode()
    write_atomic(job.record, lambda file: file.write(text))


def read_record(job: Job) -> dict:
    """What an earlier start of the sweep noted, or {}."""
    if not os.path.isfile(job.record):
        return {}
    try:
        record = json.loads(Path(job.record).read_text("utf-8"))
        return {"words": record["words"], "state": record["state"], **record}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{job.record}: not a record of a sweep; choose another --output_dir") from None


def told(job: Job) -> str:
    """Last lines of a failed run's output, indented."""
    if job.state != "failed":
        return ""
    lines = Path(job.output).read_text("utf-8", "replace").splitlines()
    start = max(i for i, line in enumerate(lines) if line.startswith("$ "))  # of this attempt
    return "".join(f"\n    {line[:300]}" for line in lines[start + 1 :][-4:])


def seconds_of(job: Job) -> float:
    """Of all its attempts."""
    return float(read_record(job).get("seconds", 0.0))
