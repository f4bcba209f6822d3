"""Where a run's numbers and pictures go: TensorBoard, a CSV file, W&B, MLflow, trackio, by --logger.

All get the same: scalars and pictures at MAE's epoch_1000x, int(1000 * fractional epoch), and the options of the run.
util/log.py calls them, on rank 0; what one of them raises ends that logger, not the run.
"""

import json
import os
import queue
import re
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import gettempdir
from typing import Any
from uuid import uuid4

import numpy as np

from util.choices import LOGGERS
from util.files import write_csv, write_text
from util.folder import mark_output

PROJECT = "noisevit"  # of W&B and trackio, and MLflow's experiment, unless the tool's own variable names another
STARTING, SAVING, CLOSING = 60.0, 10.0, 60.0  # seconds that a run waits for a tool


@dataclass(frozen=True)
class Start:
    """What a logger is told at the start. epoch: where the run continues; lines: of log.txt, before that."""

    folder: str | None
    log_dir: str | None
    name: str
    group: str | None
    hyperparameters: dict[str, Any]
    epoch: float
    lines: list[dict]


class Logger:
    """Ignores everything; each logger has those methods that concern it."""

    name = ""

    def start(self, start: Start) -> None: ...

    def scalars(self, values: dict[str, float], step: int) -> None: ...

    def image(self, name: str, picture: np.ndarray, step: int) -> None:
        """picture: uint8 [H, W, 3]."""

    def epoch(self, line: dict) -> None:
        """A line of log.txt."""

    def flush(self) -> None:
        """Before a checkpoint, which should not be ahead of what was logged."""

    def close(self, final: dict[str, float], state: str) -> None:
        """final: values of the whole run, e.g. the best score. state: finished, stopped or failed."""


def build(name: str) -> Logger:
    """name: of util/choices.py's LOGGERS."""
    logger = globals()[LOGGERS[name]]()
    return InThread(logger) if isinstance(logger, Tracker) else logger


def name_and_group(folder: str, environ: Mapping[str, str] = os.environ) -> tuple[str, str | None]:
    """A run's name is NOISEVIT_NAME, else that of its folder; folds add theirs. Its group is NOISEVIT_GROUP.

    main_sweep.py sets the two.
    """
    above, own = os.path.split(os.path.abspath(folder))
    fold = f"-{own}" if re.fullmatch(r"fold-\d+", own) else ""
    name = environ.get("NOISEVIT_NAME") or (os.path.basename(above) if fold else own)
    return name.replace(os.sep, "-") + fold, environ.get("NOISEVIT_GROUP") or None


class TensorBoard(Logger):
    name = "tensorboard"

    def start(self, start: Start) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        threading.excepthook = _excepthook
        self.writer = SummaryWriter(start.log_dir, purge_step=int(start.epoch * 1000) + 1)
        if start.epoch == 0:
            self.writer.add_text("x axis", "1000 steps are one epoch: epoch 0 ends at 1000.", 0)
        if start.hyperparameters:
            plain = (int, float, str, type(None))
            values = {k: v if isinstance(v, plain) else str(v) for k, v in start.hyperparameters.items()}
            # Without hparams' list of metrics, TensorBoard's table has the last value of every scalar.
            _, session, self.ended = hparams(values, {})
            self.writer._get_file_writer().add_summary(session, 0)

    def scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def image(self, name: str, picture: np.ndarray, step: int) -> None:
        self.writer.add_image(name, picture, step, dataformats="HWC")

    def flush(self) -> None:
        self.writer.flush()

    def close(self, final: dict[str, float], state: str) -> None:
        if state == "finished" and hasattr(self, "ended"):
            self.writer._get_file_writer().add_summary(self.ended, 0)
        self.writer.close()


def _excepthook(args, default=threading.excepthook) -> None:
    """Silence TensorBoard's thread: the run gets the same error and reports it in one line."""
    if not type(args.thread).__module__.startswith("tensorboard."):
        default(args)


class Csv(Logger):
    """metrics.csv: log.txt as a table. It is written anew after each epoch, as a later line may have more columns."""

    name = "csv"

    def start(self, start: Start) -> None:
        assert start.folder
        self.path, self.lines = os.path.join(start.folder, "metrics.csv"), list(start.lines)
        self.write()

    def epoch(self, line: dict) -> None:
        self.lines.append(line)
        self.write()

    def write(self) -> None:
        names = list(dict.fromkeys(name for line in self.lines for name in line))
        names.sort(key=lambda name: name != "epoch")  # first
        write_csv(self.path, names, [[line.get(name) for name in names] for line in self.lines])


