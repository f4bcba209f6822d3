"""Kill a run at random moments until it has finished, and compare its files with those of an undisturbed run.

    python -m bench.chaos --kills 30                       # fine-tuning on one process
    python -m bench.chaos --kills 30 --ranks 2 --main pretrain --num_workers 2

Each disturbance is SIGKILL, SIGTERM, SIGUSR1 or SIGINT to all ranks or to one, drawn by --seed, after a random time of
up to the undisturbed run's length; then the same command is started again with --resume auto. Compared bit for bit:
weights, optimizer, EMA, best metric, generators, checkpoint-best.pth, log.txt (without seconds), and TensorBoard's
scalars with their steps. Exit code 0 only if all are equal. The ranks are forks (bench/ranks.py); tests/test_faults.py
tests that torchrun restarts them.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
import torch.utils.tensorboard
from PIL import Image
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_finetune
import main_pretrain_noprop
from bench.ranks import Ranks
from util.checkpoint import BEST, LAST, read_checkpoint
from util.cli.script import run_main
from util.log import TIMES, read_log

COMMON = """
    --dataset folder --input_size 8 --in_chans 1 --epochs 4 --warmup_epochs 1 --lr 2e-3 --save_freq 2
    --device cpu --accum_iter 2 --save_every_minutes 0.003 --print_freq 3 --timeout_minutes 1
""".split()
FINETUNE = """
    --model vit_custom_patch2 --model_kwargs embed_dim=24 depth=2 num_heads=3 --aug light --mixup 0.8
    --cutmix 1.0 --ema_decay 0.99 --drop_path 0.1
""".split()
PRETRAIN = """
    --patch_size 2 --embed_dim 24 --depth 2 --num_heads 3 --T 3 --decoder_embed_dim 24 --decoder_depth 1
    --mask_ratio_max 1 --vis_freq 2
""".split()
LINES = {
    "finetune": (main_finetune.main, COMMON + FINETUNE),
    "pretrain": (main_pretrain_noprop.main, COMMON + PRETRAIN),
}
SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
# 75: saved and stopped. 130 and -N: the signal came before the handlers were installed. 2: another rank died.
EXPECTED = {75, 130, 2, *(-s for s in SIGNALS)}


def write_photos(folder: str) -> None:
    """Digits as files, to exercise loader processes: per class 24 for training and 6 for validation."""
    data = load_digits()
    for c in range(10):
        for i, pixels in enumerate(data.images[data.target == c][:30]):
            path = Path(folder, "train" if i < 24 else "val", str(c), f"{i}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((pixels * 15.9375).astype("uint8")).save(path)


def start(args, photos: str, output_dir: str) -> Ranks:
    main, line = LINES[args.main]
    line = [
        *line,
        "--data_path",
        photos,
        "--num_workers",
        str(args.num_workers),
        "--batch_size",
        str(32 // args.ranks),
        "--resume",
        "auto",
        "--output_dir",
        output_dir,
    ]
    os.makedirs(output_dir, exist_ok=True)
    return Ranks(args.ranks, lambda: run_main(lambda: main(line)), os.path.join(output_dir, "output.txt"))


def disturb(ranks: Ranks, rng: random.Random) -> str:
    """Send a signal to all ranks or to one; returns a description."""
    number, alone = rng.choice(SIGNALS), len(ranks.processes) > 1 and rng.random() < 0.5
    for process in [rng.choice(ranks.processes)] if alone else ranks.processes:
        if process.is_alive():
            os.kill(process.pid, number)
    return number.name + (" to one rank" if alone else "")


def differences(a, b, path: str = "") -> list[str]:
    """Where two checkpoints differ, bit for bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        missing = sorted(map(str, a.keys() ^ b.keys()))
        return missing + [d for k in a if k in b for d in differences(a[k], b[k], f"{path}.{k}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{path}[{i}]")]
    same = (
        torch.equal(a, b)
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
        else a == b or (a != a and b != b)
    )
    return [] if same else [path]


def tensorboard_scalars(folder: str | os.PathLike) -> dict[str, list[tuple[int, float]]]:
    """tag -> (step, value), after applying the purges of resumed runs."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def compare(killed: str, whole: str) -> dict[str, list[str]]:
    """Name of what was compared -> the differences."""
    result = {}
    for name in (LAST, BEST):
        if os.path.exists(os.path.join(whole, name)):
            contents = [read_checkpoint(os.path.join(folder, name)) for folder in (killed, whole)]
            for content in contents:
                content.pop("args")  # contains the folder's name
            for key in contents[1]:
                result[f"{name} {key}"] = differences(contents[0].get(key), contents[1][key])
    logs = [
        [{k: v for k, v in line.items() if k not in TIMES} for line in read_log(os.path.join(folder, "log.txt"))]
        for folder in (killed, whole)
    ]
    result["log.txt"] = [] if json.dumps(logs[0]) == json.dumps(logs[1]) else ["lines differ"]
    result["TensorBoard"] = differences(*(tensorboard_scalars(folder) for folder in (killed, whole)))
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="disturbances, spread over as many runs as it takes")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--main", choices=sorted(LINES), default="finetune")
    parser.add_argument("--num_workers", type=int, default=0, help="loader processes per rank")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # before the forks: OpenMP's threads do not survive one
    rng, tally, wrong = random.Random(args.seed), Counter(), Counter()
    with tempfile.TemporaryDirectory() as scratch:
        photos, whole = os.path.join(scratch, "photos"), os.path.join(scratch, "whole")
        write_photos(photos)
        tic = time.time()
        if any(start(args, photos, whole).exit_codes()):
            raise SystemExit(f"the undisturbed run failed:\n{Path(whole, 'output.txt').read_text()[-2000:]}")
        seconds, kills, runs, starts = time.time() - tic, 0, 0, 0
        while kills < args.kills:
            folder = os.path.join(scratch, "killed")
            runs, codes = runs + 1, None
            while codes is None or any(codes):
                if (codes and not set(codes) <= {0, *EXPECTED}) or starts > 10 * (args.kills + 10):
                    raise SystemExit(f"exit codes {codes}:\n{Path(folder, 'output.txt').read_text()[-2000:]}")
                ranks, starts = start(args, photos, folder), starts + 1
                if kills < args.kills and not ranks.wait(rng.uniform(0.05, 1.0) * seconds):
                    tally[disturb(ranks, rng)] += 1
                    kills += 1
                codes = ranks.exit_codes()
            compared = compare(folder, whole)
            for name, where in compared.items():
                if where:
                    wrong[f"{name}: {', '.join(where[:3])}"] += 1
            print(
                f"run {runs}: {kills} of {args.kills} disturbances, {starts} starts, {len(compared)} comparisons, "
                f"{sum(map(bool, compared.values()))} differ",
                flush=True,
            )
            shutil.rmtree(folder)
    print(
        f"{args.main}, {args.ranks} rank(s), {args.num_workers} workers, {seconds:.1f} s undisturbed: "
        + ", ".join(f"{v} {k}" for k, v in sorted(tally.items()))
    )
    print("DIFFERENT:\n" + "\n".join(f"  {k} ({v})" for k, v in wrong.items()) if wrong else "all equal, bit for bit")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
