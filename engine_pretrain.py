"""One epoch of NoProp-MAE pretraining."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import cast

import torch
from torch import nn

from models.noprop_mae import NoPropMAE
from util.data.loader import Loader
from util.lr_sched import set_lr
from util.optim import allocate_gradients, optimizer_step
from util.seed import mix, seed_all
from util.train.loop import Loop
from util.train.run import Run, Training


class EncoderFirst(nn.Module):
    """The module that DistributedDataParallel wraps: it has all parameters, but its forward pass is only the encoder.

    DDP averages a parameter's gradient when it is computed. There may be several backward passes after one forward
    pass, if each parameter gets its gradient once. So the decoders' losses can call `net` directly.
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
    """Gradients of scale(sum of net.losses), with only one decoder's activations in memory at a time.

    Each loss has its own forward and backward pass, down to the latent, where the gradients are summed; then one
    backward pass through the encoder. encode(imgs, ids_keep) -> latent is net.encode or DDP's EncoderFirst.
    Returns the unscaled losses, detached, in the order of net.loss_names.
    """
    with autocast():
        latent = encode(imgs, ids_keep)  # [B, 1+V, D]
    x, pos = net.targets(imgs, ids_mask), net.decoder_positions(ids_keep, ids_mask)
    leaf = latent.detach().requires_grad_()
    losses = []
    for compute_loss in net.losses(x, leaf, pos, generator):
        with autocast():
            loss = compute_loss()
        scale(loss).backward()
        losses.append(loss.detach())
    latent.backward(leaf.grad)
    return torch.stack(losses)


def train_one_epoch(
    training: Training,
    loader: Loader,
    run: Run,
    *,
    mask_ratio: float,
    mask_ratio_max: float | None = None,
    clip_grad: float | None = None,
) -> dict[str, float] | None:
    """Train from run.position to the end of its epoch; returns its metrics, or None if a signal stopped it.

    training.model: EncoderFirst, or DDP around it. mask_ratio_max: each micro-step draws its ratio from [mask_ratio,
    mask_ratio_max], the same on all ranks, so that none waits for another. clip_grad: maximum gradient norm. Metrics:
    loss, the sum that is trained; loss_0 .. loss_{T-1}, weighted; loss_encoder with propagate='none'; lr.
    """
    net, model, precision = cast(NoPropMAE, training.net), training.model, training.precision
    model.train()
    seed = run.options.machine.seed
    parameters = [p for p in net.parameters() if p.requires_grad]
    # Only on CPU without DDP: CUDA's allocator and DDP's buckets keep gradients together anyway.
    if keep_gradients := run.world.device.type == "cpu" and run.world.size == 1:
        allocate_gradients(parameters)
    loop = Loop(run, training, loader, net.loss_names)
    for step, batch in loop:
        seed_all(seed, *step.seeds)
        if step.first:
            lr = set_lr(training.optimizer, training.lr_at(step.time))

        ratio = draw_mask_ratio(mask_ratio, mask_ratio_max, seed, step.epoch, step.number)
        ids_keep, ids_mask = net.random_masking(len(batch.images), ratio)
        with step.exchange(model):
            losses = local_backward(
                net,
                model,
                batch.images,
                ids_keep,
                ids_mask,
                autocast=precision.autocast,
                scale=lambda loss: precision.scaler.scale(loss / step.group),  # noqa: B023 (called in this step)
            )
        loop.add(losses)

        if step.last:
            update = optimizer_step(
                training.optimizer, precision.scaler, parameters, clip_grad, keep_gradients=keep_gradients
            )
            loop.record(update, lr)
    return loop.metrics()


def draw_mask_ratio(low: float, high: float | None, seed: int, epoch: int, step: int) -> float:
    """U[low, high] from counters; low if high is None or not above it."""
    if high is None or high <= low:
        return low
    return low + (high - low) * mix(seed, epoch, step, -1) / 2.0**63  # -1: differs from all ranks