class InThread(Logger):
    """A logger whose tool may be slow or far away, in a thread. A run waits only at its start, before a checkpoint and
    at the end, and no longer than STARTING, SAVING and CLOSING."""

    def __init__(self, logger: Logger):
        self.logger, self.name = logger, logger.name
        self.calls: queue.SimpleQueue = queue.SimpleQueue()
        self.error: Exception | None = None
        threading.Thread(target=self._work, name=f"--logger {self.name}", daemon=True).start()

    def _work(self) -> None:
        for call, done in iter(self.calls.get, None):
            try:
                if self.error is None:
                    call()
            except BaseException as error:  # SystemExit and KeyboardInterrupt, too, end only this thread's work
                self.error = error if isinstance(error, Exception) else RuntimeError(type(error).__name__)
            done.set()

    def _tell(self, seconds: float, what: str, *args) -> None:
        if self.error is None:
            done = threading.Event()
            self.calls.put((partial(getattr(self.logger, what), *args), done))
            if seconds and not done.wait(seconds):
                self.error = TimeoutError(f"no answer for {seconds:g} s")
        if self.error is not None:
            self.calls.put(None)
            raise self.error

    def start(self, start: Start) -> None:
        self._tell(STARTING, "start", start)

    def scalars(self, values: dict[str, float], step: int) -> None:
        self._tell(0, "scalars", values, step)

    def image(self, name: str, picture: np.ndarray, step: int) -> None:
        self._tell(0, "image", name, picture, step)

    def flush(self) -> None:
        self._tell(SAVING, "flush")

    def close(self, final: dict[str, float], state: str) -> None:
        self._tell(CLOSING, "close", final, state)
        self.calls.put(None)


class Tracker(Logger, ABC):
    """A tool with its own store of runs.

    A file in the run's folder keeps its id there and the last step of each name: a resumed run continues it, and what
    it computes again is not sent again.
    """

    def start(self, start: Start) -> None:
        self.path = record_of(start.folder, self.name) if start.folder else ""
        self.id, self.last = "", {}
        with suppress(OSError, ValueError, KeyError, TypeError):
            record = json.loads(Path(self.path).read_text("utf-8"))
            self.id, self.last = str(record["id"]), dict(record["last"])
        known = self.id
        self.open(start)
        if self.id != known:
            self.last = {}
        self._sent([], 0)

    def scalars(self, values: dict[str, float], step: int) -> None:
        if new := {name: value for name, value in values.items() if self.is_new(name, step)}:
            self.send(new, step)
            self._sent(list(new), step)

    def image(self, name: str, picture: np.ndarray, step: int) -> None:
        if self.is_new(name, step):
            self.send_image(name, picture, step)
            self._sent([name], step)

    def is_new(self, name: str, step: int) -> bool:
        return step > self.last.get(name, -1)

    def _sent(self, names: list[str], step: int) -> None:
        self.last |= dict.fromkeys(names, step)
        if self.path:
            write_text(self.path, json.dumps({"id": self.id, "last": self.last}))

    @abstractmethod
    def open(self, start: Start) -> None:
        """Continue the run `self.id`, or begin one and set `self.id`."""

    @abstractmethod
    def send(self, values: dict[str, float], step: int) -> None: ...

    @abstractmethod
    def send_image(self, name: str, picture: np.ndarray, step: int) -> None: ...


def record_of(folder: str, name: str) -> str:
    return os.path.join(folder, f".logger-{name}.json")


def forget(folder: str) -> None:
    """The run continues from an earlier checkpoint than its last: trackers, which cannot take back, begin new runs."""
    for name in LOGGERS:
        Path(record_of(folder, name)).unlink(missing_ok=True)


