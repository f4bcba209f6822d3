"""The micro-steps of one training epoch, the same for both engines: all of a step but its forward and backward pass."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch import nn

from util.dist import all_reduce
from util.errors import UserError
from util.lr_sched import set_lr
from util.optim import allocate_gradients, optimizer_step
from util.progress import Progress
from util.seed import seed_all
from util.train.running_stats import RunningStatistics

COUNT = "micro_steps"  # beside the sums of losses in a checkpoint: how many micro-steps are in them


def effective_batch(loader, accum_iter: int) -> tuple[int, str]:
    """(images per update over all ranks, the words for it). An update ends with the epoch, after however many micro-steps."""
    steps = min(accum_iter, len(loader))
    images = loader.order.batch_size * steps * loader.world.size
    note = f" (--accum_iter {accum_iter}: an epoch has {steps} micro-steps)" if steps < accum_iter else ""
    return images, f"effective batch {images}{note}"


class Steps:
    """Goes from run.position to the end of its epoch. An engine is

        steps = Steps(model, net, names, loader, optimizer, precision.scaler, run, interrupts, ...)
        for batch in steps:
            with steps.sync():
                loss = ...
                scale(loss / steps.group).backward()
            steps.done(losses, batch.index)
        return steps.metrics()

    model: the module that is called, DDP's wrapper where there are ranks; net: the one that is saved. names: of the
    losses given to `done`. lr_at_epoch(fractional epoch) -> lr. An update takes the gradients of accum_iter
    micro-steps; the epoch's last group may be shorter. Every micro-step seeds the generators by (seed, epoch, step,
    rank), so what it draws is the same whether or not the run was interrupted before it.

    An update whose gradients are not all finite is skipped on all ranks: weights, moments, running statistics and EMA
    stay as they were before its first micro-step.
    """

    def __init__(
        self,
        model: nn.Module,
        net: nn.Module,
        names: list[str],
        loader,
        optimizer,
        scaler,
        run,
        interrupts,
        *,
        lr_at_epoch: Callable[[float], float],
        accum_iter: int = 1,
        clip_grad: float | None = None,
        ema=None,
        seed: int = 0,
        print_freq: int = 20,
        max_bad_steps: int = 10,
        profiler=None,
        keep_gradients: bool = False,
    ):
        self.model, self.net, self.names, self.loader = model, net, names, loader
        self.optimizer, self.scaler, self.ema = optimizer, scaler, ema
        self.run, self.interrupts, self.position = run, interrupts, run.position
        self.lr_at_epoch, self.accum_iter, self.clip_grad = lr_at_epoch, accum_iter, clip_grad
        self.seed, self.print_freq, self.max_bad_steps = seed, print_freq, max_bad_steps
        self.parameters = [p for p in net.parameters() if p.requires_grad]
        self.keep_gradients = keep_gradients
        if keep_gradients:
            allocate_gradients(self.parameters)
        self.epoch, self.total = self.position.epoch, len(loader)  # total: micro-steps of this rank
        self.profiler = profiler  # a StepProfiler of util/train/profile.py, or None
        self.images, self.waited, self.began = 0, 0.0, time.perf_counter()  # of this process, since here
        self.stopped = False
        device = run.world.device
        sums = self.position.sums
        counted = sums.get(COUNT, float(self.position.step) if sums else 0.0)
        self.sums = torch.tensor([*(sums.get(n, 0.0) for n in names), counted], device=device)
        self.statistics = RunningStatistics(net)
        self.made, self.updates = torch.zeros((), dtype=torch.long, device=device), 0  # updates: not skipped, tried
        self.group_losses = torch.zeros(len(names), device=device)  # mean over the accumulation group so far
        self.group_index: list[torch.Tensor] = []
        self.recent: list[tuple[torch.Tensor, torch.Tensor]] = []  # (is bad, sample indices) since the last look
        self.progress = Progress(
            f"Epoch: [{self.epoch}]", self.total, every=print_freq, start=self.position.step, enabled=run.world.is_main
        )

    def __iter__(self) -> Iterator:
        """The rest of this epoch's batches, each with lr and generators set; ends early if a signal stops the run."""
        batches = iter(self.loader.epoch(self.epoch, self.position.step))
        while (batch := self._next(batches)) is not None:
            step = self.position.step
            first = step - step % self.accum_iter
            self.group = min(self.accum_iter, self.total - first)  # micro-steps of this update
            self.last = step == first + self.group - 1
            if step == first:
                self.lr = self.lr_at_epoch(self.epoch + step / self.total)
                set_lr(self.optimizer, self.lr)
                self.statistics.keep()
            seed_all(self.seed, self.epoch, step, self.run.world.rank)
            yield batch
            if self.stopped:
                break
        self.progress.close()

    def _next(self, batches: Iterator):
        """The next batch, None after the last; the time it takes is time that the device may stand still."""
        if self.profiler is not None:
            self.profiler.begin()
        tic = time.perf_counter()
        batch = next(batches, None)
        self.waited += time.perf_counter() - tic
        if self.profiler is not None and batch is not None:
            self.profiler.got()
        return batch

    def sync(self):
        """Around forward and backward: ranks exchange gradients only in an update's last micro-step."""
        return nullcontext() if self.last or self.run.world.size == 1 else self.model.no_sync()

    def done(self, losses: torch.Tensor, index: torch.Tensor) -> None:
        """After a micro-step's backward pass: the update and all that follows it, where one is due.

        losses: [len(names)], detached, not divided by the group's size. index: int64 [B], the samples' numbers.
        """
        self.group_losses += losses / self.group
        self.group_index.append(index)
        self.position.step += 1
        if self.last:
            shown = self._update()
            self.progress.update(shown)
            self._poll()
        else:
            self.progress.update()
        self.images += len(index)
        if self.profiler is not None:
            self.profiler.done(len(index))

    def _update(self) -> dict[str, float] | None:
        """One optimizer update; returns what the progress line shows, on the steps that show one."""
        loss_scale = self.scaler.scale(torch.ones_like(self.group_losses[0]))  # before it is changed; 1 unless fp16
        norm = optimizer_step(
            self.optimizer, self.scaler, self.parameters, self.clip_grad, keep_gradients=self.keep_gradients
        )
        skipped = bad = ~torch.isfinite(norm)
        self.statistics.put_back(skipped)
        self.made += ~skipped
        self.updates += 1
        self.position.updates += 1
        if self.ema is not None:
            self.ema.update(self.net, self.position.updates, skipped)
        if self.scaler.is_enabled():
            # The GradScaler starts at 65536 and halves until the gradients fit: an overflow of the scaled gradients alone
            # is its daily business. A non-finite loss is not, nor are gradients that do not fit even scaled down.
            bad = skipped & (~torch.isfinite(self.group_losses.sum()) | (loss_scale < 1))
        counted = torch.cat([self.group_losses, torch.ones_like(self.group_losses[:1])]) * self.group
        self.sums += torch.where(bad, 0.0, counted)
        self.recent.append((bad, torch.cat(self.group_index)))
        shown, step = None, self.position.step
        # Where a multiple of print_freq lies in this update: it depends on nothing but the step, not on where a resumed
        # run began, so that the log's lines are the same.
        if step // self.print_freq > (step - self.group) // self.print_freq or step == self.total:
            self._check_bad_steps()
            values = self.group_losses.tolist()
            shown = {"lr": self.lr, "loss": sum(values), "grad_norm": norm.item()}
            scalars = {"loss": shown["loss"], **dict(zip(self.names, values))}
            scalars = {**{f"train_{n}": v for n, v in scalars.items()}, "lr": self.lr}
            self.run.log.scalars(scalars, int((self.epoch + step / self.total) * 1000))
        self.group_losses, self.group_index = torch.zeros_like(self.group_losses), []
        return shown

    def _poll(self) -> None:
        """Save and stop where a signal or the timer asks for it; the epoch's end saves by itself."""
        stop, save = self.interrupts.poll()
        if self.position.step == self.total:
            return
        if stop or save:
            self._check_bad_steps()
            self._keep_sums()
            self.run.save(self.run.state(self.net, self.optimizer, self.scaler, self.ema))
        self.stopped = stop

    def _keep_sums(self) -> None:
        self.position.sums = dict(zip([*self.names, COUNT], self.sums.tolist()))

    def _check_bad_steps(self) -> None:
        """Count and report non-finite steps since the last look; all ranks give up together after too many in a row."""
        if not self.recent:
            return
        position = self.position
        flags = torch.stack([bad for bad, _ in self.recent]).int().cpu()
        flags = all_reduce(flags, "max").tolist()  # under fp16, a loss may be non-finite on one rank only
        for bad, (_, index) in zip(flags, self.recent):
            if bad:
                position.bad_in_a_row += 1
                position.bad_total += 1
                samples = ", ".join(self.run.names(index[:8])) + (", ..." if len(index) > 8 else "")
                self.run.log.say(
                    f"warning: epoch {self.epoch}: non-finite loss or gradient, step skipped; samples {samples}"
                )
            else:
                position.bad_in_a_row = 0
        self.recent = []
        if position.bad_in_a_row >= self.max_bad_steps:
            raise UserError(
                f"--max_bad_steps {self.max_bad_steps}: {position.bad_in_a_row} non-finite steps in a row in epoch "
                f"{self.epoch}; the last checkpoint is kept; try a smaller --lr, --clip_grad 1, or --amp off"
            )

    def metrics(self) -> dict[str, float] | None:
        """Means over ranks and the epoch's micro-steps that were not bad, `loss` (the sum of all names) first; None if it
        was stopped."""
        if self.stopped:
            return None
        self._check_bad_steps()
        if self.updates and not self.made:
            self.run.log.say(
                f"warning: epoch {self.epoch}: none of {self.updates} updates was made, no gradient was finite "
                f"(loss scale {self.scaler.get_scale():g}); the weights are what they were"
            )
        self._keep_sums()  # for a checkpoint written during the evaluation that follows
        *sums, count = all_reduce(self.sums.double().cpu()).tolist()
        means = [s / count if count else math.nan for s in sums]
        seconds = time.perf_counter() - self.began
        self.run.speed = {
            "images_per_second": round(self.images * self.run.world.size / seconds, 2),
            "data_wait_percent": round(100 * self.waited / seconds, 2),  # of this rank
        }
        lr = self.lr_at_epoch(self.epoch + (self.total - 1) / self.total)
        return {"loss": sum(means), **dict(zip(self.names, means)), "lr": lr}
