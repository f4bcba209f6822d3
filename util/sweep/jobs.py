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
from typing import Protocol

from tqdm import tqdm

from util.errors import UserError
from util.files import write_atomic
from util.sweep.grid import Stage, name_of, of_stage, words_of_value

TRAININGS = ("pretrain", "finetune")
CHECKPOINT = {"pretrain": "checkpoint-last.pth", "finetune": "checkpoint-best.pth"}
SCRIPTS_AT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
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

    @property
    def name(self) -> str:
        return os.path.join(self.stage.key, name_of(self.values))

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


def read_records(jobs: list[Job], retry: bool) -> None:
    """Read the state of an earlier start: finished runs stay finished, failed ones stay failed unless `retry`."""
    for job in jobs:
        if not os.path.isfile(job.record):
            continue
        try:
            record = json.loads(Path(job.record).read_text("utf-8"))
            before, state = record["words"], record["state"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{job.record}: not a record of a sweep; choose another --output_dir") from None
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


def run_all(jobs: list[Job], at_a_time: int, say: Callable[[str], None] = print, search: Search | None = None) -> bool:
    """Run waiting jobs, `at_a_time` in parallel; True if an interrupt ended it, after every process has saved.

    search: adds jobs to the list when there is room, and stops some early.
    """
    running: dict[subprocess.Popen, tuple[Job, float]] = {}
    stop: list[int] = []  # the signals received
    sent = 0
    before = {n: signal.signal(n, lambda number, frame: stop.append(number)) for n in (signal.SIGINT, signal.SIGTERM)}
    threads = max(1, len(os.sched_getaffinity(0)) // at_a_time)
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    done = sum(job.state == "finished" for job in jobs)
    bar = tqdm(total=len(jobs), initial=done, unit="run", disable=not sys.stderr.isatty())
    try:
        while True:
            for job in jobs:
                if job.state == "waiting" and any(need.state in ("failed", "skipped") for need in job.needs):
                    job.state = "skipped"
            while search and not stop and len(ready_of(jobs)) < at_a_time - len(running) and (more := search.ask()):
                jobs += [job for job in more if job not in jobs]
                bar.total = len(jobs)
            ready = ready_of(jobs)
            for job in ready[: at_a_time - len(running)] if not stop else ():
                running[start(job, environment)] = (job, time.time())
                say(f"started {job.name}")
            if len(stop) > sent:
                sent = len(stop)
                for process in running:
                    process.send_signal(signal.SIGTERM if sent == 1 else signal.SIGKILL)
            if not running:
                return bool(stop)
            for process, (job, _) in running.items():
                if search and job.state == "running" and search.hopeless(job):
                    job.state = "pruned"
                    process.send_signal(signal.SIGTERM)
            for process in [p for p in running if p.poll() is not None]:
                job, began = running.pop(process)
                finish(job, process.returncode, time.time() - began)
                bar.update(job.state == "finished")
                say(f"{job.state} {job.name} ({time.time() - began:.0f} s)" + told(job))
            time.sleep(0.05)
    finally:
        bar.close()
        for number, handler in before.items():
            signal.signal(number, handler)


def ready_of(jobs: list[Job]) -> list[Job]:
    return [job for job in jobs if job.state == "waiting" and all(need.state == "finished" for need in job.needs)]


def start(job: Job, environment: dict[str, str]) -> subprocess.Popen:
    os.makedirs(os.path.dirname(job.record), exist_ok=True)
    job.state = "running"
    command = [sys.executable, os.path.join(SCRIPTS_AT, job.stage.script), *job.words]
    with open(job.output, "ab") as file:
        file.write(f"$ {shlex.join(command)}\n".encode())
        file.flush()
        # In its own session: Ctrl-C reaches only the sweep, which tells its processes to save.
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)


def finish(job: Job, code: int, seconds: float) -> None:
    if job.state != "pruned" or code == 0:
        job.state = "finished" if code == 0 else "interrupted" if code in (STOPPED, 130) or code < 0 else "failed"
    record = {"words": job.words, "state": job.state, "code": code, "seconds": round(seconds, 2), "values": job.values}
    text = json.dumps(record, indent=2).encode()
    write_atomic(job.record, lambda file: file.write(text))


def told(job: Job) -> str:
    """Last lines of a failed run's output, indented."""
    if job.state != "failed":
        return ""
    lines = Path(job.output).read_text("utf-8", "replace").splitlines()
    start = max(i for i, line in enumerate(lines) if line.startswith("$ "))  # of this attempt
    return "".join(f"\n    {line[:300]}" for line in lines[start + 1 :][-4:])


def seconds_of(job: Job) -> float:
    return float(json.loads(Path(job.record).read_text("utf-8"))["seconds"])
