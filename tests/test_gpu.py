"""What a GPU must do as the CPU does. DEVICE=cuda or cpu chooses; by default a GPU where there is one.

On the CPU the same code runs with a few images, which shows that the tests work: both sides are then equal.
"""

import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import main_finetune
import main_predict
import main_pretrain_noprop
from augment.batch import BatchTransform, Erasing
from augment.image import Geometry
from bench.ranks import Ranks
from engine_finetune import Criterion, train_one_epoch
from models import create_model
from tests.harness import ROOT
from tests.harness.checks import assert_same_state, comparable, log_without_times
from tests.harness.runs import CONV, VIT, finetune, pretrain, save_member
from tests.harness.training import new_run, new_training
from util.checkpoint import LAST, read_checkpoint
from util.data.datasets import ArrayDataset
from util.data.loader import Loader
from util.dist import Precision, init_world
from util.log import RunLog, read_log
from util.optim import build_adamw, build_ema, param_groups
from util.seed import counted_normal, counted_uniform
from util.train.interrupts import Interrupts

DEVICE = os.environ.get("DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
CUDA = DEVICE.startswith("cuda")
if CUDA:  # for --deterministic; read once, at the first product of matrices, which another test may make
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
on_cuda = pytest.mark.skipif(not CUDA, reason="of CUDA alone")
RUN = ["--epochs", "2", "--warmup_epochs", "0", "--lr", "1e-3", "--batch_size", "64", "--save_freq", "0", "--seed", "3"]
FINETUNE = [
    *RUN,
    *"""
        --dataset digits --mixup 0.8 --cutmix 1.0 --ema_decay 0.9 --reprob 0.25 --alpha_blend 200
        --noise_timestep uniform --aa rand-m9-mstd0.5-inc1
    """.split(),
]
SMALL_VIT = ["--model", "vit_custom_patch2", "--model_kwargs", "embed_dim=24", "depth=2", "num_heads=3"]
SMALL_CONV = ["--model", "test_efficientnet", "--input_size", "16"]
PRETRAIN = [
    *RUN,
    *"""
        --dataset digits --embed_dim 24 --depth 2 --num_heads 3 --decoder_embed_dim 24 --decoder_depth 1 --T 3
        --hflip 0.5 --loss_weighting edm --vis_freq 0
    """.split(),
]


RUNS = {
    "fine-tuning a ViT": (finetune, [*FINETUNE, *SMALL_VIT]),
    "fine-tuning a convolutional net": (finetune, [*FINETUNE, *SMALL_CONV]),
    "pretraining": (pretrain, PRETRAIN),
}


@pytest.fixture(autouse=True)
def device(monkeypatch):
    """A run on the CPU hides the GPU from its process: too late for this one, which has begun to use it, but not for
    those that it starts. 640 digits to train with, on the CPU 320."""
    if CUDA:
        torch.zeros(1, device=DEVICE)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", "0,1"))
    digits, n = load_digits(), 800 if CUDA else 400
    few = {"images": digits.images[:n], "target": digits.target[:n]}
    monkeypatch.setattr("sklearn.datasets.load_digits", lambda: SimpleNamespace(**few))
    for main, name in (
        (main_finetune, "write_finetune_report"),
        (main_finetune, "plot_confusion"),
        (main_pretrain_noprop, "write_pretrain_report"),
    ):
        monkeypatch.setattr(main, name, lambda *args: None)  # most of the time of so small a run
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def same_random_numbers(monkeypatch):
    """Masks and noise drawn on the CPU whatever the device: its generator is another, with other numbers."""

    def on_the_cpu(real):
        def draw(*size, device=None, **kwargs):
            x = real(*size, **kwargs)
            return x if device is None else x.to(device)

        return draw

    for name in ("rand", "randn", "randint"):
        monkeypatch.setattr(torch, name, on_the_cpu(getattr(torch, name)))


def losses(folder) -> list[float]:
    return [line["train_loss"] for line in read_log(str(folder / "log.txt"))]


@pytest.mark.parametrize("name", RUNS)
def test_the_loss_goes_as_on_the_cpu(name, tmp_path, same_random_numbers):
    main, line = RUNS[name]
    line = [*line, "--amp", "off", "--output_dir"]
    if main is finetune:
        line = ["--drop_path", "0", *line]
    assert main("--device", DEVICE, *line, tmp_path / "device") == 0
    assert main("--device", "cpu", *line, tmp_path / "cpu") == 0
    a, b = losses(tmp_path / "device"), losses(tmp_path / "cpu")
    assert a == pytest.approx(b, rel=0.01) and len(a) == 2


@pytest.mark.parametrize("name", RUNS)
def test_a_deterministic_run_resumes_bit_for_bit(name, tmp_path, monkeypatch):
    """So two runs of the same line have the same bits as well."""
    main, line = RUNS[name]
    amp = "bf16" if CUDA else "off"  # convolutions in bf16 are not the CPU's business
    line = [*line, "--device", DEVICE, "--deterministic", "--amp", amp, "--resume", "auto", "--output_dir"]
    assert main(*line, tmp_path / "whole") == 0
    calls, real, stop = [], Interrupts.poll, 16 if CUDA else 9  # in epoch 1 of 10 or 5 updates

    def poll(self):
        calls.append(1)
        return (True, False) if len(calls) == stop else real(self)

    with monkeypatch.context() as patch:
        patch.setattr(Interrupts, "poll", poll)
        assert main(*line, tmp_path / "stopped") == 75
    assert read_checkpoint(str(tmp_path / "stopped" / LAST))["step"] > 0
    assert main(*line, tmp_path / "stopped") == 0
    assert_same_state(*(comparable(tmp_path / folder / LAST) for folder in ("stopped", "whole")))
    assert log_without_times(tmp_path / "stopped") == log_without_times(tmp_path / "whole")


@pytest.mark.parametrize("name", RUNS if CUDA else ["fine-tuning a ViT", "pretraining"])
def test_mixed_precisions_train_as_fp32_does(name, tmp_path):
    """Their masks and noise are those of the device; the loss of the epoch differs by rounding."""
    main, line = RUNS[name]
    found = {}
    for amp in ("off", "bf16", "fp16"):
        assert main(*line, "--epochs", 1, "--device", DEVICE, "--amp", amp, "--output_dir", tmp_path / amp) == 0
        found[amp] = losses(tmp_path / amp)[0]
        checkpoint = read_checkpoint(str(tmp_path / amp / LAST))
        assert bool(checkpoint["scaler"]) == (amp == "fp16")
        assert all(torch.isfinite(v).all() for v in checkpoint["model"].values())
    assert found["bf16"] == pytest.approx(found["off"], rel=0.1)
    assert found["fp16"] == pytest.approx(found["off"], rel=0.3)  # its first updates are skipped until the scale fits


def test_fp32_products_have_the_accuracy_of_fp32():
    """TF32 would be wrong by 1e-3 of these sums' size, fp32 by 1e-6."""
    device = init_world(DEVICE).device
    g = torch.Generator().manual_seed(0)
    a, b, k = (torch.randn(s, generator=g) for s in ((512, 512), (512, 512), (64, 64, 3, 3)))
    for exact, product in (
        (a.double() @ b.double(), a.to(device) @ b.to(device)),
        *[
            (torch.conv2d(x.double(), k.double()), torch.conv2d(x.to(device), k.to(device)))
            for x in [torch.randn(4, 64, 16, 16, generator=g)]
        ],
    ):
        assert (product.cpu().double() - exact).abs().max() < 2e-5 * exact.std()


@pytest.mark.parametrize("family", [SMALL_VIT, SMALL_CONV])
def test_no_step_waits_for_the_device_as_cuda_itself_sees_it(family):
    """CUDA's own alarm, between the lines of progress; tests/test_host_sync.py counts more kinds of waits on a CPU."""
    world, steps = init_world(DEVICE), 8
    sizes = dict(embed_dim=24, depth=2, num_heads=3) if family is SMALL_VIT else {}
    net = create_model(family[1], num_classes=10, img_size=16, drop_path=0.1, **sizes).to(world.device)
    data = ArrayDataset(
        torch.randint(0, 256, (steps * 16, 3, 16, 16), dtype=torch.uint8),
        torch.arange(steps * 16) % 10,
        list("0123456789"),
    )
    transform = BatchTransform(
        (0.5,) * 3, (0.2,) * 3, size=16, geometry=Geometry("rrc", hflip=0.5), color_jitter=0.4, erasing=Erasing(0.5)
    )
    loader = Loader(data, batch_transform=transform, batch_size=16, train=True, world=world)
    optimizer, ema = build_adamw(param_groups(net, weight_decay=0.05), lr=1e-3), build_ema(net, 0.9)
    run = new_run(loader, world=world, log=RunLog(None, is_main=False), print_freq=100)
    polls = []

    def poll() -> tuple[bool, bool]:
        polls.append(1)
        if world.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error" if 2 <= len(polls) < steps - 1 else "default")
        return False, False

    run.interrupts.poll = poll
    training = new_training(net, optimizer, precision=Precision("bf16", world.device), ema=ema)
    try:
        stats = train_one_epoch(training, loader, Criterion(), run, clip_grad=1.0)
    finally:
        if world.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert len(polls) == steps and np.isfinite(stats["loss"])


@pytest.mark.slow
def test_predictions_are_the_cpus(photo_folder, tmp_path):
    save_member(tmp_path / "vit" / "checkpoint-best.pth", VIT, seed=1)
    save_member(tmp_path / "conv" / "checkpoint-best.pth", CONV, seed=2)
    line = [
        "--checkpoints",
        tmp_path / "vit",
        tmp_path / "conv",
        "--data_path",
        photo_folder / "val",
        "--views",
        12,
        "--amp",
        "off",
        "--num_workers",
        0,
    ]
    rows = {}
    for device in (DEVICE, "cpu"):
        out = tmp_path / device
        assert main_predict.main([*map(str, line), "--device", device, "--output_dir", str(out)]) == 0
        rows[device] = [r.split(",") for r in (out / "predictions.csv").read_text().splitlines()]
    assert len(rows[DEVICE]) == 13
    for a, b in zip(rows[DEVICE][1:], rows["cpu"][1:]):
        assert a[0] == b[0] and [float(p) for p in a[2:]] == pytest.approx([float(p) for p in b[2:]], abs=1e-3)


def two_ranks(*line) -> None:
    if not CUDA:
        assert Ranks(2, lambda: finetune(*line, "--device", "cpu")).exit_codes() == [0, 0]
        return
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *launcher, "main_finetune.py", *map(str, line), "--device", "cuda"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=150)


