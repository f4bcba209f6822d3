"""The benchmarks in miniature, through their own flags: each ends with the JSON line that bench/run_all.py stores."""

import importlib
import json
import os
import signal
import sys
import time

import pytest
import torch

from bench import common, gpu, run_all
from bench.mutants import Mutant, statement

KEYS = {"name", "product_s", "baseline_s", "ratio", "product_peak_gb", "baseline_peak_gb", "machine", "torch"}
MINIATURES = {
    "finetune_step": "--model vit_tiny_patch16 --img_size 32 --batch_size 2",
    "noprop_step": "--batch_size 2 --T 2 --img_size 8",
    "loader_small": "--images 256 --workers 0 --crop",
    "loader_jpeg": "--photo 60 40 --images 4 --batch_size 2 --img_size 16 --aug mae",
    "tta": "--models test_convnext test_vit --img_size 160 --photo 60 40 --images 1",
}  # timm's own test models: the smallest it has


class LocalWorker:
    """common.Worker without a process: the same flags, the same rows."""

    def __init__(self, module: str, argv: list[str], variant: str, env=None):
        bench = importlib.import_module(module)
        args = common.make_parser("", bench.add_flags, common.CHOICES).parse_args(argv)
        self.call, self.variant, self.rows = bench.build(variant, args), variant, []

    def read(self) -> dict:
        return {"rss_gb": common.peak_gb(), "torch": torch.__version__}

    def run(self) -> dict:
        cpu, tic = common.cpu_seconds(), time.perf_counter()
        images = self.call()
        return {
            "s": time.perf_counter() - tic,
            "cpu_s": common.cpu_seconds() - cpu,
            "images": images,
            "peak_gb": common.peak_gb(),
        }

    def close(self) -> None:
        pass


