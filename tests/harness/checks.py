"""Comparisons of runs, and checks of what a test must not leave out."""

import re
import resource
from collections.abc import Collection
from contextlib import contextmanager
from fnmatch import fnmatch

import torch

from bench.chaos import tensorboard_scalars
from tests.harness import ROOT
from util.checkpoint import read_checkpoint
from util.log import TIMES, read_log


def assert_same_state(a: dict, b: dict, path: str = "") -> None:
    """Bit for bit, through nested containers."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for k in a:
            assert_same_state(a[k], b[k], f"{path}.{k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same_state(x, y, f"{path}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b or (a != a and b != b), f"{path}: {a} {b}"


def comparable(path) -> dict:
    content = read_checkpoint(str(path))
    return {k: v for k, v in content.items() if k not in ("args",)}


def log_without_times(folder) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_log(str(folder / "log.txt"))]


def assert_same_run(a, b) -> None:
    """Two output folders: the last checkpoint, log.txt and each of TensorBoard's scalars with its step."""
    assert_same_state(comparable(a / "checkpoint-last.pth"), comparable(b / "checkpoint-last.pth"))
    assert log_without_times(a) == log_without_times(b)
    assert_same_state(tensorboard_scalars(a), tensorboard_scalars(b))


def assert_tensorboard_has_log(folder, *, steps: list[int], levels: Collection[str] = ()) -> None:
    """The same scalars of both trainings: those of steps at `steps`, and all of log.txt's, as train/loss, val/acc1."""
    scalars, lines = tensorboard_scalars(folder), read_log(str(folder / "log.txt"))
    by_step = {"train_loss", "lr", *levels}
    logged = {name for name in lines[0] if name.startswith(("train_", "val_"))}
    by_epoch = {"/".join(name.split("_", 1)): name for name in logged}
    assert set(scalars) == by_step | set(by_epoch) and {"train/loss", "train/lr"} <= set(by_epoch)
    for tag in by_step:
        assert [step for step, _ in scalars[tag]] == steps, tag
    for tag, name in by_epoch.items():
        assert [step for step, _ in scalars[tag]] == [1000 * (line["epoch"] + 1) for line in lines], tag
        torch.testing.assert_close([value for _, value in scalars[tag]], [line[name] for line in lines])


def undocumented(folder) -> list[str]:
    """The files of an output folder that the table of what a run leaves does not have."""
    pages = "".join(page.read_text() for page in (ROOT / "README.md", *ROOT.glob("docs/*.md")))
    table = pages.split("\n| file | of | |\n")[1].split("\n\n")[0]
    names = re.findall(r"`([^`]+)`", "".join(row.split("|")[1] for row in table.splitlines()))
    left = [path.name + "/" * path.is_dir() for path in folder.iterdir() if not path.name.startswith(".")]
    return [one for one in left if not any(fnmatch(one, re.sub(r"{.+?}", "*", name)) for name in names)]


def one_line(caught) -> str:
    text = str(caught.value)
    assert "\n" not in text and 0 < len(text) < 600, text
    return text


@contextmanager
def peak_memory_below(megabytes: int):
    """A cap on this process's address space, relative to now: what asks for more gets MemoryError."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + megabytes * 2**20, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
