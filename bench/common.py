"""Times several variants of the same work in turns.

Every variant has its own process, so that variants do not share allocator, thread pool, timm's globals or peak memory.
They take turns, one working while the others wait, so that a slow minute of the machine affects all of them.

A benchmark is a module with `build(variant, args) -> callable`, which sets up and returns the function to time; each
call is one measurement and returns the number of images processed.
"""

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).absolute().parent.parent


def main(name: str, doc: str, build: Callable, add_flags: Callable, *, extra: tuple[str, ...] = ()) -> None:
    """Command line of one benchmark. extra: variants besides `product` and `baseline`, measured on request."""
    args = make_parser(doc, add_flags, extra).parse_args()
    if args.worker:
        serve(build, args)
        return
    results, torch_version = measure(f"bench.{name}", sys.argv[1:], args.variants, args.repeats, args.warmup)
    print_table(name, results)
    print(json.dumps(summary(name, results, torch_version)))


def make_parser(doc: str, add_flags: Callable, extra: tuple[str, ...] = ()) -> argparse.ArgumentParser:
    known = ("product", "baseline", *extra)
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds; each variant once in each")
    parser.add_argument("--warmup", type=int, default=1, help="rounds that do not count")
    parser.add_argument("--device", default="cpu", help="of the product; the baseline stays on the CPU")
    parser.add_argument("--threads", type=int, default=0, help="of torch (0: its default, the number of cores)")
    parser.add_argument("--variants", nargs="+", choices=known, default=["product", "baseline"])
    parser.add_argument("--worker", choices=known, help=argparse.SUPPRESS)
    return parser


# The child process: set up, then one measurement per line on stdin.


