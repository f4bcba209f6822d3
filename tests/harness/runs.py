"""Small runs: their flags, a main in this process or in one of its own, checkpoints without a run."""

import os
import subprocess
import sys

import torch

import main_finetune
import main_pretrain_noprop
from models import create_model
from tests.harness import ROOT
from tests.harness.training import new_run, new_training

NET = """
    --dataset digits --model vit_custom_patch4 --model_kwargs embed_dim=12 depth=1 num_heads=2 --epochs 3
    --warmup_epochs 0 --batch_size 64 --lr 1e-3 --ema_decay 0.9 --save_freq 0 --device cpu --num_workers 0
""".split()
# A net that trains in a second on digits, with everything random switched on: it gets 45 % right.
TINY = """
    --dataset digits --model vit_custom_patch4 --model_kwargs embed_dim=36 depth=2 num_heads=3 --epochs 3
    --warmup_epochs 1 --batch_size 64 --accum_iter 2 --lr 5e-3 --drop_path 0.1 --mixup 0.8 --cutmix 1.0
    --mixup_prob 0.3 --ema_decay 0.9 --save_freq 1 --device cpu --num_workers 0
""".split()
# Nothing random and fp32: what different runs of it reach can be compared.
PLAIN = """
    --dataset digits --model vit_custom_patch2 --model_kwargs embed_dim=24 depth=2 num_heads=3 --epochs 2
    --warmup_epochs 0 --lr 1e-3 --drop_path 0 --aug none --alpha_blend 0 --device cpu --amp off
""".split()

VIT = {"model": "vit_custom_patch8", "model_kwargs": {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}}
CONV = {"model": "resnet10t", "model_kwargs": {}}


def finetune(*argv) -> int:
    """main_finetune in this process; the arguments later in the line win."""
    return main_finetune.main([*map(str, argv)])


def pretrain(*argv) -> int:
    """main_pretrain_noprop likewise."""
    return main_pretrain_noprop.main([*map(str, argv)])


def classifier_meta(**changes) -> dict:
    """The meta of a tiny classifier of 8 x 8 grey images; a value of `...` leaves its key out."""
    meta = {
        "kind": "finetune",
        "model": "vit_custom_patch4",
        "model_kwargs": {"embed_dim": 12, "depth": 1, "num_heads": 2},
        "global_pool": True,
        "img_size": [8, 8],
        "in_chans": 1,
        "num_classes": 2,
        "classes": ["a", "b"],
        "mean": [0.5],
        "std": [0.5],
        "dataset": "digits",
    }
    return {k: v for k, v in {**meta, **changes}.items() if v is not ...}


def save_member(
    path, family: dict, *, classes=("blue", "red"), size=(24, 40), in_chans=3, seed=0, ema=False, crop_pct=None, **args
):
    """A checkpoint of main_finetune.py, with random weights so large that images differ. Returns (net, meta)."""
    torch.manual_seed(seed)
    mean, std = ([0.3 + 0.1 * seed] * in_chans, [0.2 + 0.1 * seed] * in_chans)
    meta = {
        "kind": "finetune",
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
    run = new_run(meta=meta, **args)
    run.position.best, run.position.best_epoch = 75.0 + seed, 0
    state = run.state(new_training(net))
    if ema:  # the average is what predicts: the last weights are made useless
        state["ema"] = {k: v.clone() for k, v in state["model"].items()}
        state["model"] = {k: torch.zeros_like(v) for k, v in state["model"].items()}
    torch.save(state, path)
    return net, meta


def copy_first_epoch(run, to) -> None:
    """What a run with --save_freq 1 that was stopped after its first epoch would have left."""
    for path in [run / "checkpoint-0.pth", run / "log.txt", *run.glob("events*")]:
        (to / path.name).write_bytes(path.read_bytes())


def run_script(*args, nproc: int = 0, check: int | None = 0, timeout: int = 240, env: dict | None = None, cwd=ROOT):
    """Run `python ARGS` or, with nproc, `torchrun --nproc_per_node N ARGS` in `cwd`; returns the result."""
    command = [sys.executable]
    if nproc:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    result = subprocess.run(
        [*command, *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=timeout, env=environment
    )
    if check is not None:
        assert result.returncode == check, f"exit {result.returncode}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result
