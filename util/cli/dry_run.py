"""--dry_run: what a command line resolves to, and an estimate of its memory."""

import re
from collections.abc import Callable
from typing import Any

import torch

from augment.alpha_blend import AlphaBlend, alphas_cumprod, decibel
from augment.image import PHOTO_JITTER, SCALES
from util.cli.finetune import FinetuneOptions
from util.cli.flags import Flag, Options, flags_of_group
from util.cli.pretrain import PretrainOptions
from util.cli.resolve import Source
from util.data.loader import Loader, loader_processes
from util.data_specs import DATASETS, IN_MEMORY
from util.dist import Precision


def saved_bytes(net, forward, image_shape: tuple[int, ...], precision) -> int:
    """Bytes that autograd saves per image for the backward pass, without weights; measured on a batch of two."""
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
    """Signal-to-noise ratio in dB where the noise is added, for the first training batch, at some timesteps t."""
    seen: list[torch.Tensor] = []
    hook = noise.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().float().square().mean()))
    with torch.no_grad(), precision.autocast():
        net.eval()(next(iter(loader.epoch())).images)
    hook.remove()
    power, abar = float(torch.stack(seen).mean()), alphas_cumprod(noise.config.beta_power).tolist()
    steps = (5, 15, 50, 150, 400)
    lines = [
        f"noise: root mean square {power**0.5:.3g} where it is added; signal to noise in dB:",
        "  t             " + "".join(f"{t:>8}" for t in steps),
    ]
    for units, signal in (("absolute", power), ("relative", 1.0)):
        cells = "".join(f"{decibel(signal * abar[t] / (1 - abar[t])):8.1f}" for t in steps)
        lines.append(f"  {units:<14}{cells}")
    return "\n".join(lines)


def describe(
    options: FinetuneOptions | PretrainOptions,
    meta: dict,
    origin: Source,
    net: torch.nn.Module,
    groups: list[dict],
    loader: Loader,
    precision: Precision,
    forward: Callable | None = None,
) -> str:
    """The resolved values, parameter groups, effective batch, steps per epoch and estimated memory.

    forward(images) -> outputs: what a step keeps in memory at a time, if that is less than net(images).
    """
    optimizer = options.optimizer
    n = sum(p.numel() for p in net.parameters())
    weights = sum(p.numel() * p.element_size() for p in net.parameters())
    copies = 4 + bool(options.flat().get("ema_decay"))  # weights, gradients, two moments, EMA
    batch, steps = loader.order.batch_size, len(loader)
    micro_steps, ranks = min(optimizer.accum_iter, steps), loader.world.size
    images = batch * micro_steps * ranks
    activations = batch * saved_bytes(net, forward or net, (meta["in_chans"], *meta["img_size"]), precision)
    lines = [
        *resolved_values(options, meta, origin, precision, optimizer.lr_for(images)),
        f"parameters: {n:,} ({n / 1e6:.2f} M), in groups:",
    ]
    for g in groups:
        size = sum(p.numel() for p in g["params"])
        lines.append(
            f"  lr_scale {g['lr_scale']:.5f}  weight_decay {g['weight_decay']:<6g} {size:>12,}  {g['names'][0]} ... "
            f"({len(g['names'])})"
        )
    lines += [
        f"effective batch: {images} (= {batch} x accum {micro_steps} x {ranks} processes)",
        f"steps per epoch: {steps} ({-(-steps // optimizer.accum_iter)} updates), {optimizer.epochs} epochs",
        f"estimated memory per process: {in_units(weights * copies + activations)} "
        f"({in_units(weights * copies)} weights, gradients and optimizer; {in_units(activations)} activations)",
    ]
    return "\n".join(lines)


def resolved_values(options: Options, meta: dict, origin: Source, precision: Precision, lr: float) -> list[str]:
    """Each flag with its resolved value, in the groups of --help."""
    flat = options.flat()
    known = {
        "lr": f"{lr:.4g}" + (f" (from --blr {flat['blr']:g})" if flat["lr"] is None else ""),
        "amp": f"{precision.name} ({precision.why})",
        "device": str(precision.device),
        "input_size": f"{' '.join(map(str, meta['img_size']))} ({origin.size})",
        "in_chans": meta["in_chans"],
        **{k: f"{' '.join(f'{v:.4g}' for v in meta[k])} ({origin.values})" for k in ("mean", "std")},
        "model": meta["model"],
        "model_kwargs": [f"{k}={v}" for k, v in meta["model_kwargs"].items()],
        "global_pool": meta["global_pool"],
        "nb_classes": meta["num_classes"],
        "crop_pct": meta.get("crop_pct"),
        "hflip": DATASETS[flat["dataset"]].hflip if flat["hflip"] is None else flat["hflip"],
        "log_dir": flat["log_dir"] or flat["output_dir"],
        "num_workers": loader_processes(flat["num_workers"]),
    }
    if (aug := flat.get("aug")) and flat["color_jitter"] is None:
        known["color_jitter"] = PHOTO_JITTER if aug == "photo" else "none"
    if aug and flat["scale"] is None:
        cropped = aug in SCALES and (aug == "photo" or flat["dataset"] not in IN_MEMORY)
        known["scale"] = SCALES[aug] if cropped else "none"
    lines = []
    for group in options.groups().values():
        lines.append(f"{(group.__doc__ or '').strip()}:")
        for flag in flags_of_group(group, options.MAIN):
            value = known.get(flag.dest, flat[flag.dest])
            lines.append(f"  {flag.name:<22} {shown(value, flag)}")
    return lines


def shown(value: Any, flag: Flag) -> str:
    """A value as text; for one that is not resolved, the default that --help gives."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if value in (None, "", []):
        found = re.search(r"\(default: (.*)\)$", flag.argparse["help"])
        return found.group(1) if found else "none"
    values = value if isinstance(value, (list, tuple)) else [value]
    return " ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)


def in_units(size: float) -> str:
    """Bytes as KiB, MiB or GiB."""
    unit, least = next((u for u in (("GiB", 2**30), ("MiB", 2**20)) if size >= u[1]), ("KiB", 2**10))
    return f"{size / least:.1f} {unit}"
