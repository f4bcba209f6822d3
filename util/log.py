"""What a run reports: to its loggers, in log.txt (one JSON object per epoch, MAE's convention), on the terminal."""

import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from tqdm import tqdm

from util.dist import World, broadcast_object
from util.errors import UserError, reason_of
from util.files import survive, write_text
from util.folder import (
    clear_run,
    goes_on_in,
    lock_folder,
    make_folder,
    mark_output,
    refuse_log_of_other_run,
    refuse_other_run,
)
from util.loggers import Logger, Start, build, forget, name_and_group

TIMES = ("seconds", "images_per_second", "data_wait_percent")  # the entries of log.txt that equal runs do not share


class RunLog:
    """Writes on rank 0 only.

    The loggers (util/loggers.py) get, every --print_freq steps, train_loss and lr, as MAE does, and of pretraining the
    loss of each level (train_loss_0, ...); after each epoch the values of its line in log.txt: train_loss as
    train/loss, val_acc1 as val/acc1.
    """

    def __init__(
        self,
        output_dir: str | None,
        log_dir: str | None = None,
        *,
        is_main: bool = True,
        kind: str = "",
        anew: bool = False,
        loggers: Sequence[str] = ("tensorboard",),
    ):
        self.output_dir = output_dir if is_main else None
        self.is_main = is_main
        self.kind, self.anew = kind, anew  # anew: delete another run's files in the folder
        self.lock = None
        self.log_dir = (log_dir or output_dir) if is_main else None
        self.asked = list(loggers) if is_main else []
        self.loggers: list[Logger] = []  # that are on
        if self.output_dir:
            make_folder(self.output_dir, "--output_dir")
            mark_output(self.output_dir)

    def start(self, epoch: float = 0.0, hyperparameters: dict | None = None) -> None:
        """Open the files to continue at `epoch`; what an interrupted run wrote beyond it is dropped.

        UserError if another process is training there.
        """
        kept: list[dict] = []
        if self.output_dir:
            self.lock = lock_folder(self.output_dir)
            if self.anew:
                clear_run(self.output_dir)
            kept = [line for line in read_log(self.path("log.txt")) if line["epoch"] < math.floor(epoch)]
            write_text(self.path("log.txt"), "".join(json.dumps(line) + "\n" for line in kept), "--output_dir")
        if self.log_dir and "tensorboard" in self.asked:
            make_folder(self.log_dir, "--log_dir")
            mark_output(self.log_dir)
        places = {"tensorboard": self.log_dir, "csv": self.output_dir}
        self.loggers = [build(name) for name in self.asked if places.get(name, True)]
        name, group = name_and_group(self.output_dir or self.log_dir or self.kind)
        self._each("start", Start(self.output_dir, self.log_dir, name, group, dict(hyperparameters or {}), epoch, kept))

    def path(self, name: str) -> str:
        assert self.output_dir
        return os.path.join(self.output_dir, name)

    def write_args(self, options: dict) -> None:
        """args.json: the kind of run, the resolved options, versions, git commit and command line.

        Deletes an existing report: it belongs to another command line, or to fewer epochs.
        """
        if self.output_dir:
            for name in ("report.md", "report.html", "result.json"):
                with suppress(OSError):
                    os.unlink(self.path(name))
            about = {"kind": self.kind, "command": sys.argv, "options": options}
            text = json.dumps({**about, "versions": versions(), "git": git_commit()}, indent=2, default=str) + "\n"
            write_text(self.path("args.json"), text, "--output_dir")

    def scalars(self, values: dict[str, float], epoch_1000x: int) -> None:
        self._each("scalars", values, epoch_1000x)

    def image(self, name: str, picture, epoch_1000x: int) -> None:
        """picture: uint8 [H, W, 3]."""
        self._each("image", name, picture, epoch_1000x)

    def epoch(self, line: dict) -> None:
        """Append one line to log.txt; NaN and infinite values become null."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        if self.output_dir:
            with survive(self.path("log.txt")), open(self.path("log.txt"), "ab+") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":  # a full disk cut a line short
                        file.write(b"\n")
                file.write(json.dumps(clean).encode() + b"\n")
        self._each("epoch", clean)

    def flush(self) -> None:
        """Called before a checkpoint, so that the log on disk is not behind it."""
        self._each("flush")

    def say(self, text: str) -> None:
        if self.is_main:
            # file names may be any bytes
            text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
            tqdm.write(text) if sys.stderr.isatty() else print(text, flush=True)

    def notes(self, notes: list[str]) -> None:
        for note in notes:
            self.say(f"note: {note}")

    def close(self, final: dict[str, float] | None = None, state: str = "finished") -> None:
        """final: values of the whole run, for the loggers; state: finished, stopped or failed."""
        self._each("close", final or {}, state)
        self.loggers = []
        if self.lock:
            self.lock.close()

    def forget(self) -> None:
        """Called before `start` if the run continues from an earlier checkpoint than its last."""
        if self.output_dir:
            with survive(self.output_dir):
                forget(self.output_dir)

    def _each(self, what: str, *args) -> None:
        """Tell each logger; one that fails is off from then on."""
        for logger in list(self.loggers):
            told = False
            with survive(f"--logger {logger.name}", "off from here on"):
                getattr(logger, what)(*args)
                told = True
            if not told:
                self.loggers.remove(logger)


def claim(
    output_dir: str | None,
    kind: str,
    world: World,
    *,
    log_dir: str | None = None,
    loggers: Sequence[str] = ("tensorboard",),
    resume: str = "",
    overwrite: bool = False,
) -> RunLog:
    """The log of a run that may write to `output_dir`, on every rank; UserError if another run's files would be lost.

    All scripts open their output folder here. kind: a key of util/folder.py's KINDS. output_dir '' or None: no files.
    """
    fault = None
    if world.is_main:
        try:
            if log_dir:
                refuse_log_of_other_run(log_dir, output_dir)
            if output_dir:
                make_folder(output_dir, "--output_dir")
                refuse_other_run(output_dir, kind, resume, overwrite)
        except UserError as error:
            fault = str(error)
        except OSError as error:
            fault = f"--output_dir {output_dir}: cannot be read ({reason_of(error)})"
    if fault := broadcast_object(fault):
        raise UserError(fault)
    anew = overwrite and not goes_on_in(output_dir or "", resume)
    return RunLog(output_dir or None, log_dir, is_main=world.is_main, kind=kind, anew=anew, loggers=loggers)


def read_log(path: str) -> list[dict]:
    """The lines of a log.txt, without an unfinished line (a killed run) or any other invalid one."""
    lines = []
    if os.path.isfile(path):
        for text in Path(path).read_text("utf-8", "replace").splitlines():
            try:
                line = json.loads(text)
            except (json.JSONDecodeError, RecursionError):
                continue
            if isinstance(line, dict) and isinstance(line.get("epoch"), int):
                lines.append(line)
    return lines


def versions() -> dict[str, str]:
    import timm
    import torchvision

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores"
        + (f", {torch.cuda.get_device_name()} x {torch.cuda.device_count()}" if torch.cuda.is_initialized() else ""),
    }


def git_commit() -> str | None:
    """The commit of this code, with `-dirty` if files have changed; None outside a git checkout."""
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
