"""What a run reports: TensorBoard, log.txt (one JSON object per epoch, MAE's convention), lines on the terminal."""

import json
import math
import os
import platform
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from util.dist import World, broadcast_object
from util.errors import UserError, reason_of
from util.files import must_write, survive, write_text
from util.folder import (
    clear_run,
    goes_on_in,
    lock_folder,
    make_folder,
    mark_output,
    refuse_log_of_other_run,
    refuse_other_run,
)

TIMES = ("seconds", "images_per_second", "data_wait_percent")  # the entries of log.txt that equal runs do not share


class RunLog:
    """Writes on rank 0 only.

    TensorBoard's steps are MAE's epoch_1000x: int(1000 * fractional epoch). Every --print_freq steps both trainings
    write train_loss and lr, as MAE does, and pretraining the loss of each level (train_loss_0, ...). After each epoch
    they write the values of its line in log.txt: train_loss as train/loss, val_acc1 as val/acc1.
    """

    def __init__(
        self,
        output_dir: str | None,
        log_dir: str | None = None,
        *,
        is_main: bool = True,
        kind: str = "",
        anew: bool = False,
    ):
        self.output_dir = output_dir if is_main else None
        self.is_main = is_main
        self.kind, self.anew = kind, anew  # anew: delete another run's files in the folder
        self.writer: Any = None  # TensorBoard's SummaryWriter
        self.lock = None
        self.log_dir = (log_dir or output_dir) if is_main else None
        if self.output_dir:
            make_folder(self.output_dir, "--output_dir")
            mark_output(self.output_dir)

    def start(self, epoch: float = 0.0) -> None:
        """Open the files to continue at `epoch`; what an interrupted run wrote beyond it is dropped.

        UserError if another process is training there.
        """
        if self.output_dir:
            self.lock = lock_folder(self.output_dir)
            if self.anew:
                clear_run(self.output_dir)
            kept = [line for line in read_log(self.path("log.txt")) if line["epoch"] < math.floor(epoch)]
            write_text(self.path("log.txt"), "".join(json.dumps(line) + "\n" for line in kept), "--output_dir")
        if self.log_dir:
            from torch.utils.tensorboard import SummaryWriter

            make_folder(self.log_dir, "--log_dir")
            mark_output(self.log_dir)
            threading.excepthook = _excepthook
            with must_write("--log_dir", self.log_dir):
                self.writer = SummaryWriter(self.log_dir, purge_step=int(epoch * 1000) + 1)
                if epoch == 0:
                    self.writer.add_text("x axis", "1000 steps are one epoch: epoch 0 ends at 1000.", 0)

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
        with self._tensorboard() as writer:
            for name, value in values.items() if writer else ():
                writer.add_scalar(name, value, epoch_1000x)

    def image(self, name: str, picture, epoch_1000x: int) -> None:
        """picture: uint8 [H, W, 3]."""
        with self._tensorboard() as writer:
            if writer:
                writer.add_image(name, picture, epoch_1000x, dataformats="HWC")

    def epoch(self, line: dict) -> None:
        """Append one line to log.txt; NaN and infinite values become null."""
        if self.output_dir:
            clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
            with survive(self.path("log.txt")), open(self.path("log.txt"), "ab+") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":  # a full disk cut a line short
                        file.write(b"\n")
                file.write(json.dumps(clean).encode() + b"\n")

    def flush(self) -> None:
        """Called before a checkpoint, so that the log on disk is not behind it."""
        with self._tensorboard() as writer:
            if writer:
                writer.flush()

    def say(self, text: str) -> None:
        if self.is_main:
            # file names may be any bytes
            text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
            tqdm.write(text) if sys.stderr.isatty() else print(text, flush=True)

    def notes(self, notes: list[str]) -> None:
        for note in notes:
            self.say(f"note: {note}")

    def close(self) -> None:
        with self._tensorboard() as writer:
            if writer:
                writer.close()
        if self.lock:
            self.lock.close()

    @contextmanager
    def _tensorboard(self):
        """An error ends TensorBoard's file: its writing thread is dead then."""
        writer, self.writer = self.writer, None
        with survive(self.log_dir or "", "TensorBoard's file is no longer written"):
            yield writer
            self.writer = writer


def _excepthook(args, default=threading.excepthook) -> None:
    """Silence TensorBoard's thread: the run gets the same error and reports it in one line."""
    if not type(args.thread).__module__.startswith("tensorboard."):
        default(args)


def claim(
    output_dir: str | None,
    kind: str,
    world: World,
    *,
    log_dir: str | None = None,
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
    return RunLog(output_dir or None, log_dir, is_main=world.is_main, kind=kind, anew=anew)


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
