"""Loader processes: how many, how they start, and which file each is at, so that one that dies is reported with it."""

import os
import weakref
from collections.abc import Callable, Sequence
from functools import partial

import torch
from PIL import Image
from torch.utils.data import get_worker_info

from augment.decoding import ImageError, limit_pixels

_alive: weakref.WeakSet = weakref.WeakSet()


def loader_processes(wanted: int) -> int:
    """`--num_workers`, at most one per core that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(wanted, cores)


def worker_init() -> Callable[[int], None]:
    """A loader process's first call: one thread, and this process's limit of pixels, wherever processes are not forked."""
    return partial(_start, 2 * Image.MAX_IMAGE_PIXELS)


def _start(max_pixels: float, worker: int) -> None:
    torch.set_num_threads(1)
    limit_pixels(max_pixels)


def reason_of(error: ImageError, path: str) -> str:
    """Why a file cannot be decoded, in a line without its name."""
    lines = str(error).replace(repr(path), "").splitlines()
    return lines[0].strip()[:160] if lines else type(error).__name__


class Reading:
    """A row for each of `workers` processes in memory that they share with this one: process id, number of its sample."""

    def __init__(self, paths: Sequence[str], workers: int):
        self.paths = paths
        self.table = torch.zeros(max(1, workers), 2, dtype=torch.int64).share_memory_()
        _alive.add(self)

    def note(self, index: int) -> None:
        """Called in a loader process before it opens sample `index`; about 10 microseconds."""
        worker = get_worker_info()
        if worker is not None:
            self.table[worker.id] = torch.tensor([os.getpid(), index])


def file_of_process(pid: int) -> str | None:
    """The path that loader process `pid` began with last; None if it is none of this process's."""
    for reading in _alive:
        for its, index in reading.table.tolist():
            if its == pid:
                return reading.paths[index] if reading.paths else None
    return None
