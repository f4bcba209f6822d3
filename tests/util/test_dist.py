"""Ranks: what they exchange and what they keep to themselves, and what is said when one of them is lost."""

import os
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

from bench.ranks import Ranks
from tests.harness.checks import assert_same_state, comparable, log_without_times
from tests.harness.runs import NET, finetune
from util import checkpoint
from util.dist import broadcast_buffers, gather_objects, init_world, lost_rank, shutdown, wrap_ddp
from util.log import versions
from util.train import interrupts
from util.train.interrupts import MAIN_THREAD_FIRST, Interrupts

HANGS, GONE, BROKEN = "waited for another rank longer", "another rank died", "the exchange with another rank failed"
# As torch 2.6 to 2.14 and NCCL 2.21 to 2.28 word them; numbers and names differ each time.
TEXTS = [
    (
        "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 9000ms for recv operation to "
        "complete",
        HANGS,
    ),
    ("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:41267", GONE),
    (
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:525] Read error [127.0.0.1]:9273: Connection reset by peer",
        GONE,
    ),
    ("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Application timeout caused pair closure", HANGS),
    ("[../third_party/gloo/gloo/transport/tcp/pair.cc:229] writev [10.0.0.2]:5501: Broken pipe", GONE),
    ("[../third_party/gloo/gloo/transport/tcp/pair.cc:845] connect [127.0.1.1]:33061: Connection refused", GONE),
    ("failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?", GONE),
    ("The client socket has timed out after 600000ms while trying to connect to (node1, 29500).", HANGS),
    ("wait timeout after 600000ms, keys: /attempt_0/cuda//cuda//0", HANGS),
    ("Socket Timeout", HANGS),
    (
        "[1] is setting up NCCL communicator and retrieving ncclUniqueId from [0] via c10d key-value store by key "
        "'0', but store->get('0') got error: wait timeout after 600000ms, keys: /default_pg/0//cuda//0",
        HANGS,
    ),
    (
        "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=1580, OpType=ALLREDUCE, "
        "NumelIn=466119168, NumelOut=466119168, Timeout(ms)=600000) ran for 600004 milliseconds before timing out.",
        HANGS,
    ),
    (
        "NCCL communicator was aborted on rank 1.  Original reason for failure was: [Rank 1] Watchdog caught "
        "collective operation timeout: WorkNCCL(SeqNum=7, OpType=BROADCAST, Timeout(ms)=600000) ran for 600071 "
        "milliseconds before timing out.",
        HANGS,
    ),
    ("NCCL communicator was aborted on rank 12. ", GONE),
    (
        "NCCL communicator encountered error set by ProcessGroupNCCL: NCCL error: remote process exited or there was "
        "a network error, NCCL version 2.21.5",
        GONE,
    ),
    (
        "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.hpp:268, remote process exited or there was a "
        "network error, NCCL version 2.21.5\nncclRemoteError: A call failed possibly due to a network error or a "
        "remote process exiting prematurely.\nLast error:\nsocketProgressOpt: Call to recv from 172.16.0.4<33759> "
        "failed : Connection reset by peer",
        GONE,
    ),
    (
        "NCCL error in: ../torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:1275, internal error, NCCL version 2.14.3\n"
        "ncclInternalError: Internal check failed.\nLast error:\nNet : Connection closed by remote peer user<50260>",
        GONE,
    ),
    (
        "NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.hpp:317, unhandled system error (run with "
        "NCCL_DEBUG=INFO for details), NCCL version 2.21.5\nncclSystemError: System call (e.g. socket, malloc) or "
        "external library call failed or device error. \nLast error:\nError while creating shared memory segment "
        "/dev/shm/nccl-EoOvZr (size 7340384)",
        BROKEN,
    ),
    (
        "NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.hpp:317, unhandled cuda error (run with "
        "NCCL_DEBUG=INFO for details), NCCL version 2.21.5\nncclUnhandledCudaError: Call to CUDA function failed.\n"
        "Last error:\nCuda failure 'out of memory'",
        None,
    ),
    (
        "NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.hpp:317, invalid usage (run with NCCL_DEBUG=WARN for "
        "details), NCCL version 2.21.5\nncclInvalidUsage: This usually reflects invalid usage of NCCL library.\nLast "
        "error:\nDuplicate GPU detected : rank 0 and rank 1 both on CUDA device 1a000",
        None,
    ),
    ("CUDA error: the launch timed out and was terminated", None),
    ("DataLoader timed out after 5 seconds", None),
    ("CUDA out of memory. Tried to allocate 2.00 GiB", None),
]


