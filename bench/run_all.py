"""`make bench`: runs every benchmark with small settings and writes BENCH.md from their output.

    python -m bench.run_all                       all rows
    python -m bench.run_all --only noprop_T4 tta  only these rows; stored results for the others
    python -m bench.run_all --only                no row: BENCH.md from the stored results

Results are stored in bench/results.json with date, machine and commit; bench/notes.md is the handwritten part of
BENCH.md.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time

from bench.common import ROOT

FOLDER = ROOT / "bench"
RESULTS = FOLDER / "results.json"
# One thread: with other jobs on the machine, two threads would mostly wait for each other.
COMMON = "--threads 1 --repeats"
ALL = "--variants product baseline other_attention glibc_default mmap_32mb"
MEMORY = "--variants product baseline glibc_default mmap_32mb"

# id: (description, module and flags, rounds, goal)
ROWS = {
    "finetune_lite0": (
        "fine-tune step, EfficientNet-Lite0 224 px, batch 16",
        f"finetune_step --model tf_efficientnet_lite0 {MEMORY}",
        3,
        5.0,
    ),
    "finetune_vit_small": (
        "fine-tune step, ViT-S/16 224 px, batch 4",
        "finetune_step --model vit_small_patch16 --batch_size 4 --variants product baseline other_attention",
        2,
        5.0,
    ),
    "finetune_vit_base": ("fine-tune step, ViT-B/16 224 px, batch 4", "finetune_step --batch_size 4", 1, 5.0),
    "noprop_T1": (
        "NoProp step, CIFAR defaults, batch 64, T = 1",
        f"noprop_step --batch_size 64 --T 1 {MEMORY}",
        2,
        None,
    ),
    "noprop_T4": ("NoProp step, batch 64, T = 4", f"noprop_step --batch_size 64 --T 4 {ALL}", 2, 3.0),
    "noprop_T10": ("NoProp step, batch 64, T = 10", f"noprop_step --batch_size 64 --T 10 {MEMORY}", 2, 3.0),
    "loader_small": ("32 px pipeline: flip, to float, normalise", "loader_small --images 4096 --workers 2", 2, 15.0),
    "loader_small_crop": (
        "the same with a padded random crop",
        "loader_small --images 4096 --workers 2 --crop",
        2,
        None,
    ),
    "jpeg_pretrain": ("JPEG 500 x 375 -> 224, crop and flip", "loader_jpeg --images 128", 5, 2.5),
    "jpeg_mae": ("the same with RandAugment and erasing", "loader_jpeg --images 128 --aug mae", 5, 2.0),
    "jpeg_photo": (
        "JPEG 2000 x 1500 -> 224, crop and flip",
        "loader_jpeg --photo 2000 1500 --images 12 --batch_size 6",
        5,
        4.0,
    ),
    "tta": ("12-view TTA, 2 small nets, 384 px", "tta --images 2", 1, 4.0),
}


def command_of(row: str) -> str:
    _, flags, rounds, _ = ROWS[row]
    return f"python -m bench.{flags} {COMMON} {rounds}"


def run(row: str) -> dict:
    """Run a benchmark in its own process; its summary with command, date and load."""
    command = command_of(row)
    print(f"\n$ {command}", flush=True)
    load = os.getloadavg()[0]
    process = subprocess.run(
        [sys.executable, *shlex.split(command)[1:]], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    print(process.stdout, flush=True)
    result = json.loads(process.stdout.splitlines()[-1])
    date = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return {**result, "command": command, "date": date, "commit": measured_commit(), "load": round(load, 1)}


def stored() -> dict:
    return json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}


def store(results: dict) -> None:
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


def measured_commit() -> str:
    """HEAD, with `-dirty` if code outside bench/ has changed."""
    head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    edited = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", ".", ":!bench"], cwd=ROOT, capture_output=True)
    return head.stdout.strip() + "-dirty" * (edited.returncode == 1)


def write(results: dict) -> None:
    lines = [
        "# Benchmarks",
        "",
        "Written by `make bench` (bench/run_all.py) from bench/results.json; the text below the tables is "
        "bench/notes.md.",
        "",
        *(
            f"Machine: {machine}, torch {version}."
            for machine, version in sorted({(r["machine"], r["torch"]) for r in results.values()})
        ),
        "",
        "Product and baseline are two processes that work in turns; medians. **x** is the baseline's time over the "
        "product's, in wall time and in CPU time: on a machine with other jobs CPU time is the steadier one. Load is "
        "the load average when the row began; above 0 the wall times are longer than on an idle machine. Goals are "
        "for a CPU that computes bf16.",
        "",
        "## Product against baseline",
        "",
        "| work | product | baseline | x (wall) | x (CPU) | goal | reached | product GiB | baseline GiB | load |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row, (what, _, _, goal) in ROWS.items():
        variants = results.get(row, {}).get("variants", {})
        if not {"product", "baseline"} <= set(variants):
            continue
        p, b = variants["product"], variants["baseline"]
        wall, cpu = b["s"] / p["s"], b["cpu_s"] / p["cpu_s"] if p["cpu_s"] else float("nan")
        speed = [f"{v['s']:.3g} s, {v['images'] / v['s']:,.3g} img/s" for v in (p, b)]
        verdict = "" if goal is None else "yes" if min(wall, cpu) >= goal else "**no**"
        lines.append(
            f"| {what} | {speed[0]} | {speed[1]} | {wall:.2f} | {cpu:.2f} | {goal or ''} | {verdict} | "
            f"{p['peak_gb']:.2f} | {b['peak_gb']:.2f} | {results[row]['load']} |"
        )
    lines += [
        "",
        "## Choices inside the product",
        "",
        "CPU seconds and peak memory of one call. `other_attention`: timm's fused attention where the product takes "
        "plain attention, and the other way round. `glibc_default`: without util.dist.keep_freed_memory(). "
        "`mmap_32mb`: freed memory kept, but blocks from 32 MB on mapped.",
        "",
        "| work | variant | CPU s | wall s (range) | relative to product (CPU) | peak GiB | GiB above start |",
        "|---|---|---|---|---|---|---|",
    ]
    for row, (what, *_) in ROWS.items():
        variants = {v: r for v, r in results.get(row, {}).get("variants", {}).items() if v != "baseline"}
        if len(variants) < 2:
            continue
        for variant, r in variants.items():
            lines.append(
                f"| {what} | {variant} | {r['cpu_s']:.2f} | {r['s']:.2f} ({r['low']:.2f} to {r['high']:.2f}) | "
                f"{r['cpu_s'] / variants['product']['cpu_s']:.2f} | {r['peak_gb']:.2f} | "
                f"{r['peak_gb'] - r['start_gb']:.2f} |"
            )
    lines += ["", "## Commands", "", "| work | command | date | commit |", "|---|---|---|---|"]
    for row, (what, *_) in ROWS.items():
        if row in results:
            r = results[row]
            lines.append(f"| {what} | `{r['command']}` | {r['date']} | {r['commit']} |")
    parts = ["\n".join(lines)]
    for name in ("scaling.md", "notes.md"):  # bench/scaling.py writes the first
        if (FOLDER / name).exists():
            parts.append((FOLDER / name).read_text("utf-8").strip())
    (FOLDER / "BENCH.md").write_text("\n\n".join(parts) + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(ROWS), default=None, help="rows to measure (default: all)")
    args = parser.parse_args()
    for row in ROWS if args.only is None else args.only:
        result = run(row)
        store({**stored(), row: result})  # at once, because a later row may fail
    write(stored())
    print(f"wrote {FOLDER / 'BENCH.md'}")


if __name__ == "__main__":
    main()
