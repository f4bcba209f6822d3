"""One epoch of supervised fine-tuning, and evaluation."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from augment.alpha_blend import AlphaBlend, NoiseConfig
from models.vit import noise_for_a_while
from util.cli.settings import Loss
from util.data.datasets import Dataset
from util.data.loader import Loader
from util.dist import Precision, all_reduce, gather_objects
from util.errors import UserError
from util.lr_sched import set_lr
from util.metrics import BINS, Evaluation, scores_from_confusion
from util.optim import optimizer_step
from util.progress import batches_of
from util.seed import seed_all
from util.train.loop import Loop
from util.train.run import Run, Training
from util.train.running_stats import RunningStatistics


class Criterion(nn.Module):
    """Cross entropy against class numbers [B] or mixed targets [B, C], with label smoothing and class weights.

        loss = 1/B sum_b w_b sum_c t_bc (-log p_bc),   t = (1 - s) m + s / C,   w_b = sum_c weight_c m_bc

    m is the target before smoothing: one class, or a mixture of two. A sample's weight depends on m, not on t: with
    smoothing's s / C for every class, the weights of rare classes would outweigh that of the true class.
    The mean is over samples, not weights: balanced weights average 1 over the training set, so a batch of frequent
    classes has a small loss. Class numbers are smoothed here; mixed targets are already smoothed (timm's Mixup).
    """

    def __init__(self, smoothing: float = 0.0, weight: torch.Tensor | None = None):
        super().__init__()
        self.smoothing = smoothing
        self.weight: torch.Tensor | None
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits, (m, t) = logits.float(), self.shares(targets, logits.shape[1])
        if self.weight is None:
            return F.cross_entropy(logits, t)
        w = (m * self.weight).sum(1)  # [B]; not a matrix product, where autocast would round the weights
        return (w * F.cross_entropy(logits, t, reduction="none")).mean()

    def shares(self, targets: torch.Tensor, C: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(m, t), both [B, C]."""
        s = self.smoothing
        if targets.ndim == 1:
            m = F.one_hot(targets, C).float()
            return m, m * (1.0 - s) + s / C
        return (targets - s / C) / (1.0 - s), targets


def build_criterion(loss: Loss, train: Dataset, num_classes: int) -> Criterion:
    """Cross entropy with --smoothing and --class_weights."""
    balanced = loss.class_weights == "balanced"
    return Criterion(loss.smoothing, balanced_weights(train.targets, num_classes) if balanced else None)


def balanced_weights(targets: torch.Tensor, num_classes: int) -> torch.Tensor:
    """n / (C n_c), scikit-learn's rule: the mean weight over the training set is 1; [num_classes].

    C counts the classes that have images; others (--nb_classes above the data's) have weight 0.
    """
    counts = torch.bincount(targets, minlength=num_classes).float()
    return torch.where(counts > 0, len(targets) / ((counts > 0).sum() * counts), 0.0)


def train_one_epoch(
    training: Training,
    loader: Loader,
    criterion: nn.Module,
    run: Run,
    *,
    mixup: Callable | None = None,
    clip_grad: float | None = None,
) -> dict[str, float] | None:
    """Train from run.position to the end of its epoch; returns its metrics (loss, lr), or None if a signal stopped it.

    criterion(logits [B, C], targets) -> 0-d loss. mixup(images, targets [B]) -> images, targets [B, C]. clip_grad:
    maximum gradient norm.
    """
    net, model, precision, ema = training.net, training.model, training.precision, training.ema
    model.train()
    training.freeze(net)  # frozen layers work as in evaluation
    parameters = [p for p in net.parameters() if p.requires_grad]
    statistics = RunningStatistics(net)  # BatchNorm's, which the forward pass updates
    loop = Loop(run, training, loader, ["loss"])
    for step, batch in loop:
        seed_all(run.options.machine.seed, *step.seeds)
        if step.first:
            lr = set_lr(training.optimizer, training.lr_at(step.time))
            statistics.keep()

        images, targets = batch.images, batch.targets
        if mixup is not None:
            images, targets = mixup(images, targets)
        with step.exchange(model):
            with precision.autocast():
                loss = criterion(model(images), targets)
            precision.scaler.scale(loss / step.group).backward()
        loop.add(loss.detach())

        if step.last:
            update = optimizer_step(training.optimizer, precision.scaler, parameters, clip_grad)
            statistics.put_back(update.skipped)
            if ema is not None:
                ema.update(net, step.update, update.skipped)
            loop.record(update, lr)
    return loop.metrics()


@torch.inference_mode()
def evaluate(model, loader, precision, num_classes: int, *, collect: bool = False, poll=None) -> Evaluation | None:
    """Scores over the whole split, each sample once: it is divided over ranks without padding, and counts are summed.

    The loss is plain cross entropy, whatever the training loss, so that runs can be compared.

    collect: keep probabilities, gathered in sample order on every rank. poll() -> True stops early on all ranks (None).
    """
    model.train()  # LeViT and others cache values computed from the weights, which an EMA changes, until train()
    model.eval()
    device = loader.world.device
    add_up = all_reduce if loader.world.size > 1 else lambda x: x  # without --dist_eval each rank counts for itself
    confusion = torch.zeros(num_classes * num_classes, dtype=torch.long, device=device)
    top5 = torch.zeros((), dtype=torch.long, device=device)
    loss_sum = torch.zeros((), device=device)
    gap = torch.zeros(BINS, device=device)  # sum of right - confidence in each bin of confidence
    kept = []
    for batch in batches_of(loader.epoch(), len(loader)):
        if poll is not None and poll():
            return None
        if batch is None:  # this rank has one batch less
            continue
        with precision.autocast():
            logits = model(batch.images)
        logits = logits.float()
        loss_sum += F.cross_entropy(logits, batch.targets, reduction="sum")
        cell = batch.targets * num_classes + logits.argmax(1)
        confusion.scatter_add_(0, cell, torch.ones_like(cell))  # bincount would wait for the device
        confidence, predicted = logits.softmax(1).max(1)
        bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
        gap.scatter_add_(0, bins, (predicted == batch.targets).float() - confidence)
        if num_classes > 5:
            top5 += (logits.topk(5).indices == batch.targets[:, None]).sum()
        if collect:
            kept.append((batch.index, logits.softmax(1)))
    counts = add_up(confusion.cpu()).view(num_classes, num_classes).numpy()
    if not counts.any():
        raise UserError(f"--data_path: none of the {len(loader.data)} images to evaluate can be read")
    sums = add_up(torch.cat([torch.stack([loss_sum.double().cpu(), top5.double().cpu()]), gap.double().cpu()]))
    n = max(1, int(counts.sum()))
    balanced, f1 = scores_from_confusion(counts)
    result = Evaluation(
        acc1=100.0 * float(np.trace(counts)) / n,
        acc5=100.0 * float(sums[1]) / n if num_classes > 5 else None,
        loss=float(sums[0]) / n,
        balanced_acc=balanced,
        macro_f1=f1,
        ece=100.0 * float(sums[2:].abs().sum()) / n,
        confusion=counts,
    )
    if collect:
        own = [(i.numpy(), q.cpu().numpy()) for i, q in kept]
        parts = [p for rank in (gather_objects(own) if loader.world.size > 1 else [own]) for p in rank]
        index = np.concatenate([i for i, _ in parts])
        order = np.argsort(index)
        result.index, result.probabilities = index[order], np.concatenate([q for _, q in parts])[order]
    return result


def noise_curve(
    net: nn.Module, loader: Loader, precision: Precision, num_classes: int, config: NoiseConfig, levels: list[float]
) -> list[dict[str, float]]:
    """Effect of noise in evaluation at each of `levels` (dB, relative units); the first point has no noise.

    config: the run's noise, whose kind, tokens, layers and space are kept (alpha_blend where its kind has no ratio).
    Points: snr; acc1 in percent; agreement, the percentage of images whose first class is that without noise; change,
    mean total variation between probabilities with and without noise; distance: |z' - z| / |z| where it is added.
    """
    clean = evaluate(net, loader, precision, num_classes, collect=True)
    assert clean is not None and clean.probabilities is not None  # without poll, evaluation does not stop early
    points = [{"snr": math.inf, "acc1": clean.acc1, "agreement": 100.0, "change": 0.0, "distance": 0.0}]
    kind = config.kind if config.kind not in ("token_drop", "manifold_mixup") else "alpha_blend"
    for level in levels:
        changed = replace(config, kind=kind, snr=level, strength=None, schedule="fixed", prob=1.0, anneal="none")
        moved: list[torch.Tensor] = []
        with noise_for_a_while(net, AlphaBlend(replace(changed, noise_eval=True))) as noise:
            hook = noise.register_forward_hook(
                lambda _, inputs, out, to=moved: to.append(relative_distance(inputs[0], out))
            )
            seed_all(0, 0)
            noisy = evaluate(net, loader, precision, num_classes, collect=True)
            hook.remove()
        assert noisy is not None and noisy.probabilities is not None
        p, q = noisy.probabilities, clean.probabilities
        points.append(
            {
                "snr": level,
                "acc1": noisy.acc1,
                "agreement": 100.0 * float((p.argmax(1) == q.argmax(1)).mean()),
                "change": float(np.abs(p - q).sum(1).mean() / 2),
                "distance": float(torch.stack(moved).mean()),
            }
        )
    return points


def relative_distance(z: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """|other - z| / |z| over a batch, 0-d."""
    z = z.float()
    return ((other.float() - z).square().sum() / z.square().sum()).sqrt()
