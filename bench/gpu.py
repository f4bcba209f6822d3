"""`make gpu`: the tests of tests/test_gpu.py on a GPU, then the product's speed there, in at most 8 minutes.

    python -m bench.gpu                          writes bench/GPU.md and bench/GPU.json
    python -m bench.gpu --device cpu --out DIR   the same code in miniature: DIR/GPU-miniature.md, without speeds

Every row runs in a fork of this process, which itself never touches the GPU: a row that fails, hangs or runs out of
memory becomes a line of the table. GPU.json is rewritten after each row.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from bench import common
from bench.common import ROOT

SECONDS, TEST_SECONDS, ROW_SECONDS = 460.0, 150.0, 110.0  # limits: total, the tests, one row
STEP = "--steps 10"
# id: (description, module and flags, flags for the miniature, whether it also runs compiled)
ROWS = {
    "vit_base": (
        "fine-tuning ViT-B/16, 224 px, batch 128",
        f"finetune_step --batch_size 128 {STEP}",
        "--model vit_tiny_patch16 --img_size 32 --batch_size 2 --steps 1",
        True,
    ),
    "vit_large": (
        "fine-tuning ViT-L/16, 224 px, batch 64",
        f"finetune_step --model vit_large_patch16 --batch_size 64 {STEP}",
        "--model vit_tiny_patch16 --img_size 32 --batch_size 4 --steps 1",
        True,
    ),
    "lite0": (
        "fine-tuning EfficientNet-Lite0, 224 px, batch 256",
        f"finetune_step --model tf_efficientnet_lite0 --batch_size 256 {STEP}",
        "--model test_efficientnet --img_size 64 --batch_size 2 --steps 1",
        True,
    ),
    "noprop_T4": (
        "NoProp pretraining, CIFAR defaults, T = 4, batch 128",
        f"noprop_step --T 4 --batch_size 128 {STEP}",
        "--T 2 --img_size 8 --batch_size 2 --steps 1",
        True,
    ),
    "noprop_T10": (
        "NoProp pretraining, CIFAR defaults, T = 10, batch 128",
        f"noprop_step --T 10 --batch_size 128 {STEP}",
        "--T 3 --img_size 8 --batch_size 2 --steps 1",
        True,
    ),
    "loader_jpeg": (
        "loader: JPEG 500 x 375 to 224 px, RandAugment, erasing, one process per core",
        f"loader_jpeg --aug mae --images 128 --repeat 64 --batch_size 128 --workers {os.cpu_count()}",
        "--photo 60 40 --images 2 --repeat 2 --batch_size 2 --img_size 16 --workers 1",
        False,
    ),
    "loader_small": (
        "loader: 50,000 images of 32 px in memory, padded crop and flip",
        "loader_small --images 50000 --crop",
        "--images 256",
        False,
    ),
    "tta": (
        "12 views of 500 x 375 photos, ViT-B/16 and ConvNeXt-B, 224 px",
        "tta --models vit_base_patch16 convnext_base --img_size 224 --images 256 --batch_size 192 --workers "
        f"{os.cpu_count()}",
        "--models test_vit test_convnext --img_size 160 --photo 60 40 --images 1 --workers 0",
        False,
    ),
}


def in_a_fork(seconds: float, log: Path, call: Callable[[], dict]) -> dict:
    """call()'s dict from its own process, whose output goes to `log`; {"failed": why} if it fails or takes too long."""
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)

    def child() -> None:
        os.setpgrp()  # so that its loader and compiler processes can be ended with it
        with open(log, "ab") as file:
            os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        try:
            answer = call()
        except BaseException as error:
            traceback.print_exc()
            answer = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}
        writer.send(answer)

    process = context.Process(target=child)
    process.start()
    writer.close()
    try:
        if not reader.poll(max(0.0, seconds)):
            return {"failed": f"not done after {seconds:.0f} s"}
        answer = reader.recv()
        process.join(5)  # time to release the GPU
        return answer
    except EOFError:
        process.join(5)
        return {"failed": f"its process ended with {process.exitcode}"}
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()


def describe_device(name: str) -> dict:
    """The device and the speed of its matrix products. UserError if it is missing."""
    import torch

    from util.dist import pick_device
    from util.train.profile import matmul_rate

    device = pick_device(name)
    rates = {
        str(d).removeprefix("torch."): matmul_rate(device, d) for d in (torch.bfloat16, torch.float16, torch.float32)
    }
    about = {"device": common.machine(), "torch": torch.__version__, "python": sys.version.split()[0], "rates": rates}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {
            "device": f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute capability "
            f"{properties.major}.{properties.minor}, {torch.cuda.device_count()} visible",
            "host": common.machine(),
            "cuda": torch.version.cuda,
        }
    return about


