"""One epoch of NoProp-MAE pretraining."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import nn

from engine_finetune import check_bad_steps
from models.noprop_mae import NoPropMAE
from util.dist import all_reduce
from util.log import Progress
from util.lr_sched import set_lr
from util.optim import optimizer_step
from util.seed import mix, seed_all


class EncoderFirst(nn.Module):
    """What DistributedDataParallel wraps: all the parameters, and the encoder alone as the forward pass.

    DDP averages a parameter's gradient when it arrives, after one forward and from however many backward passes, as
    long as each parameter's arrives once. So the decoders' losses may call `net` directly.
    """

    def __init__(self, net: NoPropMAE):
        super().__init__()
        self.net = net

    def forward(self, imgs: torch.Tensor, ids_keep: torch.Tensor) -> torch.Tensor:
        return self.net.encode(imgs, ids_keep)


def local_backward(
    net: NoPropMAE,
    encode: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    imgs: torch.Tensor,
    ids_keep: torch.Tensor,
    ids_mask: torch.Tensor,
    *,
    autocast: Callable = nullcontext,
    scale: Callable[[torch.Tensor], torch.Tensor] = lambda loss: loss,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Gradients of scale(sum of all losses), with one decoder's activations alive at a time.

    Each decoder goes forward and backward by itself, down to the latent, where the T gradients add up; then the encoder
    goes backward once. encode(imgs, ids_keep) -> latent is net.encode or DDP's EncoderFirst.
    Returns the unscaled losses, detached: [T], and with propagate='none' [T + 1], the encoder's own last.
    """
    with autocast():
        latent = encode(imgs, ids_keep)  # [B, 1+V, D]
    x, pos = net.targets(imgs, ids_mask), net.decoder_positions(ids_keep, ids_mask)
    local = net.encoder_head is not None
    leaf = latent.detach().requires_grad_(not local)
    losses = []
    for i in range(net.T):
        with autocast():
            loss = net.decoder_loss(i, x, leaf, pos, generator)
        scale(loss).backward()
        losses.append(loss.detach())
    if local:
        with autocast():
            loss = net.encoder_loss(x, latent, pos)
        scale(loss).backward()
        losses.append(loss.detach())
    else:
        latent.backward(leaf.grad)
    return torch.stack(losses)


def train_one_epoch(model, loader, optimizer, precision, run, interrupts, *, lr_at_epoch, mask_ratio, mask_ratio_max=None,
                    accum_iter=1, clip_grad=None, seed=0, print_freq=20, max_bad_steps=10):  # fmt: skip
    """Train from run.position to the end of its epoch; returns metrics, or None if a signal stopped it.

    model: EncoderFirst, or DDP around it. lr_at_epoch(fractional epoch) -> lr. mask_ratio_max: the ratio is drawn from
    [mask_ratio, mask_ratio_max] for each micro-step, the same on all ranks, so that none waits for a longer one.
    Metrics: loss, the sum that is trained; loss_0 .. loss_{T-1}, as weighted; loss_encoder with propagate='none'.
    Every micro-step seeds the generators by (seed, epoch, step, rank), so masks and noise are the same whether or not
    the run was interrupted before it.
    """
    position, log, world = run.position, run.log, run.world
    epoch, steps = position.epoch, len(loader)
    net = getattr(model, "module", model).net
    model.train()
    parameters = [p for p in net.parameters() if p.requires_grad]
    names = [f"loss_{i}" for i in range(net.T)] + ["loss_encoder"] * (net.encoder_head is not None)
    progress = Progress(f"Epoch: [{epoch}]", steps, every=print_freq, start=position.step, enabled=world.is_main)
    loss_sums = torch.tensor([position.sums.get(n, 0.0) for n in names], device=world.device)
    bad_recent: list[tuple[torch.Tensor, torch.Tensor]] = []  # (is bad, sample indices) since the last look
    group_losses = torch.zeros(len(names), device=world.device)
    group_index: list[torch.Tensor] = []

    for batch in loader.epoch(epoch, position.step):
        step = position.step
        first = step - step % accum_iter  # of the accumulation group; the epoch's last group may be shorter
        group = min(accum_iter, steps - first)
        last = step == first + group - 1
        if step == first:
            lr = lr_at_epoch(epoch + step / steps)
            set_lr(optimizer, lr)
        seed_all(seed, epoch, step, world.rank)
        ratio = draw_mask_ratio(mask_ratio, mask_ratio_max, seed, epoch, step)
        ids_keep, ids_mask = net.random_masking(len(batch.images), ratio)

        with nullcontext() if last or world.size == 1 else model.no_sync():
            losses = local_backward(
                net, model, batch.images, ids_keep, ids_mask, autocast=precision.autocast,
                scale=lambda loss, n=group: precision.scaler.scale(loss / n),
            )  # fmt: skip
        group_losses += losses / group
        group_index.append(batch.index)
        position.step = progress.step = step + 1
        if not last:
            progress.update()
            continue

        norm = optimizer_step(optimizer, precision.scaler, parameters, clip_grad)
        position.updates += 1
        # With fp16 an infinite norm alone is the GradScaler's daily business; a non-finite loss is not.
        bad = ~torch.isfinite(group_losses.sum() if precision.scaler.is_enabled() else norm)
        loss_sums += torch.where(bad, 0.0, group_losses * group)
        bad_recent.append((bad, torch.cat(group_index)))
        shown = None
        if progress.due or len(bad_recent) >= print_freq:
            check_bad_steps(bad_recent, position, max_bad_steps, run)
            bad_recent = []
            values = group_losses.tolist()
            shown = {"lr": lr, "loss": sum(values), "grad_norm": norm.item()}
            scalars = {f"train_{n}": v for n, v in zip(["loss", *names], [shown["loss"], *values])}
            log.scalars({**scalars, "lr": lr}, int((epoch + position.step / steps) * 1000))
        group_losses, group_index = torch.zeros_like(group_losses), []
        progress.update(shown)

        stop, save = interrupts.poll()
        if (stop or save) and position.step < steps:
            check_bad_steps(bad_recent, position, max_bad_steps, run)
            bad_recent = []
            position.sums = dict(zip(names, loss_sums.tolist()))
            run.save(run.state(net, optimizer, precision.scaler))
        if stop and position.step < steps:
            progress.close()
            return None
    check_bad_steps(bad_recent, position, max_bad_steps, run)
    progress.close()
    position.sums = dict(zip(names, loss_sums.tolist()))
    means = (all_reduce(loss_sums.double().cpu()) / (steps * world.size)).tolist()
    return {"loss": sum(means), **dict(zip(names, means)), "lr": lr_at_epoch(epoch + (steps - 1) / steps)}


def draw_mask_ratio(low: float, high: float | None, seed: int, epoch: int, step: int) -> float:
    """U[low, high] by counters; low itself where high is None or not above it."""
    if high is None or high <= low:
        return low
    return low + (high - low) * mix(seed, epoch, step, -1) / 2.0**63  # -1: no rank's number
