"""The life of a run, the same for pretraining and fine-tuning: position, signals, saving, resuming."""

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
LOUD = 20.0  # dB of signal to noise, below which a run warns
EXIT_STOPPED = 75  # EX_TEMPFAIL: saved in mid-run after a signal; the same line with --resume auto goes on


@dataclass
class Position:
    """Where a run is: `step` micro-steps of `epoch` are done. Everything here goes through a checkpoint exactly."""

    epoch: int = 0
    step: int = 0
    updates: int = 0  # optimizer updates so far (the EMA's warm-up counts them)
    bad_in_a_row: int = 0
    bad_total: int = 0
    best: float | None = None
    best_epoch: int = -1
    best_by: str = ""  # the metric that `best` is of; a checkpoint of before does not say
    planned: int = 0  # epochs in all, of the command line that wrote this
    finished: bool = False
    sums: dict = field(default_factory=dict)  # running sums of this epoch's metrics, floats

    def improves(self, value: float) -> bool:
        """True if `value` is above the best so far; NaN and infinite ones never are."""
        return math.isfinite(value) and (self.best is None or value > self.best or not math.isfinite(self.best))

    def next_epoch(self) -> None:
        self.epoch, self.step, self.sums = self.epoch + 1, 0, {}


@dataclass
class Training:
    """What an epoch works on: `model` is called (net, or DistributedDataParallel around it), `net` is saved.

    lr_at(fractional epoch) -> learning rate. freeze(net), after net.train(): layers that compute as in evaluation.
    """

    net: nn.Module
    model: nn.Module
    optimizer: torch.optim.Optimizer
    precision: Precision
    lr_at: Callable[[float], float]
    ema: Ema | None = None
    freeze: Callable[[nn.Module], None] = lambda net: None


def begin(options: Trained) -> tuple[Trained, World]:
    """What a training main does first: the processes meet, and what it cannot do on this machine is said."""
    machine, reading = options.machine, options.reading
    limit_pixels(reading.max_pixels)
    world = init_world(machine.device, machine.dist_url, machine.timeout_minutes, machine.deterministic)
    if machine.compile:
        require_compiler(world.device)
    return options.having(loader=choose_loader(reading.loader, options.data.dataset, world)), world


def open_log(settings: RunSettings, kind: str, world: World, *, writes: bool = True) -> RunLog:
    """The log of a training run, its folder claimed (util/log.py); writes=False: of one that saves nothing."""
    return claim(
        settings.output_dir if writes else None,
        kind,
        world,
        log_dir=settings.log_dir,
        resume=settings.resume,
        overwrite=settings.overwrite,
    )


@dataclass
class Found:
    """A checkpoint to go on from, and later ones of the same folder that the run goes back behind."""

    content: dict
    path: str
    later: list[str]


def find_checkpoint(settings: RunSettings, log: RunLog, world: World) -> Found | None:
    """The checkpoint that --resume means, read on every rank; None to start anew."""
    path: str | None = settings.resume
    if settings.resume == "auto":
        path = broadcast_object(find_resume(log.output_dir or "") if world.is_main else None)
    if not path:
        return None
    content = read_checkpoint(path)
    if content.get("kind") != log.kind:
        raise UserError(f"--resume {path}: a checkpoint of {content.get('kind')}, this is {log.kind}")
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
            f"--resume {path}: {later[0]} goes beyond it, and --resume auto would go on with that; --overwrite removes "
            "what is later, or choose another --output_dir"
        )
    return Found(content, path, later)


