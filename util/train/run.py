"""A training run, for pretraining and fine-tuning: position, signals, saving, resuming."""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import TypeVar

import torch
from torch import nn

from augment.decoding import limit_pixels
from util.checkpoint import (
    FORMAT,
    CheckpointWriter,
    find_resume,
    load_exactly,
    non_finite,
    read_checkpoint,
    resumable,
    rng_state,
    set_rng_state,
)
from util.cli.finetune import FinetuneOptions
from util.cli.flags import differences, refusal
from util.cli.pretrain import PretrainOptions
from util.cli.settings import Run as RunSettings
from util.data.loader import Loader, choose_loader
from util.dist import Precision, World, all_reduce, broadcast_object, gather_objects, init_world
from util.errors import UserError, reason_of
from util.files import survive
from util.folder import goes_on_in
from util.log import RunLog, claim
from util.meta import refuse_other_classes
from util.optim import Ema, restore_optimizer
from util.train.compiled import require_compiler
from util.train.interrupts import Interrupts
from util.train.profile import StepProfiler

NEEDED = ("epoch", "step", "progress", "sums", "global_batch", "world_size", "model", "rng")
Trained = TypeVar("Trained", FinetuneOptions, PretrainOptions)
LOUD = 20.0  # signal-to-noise ratio in dB below which a run warns
EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped and saved after a signal; --resume auto continues


@dataclass
class Position:
    """Position of a run: `step` micro-steps of `epoch` are done. Checkpoints store all of it exactly."""

    epoch: int = 0
    step: int = 0
    updates: int = 0  # optimizer updates so far (the EMA's warm-up counts them)
    bad_in_a_row: int = 0
    bad_total: int = 0
    best: float | None = None
    best_epoch: int = -1
    best_by: str = ""  # the metric of `best`; '' in earlier checkpoints
    planned: int = 0  # total epochs of the command that wrote this
    finished: bool = False
    sums: dict = field(default_factory=dict)  # running sums of this epoch's metrics, floats

    def improves(self, value: float) -> bool:
        """True if `value` is finite and above the best so far."""
        return math.isfinite(value) and (self.best is None or value > self.best or not math.isfinite(self.best))

    def next_epoch(self) -> None:
        self.epoch, self.step, self.sums = self.epoch + 1, 0, {}


@dataclass
class Training:
    """What an epoch trains: `model` is called (net, or DistributedDataParallel around it), `net` is saved.

    lr_at(fractional epoch) -> learning rate. freeze(net), called after net.train(), keeps layers as in evaluation.
    """

    net: nn.Module
    model: nn.Module
    optimizer: torch.optim.Optimizer
    precision: Precision
    lr_at: Callable[[float], float]
    ema: Ema | None = None
    freeze: Callable[[nn.Module], None] = lambda net: None


def begin(options: Trained) -> tuple[Trained, World]:
    """First step of a training main: join the processes and report what this machine cannot do."""
    machine, reading = options.machine, options.reading
    limit_pixels(reading.max_pixels)
    world = init_world(machine.device, machine.dist_url, machine.timeout_minutes, machine.deterministic)
    if machine.compile:
        require_compiler(world.device)
    return options.having(loader=choose_loader(reading.loader, options.data.dataset, world)), world


def open_log(settings: RunSettings, kind: str, world: World, *, writes: bool = True) -> RunLog:
    """The log of a training run; claims its folder (util/log.py). writes=False: saves nothing."""
    return claim(
        settings.output_dir if writes else None,
        kind,
        world,
        log_dir=settings.log_dir,
        loggers=settings.logger,
        resume=settings.resume,
        overwrite=settings.overwrite,
    )


@dataclass
class Found:
    """A checkpoint to resume from, and later ones in the same folder, which become obsolete."""

    content: dict
    path: str
    later: list[str]


def find_checkpoint(settings: RunSettings, log: RunLog, world: World) -> Found | None:
    """The checkpoint of --resume, read on every rank; None for a new run."""
    path: str | None = settings.resume
    if settings.resume == "auto":
        path = broadcast_object(find_resume(log.output_dir or "") if world.is_main else None)
    if not path:
        return None
    content = read_checkpoint(path)
    if content.get("kind") != log.kind:
        raise UserError(f"--resume {path}: a {content.get('kind')} checkpoint, this is {log.kind}")
    if content.get("optimizer") is None:
        raise UserError(
            f"--resume {path}: holds weights only; resume from checkpoint-last.pth, or give it to --finetune"
        )
    lacking = [k for k in NEEDED if k not in content]
    if lacking:
        raise UserError(f"--resume {path}: lacks {', '.join(lacking[:4])}; not a whole checkpoint")
    if not all(type(content[k]) is int and 0 <= content[k] < 2**31 for k in ("epoch", "step")):
        raise UserError(f"--resume {path}: its epoch or step is not a number of 0 or more")
    later: list[str] = []
    if settings.resume != "auto" and log.output_dir and goes_on_in(log.output_dir, path):
        here = (content["epoch"], content["step"])
        later = [other for position, other in resumable(log.output_dir) if position > here]
    later = broadcast_object(later)
    if later and not settings.overwrite:
        raise UserError(
            f"--resume {path}: {later[0]} is later, and --resume auto would continue from it; --overwrite removes "
            "what is later, or choose another --output_dir"
        )
    return Found(content, path, later)


