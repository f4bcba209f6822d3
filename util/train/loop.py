"""The loop around the micro-steps of a training epoch: position, metrics, saving and stopping."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from util.cli.settings import Optimizer
from util.data.loader import Batch, Loader
from util.dist import all_reduce
from util.errors import UserError
from util.optim import Update
from util.progress import Progress
from util.train.run import Run, Training

# Stored with the sums of losses in a checkpoint: the number of micro-steps summed, and the signal-to-noise ratio.
COUNT, SNR = "micro_steps", "noise_snr"


def effective_batch(loader: Loader, settings: Optimizer) -> tuple[int, str]:
    """(images per update over all ranks, a description). The last update of an epoch may be smaller."""
    steps, batch = min(settings.accum_iter, len(loader)), loader.order.batch_size
    notes = []
    if batch < settings.batch_size:
        notes.append(f"--batch_size {settings.batch_size}: {batch} of {loader.order.n} training images make a batch")
    if steps < settings.accum_iter:
        notes.append(f"--accum_iter {settings.accum_iter}: an epoch has {steps} micro-steps")
    images = batch * steps * loader.world.size
    return images, f"effective batch {images}" + (f" ({'; '.join(notes)})" if notes else "")


@dataclass(frozen=True)
class Step:
    """Micro-step `number` of an epoch's `total`; `group` of them make an update, from the `first` to the `last`."""

    epoch: int
    number: int
    total: int
    group: int
    first: bool
    last: bool
    update: int  # number of the update in the run, from 1
    seeds: tuple[int, int, int]  # epoch, number and rank: a resumed run draws the same numbers

    @property
    def time(self) -> float:
        """The fractional epoch."""
        return self.epoch + self.number / self.total

    def exchange(self, model: nn.Module) -> AbstractContextManager:
        """Context for forward and backward: ranks exchange gradients only in the last micro-step of an update."""
        return nullcontext() if self.last else getattr(model, "no_sync", nullcontext)()