class Wandb(Tracker):
    """Steps are the metric epoch_1000x, the axis of all others: W&B's own steps never go back, not even by a resume."""

    name = "wandb"

    def open(self, start: Start) -> None:
        import wandb

        online = wandb.setup().settings.mode not in ("offline", "disabled", "dryrun")
        if online and not wandb.login(prompt=False, verify=False):  # wandb.init would ask at a terminal
            raise RuntimeError("no API key; run `wandb login`, or set WANDB_MODE=offline")
        self.id = self.id or uuid4().hex[:8]
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=start.name,
            group=start.group,
            dir=os.environ.get("WANDB_DIR", start.folder),
            id=self.id,
            resume="allow",
            config=start.hyperparameters,
            allow_val_change=True,
            settings=wandb.Settings(
                console="off",
                quiet=True,
                init_timeout=STARTING / 3,
                finish_timeout=CLOSING / 2,
                finish_timeout_raises=True,
            ),
        )
        self.run.define_metric("epoch_1000x")
        self.run.define_metric("*", step_metric="epoch_1000x")

    def send(self, values: dict[str, float], step: int) -> None:
        self.run.log({"epoch_1000x": step, **values})

    def send_image(self, name: str, picture: np.ndarray, step: int) -> None:
        import wandb

        self.run.log({"epoch_1000x": step, name: wandb.Image(picture)})

    def close(self, final: dict[str, float], state: str) -> None:
        self.run.summary.update(final)
        self.run.finish(exit_code={"finished": 0, "stopped": 75}.get(state, 1))


class Mlflow(Tracker):
    name = "mlflow"

    def open(self, start: Start) -> None:
        from filelock import FileLock  # a requirement of torch

        for name, most in (("MAX_RETRIES", "2"), ("TIMEOUT", "10")):  # by default it tries for minutes
            os.environ.setdefault(f"MLFLOW_HTTP_REQUEST_{name}", most)
        # Two runs of a sweep that make the tables of a new store at the same time break it.
        with FileLock(os.path.join(gettempdir(), f"noisevit-mlflow-{getattr(os, 'getuid', int)()}.lock")):
            self._open(start)

    def _open(self, start: Start) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        self.client, known = MlflowClient(), {}
        try:
            known = dict(self.client.get_run(self.id).data.params)
            self.client.update_run(self.id, status="RUNNING")
        except MlflowException:  # none yet, or another store
            tags = {"group": start.group} if start.group else {}
            self.id = self.client.create_run(self._experiment(), run_name=start.name, tags=tags).info.run_id
        values = {name: str(value)[:6000] for name, value in start.hyperparameters.items()}
        params = [Param(name, value) for name, value in values.items() if name not in known]
        for first in range(0, len(params), 100):  # MLflow's largest batch
            self.client.log_batch(self.id, params=params[first : first + 100])
        for name in known:  # MLflow has no other value for a parameter, a resumed run may
            if values.get(name, known[name]) != known[name]:
                self.client.set_tag(self.id, f"resumed with {name}", values[name])

    def _experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            with suppress(MlflowException):  # another process was faster
                self.client.create_experiment(name)
            experiment = self.client.get_experiment_by_name(name)
        assert experiment is not None
        if "://" not in experiment.artifact_location:  # its pictures are no data set
            os.makedirs(root := os.path.dirname(experiment.artifact_location), exist_ok=True)
            mark_output(root)
        return experiment.experiment_id

    def send(self, values: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.client.log_batch(self.id, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    def send_image(self, name: str, picture: np.ndarray, step: int) -> None:
        self.client.log_image(self.id, picture, key=name, step=step)

    def close(self, final: dict[str, float], state: str) -> None:
        self.scalars(final, max(self.last.values(), default=0))
        self.client.set_terminated(self.id, {"finished": "FINISHED", "stopped": "KILLED"}.get(state, "FAILED"))


class Trackio(Tracker):
    """trackio continues the run of a name, so a new run gets a name that no other has."""

    name = "trackio"

    def open(self, start: Start) -> None:
        import trackio

        project, taken = os.environ.get("TRACKIO_PROJECT", PROJECT), set()
        with suppress(ValueError):  # no such project yet
            taken = {run.name for run in trackio.Api().runs(project)}
        resume = "allow" if self.id else "never"
        if not self.id:
            names = (f"{start.name}-{n}" if n else start.name for n in range(len(taken) + 1))
            self.id = next(name for name in names if name not in taken)
        self.run = trackio.init(
            project, name=self.id, group=start.group, config=start.hyperparameters, resume=resume, embed=False
        )

    def send(self, values: dict[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def send_image(self, name: str, picture: np.ndarray, step: int) -> None:
        import trackio

        self.run.log({name: trackio.Image(picture)}, step=step)

    def close(self, final: dict[str, float], state: str) -> None:
        self.scalars(final, max(self.last.values(), default=0))
        self.run.finish()
