"""Loader processes: how many, and which file each is at, so that one that dies (a crash, no memory) is reported with it."""

import os
import weakref

import torch
from torch.utils.data import get_worker_info

_alive: weakref.WeakSet = weakref.WeakSet()


def loader_processes(wanted: int) -> int:
    """`--num_workers`, at most one per core that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(wanted, cores)


class Reading:
    """A row for each of `workers` processes in memory that they share with this one: process id, number of its sample."""

    def __init__(self, paths: list[str], workers: int):
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