def serve(build: Callable, args) -> None:
    # The original stdout is for the answers; output of the measured code is dropped.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    run = build(args.worker, args)
    ready = {"rss_gb": peak_gb(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    print(json.dumps(ready), file=answers)
    for _ in sys.stdin:
        cpu, begin = cpu_seconds(), time.perf_counter()
        images = run()
        seconds = time.perf_counter() - begin
        answer = {"s": seconds, "cpu_s": cpu_seconds() - cpu, "images": images, "peak_gb": peak_gb()}
        print(json.dumps(answer), file=answers)


CHOICES = ("other_attention", "glibc_default", "mmap_32mb")


def start_up(variant: str, device: str):
    """The World as the mains create it; each variant of CHOICES changes one thing.

    other_attention: fused attention where the product uses plain attention, and vice versa. glibc_default: without
    keep_freed_memory(). mmap_32mb: freed memory is kept, but blocks of 32 MB or more are mapped and unmapped.
    """
    from util import dist

    if variant in ("glibc_default", "mmap_32mb"):
        dist.keep_freed_memory = lambda: None
    if variant == "mmap_32mb":
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(M_MMAP_THRESHOLD, 2**25)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    return dist.init_world(device)


def precision_of(variant: str, net, world, amp: str | None):
    """The Precision as the mains create it for `net`; also prepares `net`."""
    from util import dist

    precision = dist.Precision(amp, world.device, net)
    dist.prepare_net(net, precision)
    if variant == "other_attention":
        for module in net.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = not module.fused_attn
    return precision


def peak_gb() -> float:
    """Peak resident memory of this process in GiB, with shared libraries, without loader workers.

    VmHWM if available: ru_maxrss includes the size of the process that this one was forked from.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**20
    except OSError:
        pass
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def cpu_seconds() -> float:
    """CPU time of this process and its children, including living ones (loader workers)."""
    try:
        return sum(_ticks(pid) for pid in [os.getpid(), *_children(os.getpid())]) / os.sysconf("SC_CLK_TCK")
    except OSError:
        times = os.times()
        return times.user + times.system + times.children_user + times.children_system


def _children(pid: int) -> list[int]:
    return [int(p) for task in Path(f"/proc/{pid}/task").iterdir() for p in (task / "children").read_text().split()]


def _ticks(pid: int) -> int:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:  # it has ended since; its time is now in the parent's cutime and cstime
        return 0
    return sum(int(v) for v in fields[11:15])  # utime, stime, cutime, cstime


# The parent process: runs variants in turns, medians, a table.


class Worker:
    """A child process of one variant. `env` adds to its environment, e.g. a rank's variables."""

    def __init__(self, module: str, argv: list[str], variant: str, env: dict[str, str] | None = None):
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *argv, "--worker", variant],
            cwd=ROOT,
            env={**os.environ, **(env or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.variant, self.rows = variant, []

    def read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"bench: the process of variant {self.variant} ended with {self.process.wait()}")
        return json.loads(line)

    def start(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def run(self) -> dict:
        self.start()
        return self.read()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def measure(module: str, argv: list[str], variants: list[str], repeats: int, warmup: int) -> tuple[dict, str]:
    """({variant: its medians}, torch's version). Keys: s, low, high, cpu_s, images, start_gb, peak_gb."""
    workers = [Worker(module, argv, v) for v in variants]
    ready = [w.read() for w in workers]
    for repeat in range(-warmup, repeats):
        for w in workers:
            row = w.run()
            if repeat >= 0:
                w.rows.append(row)
    for w in workers:
        w.close()
    results = {w.variant: {**medians(w.rows), "start_gb": r["rss_gb"]} for w, r in zip(workers, ready)}
    return results, ready[0]["torch"]


def medians(rows: list[dict]) -> dict:
    seconds = [row["s"] for row in rows]
    return {
        "s": statistics.median(seconds),
        "low": min(seconds),
        "high": max(seconds),
        "cpu_s": statistics.median(row["cpu_s"] for row in rows),
        "images": rows[0]["images"],
        "peak_gb": rows[-1]["peak_gb"],
    }


def machine() -> str:
    model, flags = platform.processor() or platform.machine(), ""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        read = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
        model = f"{read.get('model name', model)} family {read.get('cpu family')} model {read.get('model')}"
        flags = ", " + ("bf16" if {"avx512_bf16", "amx_bf16"} & set(read.get("flags", "").split()) else "no bf16")
    except OSError:
        pass
    return f"{model}, {os.cpu_count()} cores{flags}"


def print_table(name: str, results: dict) -> None:
    """One row per variant; `x` is the baseline's median over the variant's."""
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    print(f"{name}: {machine()}; load average {load}")
    print(
        "| variant | s (median) | s (range) | CPU s | images/s | x | x (CPU s) | peak GiB | of it before the first "
        "call |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    base = results.get("baseline")
    for variant, r in results.items():
        ratios = [f"{base[k] / r[k]:.2f}" if base and r[k] else "" for k in ("s", "cpu_s")]
        print(
            f"| {variant} | {r['s']:.3f} | {r['low']:.3f} to {r['high']:.3f} | {r['cpu_s']:.2f} | "
            f"{r['images'] / r['s']:.1f} | {ratios[0]} | {ratios[1]} | {r['peak_gb']:.2f} | {r['start_gb']:.2f} |"
        )


def summary(name: str, results: dict, torch_version: str) -> dict:
    """The JSON object of the last line: seconds of one call; in `variants`, CPU time and range of each variant."""
    rounded = {v: {k: round(x, 4) for k, x in r.items()} for v, r in results.items()}
    product, baseline = rounded.get("product", {}), rounded.get("baseline", {})
    return {
        "name": name,
        "product_s": product.get("s"),
        "baseline_s": baseline.get("s"),
        "ratio": round(baseline["s"] / product["s"], 3) if product and baseline else None,
        "product_peak_gb": product.get("peak_gb"),
        "baseline_peak_gb": baseline.get("peak_gb"),
        "machine": machine(),
        "torch": torch_version,
        "variants": rounded,
    }