class Run:
    """A training run: its position, checkpoints, resume and interrupts. Rank 0 writes, all ranks read.

    options: the main's, with groups `run`, `optimizer` and `machine`. meta: for its checkpoints. loader: for training;
    positions count steps in its order of samples.
    """

    def __init__(
        self, options: FinetuneOptions | PretrainOptions, world: World, log: RunLog, *, meta: dict, loader: Loader
    ):
        self.options, self.world, self.log, self.meta = options, world, log, meta
        self.loader, self.accum_iter = loader, options.optimizer.accum_iter
        self.global_batch = loader.order.batch_size * world.size  # images per micro-step over all ranks
        self.writer = CheckpointWriter(log.output_dir, options.run.keep) if log.output_dir else None
        self.wrote = False  # whether rank 0 wrote the last checkpoint
        self.position = Position()
        self.described: dict = {}  # content of args.json
        self.speed: dict[str, float] = {}  # of the last epoch, for log.txt
        self.interrupts = Interrupts(options.run.save_every_minutes, options.machine.timeout_minutes)
        self.profiler: StepProfiler | None = None

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *error) -> None:
        self.interrupts.close()
        state = "failed" if error[0] else "finished" if self.position.finished else "stopped"
        self.log.close(self.final(), state)

    def begin(
        self,
        training: Training,
        epochs: int,
        found: Found | None,
        *,
        lr: float,
        new_optimizer: bool = False,
        noted: dict | None = None,
    ) -> None:
        """Continue from `found`, or start at --start_epoch, for `epochs` in total; open the log there.

        new_optimizer: ignore the optimizer in `found`, from another phase. noted: what the main adds to args.json.
        UserError if there is nothing to train.
        """
        settings, first = self.options.run, self.options.run.start_epoch
        if found:
            self.restore(found, training, new_optimizer)
        elif first >= epochs:
            raise UserError(
                f"--start_epoch {first}: should be below the {epochs} epochs of the run"
                if epochs
                else "--epochs 0: should be 1 or more; there is nothing to train"
            )
        else:
            self.position.epoch = first
        position = self.position
        # A finished run continues if the number of epochs has changed.
        position.finished = position.epoch >= epochs or (position.finished and position.planned == epochs)
        position.planned = epochs
        if position.finished and found and not goes_on_in(settings.output_dir, settings.resume):
            raise UserError(f"--resume {found.path}: is finished after {position.epoch} epochs; give more --epochs")
        self.described |= {**(noted or {}), **self.options.flat(), "resolved": self.meta, "lr": lr}
        self.log.start(position.epoch + position.step / len(self.loader), self.hyperparameters())
        if position.finished:
            self.log.say(f"the run is finished after {position.epoch} epochs; more --epochs would continue it")
        else:
            warmup = self.options.optimizer.warmup_epochs
            if self.options.optimizer.epochs < warmup:
                self.log.say(
                    f"warning: --epochs {self.options.optimizer.epochs} ends within --warmup_epochs {warmup:g}: the "
                    "learning rate does not reach its peak"
                )
            self.log.write_args(self.described)
        if settings.profile and self.log.output_dir:
            precision = training.precision
            self.profiler = StepProfiler(settings.profile, self.log, precision.device, precision.dtype)

    def hyperparameters(self) -> dict:
        """For the loggers: every flag, as resolved, and what the main notes."""
        flags = self.options.flat()
        resolved = {name: value for name, value in self.meta.items() if name in flags}
        return {**{name: value for name, value in self.described.items() if name != "resolved"}, **resolved}

    def final(self) -> dict[str, float]:
        """For the loggers, beside the last values: the best one by --eval_metric and its epoch."""
        best, by = self.position.best, self.position.best_by
        if best is None or not by:
            return {}
        return {f"best/{by}": -best if by == "loss" else best, "best/epoch": self.position.best_epoch}

    def epochs(self) -> Iterator[int]:
        """The epochs from the current position until the run is finished."""
        while not self.position.finished:
            yield self.position.epoch
        if self.profiler is not None:
            self.profiler.close()

    def end_epoch(self, training: Training, values: dict, *, is_best: bool = False, finished: bool = False) -> None:
        """Write the epoch's line in log.txt, scalars and checkpoints.

        values: train_*, val_*; finished: this is the last epoch.
        """
        position, epoch = self.position, self.position.epoch
        parameters = sum(p.numel() for p in training.net.parameters())
        # TensorBoard's groups: train_loss becomes train/loss, at the first step of the next epoch.
        self.log.scalars({name.replace("_", "/", 1): value for name, value in values.items()}, (epoch + 1) * 1000)
        line = {**values, "epoch": epoch, "n_parameters": parameters, "bad_steps": position.bad_total, **self.speed}
        self.log.epoch(line)
        position.next_epoch()
        position.finished = finished or position.epoch >= position.planned
        self.save(training, finished_epoch=epoch, is_best=is_best)

    def tell_noise(self, snr: float) -> None:
        """snr: measured signal-to-noise ratio in dB where the noise is added; logged once, stored in args.json."""
        if "noise_snr_measured" in self.described:
            return
        self.described["noise_snr_measured"] = round(snr, 2)
        self.log.write_args(self.described)
        self.log.say(f"noise: {snr:.1f} dB, signal to noise where it is added")
        if snr < LOUD:
            self.log.say(
                f"warning: the noise is loud: below {LOUD:g} dB it has cost accuracy; a smaller --alpha_blend, or "
                "--noise_snr 31, makes it softer"
            )

    def describe_speed(self) -> str:
        return (
            f"{self.speed['seconds']:.1f} s, {self.speed['images_per_second']:.4g} images/s, "
            f"{self.speed['data_wait_percent']:.0f} % waiting for data"
        )

    def report(self, write: Callable[[str], None]) -> None:
        """Call write(output_dir), which makes the report and its pictures; a finished run keeps its report."""
        if self.log.output_dir and (self.speed or not os.path.exists(self.log.path("report.md"))):
            with survive(self.log.path("report.md")):
                write(self.log.output_dir)

    def state(self, training: Training) -> dict:
        """The checkpoint's dict. A collective: every rank contributes its generator states."""
        return {
            "format": FORMAT,
            "kind": self.log.kind,
            "meta": self.meta,
            "args": self.options.flat(),
            "epoch": self.position.epoch,
            "step": self.position.step,
            "progress": {**asdict(self.position), "sums": {}},
            "sums": gather_objects(self.position.sums),  # one entry per rank
            "global_batch": self.global_batch,
            "images": self.loader.order.n,
            "world_size": self.world.size,
            "model": training.net.state_dict(),
            "ema": training.ema.module.state_dict() if training.ema is not None else None,
            "optimizer": training.optimizer.state_dict(),
            "scaler": training.precision.scaler.state_dict(),
            "rng": gather_objects(rng_state(self.world.device)),
        }

    def save(self, training: Training, *, finished_epoch: int | None = None, is_best: bool = False) -> None:
        """checkpoint-last.pth, and at the end of an epoch -best and -{epoch} when due.

        UserError, on all ranks, if a rank's weights or buffers are not finite: they would replace good ones.
        """
        state = self.state(training)
        name = next(filter(None, (non_finite(state[part] or {}) for part in ("model", "ema"))), None)
        if all_reduce(torch.tensor(int(name is not None)), "max"):
            raise UserError(
                f"epoch {self.position.epoch}: {name or 'another rank'} holds NaN or infinite values, nothing is "
                "saved; the previous checkpoint is kept; try a smaller --lr, --clip_grad 1, or --amp off"
            )
        if self.writer is None:
            return
        self.log.flush()
        if is_best:
            self.writer.save_best(state)
        else:
            self.writer.retry_best()
        self.wrote = wrote = self.writer.save_last(state)
        every = self.options.run.save_freq
        due = every and finished_epoch is not None and ((finished_epoch + 1) % every == 0 or self.position.finished)
        if finished_epoch is not None and due and wrote:
            self.writer.save_epoch(state, finished_epoch)
        if self.position.finished and not wrote:
            raise UserError(
                f"{self.writer.output_dir}: the finished run's checkpoint could not be written; free some space and "
                "run the same command with --resume auto: it continues from the last one"
            )

    def stop_requested(self) -> bool:
        """Whether a signal requests a stop; the same on all ranks, which must call it equally often."""
        return self.interrupts.poll()[0]

    def stopped(self) -> int:
        """Log what was saved after a signal; returns the exit code."""
        if self.writer is None:
            saved = "nothing is saved without --output_dir"
        elif self.wrote:
            saved = "saved; --resume auto continues"
        else:
            saved = "not saved; --resume auto continues from the previous checkpoint, if there is one"
        self.log.say(
            f"stopped {self.interrupts.why} at epoch {self.position.epoch}, step {self.position.step}; {saved}"
        )
        return EXIT_STOPPED

    def restore(self, found: Found, training: Training, new_optimizer: bool = False) -> None:
        """Restore everything except learning-rate scales and weight decay, which come from this command line.

        UserError if the checkpoint is from another model or run (`compare`), or is not as `state` writes it. Empties
        `found.content`, so that its tensors do not stay in memory.
        """
        refuse_other_classes(f"--resume {found.path}", found.content["meta"].get("classes"), self.meta.get("classes"))
        try:
            self.compare(found)
            self._restore(found.content, training, new_optimizer)
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {reason_of(error)}"
            raise UserError(f"--resume: the checkpoint is incomplete ({reason})") from None
        self.log.say(f"resume: {found.path} at epoch {self.position.epoch}, step {self.position.step}")
        found.content.clear()
        if found.later:
            self.log.forget()
        for path in found.later if self.world.is_main else ():
            with survive(path, "not removed"):
                os.unlink(path)

    def compare(self, found: Found) -> None:
        """UserError if a flag that changes the results, or the images per micro-step, differ from the checkpoint's.

        Logs the changes that a resume may make, and those that --force_resume allows.
        """
        content, force, options = found.content, self.options.run.force_resume, self.options.flat()
        before, resumed = content.get("args"), f"--resume {found.path}"
        changed = differences(type(self.options).flags(), before if isinstance(before, dict) else {}, options)
        refused = [d for d in changed if not d.flag.free_at_resume]
        if refused and not force:
            raise UserError(refusal(refused, f"{resumed} was written with", "give its value, or --force_resume"))
        if content["global_batch"] != self.global_batch and not force:
            raise UserError(
                f"{resumed}: written with {content['global_batch']} images per micro-step over "
                f"{content.get('world_size')} processes, this line has {self.global_batch} over {self.world.size}; "
                "choose --batch_size to make them equal (the sample order then continues exactly), or --force_resume"
            )
        now = self.loader.order.n
        images, split = content.get("images", now), next((k for k in ("val_split", "kfold") if options.get(k)), "")
        if images != now:
            if split and not force:  # the split changes
                raise UserError(
                    f"{resumed}: written with {images} training images, now there are {now}, and --{split} would hold "
                    "out some that were trained on; restore the data set, or --force_resume"
                )
            self.log.say(f"resume: {now} training images from here on, {images} before")
        for d in changed:
            self.log.say(f"resume: {d.flag.name} {d.now} from here on, {d.before} before")

    def _restore(self, content: dict, training: Training, new_optimizer: bool) -> None:
        load_exactly(training.net, content["model"], "--resume")
        if training.ema is not None:
            load_exactly(training.ema.module, content["ema"] or content["model"], "--resume")
        if not new_optimizer:
            restore_optimizer(training.optimizer, content["optimizer"])
        if content["scaler"]:
            training.precision.scaler.load_state_dict(content["scaler"])
        self.position = Position(**content["progress"])
        self.position.step = self._step_after(content["step"], content["global_batch"])
        same_steps = content["global_batch"] == self.global_batch and content["step"] == self.position.step
        if not same_steps:
            self.log.say(
                f"resume: {content['step']} steps of {content['global_batch']} images of epoch {self.position.epoch} "
                f"were done; continues at step {self.position.step} of {self.global_batch} images each"
            )
        if len(content["sums"]) == self.world.size and same_steps:
            self.position.sums = content["sums"][self.world.rank]
        elif self.world.is_main and content["step"]:
            # Sums over micro-steps and ranks, rescaled to this run's numbers of both.
            parts, steps = content["sums"], self.position.step / content["step"]
            scale = steps * self.world.size / len(parts)
            self.position.sums = {k: scale * sum(p[k] for p in parts) for k in parts[0] if k != "noise_snr"}
        if len(content["rng"]) == self.world.size:
            set_rng_state(content["rng"][self.world.rank], self.world.device)

    def _step_after(self, step: int, global_batch: int) -> int:
        """The micro-step after `step` steps of `global_batch` images each, rounded down to a whole update.

        The epoch's order of samples is the same for any batch size: none is skipped, few are repeated.
        """
        if global_batch != self.global_batch:
            step = step * global_batch // self.global_batch
        return len(self.loader) if step >= len(self.loader) else step - step % self.accum_iter
