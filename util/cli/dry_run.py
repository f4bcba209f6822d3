"""--dry_run: what a command line resolves to, and an estimate of its memory."""

import json
from collections.abc import Callable

import torch

from augment.alpha_blend import AlphaBlend, alphas_cumprod, decibel
from util.cli.flags import Options
from util.data.loader import Loader
from util.dist import Precision


def saved_bytes(net, forward, image_shape: tuple[int, ...], precision) -> int:
    """Bytes autograd keeps for one image's backward: measured on a batch of two, weights not counted."""
    owned = {p.untyped_storage().data_ptr() for p in net.parameters()}
    seen: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in owned:
            seen[storage.data_ptr()] = storage.nbytes()
        return x

    device = next(net.parameters()).device
    net.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), precision.autocast():
        output = forward(torch.zeros(2, *image_shape, device=device))
    del output
    return sum(seen.values()) // 2


def noise_table(net: torch.nn.Module, noise: AlphaBlend, loader: Loader, precision: Precision) -> str:
    """Signal to noise in dB where the noise goes in, for the first batch of training, at some timesteps t."""
    seen: list[torch.Tensor] = []
    hook = noise.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().float().square().mean()))
    with torch.no_grad(), precision.autocast():
        net(next(iter(loader.epoch())).images)
    hook.remove()
    power, abar = float(torch.stack(seen).mean()), alphas_cumprod(noise.config.beta_power).tolist()
    steps = (5, 15, 50, 150, 400)
    lines = [
        f"noise: root mean square {power**0.5:.3g} where it goes in; signal to noise in dB:",
        "  t             " + "".join(f"{t:>8}" for t in steps),
    ]
    for units, signal in (("absolute", power), ("relative", 1.0)):
        cells = "".join(f"{decibel(signal * abar[t] / (1 - abar[t])):8.1f}" for t in steps)
        lines.append(f"  {units:<14}{cells}")
    return "\n".join(lines)


def describe(
    options: Options,
    meta: dict,
    net: torch.nn.Module,
    groups: list[dict],
    loader: Loader,
    precision: Precision,
    lr: float,
    forward: Callable | None = None,
) -> str:
    """The resolved options, model, parameter groups, effective batch, steps per epoch and estimated memory.

    forward(images) -> outputs: what a step computes and keeps at a time, where it is less than net(images).
    """
    flat = options.flat()
    n = sum(p.numel() for p in net.parameters())
    weights = sum(p.numel() * p.element_size() for p in net.parameters())
    copies = 4 + bool(flat.get("ema_decay"))  # weights, gradients, two moments, EMA
    batch, steps, accum_iter = loader.order.batch_size, len(loader), flat["accum_iter"]
    micro_steps, ranks = min(accum_iter, steps), loader.world.size
    activations = batch * saved_bytes(net, forward or net, (meta["in_chans"], *meta["img_size"]), precision)
    lines = [
        "options: " + json.dumps(flat, default=str, sort_keys=True),
        "model:   " + json.dumps(meta, default=str),
        f"parameters: {n:,} ({n / 1e6:.2f} M)",
        "groups:",
    ]
    for g in groups:
        size = sum(p.numel() for p in g["params"])
        lines.append(
            f"  lr_scale {g['lr_scale']:.5f}  weight_decay {g['weight_decay']:<6g} {size:>12,}  {g['names'][0]} ... "
            f"({len(g['names'])})"
        )
    lines += [
        f"effective batch: {batch * micro_steps * ranks} (= {batch} x accum {micro_steps} x {ranks} processes), "
        f"lr {lr:.4g}",
        f"steps per epoch: {steps} ({-(-steps // accum_iter)} updates), {flat['epochs']} epochs",
        f"estimated memory per process: {(weights * copies + activations) / 2**30:.2f} GiB "
        f"({weights * copies / 2**30:.2f} weights, gradients and optimizer; {activations / 2**30:.2f} activations)",
    ]
    return "\n".join(lines)