@pytest.fixture
def in_this_process(monkeypatch):
    """What the benchmarks change for a process of their own stays as it was."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    monkeypatch.setattr(common, "Worker", LocalWorker)
    monkeypatch.setattr("timm.layers.set_fused_attn", lambda *args, **kwargs: None)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", MINIATURES)
def test_miniature_ends_with_its_json(name, in_this_process, monkeypatch, capsys):
    bench = importlib.import_module(f"bench.{name}")
    monkeypatch.setattr(sys, "argv", ["bench", *MINIATURES[name].split(), "--repeats", "1", "--warmup", "0"])
    common.main(name, bench.__doc__, bench.build, bench.add_flags, extra=common.CHOICES)
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert set(result) >= KEYS and result["name"] == name
    assert result["ratio"] == pytest.approx(result["baseline_s"] / result["product_s"], rel=0.1)
    images = {v: row["images"] for v, row in result["variants"].items()}
    assert images["product"] == images["baseline"] > 0, "both did the same work"
    assert sum(line.startswith("| ") for line in lines) == 3, "a table with a row for each"


@pytest.mark.slow
def test_a_process_of_its_own_answers_and_reports_its_memory():
    worker = common.Worker("bench.loader_small", ["--images", "64", "--workers", "0", "--threads", "1"], "product")
    ready, row = worker.read(), worker.run()
    worker.close()
    assert ready["threads"] == 1 and row["images"] == 64 and row["s"] > 0 and row["cpu_s"] >= 0
    assert 0.01 < ready["rss_gb"] <= row["peak_gb"] < 8
    assert worker.process.returncode == 0


def test_every_row_of_make_bench_is_a_line_its_benchmark_takes():
    for row in run_all.ROWS:
        _, _, module, *argv = run_all.command_of(row).split()
        bench = importlib.import_module(module)
        args = common.make_parser("", bench.add_flags, common.CHOICES).parse_args(argv)
        assert args.threads == 1 and {"product", "baseline"} <= set(args.variants)


def test_table_has_ratio_goal_and_command_of_each_measured_row(monkeypatch, tmp_path):
    def variants(product: float, baseline: float) -> dict:
        row = {"low": 1.0, "high": 2.0, "images": 10, "peak_gb": 1.5, "start_gb": 0.5}
        return {
            "product": {"s": product, "cpu_s": product, **row},
            "baseline": {"s": baseline, "cpu_s": baseline, **row},
        }

    common_keys = {"machine": "M", "torch": "2", "date": "today", "commit": "abc", "load": 0.0}
    results = {
        "jpeg_pretrain": {"variants": variants(2.0, 5.0), "command": "python -m one", **common_keys},
        "tta": {"variants": variants(2.0, 4.0), "command": "python -m two", **common_keys},
    }
    monkeypatch.setattr(run_all, "FOLDER", tmp_path)
    (tmp_path / "notes.md").write_text("words")
    run_all.write(results)
    text = (tmp_path / "BENCH.md").read_text()
    assert "| 2 s, 5 img/s | 5 s, 2 img/s | 2.50 | 2.50 | 2.5 | yes |" in text
    assert "| 2.00 | 2.00 | 4.0 | **no** |" in text
    assert "`python -m one`" in text and "`python -m two`" in text and text.endswith("words\n")


@pytest.mark.slow
def test_make_gpu_in_miniature_runs_every_row_despite_failures(tmp_path, monkeypatch):
    """One test stands for all of tests/test_gpu.py, which run by themselves; one compiled row stands for five."""
    rows = {row: (*rest, compiles and row == "vit_base") for row, (*rest, compiles) in gpu.ROWS.items()}
    monkeypatch.setattr(gpu, "ROWS", {**rows, "broken": ("no net", "finetune_step --model no_such_net", "", False)})
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path), "--tests", "fp32_products"]) == 1
    results = json.loads((tmp_path / "GPU-miniature.json").read_text())
    assert (results["tests"]["passed"], results["tests"]["wrong"], results["tests"]["skipped"]) == (1, {}, [])
    assert list(results["rows"]) == list(gpu.ROWS) and set(results["rows"]["vit_base"]) == {"eager", "--compile"}
    assert "no_such_net" in results["rows"].pop("broken")["eager"]["failed"]
    for row, modes in results["rows"].items():
        for mode, found in modes.items():
            assert "failed" not in found, (row, found)
            assert found["images"] > 0 and found["low"] <= found["s"] <= found["high"] and found["peak_gb"] > 0
            assert ((found["flops"] or 0) > 0) == ("_step" in gpu.ROWS[row][1] and mode == "eager")
    page = (tmp_path / "GPU-miniature.md").read_text()
    assert "In miniature" in page and "| no net | eager | failed: " in page and "1 passed, 0 failed" in page
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"GPU-miniature.{end}" for end in ("json", "log", "md")]


def test_every_row_of_make_gpu_is_a_line_its_benchmark_takes():
    for _, flags, small, compiles in gpu.ROWS.values():
        for line in (flags, f"{flags} {small}"):
            module, *argv = [*line.split(), "--device", "cuda", *(["--compile"] if compiles else [])]
            bench = importlib.import_module(f"bench.{module}")
            assert common.make_parser("", bench.add_flags, ()).parse_args(argv).device == "cuda"


def test_a_fork_that_hangs_or_is_killed_is_reported(tmp_path):
    def dies():
        os.kill(os.getpid(), signal.SIGKILL)

    assert gpu.in_a_fork(5, tmp_path / "log", lambda: {"a": 1}) == {"a": 1}
    assert "ended with -9" in gpu.in_a_fork(5, tmp_path / "log", dies)["failed"]
    assert "not done after" in gpu.in_a_fork(0.2, tmp_path / "log", lambda: time.sleep(60))["failed"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_make_gpu_without_one_says_how_to_run_the_miniature(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "no CUDA device is visible" in said and "DEVICE=cpu make gpu" in said and said.count("\n") == 1
    assert not (tmp_path / "GPU.md").exists()


def test_share_and_milliseconds_of_the_page_are_those_of_the_numbers(tmp_path):
    row = {
        "s": 2.0,
        "low": 1.0,
        "high": 4.0,
        "images": 80,
        "peak_gb": 3.0,
        "steps": 10,
        "ready_s": 9.0,
        "flops": 10**15,
    }
    results = {
        "about": {"device": "X", "torch": "2", "python": "3", "rates": {"bfloat16": 1e15}},
        "miniature": False,
        "command": "make gpu",
        "commit": "abc",
        "seconds": 1.0,
        "date": "today",
        "tests": {"failed": "not run"},
        "flags": {"vit_base": "finetune_step"},
        "rows": {"vit_base": {"eager": row, "--compile": {**row, "s": 1.0, "flops": None}}},
    }
    gpu.write(results, tmp_path / "GPU")
    page = (tmp_path / "GPU.md").read_text()
    assert "| eager | 40 | 200.0 | 20 to 80 images/s | 3.00 | 500 | 50.0 % | 9 s |" in page
    assert "| --compile | 80 | 100.0 | 20 to 80 images/s | 3.00 | 1e+03 | 100.0 % | 9 s |" in page


def test_a_mutant_is_of_its_whole_statement():
    """A line within a call has no tests of its own: they are those of the statement; of a block, its head alone."""
    text = "def f(a):\n    if (a\n            > 1):\n        return [\n            a,\n            2]\n    return 0\n"
    mutant = Mutant("x.py", text, text.replace("2]", "3]"))
    assert mutant.change == (6, ["            2]"], ["            3]"]) and mutant.where == "x.py:6"
    for line, lines in ((1, range(1, 8)), (3, range(2, 4)), (5, range(4, 7)), (6, range(4, 7)), (7, range(7, 8))):
        assert statement(text, line, line) == lines