def run_tests(device: str, choice: str, limit: float) -> dict:
    """pytest's result: passed, skipped, seconds, {test: why it failed}, and whether time ran out."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        pytest = [sys.executable, "-m", "pytest", "tests/test_gpu.py", "-p", "no:cacheprovider"]
        command = [*pytest, "-k", choice, f"--junitxml={report}"]
        process, cut_off = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "DEVICE": device}), False
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            cut_off = True
            for _ in range(2):  # a training run may take the first signal and save
                process.send_signal(signal.SIGINT)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(5)
        if not report.exists():
            return {"failed": f"pytest ended with {process.poll()} and no report"}
        cases = list(ElementTree.parse(report).iter("testcase"))
    bad = {}
    for case in cases:
        for wrong in (*case.findall("failure"), *case.findall("error")):
            bad[case.get("name")] = " ".join((wrong.get("message") or wrong.text or "").split())[:300]
    skipped = [case.get("name") for case in cases if case.find("skipped") is not None]
    return {
        "passed": len(cases) - len(bad) - len(skipped),
        "skipped": skipped,
        "wrong": bad,
        "cut_off": cut_off,
        "seconds": round(sum(float(case.get("time")) for case in cases), 1),
    }


def measure(flags: str, device: str, compiled: bool, miniature: bool, rounds: int) -> dict:
    """Medians of `rounds` calls of a benchmark's product after warm-up, its peak memory, the FLOP of a call."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    import util.train.compiled
    from util.train.profile import FORMULAS

    began = time.perf_counter()
    module, *argv = flags.split()
    bench = importlib.import_module(f"bench.{module}")
    argv += ["--device", device, *(["--compile"] if compiled else [])]
    args = common.make_parser("", bench.add_flags, ()).parse_args(argv)
    if miniature:
        torch.set_num_threads(1)
        util.train.compiled.BACKEND = "eager"  # capture graphs without compiling, which takes a minute
    on_cuda = torch.device(device).type == "cuda"

    def wait() -> None:
        if on_cuda:
            torch.cuda.synchronize()

    call, flops = bench.build("product", args), None
    if "_step" in module and not compiled:
        with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
            call()
        flops = counter.get_total_flops()
    else:
        call()
    wait()
    ready = time.perf_counter() - began
    call()
    wait()
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(rounds):
        tic = time.perf_counter()
        images = call()
        wait()
        seconds.append(time.perf_counter() - tic)
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_cuda else common.peak_gb()
    return {
        "s": statistics.median(seconds),
        "low": min(seconds),
        "high": max(seconds),
        "images": images,
        "peak_gb": peak,
        "steps": getattr(args, "steps", None),
        "ready_s": ready,
        "flops": flops,
    }


