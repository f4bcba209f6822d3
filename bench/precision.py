"""Training steps in fp32 and bf16 for several kinds of networks: the basis of util.dist.Precision's default on CPU.

    python -m bench.precision                                        # rewrites bench/precision.md
    python -m bench.precision --rows vit_small_patch16:224:4 --output ''

Both steps use one network with the same weights and images, in turns, in one process with one thread; medians. `x` is
the bf16 step's time over the fp32 step's in the same turn: below 1, bf16 is faster. Attention is plain in bf16 and
fused in fp32, as in the product.
"""

import argparse
import datetime
import gc
import os
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.layers import set_fused_attn

from bench.common import ROOT, machine
from engine_pretrain import local_backward
from models import create_model
from models.noprop_mae import NoPropMAE
from util.dist import Precision, computes_bf16, keep_freed_memory, prepare_net
from util.optim import build_adamw, param_groups
from util.precision import is_convolutional, place

ROWS = {
    "ViT": ["vit_tiny_patch16:224:4", "vit_small_patch16:224:4", "vit_tiny_patch4:32:16"],
    "Swin": ["swin_tiny_patch4_window7_224:224:2", "swinv2_tiny_window8_256:256:2"],
    "NoProp-MAE": ["noprop:32:16"],
    "ConvNeXt": ["convnext_atto:224:4", "convnext_tiny:224:2"],
    "EfficientNet": ["tf_efficientnet_lite0:224:8"],
    "MobileNet": ["mobilenetv3_large_100:224:8"],
    "ResNet": ["resnet10t:224:8", "resnet50:224:4"],
    "hybrid": [
        "maxvit_rmlp_pico_rw_256:256:2",
        "coatnet_pico_rw_224:224:2",
        "levit_128s:224:8",
        "efficientformer_l1:224:4",
    ],
}
CPU = torch.device("cpu")
PRODUCTS = ("aten::addmm", "aten::mm", "aten::bmm", "aten::baddbmm", "aten::mkldnn_linear")
READING = "## What follows"  # from this heading on, the file is written by hand
AMD = 0.5  # a bf16 product's time over an fp32 one's by AMD's AVX512_BF16: 32 multiply-adds a cycle against 16


def build(model: str, size: int, batch: int):
    """(net, backward(autocast)) of one row."""
    torch.manual_seed(0)
    images = torch.randn(batch, 3, size, size)
    if model == "noprop":
        net = NoPropMAE(T=4, img_size=size, patch_size=4)

        def backward(autocast) -> None:
            local_backward(net, net.encode, images, *net.random_masking(batch, 0.75), autocast=autocast)

        return net, backward
    net = create_model(model, num_classes=10, img_size=size)
    place(net, torch.device("cpu"))
    targets = torch.arange(batch) % 10

    def backward(autocast) -> None:
        with autocast():
            loss = F.cross_entropy(net(images).float(), targets)
        loss.backward()

    return net, backward


def product_share(call) -> float:
    """Share of matrix products in the CPU time of call()."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    times = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    return sum(times.get(name, 0.0) for name in PRODUCTS) / sum(times.values())


def measure(row: str, repeats: int, product: float) -> dict:
    """One row of the table. product: a bf16 matrix product's time over an fp32 one's."""
    model, size, batch = row.split(":")
    net, backward = build(model, int(size), int(batch))
    optimizer = build_adamw(param_groups(net, weight_decay=0.05), lr=1e-5)
    fused = {m for m in net.modules() if getattr(m, "fused_attn", False)}
    precisions = [Precision("off", CPU), Precision("bf16", CPU)]

    def step(precision: Precision) -> tuple[float, float]:
        for module in fused:
            module.fused_attn = True
        prepare_net(net, precision)
        wall, cpu = time.perf_counter(), time.process_time()
        backward(precision.autocast)
        optimizer.step()
        optimizer.zero_grad()
        return time.process_time() - cpu, time.perf_counter() - wall

    net.train()
    for precision in precisions:
        step(precision)
    turns = [[step(precision) for precision in precisions] for _ in range(repeats)]
    in_products = product_share(lambda: step(precisions[1]))
    x = statistics.median(b / a for (a, _), (b, _) in turns)
    return {
        "network": model,
        "input": f"{size} px, batch {batch}",
        "fp32": statistics.median(a for (a, _), _ in turns),
        "bf16": statistics.median(b for _, (b, _) in turns),
        "x": x,
        "range": (min(b / a for (a, _), (b, _) in turns), max(b / a for (a, _), (b, _) in turns)),
        "wall": statistics.median(b / a for (_, a), (_, b) in turns),
        "amd": x * (1 - in_products + in_products * AMD / product),
        "convolutional": is_convolutional(net),
        "default": Precision(None, CPU, net).name,
    }


def measure_product(repeats: int, n: int = 1024) -> float:
    """A bf16 matrix product's time over an fp32 one's."""
    a, ratios = torch.randn(n, n), []
    b = a.bfloat16()
    for _ in range(repeats + 1):
        times = []
        for x in (a, b):
            tic = time.process_time()
            x @ x
            x @ x
            times.append(time.process_time() - tic)
        ratios.append(times[1] / times[0])
    return statistics.median(ratios[1:])


def table(rows: list[tuple[str, dict]], product: float) -> list[str]:
    lines = [
        "| kind | network | input | fp32 CPU s | bf16 CPU s | x (CPU) | x (wall) | default here | slower than the "
        "better | x by calculation, AMD | default there |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        f"| matrix product | 1024 x 1024 |  |  |  | {product:.2f} |  |  |  | {AMD:.2f} |  |",
    ]
    for kind, r in rows:
        lost = (r["x"] if r["default"] == "bf16" else 1.0) / min(r["x"], 1.0) - 1.0
        lines.append(
            f"| {kind} | {r['network']} | {r['input']} | {r['fp32']:.3f} | {r['bf16']:.3f} | {r['x']:.2f} "
            f"({r['range'][0]:.2f} to {r['range'][1]:.2f}) | {r['wall']:.2f} | {r['default']} | {100 * lost:.0f} % | "
            f"{r['amd']:.2f} | {'off' if r['convolutional'] else 'bf16'} |"
        )
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", metavar="MODEL:SIZE:BATCH", help="rows to measure (default: all)")
    parser.add_argument("--repeats", type=int, default=7, help="measured turns")
    parser.add_argument("--output", default=str(ROOT / "bench" / "precision.md"), help="'' prints only")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    keep_freed_memory()
    set_fused_attn(True)
    load, date = os.getloadavg()[0], datetime.datetime.now(datetime.timezone.utc)
    product, rows = measure_product(9), []
    for kind, names in {"": args.rows}.items() if args.rows else ROWS.items():
        for name in names:
            rows.append((kind, measure(name, args.repeats, product)))
            print(table(rows[-1:], product)[-1], flush=True)
            gc.collect()
    if not args.output:
        return
    try:
        _, _, words = Path(args.output).read_text("utf-8").partition(READING)
    except OSError:
        words = "\n"
    text = [
        "# Precision by kind of network",
        "",
        "Written by `python -m bench.precision`; its docstring says what is measured.",
        "",
        f"Machine: {machine()}, torch {torch.__version__}; bf16 products are{'' if computes_bf16(CPU) else ' not'} "
        f"taken as faster; {date:%Y-%m-%d %H:%M} UTC; load average {load:.1f} at the start, {os.getloadavg()[0]:.1f} "
        "at the end.",
        "",
        *table(rows, product),
        "",
        READING + words,
    ]
    Path(args.output).write_text("\n".join(text), "utf-8")


if __name__ == "__main__":
    main()