@pytest.mark.parametrize("text, expected", TEXTS)
def test_what_torch_and_nccl_say_of_a_lost_rank_becomes_one_line(text, expected, monkeypatch):
    assert lost_rank(RuntimeError(text)) is None, "one process has lost nobody"
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    said = lost_rank(dist.DistBackendError(text))
    if expected is None:
        assert said is None
    else:
        assert f"rank 0 of 2: {expected}" in str(said) and "\n" not in str(said) and "--resume auto" in str(said)


@pytest.mark.slow
def test_a_main_thread_that_stands_still_does_not_hide_a_lost_rank(tmp_path, monkeypatch):
    """Rank 1 stops polling. Rank 0 is stuck where it sees nothing of it, as behind a kernel of NCCL that never ends."""
    monkeypatch.setattr(interrupts, "MAIN_THREAD_FIRST", 0.1)
    monkeypatch.setattr(sys, "argv", ["main_finetune.py"])

    def call() -> None:
        world = init_world("cpu", timeout_minutes=0.05)
        interrupts = Interrupts(timeout_minutes=0.05)
        interrupts.poll()
        if world.is_main:
            interrupts.poll()
        time.sleep(30)

    ranks = Ranks(2, call, tmp_path / "said.txt")
    ranks.processes[0].join(15)
    assert ranks.processes[0].exitcode == 2
    ranks.processes[1].kill()
    said = (tmp_path / "said.txt").read_text()
    assert f"main_finetune.py: error: rank 0 of 2: {HANGS}" in said and said.count("error: ") == 1


def test_the_watching_thread_ends_with_its_run_and_says_nothing():
    def call() -> int:
        before = threading.active_count()  # in the rank: threads of other tests are not in it
        init_world("cpu", timeout_minutes=0.05)
        interrupts = Interrupts(timeout_minutes=0.05)
        for _ in range(3):
            interrupts.poll()
        interrupts.close()
        shutdown()
        time.sleep(0.2)
        return threading.active_count() - before

    assert Ranks(2, call).exit_codes() == [0, 0]


def test_nccl_waits_longer_than_gloo_and_fp32_is_not_tf32(monkeypatch):
    """init_world for a CUDA device, torch's calls replaced: gloo's timeout ends in our line before NCCL's aborts."""
    seen = {}

    class Backend:
        def _set_default_timeout(self, timeout):
            seen["nccl"] = timeout

    def init_process_group(backend, *, timeout, **kwargs):
        seen.update(backend=backend, gloo=timeout)

    class Group:
        WORLD = type("World", (), {"_get_backend": lambda self, device: Backend()})()

    cuda = torch.device("cuda", 0)
    monkeypatch.setattr("util.dist.pick_device", lambda *args: cuda)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "rendezvous", lambda *args, **kwargs: iter([(dist.HashStore(), 0, 2)]))
    monkeypatch.setattr(dist, "init_process_group", init_process_group)
    monkeypatch.setattr(dist, "group", Group)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    try:
        assert init_world("auto", timeout_minutes=3).device == cuda
        assert seen["backend"] == "cpu:gloo,cuda:nccl" and seen["gloo"].total_seconds() == 180
        assert seen["nccl"].total_seconds() > 180 + MAIN_THREAD_FIRST + 60
        assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = True, False


