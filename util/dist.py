"""Process group, device and precision, chosen once at start-up: the same command runs on CPU, one GPU or many."""

import ctypes
import datetime
import inspect
import os
import platform
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from util.errors import UserError, listed
from util.precision import is_convolutional, keep_out_of_bf16


@dataclass(frozen=True)
class World:
    """This process's rank and device. Rank 0 writes the files."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto` takes cuda, then mps, then cpu. A missing device is an error; there is no fallback."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, ValueError):
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name}: not a device; use auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device {name}: no CUDA device is visible here; use --device cpu or auto")
        index = local_rank if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise UserError(
                f"--device {name}: rank {local_rank} needs GPU {index}, but {torch.cuda.device_count()} visible"
            )
        return torch.device("cuda", index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: not available here; use --device cpu or auto")
    return device


def keep_freed_memory() -> None:
    """glibc: allocate large tensors on the heap and keep it, instead of mapping and zeroing pages at every step.

    An EfficientNet step takes 28 % less CPU time with it (bench/BENCH.md). Without glibc nothing changes.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


# NCCL's watchdog aborts the process without our message. So NCCL waits longer than gloo, whose timeout ends in one line
# (`lost_rank`; Interrupts in util/train/interrupts.py while the main thread waits for an NCCL kernel that never ends).
NCCL_LATER = datetime.timedelta(minutes=2)


def init_world(
    device: str = "auto", dist_url: str = "env://", timeout_minutes: float = 10.0, deterministic: bool = False
) -> World:
    """Join torchrun's process group (gloo on CPU, nccl on CUDA) if there is one.

    deterministic: use only operations with reproducible results; others raise. When a rank hangs, collectives on the
    other ranks fail after `timeout_minutes`; when one dies, they fail at once: see `lost_rank`.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    dev = pick_device(device, local_rank)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    torch.use_deterministic_algorithms(deterministic)
    if dev.type == "cpu":
        keep_freed_memory()
        # Hide GPUs: torch queries a visible one (AdamW at each step), which opens a context on it.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if dev.type == "cuda":
        torch.cuda.set_device(dev)
        # cuDNN's benchmark picks the fastest algorithm it measures, so another start may round differently.
        torch.backends.cudnn.benchmark = not deterministic
        torch.backends.cudnn.deterministic = deterministic
        # fp32 means fp32: TF32 keeps 10 of the 23 mantissa bits and is cuDNN's default for convolutions.
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
    if "RANK" in os.environ and size > 1:
        # gloo beside nccl: objects, flags and barriers go over the CPU and never wait for a kernel.
        backends = "cpu:gloo,cuda:nccl" if dev.type == "cuda" else "gloo"
        timeout = datetime.timedelta(minutes=timeout_minutes)
        try:
            store, rank, size = next(dist.rendezvous(dist_url, rank, size, timeout=timeout))
        except (RuntimeError, ValueError, AssertionError) as error:
            raise UserError(f"--dist_url {dist_url}: the processes cannot meet ({error})") from None
        # torchrun --max-restarts restarts the ranks but keeps its store, where gloo would find the addresses of the
        # dead ranks: each attempt gets its own keys.
        store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(backends, store=store, rank=rank, world_size=size, timeout=timeout)
        if dev.type == "cuda":
            backend = dist.group.WORLD._get_backend(torch.device("cuda"))  # type: ignore[union-attr]
            backend._set_default_timeout(timeout + NCCL_LATER)
    else:
        size, rank = 1, 0
    return World(rank, size, local_rank, dev)


def shutdown() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


# Parts of gloo's, the store's and NCCL's messages about another rank; tests/util/test_dist.py has the whole texts.
GONE = (
    "onnection closed",
    "onnection reset",
    "onnection refused",
    "onnection was likely closed",
    "Broken pipe",
    "remote process exit",
    "remote peer",
    "communicator was aborted",
)
NOT_A_RANK = ("CUDA error", "DataLoader")  # these time out by themselves


def lost_rank(error: RuntimeError) -> UserError | None:
    """The error to report if a collective failed because another rank hangs or died; None for any other error."""
    text = " ".join(str(error).split())
    hangs = "timed out" in text.lower() or "timeout" in text.lower()
    gone = any(words in text for words in GONE)
    broken = "unhandled system error" in text  # NCCL's text for any failed system call
    if not dist.is_initialized() or not (hangs or gone or broken) or any(words in text for words in NOT_A_RANK):
        return None
    if hangs:
        happened = "waited for another rank longer than --timeout_minutes; a rank that reports nothing hangs"
    elif gone:
        happened = "another rank died; its last message is above"
    else:
        happened = "the exchange with another rank failed: it died, or /dev/shm is full (NCCL_DEBUG=INFO tells more)"
    return UserError(
        f"rank {dist.get_rank()} of {dist.get_world_size()}: {happened} ({text[:160]}); the last checkpoint is kept, "
        "--resume auto continues; torchrun's --max-restarts does so by itself"
    )


def barrier() -> None:
    if dist.is_initialized():
        all_reduce(torch.zeros(1))


def all_reduce(x: torch.Tensor, op: str = "sum") -> torch.Tensor:
    """Reduce in place over ranks (`sum`, `max`, `min`); does nothing in a single process."""
    if dist.is_initialized():
        dist.all_reduce(x, op={"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}[op])
    return x


def gather_objects(obj) -> list:
    """One picklable object per rank, in rank order, on every rank."""
    if not dist.is_initialized():
        return [obj]
    out = [None] * dist.get_world_size()
    dist.all_gather_object(out, obj)
    return out


def broadcast_object(obj):
    """Rank 0's object, on every rank."""
    if not dist.is_initialized():
        return obj
    box = [obj]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def broadcast_buffers(module: torch.nn.Module) -> None:
    """Copy rank 0's buffers to every rank: in training, BatchNorm statistics differ between ranks."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def computes_bf16(device: torch.device) -> bool:
    """True where matrix products are faster in bf16 than in fp32.

    A CPU needs AMX, or AMD's AVX512_BF16, which does two bf16 products in the time of one in fp32. Intel's AVX512_BF16
    without AMX takes 1.8 times as long as fp32 (bench/precision.md).
    The environment variable NOISEVIT_BF16, 1 or 0, overrides this, so that any machine can run another machine's
    default.
    """
    forced = os.environ.get("NOISEVIT_BF16", "")
    if forced not in ("", "0", "1"):
        raise UserError(f"NOISEVIT_BF16={forced}: should be 1 (treat bf16 as fast), 0 (treat it as slow) or unset")
    if forced:
        return forced == "1"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return bool(
            torch.cpu._is_amx_tile_supported() or (torch.cpu._is_avx512_bf16_supported() and is_amd(cpu_description()))
        )
    return False


def cpu_description() -> str:
    """The system's description of the processor, vendor included."""
    try:
        with open("/proc/cpuinfo") as file:
            return file.read(4096)
    except OSError:
        return platform.processor()