def write(results: dict, path: Path) -> None:
    """The JSON file, and the page beside it."""
    path.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    about, tests, rate = results["about"], results["tests"], results["about"]["rates"]["bfloat16"]
    lines = [
        "# On a GPU" if not results["miniature"] else "# In miniature, on a CPU: a test that it works, not of speed",
        "",
        f"Written by `{results['command']}` (bench/gpu.py) on {results['date']}, commit {results['commit']}, in "
        f"{results['seconds']:.0f} s.",
        "",
        f"{about['device']}{'; ' + about['host'] if 'host' in about else ''}; Python {about['python']}, torch "
        f"{about['torch']}" + (f", CUDA {about['cuda']}" if "cuda" in about else "") + ".",
        "",
        "A square matrix product reaches "
        + ", ".join(f"{r / 1e12:.3g} TFLOP/s in {d}" for d, r in about["rates"].items())
        + " (util/train/profile.py).",
        "",
        "## Tests",
        "",
    ]
    if "failed" in tests:
        lines += [f"tests/test_gpu.py: {tests['failed']}."]
    else:
        counts = f"{tests['passed']} passed, {len(tests['wrong'])} failed, {len(tests['skipped'])} skipped"
        lines += [f"tests/test_gpu.py: {counts}{', and no time for the rest' if tests['cut_off'] else ''}."]
        lines += ["", *(f"- failed: {name}: {why}" for name, why in tests["wrong"].items())]
        lines += [f"- skipped: {name}" for name in tests["skipped"]]
    lines += [
        "",
        "## Speed",
        "",
        "The product at its defaults, from uint8 images or files to the update; medians, and the range of the rounds. "
        "Share: the model's FLOP/s by torch's counter over the bfloat16 product's above. Ready: time until the first "
        "call is done, with compilation. Memory: the most that torch allocated.",
        "",
        "| work | | images/s | ms per step | range | peak GiB | TFLOP/s | share of bf16 | ready |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row, modes in results["rows"].items():
        flops = modes.get("eager", {}).get("flops")
        for mode, r in modes.items():
            if "failed" in r:
                lines.append(f"| {ROWS[row][0]} | {mode} | failed: {r['failed'].replace('|', '/')} | | | | | | |")
                continue
            step = f"{1e3 * r['s'] / r['steps']:.1f}" if r["steps"] else ""
            span = f"{r['images'] / r['high']:,.4g} to {r['images'] / r['low']:,.4g} images/s"
            speed = [f"{flops / r['s'] / 1e12:.3g}", f"{100 * flops / r['s'] / rate:.1f} %"] if flops else ["", ""]
            lines.append(
                f"| {ROWS[row][0]} | {mode} | {r['images'] / r['s']:,.4g} | {step} | {span} | {r['peak_gb']:.2f} | "
                f"{speed[0]} | {speed[1]} | {r['ready_s']:.0f} s |"
            )
    lines += ["", "The benchmark of each row, with `--device` (and `--compile`):", ""]
    lines += [f"    {row}: bench.{results['flags'][row]}" for row in results["rows"]]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", "utf-8")


def main(argv: list[str] | None = None) -> int:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for the miniature")
    parser.add_argument("--out", type=Path, default=ROOT / "bench", help="the folder of GPU.md and GPU.json")
    parser.add_argument("--only", nargs="*", choices=list(ROWS), default=list(ROWS), help="rows")
    parser.add_argument("--tests", default="test", help="which of tests/test_gpu.py, as pytest's -k takes it")
    args = parser.parse_args(argv)
    os.environ.setdefault(
        "PYTORCH_NVML_BASED_CUDA_CHECK", "1"
    )  # checking for a GPU must not initialise CUDA before the forks
    for module in (
        "engine_finetune",
        "engine_predict",
        "engine_pretrain",
        "models",
        "torch._dynamo",
        "util.train.profile",
    ):
        importlib.import_module(module)  # once, for all forks; only they touch the GPU
    from util.log import git_commit

    miniature = not args.device.startswith("cuda")
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / ("GPU-miniature" if miniature else "GPU")
    log = path.with_suffix(".log")
    log.unlink(missing_ok=True)
    about = in_a_fork(120, log, lambda: describe_device(args.device))
    if "failed" in about:
        print(
            f"bench.gpu: error: {about['failed']}; DEVICE=cpu make gpu runs the same code in miniature", file=sys.stderr
        )
        return 2
    command = f"make gpu{f' DEVICE={args.device}' if args.device != 'cuda' else ''}"
    results = {
        "about": about,
        "miniature": miniature,
        "command": command,
        "commit": git_commit(),
        "seconds": 0.0,
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "tests": {"failed": "not run"},
        "rows": {},
        "flags": {},
    }

    def note(what: str, found: dict) -> None:
        results["seconds"] = time.monotonic() - began
        write(results, path)
        print(f"{results['seconds']:5.0f} s  {what}: {found.get('failed') or 'done'}", flush=True)

    print(f"{about['device']}; output of what runs: {log}", flush=True)
    results["tests"] = in_a_fork(TEST_SECONDS, log, lambda: run_tests(args.device, args.tests, TEST_SECONDS - 15))
    note("tests", results["tests"])
    for mode in ("eager", "--compile"):  # compiled rows last: they are dropped if time runs out
        for row in args.only:
            what, flags, small, compiles = ROWS[row]
            if mode == "--compile" and not compiles:
                continue
            results["flags"][row] = flags = f"{flags} {small}" if miniature else flags
            left = min(ROW_SECONDS, began + SECONDS - time.monotonic())
            found = {"failed": "no time was left"}
            if left > 5:
                rounds = 1 if miniature else 3
                found = in_a_fork(
                    left, log, lambda f=flags, c=mode != "eager", n=rounds: measure(f, args.device, c, miniature, n)
                )
            results["rows"].setdefault(row, {})[mode] = found
            note(f"{what}, {mode}", found)
    tests, rows = results["tests"], [r for modes in results["rows"].values() for r in modes.values()]
    print(f"wrote {path.with_suffix('.md')} and {path.with_suffix('.json')}")
    return int("failed" in tests or bool(tests["wrong"]) or tests["cut_off"] or any("failed" in r for r in rows))


if __name__ == "__main__":
    sys.exit(main())
