"""What several tests share: a small run's flags, checkpoints without a run, comparisons."""

import os
import resource
from contextlib import contextmanager

import torch

import main_finetune
from bench.chaos import tensorboard_scalars
from models import create_model
from util.checkpoint import read_checkpoint
from util.dist import World
from util.log import TIMES, RunLog, read_log
from util.train.run import Run

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NET = [
    "--dataset",
    "digits",
    "--model",
    "vit_custom_patch4",
    "--model_kwargs",
    "embed_dim=12",
    "depth=1",
    "num_heads=2",
    "--epochs",
    "3",
    "--warmup_epochs",
    "0",
    "--batch_size",
    "64",
    "--lr",
    "1e-3",
    "--ema_decay",
    "0.9",
    "--save_freq",
    "0",
    "--device",
    "cpu",
    "--num_workers",
    "0",
]
# A net that trains in a second on digits, with everything random switched on.
TINY = [
    "--dataset",
    "digits",
    "--model",
    "vit_custom_patch2",
    "--model_kwargs",
    "embed_dim=24",
    "depth=2",
    "num_heads=3",
    "--epochs",
    "3",
    "--warmup_epochs",
    "1",
    "--batch_size",
    "64",
    "--accum_iter",
    "2",
    "--lr",
    "2e-3",
    "--drop_path",
    "0.1",
    "--mixup",
    "0.8",
    "--cutmix",
    "1.0",
    "--ema_decay",
    "0.99",
    "--save_freq",
    "1",
    "--device",
    "cpu",
    "--num_workers",
    "0",
]
# Nothing random and fp32: what different runs of it reach can be compared.
PLAIN = [
    "--dataset",
    "digits",
    "--model",
    "vit_custom_patch2",
    "--model_kwargs",
    "embed_dim=24",
    "depth=2",
    "num_heads=3",
    "--epochs",
    "2",
    "--warmup_epochs",
    "0",
    "--lr",
    "1e-3",
    "--drop_path",
    "0",
    "--aug",
    "none",
    "--alpha_blend",
    "0",
    "--device",
    "cpu",
    "--amp",
    "off",
]

VIT = {"model": "vit_custom_patch8", "model_kwargs": {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}}
CONV = {"model": "resnet10t", "model_kwargs": {}}


def finetune(*argv) -> int:
    """main_finetune in this process; the arguments later in the line win."""
    return main_finetune.main([*map(str, argv)])


def save_member(
    path, family: dict, *, classes=("blue", "red"), size=(32, 32), in_chans=3, seed=0, ema=False, crop_pct=None, **args
):
    """A checkpoint as main_finetune.py writes it; loud enough random weights that images differ. Returns (net, meta)."""
    torch.manual_seed(seed)
    mean, std = ([0.3 + 0.1 * seed] * in_chans, [0.2 + 0.1 * seed] * in_chans)
    meta = {
        "kind": "classifier",
        **family,
        "global_pool": True,
        "img_size": list(size),
        "in_chans": in_chans,
        "num_classes": len(classes),
        "classes": list(classes),
        "mean": mean,
        "std": std,
        "dataset": "folder",
        **({"crop_pct": crop_pct} if crop_pct else {}),
    }
    net = create_model(
        family["model"], num_classes=len(classes), img_size=size, in_chans=in_chans, **family["model_kwargs"]
    ).eval()
    torch.nn.init.normal_(net.get_classifier().weight, std=1.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    run = Run(
        World(), RunLog(None), kind="finetune", options={"eval_metric": "acc1", **args}, meta=meta, save_freq=0, keep=0
    )
    run.position.best, run.position.best_epoch = 75.0 + seed, 0
    state = run.state(net)
    if ema:  # the average is what predicts: the last weights are made useless
        state["ema"] = {k: v.clone() for k, v in state["model"].items()}
        state["model"] = {k: torch.zeros_like(v) for k, v in state["model"].items()}
    torch.save(state, path)
    return net, meta


def copy_first_epoch(run, to) -> None:
    """What a run with --save_freq 1 that was stopped after its first epoch would have left."""
    for path in [run / "checkpoint-0.pth", run / "log.txt", *run.glob("events*")]:
        (to / path.name).write_bytes(path.read_bytes())


def assert_same_state(a: dict, b: dict, path: str = "") -> None:
    """Bit for bit, through nested containers."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for k in a:
            assert_same_state(a[k], b[k], f"{path}.{k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same_state(x, y, f"{path}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b or (a != a and b != b), f"{path}: {a} {b}"


def comparable(path) -> dict:
    content = read_checkpoint(str(path))
    return {k: v for k, v in content.items() if k not in ("args",)}


def log_without_times(folder) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_log(str(folder / "log.txt"))]


def assert_same_run(a, b) -> None:
    """Two output folders: the last checkpoint, log.txt and each of TensorBoard's scalars with its step."""
    assert_same_state(comparable(a / "checkpoint-last.pth"), comparable(b / "checkpoint-last.pth"))
    assert log_without_times(a) == log_without_times(b)
    assert_same_state(tensorboard_scalars(a), tensorboard_scalars(b))


def one_line(caught) -> str:
    text = str(caught.value)
    assert "\n" not in text and 0 < len(text) < 600, text
    return text


@contextmanager
def peak_memory_below(megabytes: int):
    """A cap on this process's address space, relative to now: what asks for more gets MemoryError."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + megabytes * 2**20, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
