"""Ranks of a process group as forks of this process, which has loaded torch: starting torchrun and n interpreters
would take n + 1 times four seconds of CPU."""

import faulthandler
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait

from torch.distributed import TCPStore


def empty_store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(minutes=1))


class Ranks:
    """Runs call() in n processes, a group if n > 1. Their output is appended to the file `log`."""

    def __init__(
        self, n: int, call: Callable[[], int | None], log: str | os.PathLike = os.devnull, store: TCPStore | None = None
    ):
        # The store is in this process: no port has to be found, and dead ranks keep none.
        self.store = store or empty_store()
        open(log, "a").close()  # so that the file exists when others wait for a line in it

        # No rank runs before all are forked: its connection keeps the store's thread at work, and a fork copies the
        # locks that a thread holds, shut for good.
        gate, keep_shut = os.pipe()

        def rank_main(rank: int) -> None:
            faulthandler.register(signal.SIGQUIT, file=2, all_threads=True)
            os.close(keep_shut)
            os.read(gate, 1)  # returns when no process has the other end any more
            if n > 1:
                os.environ.update(
                    RANK=str(rank),
                    LOCAL_RANK=str(rank),
                    WORLD_SIZE=str(n),
                    MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=str(self.store.port),
                    TORCHELASTIC_USE_AGENT_STORE="True",
                )
            sys.stdout = sys.stderr = open(log, "a", buffering=1)  # noqa: SIM115 (until the process ends)
            sys.exit(call())

        context = multiprocessing.get_context("fork")
        self.processes = [context.Process(target=rank_main, args=(rank,)) for rank in range(n)]
        for process in self.processes:
            process.start()
        os.close(keep_shut)
        os.close(gate)

    def wait(self, seconds: float) -> bool:
        """Wait until the first rank ends, or this many seconds; True if any has ended."""
        return bool(wait([process.sentinel for process in self.processes], seconds))

    def exit_codes(self, seconds: float = 240) -> list[int]:
        """Exit code of each rank, -N for signal N. As in torchrun, a failed rank or the time limit ends all."""
        left = list(self.processes)
        while left:
            in_time = wait([process.sentinel for process in left], seconds)
            left = [process for process in left if process.is_alive()]
            if not in_time or any(process.exitcode for process in self.processes):
                for process in left:
                    process.join(5)  # time to report the reason
                    if process.is_alive():
                        os.kill(process.pid, signal.SIGQUIT)  # its traceback, on the stderr of this process
                        process.join(0.2)
                    process.kill()
        return [process.exitcode for process in self.processes]
