"""The runs of a sweep as SLURM jobs, by submitit: an array for each wave of ready runs, a task for each GPU."""

import difflib
import os
import signal
import subprocess
import sys
import time
from functools import cached_property
from typing import Any

import cloudpickle
import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import SlurmInfoWatcher

from util.errors import UserError, reason_of
from util.sweep.jobs import STOPPED, TRAININGS, Job, command_of, open_output, read_record, write_record

MOST = 1000  # jobs of an array; SLURM's own default (MaxArraySize 1001)
LOOK = 30  # seconds between two calls of squeue, at most
LATE = 15.0  # seconds in which a result may become visible on a shared file system
# Parameters that have another name here: submitit has two for them, or a training counts tasks and GPUs by the node.
OURS = {
    "array_parallelism": "--jobs",
    "gpus_per_task": "gpus_per_node",
    "job_name": "name",
    "ntasks_per_node": "tasks_per_node",
    "num_gpus": "gpus_per_node",
    "time": "timeout_min",
}
LISTS = {"setup", "teardown", "srun_args"}
GONE = "GONE"  # SLURM forgets a job some minutes after its end
CONTINUE = {"NODE_FAIL", "PREEMPTED"}
ENDED = {*CONTINUE, GONE, "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "OUT_OF_MEMORY", "TIMEOUT"}
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # jobs may start in a folder from which it has no name


def parameters(given: list[tuple[str, Any]]) -> dict[str, Any]:
    """submitit's parameters from --slurm; UserError for one that it does not have."""
    types = submitit.AutoExecutor._typed_parameters()
    names = sorted({*types, *submitit.SlurmExecutor._valid_parameters()} - {*OURS, "use_srun"})
    values: dict[str, Any] = {"timeout_min": 240, "stderr_to_stdout": True}
    for name, value in given:
        if name in OURS:
            raise UserError(f"--slurm {name}={value}: use {OURS[name]}")
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
            raise UserError(f"--slurm {name}={value}: no parameter of submitit's; {hint}")
        if name in types and not isinstance(value, (int, float) if types[name] is float else types[name]):
            raise UserError(f"--slurm {name}={value}: should be of type {types[name].__name__}")
        values[name] = [value] if name in LISTS and isinstance(value, str) else value
    values.setdefault("tasks_per_node", max(1, values.get("gpus_per_node", 1)))
    # A job that SLURM queued again by itself and one that the sweep submits again would meet in a folder.
    values["additional_parameters"] = {"no-requeue": True, **values.get("additional_parameters", {})}
    return {name if name in types else f"slurm_{name}": value for name, value in values.items()}


def run_task(command: list[str], output: str, resumes: bool, variables: dict[str, str]) -> tuple[int, float]:
    """In the job, once per task: run `command` with these variables and torchrun's. (exit code, seconds)

    SIGTERM (pre-emption, scancel) and SIGUSR2 (submitit's: time is nearly up) become SIGTERM of the command.
    """
    submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    os.environ.setdefault("OMP_NUM_THREADS", os.environ.get("SLURM_CPUS_PER_TASK", "1"))
    received: list[int] = []
    processes: list[subprocess.Popen] = []

    def hand_on(number: int, frame) -> None:
        received.append(number)
        for process in processes:
            process.send_signal(signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, hand_on)

    def ignore() -> None:  # SLURM may signal all processes of a task
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)

    began, environment = time.time(), {**os.environ, **variables}
    with open(output, "ab") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, preexec_fn=ignore)
    processes.append(process)
    if received:
        process.send_signal(signal.SIGTERM)
    code = process.wait()
    # Ended by the signal before it could save anything. A script that does not resume would run out of time again.
    if code == -signal.SIGTERM and received and (resumes or signal.SIGUSR2 not in received):
        code = STOPPED
    return code, time.time() - began


class Queue(SlurmInfoWatcher):
    """The states of jobs by squeue: submitit's own sacct needs a database of accounting."""

    def _make_command(self) -> list[str]:
        return ["squeue", "--me", "--array", "--states=all", "--noheader", "--format=%i|%T"]

    def read_info(self, string: bytes | str) -> dict[str, dict[str, str]]:
        text = string if isinstance(string, str) else string.decode()
        known = dict(line.strip().split("|") for line in text.splitlines())
        return {job: {"State": known.get(job, GONE)} for job in self._registered}

    def is_done(self, job_id: str, mode: str = "standard") -> bool:
        return self.get_state(job_id, mode) in ENDED


