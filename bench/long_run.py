"""Checks whether memory and open files grow: trains 200 short epochs with each main and prints the slopes.

    python -m bench.long_run                      # two minutes on a quiet core
    python -m bench.long_run --main pretrain --epochs 1000

Resident memory (VmRSS) and open file descriptors (/proc/self/fd) are read after each epoch in a separate process, with
loader processes, checkpoints and TensorBoard as usual; the least-squares slope is over the second half, when caches are
warm. The last line is JSON. Exit code 1 if memory grows by more than --limit_kb per epoch, or descriptors by one or
more over that half.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from bench.chaos import LINES, write_photos
from bench.ranks import Ranks
from util.cli.script import run_main
from util.log import RunLog


def read_usage() -> tuple[int, int]:
    """(resident KiB, open descriptors) of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]), len(os.listdir("/proc/self/fd"))


def watch(main, line: list[str], out: str) -> list[tuple[int, int]]:
    """Run in a fork; usage after each epoch."""
    path = os.path.join(out, "usage.txt")
    real = RunLog.epoch

    def epoch(self, values: dict) -> None:
        real(self, values)
        with open(path, "a") as file:
            print(*read_usage(), file=file)

    RunLog.epoch = epoch
    try:
        codes = Ranks(1, lambda: run_main(lambda: main(line)), os.path.join(out, "output.txt")).exit_codes(3600)
    finally:
        RunLog.epoch = real
    if codes != [0]:
        raise SystemExit(f"exit code {codes[0]}:\n{Path(out, 'output.txt').read_text()[-2000:]}")
    return [tuple(map(int, row.split())) for row in Path(path).read_text().splitlines()]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--main", choices=[*sorted(LINES), "both"], default="both")
    parser.add_argument("--num_workers", type=int, default=1)
    parser.add_argument(
        "--limit_kb", type=float, default=20.0, help="largest allowed growth of resident memory, KiB per epoch"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    result, grows = {}, False
    for name in sorted(LINES) if args.main == "both" else [args.main]:
        with tempfile.TemporaryDirectory() as scratch:
            write_photos(scratch)
            train, line = LINES[name]
            line = [
                *line,
                "--data_path",
                scratch,
                "--num_workers",
                str(args.num_workers),
                "--batch_size",
                "120",
                "--epochs",
                str(args.epochs),
                "--save_freq",
                "50",
                "--keep",
                "2",
                *(["--vis_freq", "20"] if name == "pretrain" else []),
                "--save_every_minutes",
                "0",
                "--output_dir",
                scratch,
            ]
            usage = np.array(watch(train, line, scratch))[args.epochs // 2 :]
        slopes = [float(np.polyfit(np.arange(len(usage)), column, 1)[0]) for column in usage.T]
        result[name] = {
            "epochs": args.epochs,
            "rss_mib": round(int(usage[-1, 0]) / 1024, 1),
            "rss_kib_per_epoch": round(slopes[0], 3),
            "open_files": int(usage[-1, 1]),
            "open_files_per_epoch": round(slopes[1], 5),
        }
        grows |= slopes[0] > args.limit_kb or slopes[1] * len(usage) >= 1
        print(f"{name}: {result[name]}", flush=True)
    print(json.dumps(result))
    return int(grows)


if __name__ == "__main__":
    sys.exit(main())
