"""Kill a run at random moments until it has finished, and compare what it leaves with a run that nobody disturbed.

    python -m bench.chaos --kills 30                       # fine-tuning on one process
    python -m bench.chaos --kills 30 --ranks 2 --main pretrain

Each disturbance is SIGKILL or SIGTERM, drawn by --seed, after a random time of up to the last start's length; then the
same line is started again with --resume auto. Compared bit for bit: weights, optimizer, EMA, best metric, generators,
checkpoint-best.pth, log.txt (but for seconds) and TensorBoard's steps. Exit code 0 only if all are equal.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from util.checkpoint import BEST, LAST, read_checkpoint
from util.log import read_log

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
COMMON = ["--dataset", "digits", "--epochs", "6", "--warmup_epochs", "1", "--lr", "2e-3", "--save_freq", "2", "--device", "cpu",
          "--save_every_minutes", "0.01", "--print_freq", "5"]  # fmt: skip
LINES = {
    "finetune": ["main_finetune.py", *COMMON, "--model", "vit_custom_patch2", "--model_kwargs", "embed_dim=24", "depth=2",
                 "num_heads=3", "--mixup", "0.8", "--cutmix", "1.0", "--ema_decay", "0.99", "--drop_path", "0.1"],
    "pretrain": ["main_pretrain_noprop.py", *COMMON, "--embed_dim", "24", "--depth", "2", "--num_heads", "3", "--T", "3",
                 "--decoder_embed_dim", "24", "--decoder_depth", "1", "--mask_ratio_max", "1", "--vis_freq", "0"],
}  # fmt: skip


def start(args, output_dir: str) -> subprocess.Popen:
    command = [sys.executable]
    if args.ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.ranks}"]
    command += [
        *LINES[args.main],
        "--batch_size",
        str(64 // args.ranks),
        "--resume",
        "auto",
        "--output_dir",
        output_dir,
    ]
    log = open(os.path.join(output_dir, "output.txt"), "ab")  # noqa: SIM115 (the child keeps it)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment)


def disturb(pid: int, number: int) -> None:
    """SIGKILL to the launcher and to every process it started (torchrun's ranks live in sessions of their own), as when
    a machine dies; SIGTERM to the launcher, which passes it on."""
    family = [pid]
    if number == signal.SIGKILL:
        os.kill(pid, signal.SIGSTOP)  # starts no more of them meanwhile
        parents = {}
        for entry in filter(str.isdigit, os.listdir("/proc")):
            try:
                parents[int(entry)] = int(Path("/proc", entry, "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
        for parent in family:
            family += [child for child, its in parents.items() if its == parent]
    for one in family:
        try:
            os.kill(one, number)
        except ProcessLookupError:
            continue


def differences(a, b, path: str = "") -> list[str]:
    """Where two checkpoints differ, bit for bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        missing = sorted(map(str, a.keys() ^ b.keys()))
        return missing + [d for k in a if k in b for d in differences(a[k], b[k], f"{path}.{k}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{path}[{i}]")]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b or (a != a and b != b)  # fmt: skip
    return [] if same else [path]


def tensorboard_steps(folder: str) -> dict[str, list[int]]:
    """tag -> steps, as a reader that honours purges sees them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(folder, size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [e.step for e in events.Scalars(tag)] for tag in events.Tags()["scalars"] if tag.startswith("val/")}


def compare(killed: str, whole: str) -> dict[str, list[str]]:
    """What was compared -> where it differs."""
    result = {}
    for name in (LAST, BEST):
        if os.path.exists(os.path.join(whole, name)):
            contents = [read_checkpoint(os.path.join(folder, name)) for folder in (killed, whole)]
            for content in contents:
                content.pop("args")  # names the folder
            for key in contents[1]:
                result[f"{name} {key}"] = differences(contents[0].get(key), contents[1][key])
    logs = [[{k: v for k, v in line.items() if k != "seconds"} for line in read_log(os.path.join(folder, "log.txt"))]
            for folder in (killed, whole)]  # fmt: skip
    result["log.txt"] = [] if json.dumps(logs[0]) == json.dumps(logs[1]) else ["lines differ"]
    steps = [tensorboard_steps(folder) for folder in (killed, whole)]
    result["TensorBoard's epochs"] = [tag for tag in steps[1] if steps[0].get(tag) != steps[1][tag]]
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="disturbances, spread over as many runs as it takes")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--main", choices=sorted(LINES), default="finetune")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, tally, wrong = random.Random(args.seed), Counter(), Counter()
    with tempfile.TemporaryDirectory() as scratch:
        whole = os.path.join(scratch, "whole")
        os.mkdir(whole)
        tic = time.time()
        if start(args, whole).wait() != 0:
            raise SystemExit(f"the undisturbed run failed:\n{Path(whole, 'output.txt').read_text()[-2000:]}")
        seconds = time.time() - tic
        done = 0
        while done < args.kills:
            folder = os.path.join(scratch, f"run{tally['runs']}")
            os.mkdir(folder)
            tally["runs"] += 1
            while True:
                process = start(args, folder)
                if done < args.kills:
                    number = rng.choice([signal.SIGKILL, signal.SIGTERM])
                    try:
                        process.wait(rng.uniform(0.2, 1.0) * seconds)
                    except subprocess.TimeoutExpired:
                        disturb(process.pid, number)
                        done += 1
                        tally[number.name] += 1
                code = process.wait()
                tally[f"exit {code}"] += 1
                if code == 0:
                    break
                # 75: saved and stopped; torchrun makes 1 of it. Negative: the signal came before there was a handler.
                if code not in (75, -signal.SIGKILL, -signal.SIGTERM) and not (code == 1 and args.ranks > 1):
                    raise SystemExit(f"exit code {code}:\n{Path(folder, 'output.txt').read_text()[-2000:]}")
                if sum(tally.values()) > 10 * (args.kills + 10):
                    raise SystemExit(f"does not come to an end:\n{Path(folder, 'output.txt').read_text()[-2000:]}")
            for name, where in compare(folder, whole).items():
                tally["comparisons"] += 1
                if where:
                    wrong[f"{name}: {', '.join(where[:3])}"] += 1
            print(
                f"run {tally['runs']}: {done} of {args.kills} disturbances, {sum(wrong.values())} differences",
                flush=True,
            )
    print(f"{args.main}, {args.ranks} rank(s), {seconds:.0f} s undisturbed; " + ", ".join(f"{k}: {v}" for k, v in sorted(tally.items())))  # fmt: skip
    print(
        "all equal, bit for bit" if not wrong else "DIFFERENT:\n" + "\n".join(f"  {k} ({v})" for k, v in wrong.items())
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