@pytest.mark.slow
@pytest.mark.skipif(CUDA and torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("family", [SMALL_VIT, SMALL_CONV])
def test_two_ranks_train_as_one_with_twice_the_batch(family, tmp_path):
    line = [*RUN, "--dataset", "digits", *family, *"--drop_path 0 --aug none --alpha_blend 0 --amp off".split()]
    if family is SMALL_CONV:
        line.append("--freeze_bn")  # BatchNorm normalises by each rank's own batch
    assert finetune(*line, "--device", DEVICE, "--output_dir", tmp_path / "one") == 0
    two_ranks(*line, "--batch_size", 32, "--output_dir", tmp_path / "two")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)


HANGS = """
import os, signal, sys, time
import main_finetune
from util.train import interrupts
from util.cli.script import run_main

real, interrupts.MAIN_THREAD_FIRST = main_finetune.train_one_epoch, 1.0

def hangs(training, loader, criterion, run, **kwargs):
    if run.world.rank == 1 and run.position.epoch == 1:
        time.sleep(600)
    return real(training, loader, criterion, run, **kwargs)

main_finetune.train_one_epoch = hangs
run_main(lambda: main_finetune.main(sys.argv[1:]))
"""


@pytest.mark.skipif(not CUDA or torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_hanging_rank_ends_the_other_with_a_message_before_nccl_aborts(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [
        *RUN,
        "--dataset",
        "digits",
        *SMALL_VIT,
        "--device",
        "cuda",
        "--timeout_minutes",
        "0.2",
        "--output_dir",
        str(tmp_path),
    ]
    ranks = []
    for rank in "01":
        env = {
            **os.environ,
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        ranks.append(
            subprocess.Popen([sys.executable, "-c", HANGS, *line], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
        )
    try:
        said = ranks[0].communicate(timeout=90)[1]
    finally:
        ranks[1].kill()
    assert ranks[0].returncode == 2 and "rank 0 of 2: waited for another rank longer than --timeout_minutes" in said, (
        said
    )


@on_cuda
@pytest.mark.parametrize(
    "options",
    [
        dict(
            geometry=Geometry("pad", hflip=0.5, vflip=0.5), aa="rand-m9-mstd0.5-inc1", erasing=Erasing(0.5, recount=2)
        ),
        dict(geometry=Geometry("rrc", hflip=0.5), size=16, color_jitter=0.4, erasing=Erasing(0.5)),
    ],
)
def test_augmentation_is_the_cpus(options):
    mean, std = (0.5, 0.4, 0.6), (0.2, 0.3, 0.25)
    x = torch.randint(0, 256, (40, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    index, transform = torch.arange(40), BatchTransform(mean, std, **options)
    for where in (index, index.to(DEVICE)):
        difference = (transform(x.to(DEVICE), where, 2, True).cpu() - transform(x, index, 2, True)).abs()
        assert (difference > 1.01 / 255 / min(std)).float().mean() < 1e-3


@on_cuda
def test_counted_numbers_are_the_cpus():
    index = torch.arange(50)
    assert torch.equal(counted_uniform(1, 2, index.to(DEVICE), 9).cpu(), counted_uniform(1, 2, index, 9))
    assert torch.allclose(counted_normal(1, 2, index.to(DEVICE), 9).cpu(), counted_normal(1, 2, index, 9), atol=1e-5)


@on_cuda
def test_a_run_on_the_cpu_leaves_the_gpu_alone(tmp_path):
    line = [*RUN, "--dataset", "digits", *SMALL_VIT, "--epochs", "1", "--device", "cpu", "--output_dir", str(tmp_path)]
    code = f"import torch, main_finetune as m; m.main({line!r}); assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
