"""A run's output folder: what it already contains, whether this run may write there, and a lock against others."""

import errno
import json
import os
import re
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from util.errors import UserError, reason_of

# Kinds of run as named in args.json: a description, and the first line of the report.
KINDS = {
    "finetune": ("a training run of main_finetune.py", r"# Fine-tuning: "),
    "kfold": ("a k-fold run of main_finetune.py", r"# \d+-fold run"),
    "pretrain": ("a training run of main_pretrain_noprop.py", r"# NoProp-MAE pretraining "),
    "linprobe": ("what main_linprobe.py wrote", r"# Frozen features of "),
    "sample": ("what main_sample.py wrote", r"# Samples of "),
    "predict": ("what main_predict.py wrote", r"# Predictions for "),
}
RESUMABLE = ("finetune", "pretrain")
CHECKPOINT = r"checkpoint-(last|next|previous|best|\d+)\.pth"
# Files that training leaves. TensorBoard reads all of its files in a folder as one run.
LEFT = CHECKPOINT + (
    r"|args\.json|log\.txt|report\.(md|html)|result\.json|oof\.csv|summary\.json|(curves|confusion|noise_curve)\.png"
    r"|trace\.json|profile\.txt|reconstruction_epoch_\d+\.png|events\.out\.tfevents\..*"
    r"|metrics\.csv|\.logger-\w+\.json"
)


def kind_of_run(folder: str) -> str | None:
    """A key of KINDS, `other` for a report of unknown origin, None if there is no sign of a run."""
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        kind = json.loads(Path(folder, "args.json").read_text("utf-8"))["kind"]
        if kind in KINDS:
            return kind
    if holds(folder, r"fold-\d+"):
        return "kfold"  # the folds were started one by one
    try:  # written before args.json stored the kind
        with open(os.path.join(folder, "report.md"), encoding="utf-8", errors="replace") as file:
            heading = file.readline(200)
    except OSError:
        return None
    return next((kind for kind, (_, start) in KINDS.items() if re.match(start, heading)), "other")


def holds(folder: str, names: str) -> bool:
    """True if the name of a file in it matches the regular expression `names`."""
    return any(re.fullmatch(names, name) for name in os.listdir(folder))


def goes_on_in(folder: str, resume: str) -> bool:
    """True if --resume refers to a checkpoint in this folder."""
    return resume == "auto" or (bool(resume) and os.path.realpath(os.path.dirname(resume)) == os.path.realpath(folder))


def refuse_other_run(folder: str, kind: str, resume: str = "", overwrite: bool = False) -> None:
    """UserError if a run of this kind would overwrite another run's files.

    Training continues with --resume from a checkpoint in the folder, or starts over with --overwrite. The other scripts
    overwrite only earlier results of their own.
    """
    if overwrite or not os.path.isdir(folder):
        return
    held, checkpoints, trains = kind_of_run(folder), holds(folder, CHECKPOINT), kind in RESUMABLE
    own = held == kind or (held is None and (trains or not holds(folder, CHECKPOINT + r"|log\.txt")))
    if own and (not trains or not checkpoints or goes_on_in(folder, resume)):
        return
    if own:
        raise UserError(
            f"--output_dir {folder}: holds checkpoints of a run; --resume auto continues it, "
            "--overwrite starts over, or choose another folder"
        )
    what = (
        KINDS[held][0] if held in KINDS else "a training run" if checkpoints else "another run's log.txt or report.md"
    )
    or_else = ", or --overwrite" if trains or kind == "kfold" else ""
    raise UserError(f"--output_dir {folder}: holds {what}, which would be lost; choose another folder{or_else}")


def refuse_log_of_other_run(log_dir: str, output_dir: str | None) -> None:
    """UserError if the folder has another run's TensorBoard files: TensorBoard would merge the two."""
    if not os.path.isdir(log_dir) or (output_dir and os.path.realpath(log_dir) == os.path.realpath(output_dir)):
        return
    if (held := kind_of_run(log_dir)) in KINDS:
        raise UserError(
            f"--log_dir {log_dir}: holds {KINDS[held][0]}; TensorBoard would mix the two; choose another folder"
        )


def clear_run(folder: str, folds: int = 0) -> None:
    """--overwrite: delete what another training run left, so that none of it is resumed, used or shown.

    folds: the folders fold-0 to fold-{folds - 1} stay; each is cleared by its own run.
    """
    for name in os.listdir(folder):
        path, fold = os.path.join(folder, name), re.fullmatch(r"fold-(\d+)", name)
        with suppress(OSError):
            if re.fullmatch(LEFT, name):
                os.unlink(path)
            elif fold and int(fold.group(1)) >= folds:
                clear_run(path)
                for mark in (".lock", OUTPUT_MARK):
                    Path(path, mark).unlink(missing_ok=True)
                os.rmdir(path)  # unless it contains something else


# What this process created: folders, outer ones first, and marks in folders.
_made: list[str] = []
_marks: list[str] = []


def make_folder(path: str, flag: str) -> None:
    """Create `path` and its parents where missing. UserError if that fails."""
    try:
        above = os.path.abspath(path)
        while not os.path.isdir(above) and above not in _made:
            _made.append(above)
            above = os.path.dirname(above)
        _made.sort()
        os.makedirs(path, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a zero byte
        raise UserError(f"{flag} {path}: cannot be created ({reason_of(error)})") from None
    if not os.access(path, os.W_OK):
        raise UserError(f"{flag} {path}: no permission to write there")


def remove_empty_folders() -> None:
    """Undo folders that this process created or marked but wrote nothing to: the run failed before it began."""
    for mark in _marks:
        with suppress(OSError):
            if os.listdir(os.path.dirname(mark)) == [OUTPUT_MARK]:
                os.unlink(mark)
    for path in reversed(_made):
        with suppress(OSError, ValueError):  # ValueError: a zero byte in the name
            os.rmdir(path)


def mark_output(path: str) -> None:
    """So that it is never read as a class or a folder of images (util/data/image_files.py)."""
    mark = os.path.join(path, OUTPUT_MARK)
    with suppress(OSError):
        if not os.path.exists(mark):
            open(mark, "a").close()
            _marks.append(mark)


def lock_folder(path: str):
    """An open, locked file that keeps other processes out until it is closed; None if the file system has no locks.

    A POSIX record lock: the system releases it whenever the process ends, and unlike flock's it is not inherited, so
    loader processes that outlive a killed run by some seconds do not hold it.
    """
    try:
        import fcntl

        file = open(os.path.join(path, ".lock"), "a")  # noqa: SIM115 (held until close())
    except (ImportError, OSError):  # Windows; a full disk, another user's file
        return None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return None
        raise UserError(
            f"--output_dir {path}: another process is training there; wait until it ends, or choose another folder"
        ) from None
    return file


OUTPUT_MARK = ".noisevit-output"  # an empty file in each output folder


def is_output(names: Collection[str]) -> bool:
    """Whether a folder with these files was written by a run: it has the mark, or files that only earlier versions or
    TensorBoard write."""
    if OUTPUT_MARK in names or any(n.startswith("events.out.tfevents") for n in names):
        return True
    checkpoint = any(n.startswith("checkpoint-") and n.endswith(".pth") for n in names)
    told = {"args.json", "report.md", "summary.json"} & set(names)
    return bool(told and (checkpoint or {"log.txt", "oof.csv", "predictions.csv", "result.json"} & set(names)))