class Layer(nn.Module):
    """BatchNorm, whose statistics change, and a table, which never does."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(3), nn.Linear(3, 2)
        self.register_buffer("table", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(x)) + self.table[0]


def test_no_update_sends_buffers_and_evaluation_has_those_of_rank_0():
    def inputs(rank: int) -> torch.Tensor:
        return torch.randn(3, 8, 3, generator=torch.Generator().manual_seed(rank)) + rank  # 3 batches of 8

    def call() -> int:
        world = init_world("cpu", timeout_minutes=1)
        torch.manual_seed(0)
        net = Layer()
        model = wrap_ddp(net, world)
        net.table += world.rank  # if it were sent, rank 1's would become rank 0's
        for x in inputs(world.rank):
            model(x).square().sum().backward()
        assert torch.equal(net.table, torch.full((4,), float(world.rank)))
        means = []
        for rank in (world.rank, 0):
            mean = torch.zeros(3, dtype=torch.float64)
            for x in inputs(rank).double():
                mean = 0.9 * mean + 0.1 * x.mean(0)  # BatchNorm's momentum
            means.append(mean)
        torch.testing.assert_close(net.norm.running_mean.double(), means[0], rtol=1e-5, atol=1e-5)
        broadcast_buffers(net)
        torch.testing.assert_close(net.norm.running_mean.double(), means[1], rtol=1e-5, atol=1e-5)
        gradients = gather_objects(net.linear.weight.grad)
        assert torch.equal(*gradients), "gradients are exchanged as ever"
        return 0

    assert Ranks(2, call).exit_codes() == [0, 0]


@pytest.mark.slow
def test_files_of_two_ranks_have_the_bits_of_ddps_own_broadcasts(tmp_path, monkeypatch):
    """A net with BatchNorm, its average, evaluation at the end: DDP as torch sets it up against `wrap_ddp`."""
    line = [
        *NET,
        *"""
            --model test_resnet --model_kwargs --input_size 8 --batch_size 64 --epochs 1 --amp off --mixup 0.8
            --output_dir
        """.split(),
    ]
    monkeypatch.setattr("main_finetune.write_finetune_report", lambda *args: None)
    monkeypatch.setattr("main_finetune.plot_confusion", lambda *args: None)
    DDP = nn.parallel.DistributedDataParallel

    class AsTorchHasIt(DDP):
        def __init__(self, module, *, device_ids, gradient_as_bucket_view, **left_out):
            super().__init__(module, device_ids=device_ids, gradient_as_bucket_view=gradient_as_bucket_view)
            assert self.will_sync_module_buffers()

    assert Ranks(2, lambda: finetune(*line, tmp_path / "ours")).exit_codes() == [0, 0]
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", AsTorchHasIt)
    assert Ranks(2, lambda: finetune(*line, tmp_path / "theirs")).exit_codes() == [0, 0]
    ours, theirs = (comparable(tmp_path / name / checkpoint.LAST) for name in ("ours", "theirs"))
    assert any("running_mean" in name for name in ours["model"])
    assert_same_state(ours, theirs)
    assert log_without_times(tmp_path / "ours") == log_without_times(tmp_path / "theirs")


@pytest.fixture
def untouchable_gpu(monkeypatch):
    """A GPU is there; whatever opens a context on it fails."""

    def opens_a_context(*args, **kwargs):
        raise AssertionError("CUDA was initialised by a run on the CPU")

    def visible() -> bool:
        return os.environ["CUDA_VISIBLE_DEVICES"] != ""

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(torch.cuda, "is_available", visible)
    monkeypatch.setattr("torch.accelerator.is_available", visible)
    monkeypatch.setattr(torch._C, "_accelerator_getDeviceIndex", opens_a_context, raising=False)
    names = (
        "_lazy_init",
        "get_rng_state",
        "set_rng_state",
        "get_device_name",
        "get_device_properties",
        "manual_seed",
        "set_device",
        "is_current_stream_capturing",
    )
    for name in names:
        monkeypatch.setattr(torch.cuda, name, opens_a_context)


@pytest.mark.slow
def test_a_run_on_cpu_does_not_touch_a_visible_gpu(tmp_path, untouchable_gpu):
    for epochs in ("1", "2"):
        assert finetune(*NET, "--epochs", epochs, "--output_dir", tmp_path, "--resume", "auto") == 0
    assert "cuda" not in checkpoint.read_checkpoint(str(tmp_path / checkpoint.LAST))["rng"][0]


def test_generators_and_versions_are_asked_of_the_runs_own_device(untouchable_gpu):
    cpu = torch.device("cpu")
    state = checkpoint.rng_state(cpu)
    checkpoint.set_rng_state({**state, "cuda": state["torch"]}, cpu)  # written by a run on a GPU
    assert "cuda" not in state and versions()["machine"].endswith("cores")
