"""Checkpoints: plain dicts of tensors and primitives, written atomically, checked when read, never executed.

Keys: format, kind of run ("finetune" or "pretrain", see util/folder.py), model, ema, optimizer, scaler, epoch and step
(where to resume: the current epoch and the steps done in it), progress (best metric, patience, running sums), rng (a
list, one entry per rank), args (the options as a dict), and meta (util/meta.py): the same kind, model name and
keywords, img_size, in_chans, classes, mean, std.
"""

import argparse
import os
import random
import re
import zipfile
from collections.abc import Callable
from typing import cast

import numpy as np
import torch

from util.errors import UserError, reason_of
from util.files import survive, warn, write_atomic
from util.meta import check_meta

FORMAT = 1
LAST, PREVIOUS, BEST = "checkpoint-last.pth", "checkpoint-previous.pth", "checkpoint-best.pth"


def read_file(path: str | os.PathLike) -> dict:
    """The dict in a .pth or .safetensors file; never executes pickled code. UserError names the file.

    argparse.Namespace is allowed because MAE's checkpoints contain one; it only carries attributes.
    """
    path = os.fsdecode(path)
    if not os.path.isfile(path):
        folder = os.path.isdir(path)
        raise UserError(f"{path}: {'a folder; give a file in it' if folder else 'no such checkpoint file'}")
    with open(path, "rb") as file:
        start = file.read(40)
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: a Git LFS pointer, not the file itself; `git lfs pull` fetches it")
    try:
        if path.endswith(".safetensors") or start[8:9] == b"{":  # the JSON header; torch.save writes none
            from safetensors.torch import load_file

            return load_file(path)
        refuse_bomb(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # a foreign file can fail in any way; the user needs its name and the reason
        if "global" in str(error).lower() and "weights only" in str(error).lower():
            raise UserError(
                f"{path}: holds pickled Python objects, which are never executed; save tensors only"
            ) from None
        if "weights only load failed" in str(error).lower():  # torch's text explains how to execute the file
            raise UserError(f"{path}: not a readable checkpoint (not written by torch.save or safetensors)") from None
        raise UserError(f"{path}: not a readable checkpoint ({reason_of(error)})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a state dict")
    return content


def refuse_bomb(path: str) -> None:
    """UserError for a zip that would unpack to more than its own size.

    torch.save stores records uncompressed and each storage once, so an honest file is at least as large as its content.
    """
    if not zipfile.is_zipfile(path):
        return  # the format before torch 1.6, which is not a zip
    with zipfile.ZipFile(path) as archive:
        fault = _packing_fault(path, archive)
    if fault:
        raise UserError(f"{path}: {fault}")


def _packing_fault(path: str, archive: zipfile.ZipFile) -> str | None:
    records = archive.infolist()
    packed = [r.filename for r in records if r.compress_type != zipfile.ZIP_STORED]
    if packed:
        return f"its record {packed[0][:80]} is compressed, which torch.save never does; not read"
    if sum(r.file_size for r in records) > os.path.getsize(path):
        return "its records overlap: it would unpack to more than its own size; not read"
    return None


def read_checkpoint(path: str) -> dict:
    """A checkpoint of this project, its checksums verified."""
    fault = damage(path)
    if fault:
        raise UserError(f"{path}: {fault}")
    content = read_file(path)
    if content.get("format") != FORMAT or not isinstance(content.get("meta"), dict):
        raise UserError(
            f"{path}: not a checkpoint of this project (format {str(content.get('format'))[:40]}, expected {FORMAT})"
        )
    check_meta(content["meta"], path)
    return content


def damage(path: str) -> str | None:
    """None if the CRC-32 of every record is right; else what is wrong with the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            fault = _packing_fault(path, archive)
            if fault:
                return fault
            broken = archive.testzip()
        return f"damaged, checksum of {broken} is wrong" if broken else None
    except (OSError, zipfile.BadZipFile, RuntimeError, ValueError, EOFError, NotImplementedError) as error:
        return f"damaged or truncated ({reason_of(error)})"


class CheckpointWriter:
    """Writes a run's checkpoints. A failed write warns and leaves the previous file; the run goes on."""

    def __init__(self, output_dir: str, keep: int = 0):
        self.output_dir, self.keep = output_dir, keep
        self.failures = 0
        self.pending_best: dict | None = None  # the best weights, until the disk has room for them

    def path(self, name: str) -> str:
        return os.path.join(self.output_dir, name)

    def _write(self, name: str, state: dict) -> bool:
        try:
            write_atomic(self.path(name), lambda file: torch.save(state, file))
            return True
        except (OSError, RuntimeError) as error:
            if "DataLoader worker" in str(error):  # raised by torch's signal handler, wherever it interrupts
                raise
            self._warn(name, error)
            return False

    def _warn(self, name: str, error: Exception) -> None:
        self.failures += 1
        warn(f"{self.path(name)}: not written ({reason_of(error)}); will try again at the next save")

    def save_last(self, state: dict) -> bool:
        """checkpoint-last.pth; the one before it stays as checkpoint-previous.pth."""
        last, previous = self.path(LAST), self.path(PREVIOUS)
        if not self._write("checkpoint-next.pth", state):
            return False
        try:
            if os.path.exists(last):
                os.replace(last, previous)
            os.replace(self.path("checkpoint-next.pth"), last)
        except OSError as error:  # `find_resume` also looks for checkpoint-next.pth: nothing is lost
            self._warn(LAST, error)
            return False
        return True

    def save_epoch(self, state: dict, epoch: int) -> bool:
        """checkpoint-{epoch}.pth, a hard link to the last one if possible; deletes all but the newest `keep`."""
        path = self.path(f"checkpoint-{epoch}.pth")
        try:
            if os.path.exists(path):
                os.unlink(path)
            os.link(self.path(LAST), path)
        except OSError:
            if not self._write(os.path.basename(path), state):
                return False
        if self.keep:
            for _, old in numbered_checkpoints(self.output_dir)[: -self.keep]:
                with survive(old, "not removed"):
                    os.unlink(old)
        return True

    def save_best(self, state: dict) -> bool:
        """checkpoint-best.pth, for evaluation and prediction: `model` has the selected weights (EMA if on)."""
        slim = {k: v for k, v in state.items() if k not in ("optimizer", "scaler", "rng", "ema")}
        slim["model"] = state.get("ema") or state["model"]
        wrote = self._write(BEST, slim)
        if wrote:
            self.pending_best = None
        else:  # copy them: training continues and changes these tensors
            self.pending_best = {**slim, "model": _on_cpu(slim["model"])}
        return wrote

    def retry_best(self) -> None:
        """Write checkpoint-best.pth if that failed before."""
        if self.pending_best is not None and self._write(BEST, self.pending_best):
            self.pending_best = None


def _on_cpu(state: dict | None) -> dict | None:
    return state and {k: v.to("cpu", copy=True) if isinstance(v, torch.Tensor) else v for k, v in state.items()}


def numbered_checkpoints(output_dir: str) -> list[tuple[int, str]]:
    found = [(re.fullmatch(r"checkpoint-(\d+)\.pth", n), n) for n in os.listdir(output_dir)]
    return sorted((int(m.group(1)), os.path.join(output_dir, n)) for m, n in found if m)


def find_resume(output_dir: str, tell: Callable[[str], None] = warn) -> str | None:
    """The newest undamaged checkpoint that can be resumed, or None. Damaged ones are reported."""
    return max(resumable(output_dir, tell), key=lambda item: item[0], default=(None, None))[1]


def resumable(output_dir: str, tell: Callable[[str], None] = lambda text: None) -> list[tuple[tuple[int, int], str]]:
    """((epoch, step), path) of each undamaged checkpoint that can be resumed."""
    if not os.path.isdir(output_dir):
        return []
    names = [LAST, "checkpoint-next.pth", PREVIOUS]
    paths = [os.path.join(output_dir, n) for n in names] + [p for _, p in reversed(numbered_checkpoints(output_dir))]
    usable = []
    for path in paths:
        if not os.path.isfile(path):
            continue
        fault = damage(path)
        if fault:
            tell(f"{path}: {fault}; trying the previous one")
            continue
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):
                head = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            if head.get("format") == FORMAT and "optimizer" in head:
                usable.append(((int(head["epoch"]), int(head["step"])), path))
        except Exception as error:
            tell(f"{path}: cannot be read ({reason_of(error)}); trying the previous one")
    return usable


