"""Signals and timers that save or stop a run."""

import os
import signal
import sys
import threading
import time
from datetime import timedelta
from queue import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist

from util.dist import lost_rank

MAIN_THREAD_FIRST = 10.0  # seconds for the main thread to report a lost rank itself


class Interrupts:
    """SIGTERM, SIGUSR1, SIGINT, the end of torchrun and the save timer; all ranks agree on them without stalling.

    Each poll starts a small all-reduce on its own group and reads the previous one, which ran during the step. A second
    SIGINT interrupts at once. A thread also waits for the all-reduces: see `_watch`.
    """

    def __init__(self, save_every_minutes: float = 0.0, timeout_minutes: float = 10.0):
        self.stop, self.why = False, "by a signal"
        # torchrun, if it started this process. Without it, nothing would stop or restart the ranks.
        self.parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self.period = 60.0 * save_every_minutes
        self.next_save = time.monotonic() + self.period
        timeout = timedelta(minutes=timeout_minutes)  # the default is 30 minutes for gloo
        self.group: Any = dist.new_group(backend="gloo", timeout=timeout) if dist.is_initialized() else None
        self.pending: tuple[dist.Work, torch.Tensor] | None = None
        self.watched: SimpleQueue = SimpleQueue()
        self.closed = threading.Event()
        if self.group is not None:
            threading.Thread(target=self._watch, daemon=True).start()
        numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        self.before = {number: signal.signal(number, self._receive) for number in numbers}

    def _receive(self, number: int, frame) -> None:
        if self.stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop = True

    def close(self) -> None:
        """Restore the signal handlers and end the thread."""
        self.closed.set()
        self.watched.put(None)
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def poll(self) -> tuple[bool, bool]:
        """(stop, save), the same on every rank; all ranks must call it equally often."""
        if self.parent is not None and os.getppid() != self.parent:
            self.stop, self.why = True, "because torchrun is gone"
        save_due = self.period > 0 and time.monotonic() >= self.next_save
        if self.group is None:
            stop, save = self.stop, save_due
        else:
            stop = save = False
            if self.pending is not None:
                work, flags = self.pending
                work.wait()
                stop, save = bool(flags[0]), bool(flags[1])
            flags = torch.tensor([int(self.stop), int(save_due)])
            work = dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.group, async_op=True)
            self.pending = work, flags
            self.watched.put(work)
        if save:
            self.next_save = time.monotonic() + self.period
        return stop, save

    def _watch(self) -> None:
        """End the process with one line when another rank hangs or died and the main thread cannot notice.

        Behind an NCCL kernel that never ends, the main thread blocks in its next launch or copy.
        """
        for work in iter(self.watched.get, None):
            try:
                work.wait()
            except RuntimeError as error:
                lost = lost_rank(error)
                if lost is None or self.closed.wait(MAIN_THREAD_FIRST):
                    return
                print(f"{os.path.basename(sys.argv[0])}: error: {lost}", file=sys.stderr, flush=True)
                os._exit(2)