class Run:
    """A training run: where it is, what it saves and goes on from, what stops it. Rank 0 writes, all ranks read.

    options: those of the main, with groups `run`, `optimizer` and `machine`. meta: of its checkpoints. loader: of the
    training images; its order of samples is what a position counts in.
    """

    def __init__(
        self, options: FinetuneOptions | PretrainOptions, world: World, log: RunLog, *, meta: dict, loader: Loader
    ):
        self.options, self.world, self.log, self.meta = options, world, log, meta
        self.loader, self.accum_iter = loader, options.optimizer.accum_iter
        self.global_batch = loader.order.batch_size * world.size  # images per micro-step over all ranks
        self.writer = CheckpointWriter(log.output_dir, options.run.keep) if log.output_dir else None
        self.wrote = False  # the last checkpoint, on the rank that writes
        self.position = Position()
        self.args: dict = {}  # of args.json
        self.speed: dict[str, float] = {}  # of the epoch that ended last, for its line in log.txt
        self.interrupts = Interrupts(options.run.save_every_minutes, options.machine.timeout_minutes)
        self.profiler: StepProfiler | None = None

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *error) -> None:
        self.interrupts.close()
        self.log.close()

    def begin(self, training: Training, epochs: int, found: Found | None, *, lr: float, new_optimizer: bool = False):
        """Go on from `found`, or begin with --start_epoch, towards `epochs` in all; open the log there.

        new_optimizer: what `found` has is of another phase. UserError if there is nothing to train.
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
        # A run that is finished goes on when it is given another number of epochs.
        position.finished = position.epoch >= epochs or (position.finished and position.planned == epochs)
        position.planned = epochs
        if position.finished and found and not goes_on_in(settings.output_dir, settings.resume):
            raise UserError(f"--resume {found.path}: is finished after {position.epoch} epochs; give more --epochs")
        self.log.start(position.epoch + position.step / len(self.loader))
        if position.finished:
            self.log.say(f"the run is finished after {position.epoch} epochs; more --epochs would go on with it")
        else:
            warmup = self.options.optimizer.warmup_epochs
            if self.options.optimizer.epochs < warmup:
                self.log.say(
                    f"warning: --epochs {self.options.optimizer.epochs} ends within --warmup_epochs {warmup:g}: the "
                    "learning rate does not reach its peak"
                )
            self.args |= {**self.options.flat(), "resolved": self.meta, "lr": lr}
            self.log.write_args(self.args)
        if settings.profile and self.log.output_dir:
            precision = training.precision
            self.profiler = StepProfiler(settings.profile, self.log, precision.device, precision.dtype)

    def epochs(self) -> Iterator[int]:
        """The epochs from the position on, until it is finished."""
        while not self.position.finished:
            yield self.position.epoch
        if self.profiler is not None:
            self.profiler.close()

    def end_epoch(self, training: Training, values: dict, *, is_best: bool = False, finished: bool = False) -> None:
        """Write the epoch's line of log.txt, its scalars, its checkpoints.

        values: train_*, val_*; finished: it is the last.
        """
        position, epoch = self.position, self.position.epoch
        parameters = sum(p.numel() for p in training.net.parameters())
        # TensorBoard's groups: train_loss is train/loss there, at the step where the next epoch begins.
        self.log.scalars({name.replace("_", "/", 1): value for name, value in values.items()}, (epoch + 1) * 1000)
        line = {**values, "epoch": epoch, "n_parameters": parameters, "bad_steps": position.bad_total, **self.speed}
        self.log.epoch(line)
        position.next_epoch()
        position.finished = finished or position.epoch >= position.planned
        self.save(training, finished_epoch=epoch, is_best=is_best)

    def tell_noise(self, snr: float) -> None:
        """snr: measured signal-to-noise ratio in dB where the noise is added; logged once, stored in args.json."""
        if "noise_snr_measured" in self.args:
            return
        self.args["noise_snr_measured"] = round(snr, 2)
        self.log.write_args(self.args)
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
        """write(output_dir) makes report.md and its pictures; one that a finished run has stays."""
        if self.log.output_dir and (self.speed or not os.path.exists(self.log.path("report.md"))):
            with survive(self.log.path("report.md")):
                write(self.log.output_dir)

    def state(self, training: Training) -> dict:
        """The checkpoint's dict. A collective: every rank gives its generators' states."""
        return {
            "format": FORMAT,
            "kind": self.log.kind,
            "meta": self.meta,
            "args": self.options.flat(),
            "epoch": self.position.epoch,
            "step": self.position.step,
            "progress": {**asdict(self.position), "sums": {}},
            "sums": gather_objects(self.position.sums),  # each rank's own
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
        """checkpoint-last.pth, and at the end of an epoch -best and -{epoch} where they are due.

        UserError, on all ranks, if a rank's weights or buffers are not finite: they would replace those that are.
        """
        state = self.state(training)
        name = next(filter(None, (non_finite(state[part] or {}) for part in ("model", "ema"))), None)
        if all_reduce(torch.tensor(int(name is not None)), "max"):
            raise UserError(
                f"epoch {self.position.epoch}: {name or 'another rank'} holds NaN or infinite values, nothing is "
                "saved; the checkpoint before is kept; try a smaller --lr, --clip_grad 1, or --amp off"
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
                f"{self.writer.output_dir}: the finished run's checkpoint could not be written; make room there and "
                "run the same line again with --resume auto: it goes on from the last one that could"
            )

    def stop_requested(self) -> bool:
        """Whether a signal asks for the end: the same on all ranks, which must ask equally often."""
        return self.interrupts.poll()[0]

    def stopped(self) -> int:
        """The exit code after a signal, and what the log says about what is on disk."""
        if self.writer is None:
            saved = "nothing is saved without --output_dir"
        elif self.wrote:
            saved = "saved; --resume auto goes on"
        else:
            saved = "not saved; --resume auto goes on from the checkpoint before, if there is one"
        self.log.say(
            f"stopped {self.interrupts.why} at epoch {self.position.epoch}, step {self.position.step}; {saved}"
        )
        return EXIT_STOPPED

    def restore(self, found: Found, training: Training, new_optimizer: bool = False) -> None:
        """Put everything back; learning-rate scales and weight decay stay those of this command line.

        UserError if the checkpoint is of another model or another run (`compare`), or some part of it is not what
        `state` writes. Uses `found.content` up: it is empty afterwards, so that its tensors do not stay in memory.
        """
        refuse_other_classes(f"--resume {found.path}", found.content["meta"].get("classes"), self.meta.get("classes"))
        try:
            self.compare(found)
            self._restore(found.content, training, new_optimizer)
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {reason_of(error)}"
            raise UserError(f"--resume: the checkpoint is not whole ({reason})") from None
        self.log.say(f"resume: {found.path} at epoch {self.position.epoch}, step {self.position.step}")
        found.content.clear()
        for path in found.later if self.world.is_main else ():
            with survive(path, "not removed"):
                os.unlink(path)

    def compare(self, found: Found) -> None:
        """UserError if a flag that changes the results, or the images per micro-step, differ from the checkpoint's.

        What a resume may set anew is told, and so is all that --force_resume lets pass.
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
                "choose --batch_size so that they are equal (then the sample order goes on exactly), or --force_resume"
            )
        now = self.loader.order.n
        images, split = content.get("images", now), next((k for k in ("val_split", "kfold") if options.get(k)), "")
        if images != now:
            if split and not force:  # the split is drawn anew
                raise UserError(
                    f"{resumed}: written with {images} training images, now there are {now}, and --{split} would hold "
                    "out some that were trained on; bring the set back, or --force_resume"
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
                f"were done; goes on at step {self.position.step} of {self.global_batch} images each"
            )
        if len(content["sums"]) == self.world.size and same_steps:
            self.position.sums = content["sums"][self.world.rank]
        elif self.world.is_main and content["step"]:
            # Sums over micro-steps and ranks, which are divided by this run's number of both.
            parts, steps = content["sums"], self.position.step / content["step"]
            scale = steps * self.world.size / len(parts)
            self.position.sums = {k: scale * sum(p[k] for p in parts) for k in parts[0] if k != "noise_snr"}
        if len(content["rng"]) == self.world.size:
            set_rng_state(content["rng"][self.world.rank], self.world.device)

    def _step_after(self, step: int, global_batch: int) -> int:
        """The micro-step after `step` steps of an epoch in `global_batch` images each, rounded down to a whole update.

        The epoch's order of samples is the same for any batch size: none is left out and few are seen twice.
        """
        if global_batch != self.global_batch:
            step = step * global_batch // self.global_batch
        return len(self.loader) if step >= len(self.loader) else step - step % self.accum_iter