class Loop:
    """Iterates from run.position to the end of its epoch. An engine reads

        loop = Loop(run, training, loader, ["loss"])
        for step, batch in loop:
            ...
            loop.add(losses)
            if step.last:
                loop.record(update, lr)
        return loop.metrics()

    names: of the losses given to `add`. An update uses the gradients of --accum_iter micro-steps; the epoch's last
    group may be shorter. After an update the loop saves or ends early if a signal or the timer asks for it.
    """

    def __init__(self, run: Run, training: Training, loader: Loader, names: Sequence[str]):
        self.run, self.training, self.loader, self.names = run, training, loader, list(names)
        self.position, self.epoch, self.total = run.position, run.position.epoch, len(loader)
        self.images, self.waited, self.began = 0, 0.0, time.perf_counter()  # of this process since the loop began
        self.stopped = False
        device, sums = run.world.device, self.position.sums
        counted = sums.get(COUNT, float(self.position.step) if sums else 0.0)
        self.sums = torch.tensor([*(sums.get(n, 0.0) for n in self.names), counted], device=device)
        self.made, self.tried = torch.zeros((), dtype=torch.long, device=device), 0  # updates
        self.group_losses = torch.zeros(len(self.names), device=device)  # mean over the accumulation group so far
        self.group_index: list[torch.Tensor] = []
        self.recent: list[tuple[torch.Tensor, torch.Tensor]] = []  # (is bad, sample indices) since the last check
        self.noise = getattr(training.net, "alpha_blend", None)
        self.noise_snr: float | None = sums.get(SNR)  # dB, measured in this epoch's first step
        if self.noise is not None and self.noise_snr is None:
            self.noise.measure()
        self.print_freq = run.options.run.print_freq
        self.shown: dict[str, float] | None = None  # in the progress line
        self.progress = Progress(
            f"Epoch: [{self.epoch}]",
            self.total,
            every=self.print_freq,
            start=self.position.step,
            enabled=run.world.is_main,
        )

    def __iter__(self) -> Iterator[tuple[Step, Batch]]:
        """The rest of this epoch's micro-steps and their batches; ends early if a signal stops the run."""
        batches, profiler = iter(self.loader.epoch(self.epoch, self.position.step)), self.run.profiler
        while (batch := self._next(batches)) is not None:
            self.step, self.index, self.shown = self._step(self.position.step), batch.index, None
            yield self.step, batch
            if self.noise is not None:
                self.noise.measuring = False  # one step is measured: the same one in a resumed run
            self.position.step += 1
            self.progress.update(self.shown)
            if self.step.last:
                self._poll()
            self.images += len(batch.index)
            if profiler is not None:
                profiler.done(len(batch.index))
            if self.stopped:
                break
        self.progress.close()

    def _step(self, number: int) -> Step:
        accum_iter = self.run.accum_iter
        begin = number - number % accum_iter
        group = min(accum_iter, self.total - begin)
        first, last = number == begin, number == begin + group - 1
        seeds = (self.epoch, number, self.run.world.rank)
        return Step(self.epoch, number, self.total, group, first, last, self.position.updates + 1, seeds)

    def _next(self, batches: Iterator[Batch]) -> Batch | None:
        """The next batch, None after the last; the time spent waiting is counted."""
        profiler = self.run.profiler
        if profiler is not None:
            profiler.begin()
        tic = time.perf_counter()
        batch = next(batches, None)
        self.waited += time.perf_counter() - tic
        if profiler is not None and batch is not None:
            profiler.got()
        return batch

    def add(self, losses: torch.Tensor) -> None:
        """Add a micro-step's losses: [names], detached, not divided by the size of the accumulation group."""
        self.group_losses += losses / self.step.group
        self.group_index.append(self.index)

    def record(self, update: Update, lr: float) -> None:
        """Record an update, made or skipped, and the losses since the previous one."""
        self.made += ~update.skipped
        self.tried += 1
        self.position.updates += 1
        bad = update.skipped
        if self.training.precision.scaler.is_enabled():
            # The GradScaler starts at 65536 and halves until the gradients fit, so overflowing scaled gradients are
            # normal. A non-finite loss is not, nor are gradients that overflow without scaling.
            bad = bad & (~torch.isfinite(self.group_losses.sum()) | (update.loss_scale < 1))
        counted = torch.cat([self.group_losses, torch.ones_like(self.group_losses[:1])]) * self.step.group
        self.sums += torch.where(bad, 0.0, counted)
        self.recent.append((bad, torch.cat(self.group_index)))
        done = self.step.number + 1
        # If a multiple of print_freq is in this update. This depends on the step only, so that a resumed run logs the
        # same lines.
        if done // self.print_freq > (done - self.step.group) // self.print_freq or done == self.total:
            self._check_bad_steps()
            self._note_noise()
            values = self.group_losses.tolist()
            self.shown = {"lr": lr, "loss": sum(values), "grad_norm": update.norm.item()}
            scalars = {"loss": sum(values), **dict(zip(self.names, values))}
            scalars = {**{f"train_{n}": v for n, v in scalars.items()}, "lr": lr}
            self.run.log.scalars(scalars, int((self.epoch + done / self.total) * 1000))
        self.group_losses, self.group_index = torch.zeros_like(self.group_losses), []

    def _poll(self) -> None:
        """Save and stop if a signal or the timer asks for it; the end of the epoch saves anyway."""
        stop, save = self.run.interrupts.poll()
        if self.position.step == self.total:
            return
        if stop or save:
            self._check_bad_steps()
            self._keep_sums()
            self.run.save(self.training)
        self.stopped = stop

    def _note_noise(self) -> None:
        """Read the measured noise once an epoch, when the host waits for the device anyway."""
        if self.noise is None or self.noise_snr is not None:
            return
        self.noise_snr = self.noise.snr()
        if self.noise_snr is not None:
            self.run.tell_noise(self.noise_snr)

    def _keep_sums(self) -> None:
        self._note_noise()
        self.position.sums = dict(zip([*self.names, COUNT], self.sums.tolist()))
        if self.noise_snr is not None:
            self.position.sums[SNR] = self.noise_snr

    def _check_bad_steps(self) -> None:
        """Count and report non-finite steps since the last check; after too many in a row all ranks stop together."""
        if not self.recent:
            return
        position, most = self.position, self.run.options.run.max_bad_steps
        flags = torch.stack([bad for bad, _ in self.recent]).int().cpu()
        flags = all_reduce(flags, "max")  # under fp16 a loss may be non-finite on one rank only
        for bad, (_, index) in zip(flags.tolist(), self.recent):
            if bad:
                position.bad_in_a_row += 1
                position.bad_total += 1
                samples = ", ".join(self.loader.data.name(i) for i in index[:8].tolist())
                samples += ", ..." if len(index) > 8 else ""
                self.run.log.say(
                    f"warning: epoch {self.epoch}: non-finite loss or gradient, step skipped; samples {samples}"
                )
            else:
                position.bad_in_a_row = 0
        self.recent = []
        if position.bad_in_a_row >= most:
            raise UserError(
                f"--max_bad_steps {most}: {position.bad_in_a_row} non-finite steps in a row in epoch {self.epoch}; "
                "the last checkpoint is kept; try a smaller --lr, --clip_grad 1, or --amp off"
            )

    def metrics(self) -> dict[str, float] | None:
        """Means over ranks and over the epoch's good micro-steps: each loss by name, and their sum as `loss`.

        None if a signal stopped the epoch. Sets run.speed.
        """
        if self.stopped:
            return None
        self._check_bad_steps()
        if self.tried and not self.made:
            scale = self.training.precision.scaler.get_scale()
            self.run.log.say(
                f"warning: epoch {self.epoch}: all {self.tried} updates were skipped, no gradient was finite "
                f"(loss scale {scale:g}); the weights did not change"
            )
        self._keep_sums()  # for a checkpoint written during the evaluation
        *sums, count = all_reduce(self.sums.double().cpu()).tolist()
        means = [s / count if count else math.nan for s in sums]
        seconds = time.perf_counter() - self.began
        self.run.speed = {
            "seconds": round(seconds, 2),
            "images_per_second": round(self.images * self.run.world.size / seconds, 2),
            "data_wait_percent": round(100 * self.waited / seconds, 2),  # of this rank
        }
        lr = self.training.lr_at(self.epoch + (self.total - 1) / self.total)
        snr = {} if self.noise_snr is None else {SNR: round(self.noise_snr, 2)}
        return {"loss": sum(means), **dict(zip(self.names, means)), "lr": lr, **snr}