def rng_state(device: torch.device) -> dict:
    """This process's generators, as tensors and primitives (weights_only can read them).

    CUDA's only for a run on CUDA: reading it opens a CUDA context, some 500 MB of GPU memory per process.
    """
    name, keys, pos, has_gauss, cached = cast(tuple, np.random.get_state())
    version, internal, gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), pos, has_gauss, cached],
        "python": [version, torch.tensor(internal, dtype=torch.int64), gauss],
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict, device: torch.device) -> None:
    """Inverse of `rng_state`. The state tensors may be on any device."""
    torch.set_rng_state(state["torch"].cpu())
    name, keys, pos, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), pos, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def peek(path: str) -> dict:
    """{meta, args} of this project's checkpoint, without reading its tensors; {} for any other file.

    args: the options of its run, not checked. UserError if the meta is this project's and has an invalid entry.
    """
    if path.endswith(".safetensors") or not os.path.isfile(path):
        return {}
    try:
        refuse_bomb(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # `read_file` reports what is wrong when the weights are read
        return {}
    meta = own_meta(content, path) if isinstance(content, dict) else None
    if meta is None:
        return {}
    return {"meta": meta, "args": content["args"] if isinstance(content.get("args"), dict) else {}}


def peek_meta(path: str) -> dict | None:
    """The meta found by `peek`, or None."""
    return peek(path).get("meta")


def own_meta(content: dict, path: str) -> dict | None:
    """The checked meta of this project's checkpoint; None for the content of any other file."""
    if content.get("format") != FORMAT or not isinstance(content.get("meta"), dict):
        return None
    check_meta(content["meta"], path, whole=True)
    return content["meta"]


def load_exactly(model, state: dict, flag: str) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{flag}: the checkpoint is for another model ({' '.join(str(error).split())[:200]})") from None
    name = non_finite(state)
    if name is not None:
        raise UserError(f"{flag}: the checkpoint's {name} holds NaN or infinite values")


def non_finite(state: dict[str, torch.Tensor]) -> str | None:
    """Name of the first entry with a NaN or infinite value; None if there is none."""
    names = [k for k, v in state.items() if v.is_floating_point()]
    finite = [torch.isfinite(state[k]).all() for k in names]
    if not finite or torch.stack(finite).all():
        return None
    return next(k for k, ok in zip(names, finite) if not ok)