class SlurmRun:
    """A job of submitit's. stopping: the sweep has told it to stop."""

    def __init__(self, job: Job, submitted: submitit.Job):
        self.job, self.submitted = job, submitted
        self.note = f" (SLURM job {submitted.job_id})"
        self.stopping = False
        self.missed = 0.0

    def poll(self) -> tuple[int, float] | None:
        """(exit code, seconds) of a job that has ended: STOPPED if it is to go on, 130 if it was cancelled."""
        submitted = self.submitted
        if not submitted.done():
            return None
        state = submitted.state
        if not self.has_results():
            self.missed = self.missed or time.time()
            late = state == "COMPLETED" and time.time() - self.missed < LATE
            return None if late else self.lost(state)
        try:
            results = submitted.results()
        except FailedJobError as error:
            self.say(str(error))
            return 1, 0.0
        seconds = max(seconds for _, seconds in results)
        codes = {code for code, _ in results}
        code = next(iter(codes - {0, STOPPED}), max(codes))
        if code == STOPPED and not self.stopping:
            if state not in ENDED:  # it is about to end, and only then is it known whether somebody cancelled it
                return None
            code = 130 if state == "CANCELLED" else STOPPED
        return code, seconds

    def has_results(self) -> bool:
        tasks = range(self.submitted.num_tasks)
        return all(self.submitted.task(task).paths.result_pickle.exists() for task in tasks)

    def lost(self, state: str) -> tuple[int, float]:
        """Of a job without a result."""
        if self.stopping or state == "CANCELLED":
            return 130, 0.0
        if state in CONTINUE:
            return STOPPED, 0.0
        log = self.submitted.task(0).stdout() or f"nothing in {self.submitted.task(0).paths.stdout}"
        self.say(f"{log}\nSLURM job {self.submitted.job_id}: {state}")
        return 1, 0.0

    def say(self, text: str) -> None:
        with open(self.job.output, "ab") as file:
            file.write(f"{text.strip()}\n".encode())


class Slurm:
    """Submits runs. at_a_time: those of an array that run at the same time."""

    verb, pause, again = "queued", 2.0, True

    def __init__(self, at_a_time: int, output_dir: str, given: list[tuple[str, Any]]):
        self.at_a_time = at_a_time
        name = os.path.basename(os.path.abspath(output_dir))
        self.parameters = {"name": name, "slurm_array_parallelism": at_a_time, **parameters(given)}
        self.folder = os.path.abspath(os.path.join(output_dir, ".sweep", "slurm"))
        submitit.SlurmJob.watcher = Queue(delay_s=LOOK)

    @cached_property
    def executor(self) -> submitit.AutoExecutor:
        try:
            executor = submitit.AutoExecutor(self.folder, cluster="slurm")
        except RuntimeError:
            raise UserError("--launcher slurm: there is no srun here; start the sweep where SLURM is") from None
        executor.update_parameters(**self.parameters)
        return executor

    def room(self, running: int) -> int:
        return MOST

    def adopt(self, jobs: list[Job]) -> list[tuple[Job, SlurmRun]]:
        """Runs that an earlier start of the sweep submitted and that SLURM still has, or that ended meanwhile."""
        found = []
        for job in jobs:
            record = read_record(job)
            if job.state == "waiting" and record.get("state") == "running" and "slurm" in record:
                tasks = range(record["tasks"])
                run = SlurmRun(job, submitit.SlurmJob(self.folder, record["slurm"], tasks))
                if run.has_results() or run.submitted.watcher.get_state(record["slurm"]) != GONE:
                    job.state = "running"
                    found.append((job, run))
        return found

    def start(self, jobs: list[Job]) -> list[SlurmRun]:
        try:
            with self.executor.batch():
                made = []
                for job in jobs:
                    command = command_of(job)
                    open_output(job, command).close()
                    resumes = job.stage.options.MAIN in TRAININGS
                    output = os.path.abspath(job.output)
                    made.append(self.executor.submit(run_task, command, output, resumes, job.environment))
        except (FailedJobError, FailedSubmissionError) as error:
            raise UserError(f"--launcher slurm: {reason_of(error)}") from None
        for job, submitted in zip(jobs, made):
            job.state = "running"
            write_record(job, slurm=submitted.job_id, tasks=submitted.num_tasks)
        return [SlurmRun(job, submitted) for job, submitted in zip(jobs, made)]

    def stop(self, runs: list[SlurmRun], kill: bool) -> None:
        """Cancel what waits, tell the others to save. kill: end all; SLURM leaves them KillWait seconds."""
        ids = [run.submitted.job_id for run in runs]
        for run in runs:
            run.stopping = True
        for flags in ([],) if kill else (["--state=PENDING"], ["--signal=TERM"]):
            subprocess.run(["scancel", *flags, *ids], check=False)
