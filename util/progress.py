"""A progress bar on a terminal, else plain lines."""

import sys
import time
from collections.abc import Iterable, Iterator

from tqdm import tqdm


class Progress:
    """A tqdm bar on a terminal, else a line every `every` steps: `Epoch: [3]  [ 20/100]  lr: ..  loss: ..`."""

    def __init__(self, header: str, total: int, *, every: int = 20, start: int = 0, enabled: bool = True):
        self.header, self.total, self.every, self.step, self.enabled = header, total, every, start, enabled
        self.bar = (
            tqdm(total=total, initial=start, desc=header, leave=False) if enabled and sys.stderr.isatty() else None
        )
        self.begin, self.first = time.perf_counter(), start

    @property
    def due(self) -> bool:
        """Whether the next `update` should show values."""
        return (self.step + 1) % self.every == 0 or self.step + 1 == self.total

    def update(self, values: dict[str, float] | None = None) -> None:
        """Count a step and show `values`, if given."""
        self.step += 1
        shown = "  ".join(f"{k}: {v:.4g}" for k, v in (values or {}).items())
        if self.bar is not None:
            self.bar.update(1)
            if values:
                self.bar.set_postfix_str(shown)
        elif self.enabled and values:
            seconds = (time.perf_counter() - self.begin) / (self.step - self.first)
            left = time.strftime("%H:%M:%S", time.gmtime(seconds * (self.total - self.step)))
            width = len(str(self.total))
            print(
                f"{self.header}  [{self.step:{width}d}/{self.total}]  eta: {left}  {shown}  s/it: {seconds:.3f}",
                flush=True,
            )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def batches_of(iterable: Iterable, count: int) -> Iterator:
    """`count` items of an iterable, padded with None, so that all ranks make the same number of iterations."""
    iterator = iter(iterable)
    for _ in range(count):
        yield next(iterator, None)
