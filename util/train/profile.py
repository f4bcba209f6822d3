"""--profile N: where a training step's time goes, and how much of the machine's arithmetic it uses."""

import time
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from util.files import survive, write_atomic

WARMUP = 3  # micro-steps before timing; FLOP are counted in the second
aten = torch.ops.aten
# Attention on CPU, for which torch's counter has no formula.
FORMULAS = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *rest, **kw: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *rest, **kw: sdpa_backward_flop_count(grad, q, k, v)
    ),
}


class StepProfiler:
    """Profiles the first WARMUP + 2 N micro-steps of a run: N are timed, then N run under torch.profiler.

    util/train/loop.py calls `begin` before it requests a batch, `got` when it has one, `done` after the step. Writes
    trace.json (chrome://tracing, Perfetto) and profile.txt (rates and top operations) to output_dir, and a line to the
    log. The steps may span epochs; `close` reports a run that was too short.
    """

    def __init__(self, steps: int, log, device: torch.device, dtype: torch.dtype):
        self.steps, self.log, self.device, self.dtype = steps, log, device, dtype
        self.step = self.images = self.flops = 0
        self.waited = self.seconds = 0.0
        self.context: Any = None  # FlopCounterMode or torch.profiler while active
        self.finished = False

    def begin(self) -> None:
        if self.finished:
            return
        if self.context is not None:  # the epoch ended: the same step's batch is requested again
            pass
        elif self.step == 1:
            self.context = FlopCounterMode(display=False, custom_mapping=FORMULAS)
            self.context.__enter__()
        elif self.step == WARMUP + self.steps:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
            self.context = profile(activities=activities)
            self.context.__enter__()
        if self.step == WARMUP:
            self._synchronize()
        self.tic = time.perf_counter()

    def got(self) -> None:
        if not self.finished and WARMUP <= self.step < WARMUP + self.steps:
            self.waited += time.perf_counter() - self.tic

    def done(self, images: int) -> None:
        """images: number of images in this micro-step of this process."""
        if self.finished:
            return
        if WARMUP <= self.step < WARMUP + self.steps:
            if self.step == WARMUP + self.steps - 1:
                self._synchronize()
            self.seconds += time.perf_counter() - self.tic
            self.images += images
        self.step += 1
        if self.step == 2:
            self.context.__exit__(None, None, None)
            self.flops, self.context = self.context.get_total_flops(), None
        elif self.step == WARMUP + 2 * self.steps:
            self._synchronize()
            self.context.__exit__(None, None, None)
            self._write()
            self.finished, self.context = True, None

    def close(self) -> None:
        """Stop the active profiler; report if the run ended too early."""
        if self.context is not None:
            self.context.__exit__(None, None, None)
            self.context = None
        if not self.finished:
            self.finished = True
            self.log.say(
                f"--profile {self.steps}: nothing written; the run had {self.step} micro-steps, "
                f"profiling needs {WARMUP + 2 * self.steps}"
            )

    def summary(self) -> str:
        rate, peak = self.flops * self.steps / self.seconds, matmul_rate(self.device, self.dtype)
        return (
            f"profile: {self.images / self.seconds:.4g} images/s per process, "
            f"waiting for data {100 * self.waited / self.seconds:.1f} %, "
            f"{self.flops / 1e9:.4g} GFLOP a step, {rate / 1e9:.4g} GFLOP/s = {100 * rate / peak:.1f} % "
            f"of the {peak / 1e9:.4g} that a {str(self.dtype).removeprefix('torch.')} matrix product reaches here"
        )

    def _write(self) -> None:
        line = self.summary()
        self.log.say(line)
        with survive(self.log.path("trace.json")):
            self.context.export_chrome_trace(self.log.path("trace.json"))
        by = "self_cuda_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        table = self.context.key_averages().table(sort_by=by, row_limit=30, max_name_column_width=60)
        text = f"{line}\n(timed without the profiler; below, {self.steps} micro-steps under it, by {by})\n\n{table}\n"
        with survive(self.log.path("profile.txt")):
            write_atomic(self.log.path("profile.txt"), lambda file: file.write(text.encode()))

    def _synchronize(self) -> None:
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product of this dtype, the best of five."""
    n = 1024 if device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):  # the first is a warm-up
        tic = time.perf_counter()
        a @ b
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()
        best = min(best, time.perf_counter() - tic)
    return 2.0 * n**3 / best
