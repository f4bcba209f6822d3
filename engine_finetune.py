"""One epoch of supervised fine-tuning, and evaluation."""

from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from util.dist import all_reduce, gather_objects
from util.errors import UserError
from util.log import Progress, batches_of
from util.lr_sched import set_lr
from util.optim import optimizer_step
from util.seed import seed_all


class Criterion(nn.Module):
    """Cross entropy against class numbers [B] or soft targets [B, C], with label smoothing and class weights.

    loss = mean_b sum_c weight_c target_bc (-log p_bc). Mixed targets arrive smoothed (timm's Mixup does it).
    """

    def __init__(self, smoothing: float = 0.0, weight: torch.Tensor | None = None):
        super().__init__()
        self.smoothing = smoothing
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if targets.ndim == 1:
            C = logits.shape[1]
            targets = F.one_hot(targets, C).float() * (1.0 - self.smoothing) + self.smoothing / C
        return F.cross_entropy(logits.float(), targets, weight=self.weight)


def train_one_epoch(model, loader, optimizer, criterion, precision, run, interrupts, *, lr_at_epoch, accum_iter=1,
                    clip_grad=None, mixup=None, ema=None, freeze=None, seed=0, print_freq=20, max_bad_steps=10):  # fmt: skip
    """Train from run.position to the end of its epoch; returns (metrics or None if a signal stopped it, save callback due).

    lr_at_epoch(fractional epoch) -> lr. mixup(images, targets) -> mixed. freeze(model) runs after model.train().
    Every micro-step seeds the generators by (seed, epoch, step, rank), so dropout, mixing and noise are the same
    whether or not the run was interrupted before it.
    """
    position, log, world = run.position, run.log, run.world
    epoch, steps = position.epoch, len(loader)
    net = model.module if hasattr(model, "module") else model
    model.train()
    if freeze is not None:
        freeze(net)
    parameters = [p for p in net.parameters() if p.requires_grad]
    progress = Progress(f"Epoch: [{epoch}]", steps, every=print_freq, start=position.step, enabled=world.is_main)
    loss_sum = torch.tensor(position.sums.get("loss", 0.0), device=world.device)
    bad_recent: list[tuple[torch.Tensor, torch.Tensor]] = []  # (is bad, sample indices) since the last look
    group_loss = torch.zeros((), device=world.device)
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
        images, targets = batch.images, batch.targets
        if mixup is not None:
            images, targets = mixup(images, targets)

        with nullcontext() if last or world.size == 1 else model.no_sync():
            with precision.autocast():
                loss = criterion(model(images), targets)
            precision.scaler.scale(loss / group).backward()
        group_loss += loss.detach() / group
        group_index.append(batch.index)
        position.step = progress.step = step + 1
        if not last:
            progress.update()
            continue

        norm = optimizer_step(optimizer, precision.scaler, parameters, clip_grad)
        position.updates += 1
        if ema is not None:
            ema.update(net, step=position.updates)
        # With fp16 an infinite norm alone is the GradScaler's daily business; a non-finite loss is not.
        bad = ~torch.isfinite(group_loss if precision.scaler.is_enabled() else norm)
        loss_sum += torch.where(bad, 0.0, group_loss * group)
        bad_recent.append((bad, torch.cat(group_index)))
        shown = None
        if progress.due or len(bad_recent) >= print_freq:
            check_bad_steps(bad_recent, position, max_bad_steps, run)
            bad_recent = []
            shown = {"lr": lr, "loss": group_loss.item(), "grad_norm": norm.item()}
            log.scalars({"train_loss": shown["loss"], "lr": lr}, int((epoch + position.step / steps) * 1000))
        group_loss, group_index = torch.zeros_like(group_loss), []
        progress.update(shown)

        stop, save = interrupts.poll()
        if (stop or save) and position.step < steps:
            check_bad_steps(bad_recent, position, max_bad_steps, run)
            bad_recent = []
            position.sums = {"loss": loss_sum.item()}
            run.save(run.state(net, optimizer, precision.scaler, ema))
        if stop and position.step < steps:
            progress.close()
            return None
    check_bad_steps(bad_recent, position, max_bad_steps, run)
    progress.close()
    position.sums = {"loss": loss_sum.item()}  # for a checkpoint written during the evaluation that follows
    mean_loss = all_reduce(loss_sum.double().cpu()).item() / (steps * world.size)
    return {"loss": mean_loss, "lr": lr_at_epoch(epoch + (steps - 1) / steps)}