def is_amd(description: str) -> bool:
    return "AuthenticAMD" in description


class Precision:
    """Autocast and loss scaling: `off`, `bf16`, `fp16`, `mixed` (bf16; fp16 on a GPU without it), or None.

    None takes the faster one for this device and kind of `net` (bench/precision.md), the same each time. On CPU that is
    bf16 for networks of matrix products, if the CPU is fast at it, and fp32 for convolutional ones; on CUDA, bf16 or
    fp16. Without a net, matrix products are assumed. `why` is the reason. Only fp16 needs a GradScaler: its gradients
    underflow, while bf16 has fp32's exponent range.
    """

    def __init__(self, amp: str | None, device: torch.device, net: torch.nn.Module | None = None):
        self.name, self.why = choose_precision(device, net) if amp is None else (amp, "--amp")
        if amp == "mixed":
            self.name = "fp16" if device.type == "cuda" and not computes_bf16(device) else "bf16"
        self.device = device
        self.dtype = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.name]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # mps without fp16 support warns here and again at the first step
            self.scaler = torch.amp.GradScaler(device.type, enabled=self.name == "fp16")

    def __str__(self) -> str:
        return f"amp {self.name} ({self.why})"

    def autocast(self):
        if self.name == "off":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)


def choose_precision(device: torch.device, net: torch.nn.Module | None) -> tuple[str, str]:
    """(amp, reason) of the faster precision."""
    if device.type == "cuda":
        return ("bf16", "this GPU supports it") if computes_bf16(device) else ("fp16", "this GPU has no bf16")
    if not computes_bf16(device):
        return "off", f"fp32: bf16 is no faster on this {'CPU' if device.type == 'cpu' else 'device'}"
    if device.type == "cpu" and net is not None and is_convolutional(net):
        return "off", "fp32: convolutions are slower in bf16 on this CPU"
    return "bf16", "faster for matrix products on this CPU"


def prepare_net(
    net: torch.nn.Module, precision: Precision, trained_on: tuple[int, int, int] | None = None
) -> list[str]:
    """Adapt net's layers to the precision; returns notes for the log.

    trained_on: channels, height, width of the training images; None if it is not trained.
    On CPU in bf16, the backward pass of fused attention is slow (bench/BENCH.md); plain softmax(q k^T) v is faster.
    """
    if precision.device.type != "cpu" or precision.name == "off":
        return []
    for module in net.modules():
        if getattr(module, "fused_attn", False):
            module.fused_attn = False  # type: ignore[assignment]
    names = keep_out_of_bf16(net, trained_on) if trained_on else []
    why = f"in fp32, because torch's {precision.name} gradients are wrong for such small feature maps"
    return [f"{why}: {listed(names, 4)}"] if names else []


def wrap_ddp(model, world: World):
    """DistributedDataParallel, or the model itself in a single process.

    By default DDP sends rank 0's buffers to the others at every update: for Swin-V2-B at 384 px, 86 MB of attention
    masks and position tables that never change. BatchNorm's statistics do change, but no training step reads them;
    evaluation (broadcast_buffers) and checkpoints (written by rank 0) use rank 0's.
    """
    if world.size == 1:
        return model
    DDP = torch.nn.parallel.DistributedDataParallel
    device_ids = [world.device.index] if world.device.type == "cuda" else None
    new = "forward_sync_buffers" in inspect.signature(DDP.__init__).parameters  # the name since torch 2.14
    keep: dict[str, Any] = {"forward_sync_buffers" if new else "broadcast_buffers": False}
    return DDP(model, device_ids=device_ids, gradient_as_bucket_view=True, **keep)
