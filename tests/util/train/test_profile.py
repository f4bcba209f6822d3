"""--profile: what is counted and what is written."""

import json

import torch
from torch import nn

from util.train.profile import WARMUP, StepProfiler, matmul_rate


class Log:
    """RunLog's two methods that StepProfiler calls."""

    def __init__(self, folder):
        self.folder, self.lines = folder, []

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def say(self, text: str) -> None:
        self.lines.append(text)


def follow(profiler: StepProfiler, steps: int, work) -> None:
    for _ in range(steps):
        profiler.begin()
        profiler.got()
        work()
        profiler.done(8)
    profiler.begin()  # for a batch that does not come: the epoch is over


def test_operations_are_counted_by_hand_and_trace_and_table_are_written(tmp_path):
    net = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 4))
    q = torch.randn(1, 2, 5, 8, requires_grad=True)

    def work():
        net(torch.ones(8, 6)).sum().backward()
        nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()

    log = Log(tmp_path)
    profiler = StepProfiler(2, log, torch.device("cpu"), torch.float32)
    follow(profiler, WARMUP + 1, work)  # an epoch ends in the middle
    follow(profiler, 3, work)
    # A product of [a, b] and [b, c] is 2abc. Layer 1: forward and weight gradient (its input needs none); layer 2:
    # three products. Attention: q k^T and its product with v forward; in the backward pass the scores once more, and
    # four gradients.
    linear = 2 * (2 * 8 * 6 * 10) + 3 * (2 * 8 * 10 * 4)
    product = 2 * 2 * 5 * 5 * 8
    assert profiler.flops == linear + 7 * product
    assert profiler.images == 16 and profiler.seconds > 0
    assert len(log.lines) == 1 and "images/s" in log.lines[0] and "waiting for data" in log.lines[0]
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert sum(e.get("name") == "aten::addmm" for e in events) == 2 * 2, "two layers in each of the N steps"
    text = (tmp_path / "profile.txt").read_text()
    assert text.startswith(log.lines[0]) and "by self_cpu_time_total)" in text
    shares = [row.split() for row in text.splitlines() if row.lstrip().startswith("aten::")]
    order = [float(row[1].removesuffix("%")) for row in shares]  # Self CPU %
    assert len(order) > 5 and order == sorted(order, reverse=True) and "aten::addmm" in text
    profiler.close()
    assert len(log.lines) == 1


def test_a_run_too_short_to_profile_says_so(tmp_path):
    log = Log(tmp_path)
    profiler = StepProfiler(5, log, torch.device("cpu"), torch.float32)
    follow(profiler, 4, lambda: None)
    profiler.close()
    assert "4 micro-steps, profiling needs 13" in log.lines[0] and not list(tmp_path.iterdir())
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    assert _get_current_dispatch_mode() is None


def test_matmul_rate_counts_two_operations_a_term_over_the_shortest_of_its_products(monkeypatch):
    """1,024 x 1,024 sums of 1,024 products, by a clock whose products take 9, 3, 2, 4, 5 and 6 s."""
    ticks = iter([0, 9, 10, 13, 20, 22, 30, 34, 40, 45, 50, 56])
    monkeypatch.setattr("util.train.profile.time.perf_counter", lambda: float(next(ticks)))
    assert matmul_rate(torch.device("cpu"), torch.bfloat16) == (1024**3 + 1024**3) / 2


def test_the_line_gives_shares_of_a_matrix_products_rate(tmp_path, monkeypatch):
    monkeypatch.setattr("util.train.profile.matmul_rate", lambda device, dtype: 4e9)
    profiler = StepProfiler(2, Log(tmp_path), torch.device("cpu"), torch.bfloat16)
    profiler.images, profiler.seconds, profiler.waited, profiler.flops = 24, 1.5, 0.3, int(6e8)
    assert profiler.summary() == (
        "profile: 16 images/s per process, waiting for data 20.0 %, 0.6 GFLOP a step, 0.8 GFLOP/s = 20.0 % "
        "of the 4 that a bfloat16 matrix product reaches here"
    )