def check_bad_steps(recent: list, position, limit: int, run) -> None:
    """Count and report non-finite steps since the last look; all ranks give up together after `limit` in a row."""
    for bad, index in recent:
        if bool(bad):
            position.bad_in_a_row += 1
            position.bad_total += 1
            samples = ", ".join(run.names(index[:8])) + (", ..." if len(index) > 8 else "")
            run.log.say(
                f"warning: epoch {position.epoch}: non-finite loss or gradient, step skipped; samples {samples}"
            )
        else:
            position.bad_in_a_row = 0
    worst = int(all_reduce(torch.tensor([position.bad_in_a_row]), "max"))
    if worst >= limit:
        raise UserError(
            f"--max_bad_steps {limit}: {worst} non-finite steps in a row in epoch {position.epoch}; "
            "the last checkpoint is kept; try a smaller --lr, --clip_grad 1, or --amp off"
        )


@dataclass
class Evaluation:
    """Scores in percent, mean loss, confusion counts [C, C] (rows true), and per-sample probabilities where asked."""

    acc1: float
    acc5: float | None
    loss: float
    balanced_acc: float
    macro_f1: float
    confusion: np.ndarray
    index: np.ndarray = field(default=None)
    probabilities: np.ndarray = field(default=None)

    def scores(self) -> dict[str, float]:
        names = ("loss", "acc1", "acc5", "balanced_acc", "macro_f1")
        return {n: getattr(self, n) for n in names if getattr(self, n) is not None}


@torch.inference_mode()
def evaluate(model, loader, precision, num_classes: int, *, collect: bool = False, poll=None) -> Evaluation | None:
    """Accuracy over the whole split, each sample once: ranks share it without padding and add up their counts.

    collect: keep probabilities, gathered in sample order on every rank. poll() -> True stops early on all ranks (None).
    """
    model.eval()
    device = loader.world.device
    add_up = all_reduce if loader.world.size > 1 else lambda x: x  # a loader that is not shared counts alone
    confusion = torch.zeros(num_classes * num_classes, dtype=torch.long, device=device)
    top5 = torch.zeros((), dtype=torch.long, device=device)
    loss_sum = torch.zeros((), device=device)
    kept = []
    for batch in batches_of(loader.epoch(), len(loader)):
        if poll is not None and poll():
            return None
        if batch is None:  # this rank's share is one batch shorter
            continue
        with precision.autocast():
            logits = model(batch.images)
        logits = logits.float()
        loss_sum += F.cross_entropy(logits, batch.targets, reduction="sum")
        confusion += torch.bincount(batch.targets * num_classes + logits.argmax(1), minlength=num_classes**2)
        if num_classes > 5:
            top5 += (logits.topk(5).indices == batch.targets[:, None]).sum()
        if collect:
            kept.append((batch.index, logits.softmax(1).cpu()))
    confusion = add_up(confusion.cpu()).view(num_classes, num_classes).numpy()
    sums = add_up(torch.stack([loss_sum.double().cpu(), top5.double().cpu()]))
    n = max(1, int(confusion.sum()))
    balanced, f1 = scores_from_confusion(confusion)
    result = Evaluation(
        acc1=100.0 * float(np.trace(confusion)) / n,
        acc5=100.0 * float(sums[1]) / n if num_classes > 5 else None,
        loss=float(sums[0]) / n,
        balanced_acc=balanced,
        macro_f1=f1,
        confusion=confusion,
    )
    if collect:
        own = [(i.numpy(), q.numpy()) for i, q in kept]
        parts = [p for rank in (gather_objects(own) if loader.world.size > 1 else [own]) for p in rank]
        index = np.concatenate([i for i, _ in parts])
        order = np.argsort(index)
        result.index, result.probabilities = index[order], np.concatenate([q for _, q in parts])[order]
    return result


def scores_from_confusion(confusion: np.ndarray) -> tuple[float, float]:
    """Balanced accuracy and macro F1 in percent, as scikit-learn's: over the classes that occur (F1: or are predicted)."""
    right, true, predicted = np.diag(confusion).astype(float), confusion.sum(1), confusion.sum(0)
    recall = right[true > 0] / true[true > 0]
    seen = (true + predicted) > 0
    f1 = 2 * right[seen] / (true + predicted)[seen]
    return 100.0 * float(recall.mean()) if len(recall) else 0.0, 100.0 * float(f1.mean()) if len(f1) else 0.0
