"""The life of a run, the same for pretraining and fine-tuning: position, signals, saving, resuming."""

import inspect
import math
import os
from dataclasses import asdict, dataclass, field

import torch

from util.checkpoint import FORMAT, CheckpointWriter, find_resume, read_checkpoint, resumable, rng_state, set_rng_state
from util.dist import World, all_reduce, broadcast_object, gather_objects
from util.errors import UserError
from util.files import survive
from util.flags import Flag, differences, refusal
from util.folder import goes_on_in
from util.log import RunLog

NEEDED = ("epoch", "step", "progress", "sums", "global_batch", "world_size", "model", "rng")
MAIN_THREAD_FIRST = 10.0  # seconds in which it may report a lost rank itself
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


class Run:
    """Saves and restores a run's state; rank 0 writes, all ranks read."""

    def __init__(
        self,
        world: World,
        log: RunLog,
        *,
        kind: str,
        options: dict,
        meta: dict,
        save_freq: int,
        keep: int,
        flags: dict[str, Flag] | None = None,
    ):
        self.world, self.log, self.kind, self.options, self.meta = world, log, kind, options, meta
        self.flags = flags or {}  # what the options' flags declare of themselves, for a resume
        self.save_freq = save_freq
        self.writer = CheckpointWriter(log.output_dir, keep) if log.output_dir else None
        self.wrote = False  # the last checkpoint, on the rank that writes
        self.source = ""  # the checkpoint that this run goes on from
        self.later: list[str] = []  # checkpoints of the same folder that it goes back behind
        self.position = Position()
        self.speed: dict[str, float] = {}  # of the epoch that ended last, for its line in log.txt
        self.global_batch = 0  # images per micro-step over all ranks: the unit of the sample order
        self.total, self.accum_iter = math.inf, 1  # micro-steps of an epoch, and of an update
        self.images = 0  # of the training set
        self.names = lambda index: [str(int(i)) for i in index]  # sample names for reports

    def follow(self, loader, accum_iter: int) -> None:
        """The order of samples that the run goes through: training's Loader, and micro-steps per update."""
        self.global_batch, self.total = loader.order.batch_size * self.world.size, len(loader)
        self.images, self.accum_iter = loader.order.n, accum_iter
        self.names = lambda index: [loader.data.name(int(i)) for i in index]

    def start_at(self, epoch: int, epochs: int) -> None:
        """A run without a checkpoint begins with `epoch` of `epochs`. UserError if there is nothing to train."""
        if epoch >= epochs:
            raise UserError(
                f"--start_epoch {epoch}: should be below the {epochs} epochs of the run"
                if epochs
                else "--epochs 0: should be 1 or more; there is nothing to train"
            )
        self.position = Position(epoch=epoch)

    def plan(self, epochs: int) -> None:
        """How many epochs the run has in all. One that is finished goes on when it is given another number."""
        position = self.position
        position.finished = position.epoch >= epochs or (position.finished and position.planned == epochs)
        position.planned = epochs
        if position.finished and not goes_on_in(self.options["output_dir"], self.options["resume"]):
            raise UserError(f"--resume {self.source}: is finished after {position.epoch} epochs; give more --epochs")
        if position.finished:
            self.log.say("the run is finished; more --epochs would go on with it")

    def describe_speed(self) -> str:
        return (
            f"{self.speed['images_per_second']:.4g} images/s, {self.speed['data_wait_percent']:.0f} % waiting for data"
        )

    def state(self, model, optimizer=None, scaler=None, ema=None) -> dict:
        """The checkpoint's dict. A collective: every rank gives its generators' states."""
        return {
            "format": FORMAT,
            "kind": self.kind,
            "meta": self.meta,
            "args": self.options,
            "epoch": self.position.epoch,
            "step": self.position.step,
            "progress": {**asdict(self.position), "sums": {}},
            "sums": gather_objects(self.position.sums),  # each rank's own
            "global_batch": self.global_batch,
            "images": self.images,
            "world_size": self.world.size,
            "model": model.state_dict(),
            "ema": ema.module.state_dict() if ema is not None else None,
            "optimizer": optimizer.state_dict() if optimizer is not None else None,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "rng": gather_objects(rng_state(self.world.device)),
        }

    def save(self, state: dict, *, finished_epoch: int | None = None, is_best: bool = False) -> None:
        """checkpoint-last.pth, and at the end of an epoch -best and -{epoch} where they are due.

        UserError, on all ranks, if a rank's weights or buffers are not finite: they would replace those that are.
        """
        name = next(filter(None, (non_finite(state.get(part) or {}) for part in ("model", "ema"))), None)
        if all_reduce(torch.tensor(int(name is not None)), "max"):
            raise UserError(
                f"epoch {self.position.epoch}: {name or 'another rank'} holds NaN or infinite values, nothing is saved; the "
                "checkpoint before is kept; try a smaller --lr, --clip_grad 1, or --amp off"
            )
        if self.writer is None:
            return
        self.log.flush()
        if is_best:
            self.writer.save_best(state)
        else:
            self.writer.retry_best()
        self.wrote = wrote = self.writer.save_last(state)
        due = (
            finished_epoch is not None
            and self.save_freq
            and ((finished_epoch + 1) % self.save_freq == 0 or self.position.finished)
        )
        if due and wrote:
            self.writer.save_epoch(state, finished_epoch)
        if self.position.finished and not wrote:
            raise UserError(
                f"{self.writer.output_dir}: the finished run's checkpoint could not be written; make room there and run "
                "the same line again with --resume auto: it goes on from the last one that could"
            )

    def stopped(self) -> int:
        """The exit code after a signal, and what the log says about what is on disk."""
        if self.writer is None:
            saved = "nothing is saved without --output_dir"
        elif self.wrote:
            saved = "saved; --resume auto goes on"
        else:
            saved = "not saved; --resume auto goes on from the checkpoint before, if there is one"
        self.log.say(f"stopped by a signal at epoch {self.position.epoch}, step {self.position.step}; {saved}")
        return EXIT_STOPPED

    def find(self, resume: str) -> dict | None:
        """The checkpoint that --resume means, read on every rank; None to start anew."""
        path = resume
        if resume == "auto":
            path = broadcast_object(find_resume(self.log.output_dir or "") if self.world.is_main else None)
        if not path:
            return None
        content = read_checkpoint(path)
        if content.get("kind") != self.kind:
            raise UserError(f"--resume {path}: a checkpoint of {content.get('kind')}, this is {self.kind}")
        if content.get("optimizer") is None:
            raise UserError(
                f"--resume {path}: holds weights only; resume from checkpoint-last.pth, or give it to --finetune"
            )
        refuse_other_classes(f"--resume {path}", content["meta"].get("classes"), self.meta.get("classes"))
        lacking = [k for k in NEEDED if k not in content]
        if lacking:
            raise UserError(f"--resume {path}: lacks {', '.join(lacking[:4])}; not a whole checkpoint")
        if not all(type(content[k]) is int and 0 <= content[k] < 2**31 for k in ("epoch", "step")):
            raise UserError(f"--resume {path}: its epoch or step is not a number of 0 or more")
        self.source = path
        if resume != "auto":
            self.later = broadcast_object(self._later_than(content))
        if self.later and not self.options.get("overwrite"):
            raise UserError(
                f"--resume {path}: {self.later[0]} goes beyond it, and --resume auto would go on with that; --overwrite removes "
                "what is later, or choose another --output_dir"
            )
        return content

    def _later_than(self, content: dict) -> list[str]:
        folder, here = self.log.output_dir, (content["epoch"], content["step"])
        if not folder or not goes_on_in(folder, self.source):
            return []
        return [path for position, path in resumable(folder) if position > here]

    def compare(self, content: dict, force: bool) -> None:
        """UserError if a flag that changes the results, or the images per micro-step, are others than in the checkpoint.

        What a resume may set anew is told, and so is all that --force_resume lets pass.
        """
        before = content.get("args")
        found = differences(self.flags, before if isinstance(before, dict) else {}, self.options)
        refused = [d for d in found if not d.flag.free_at_resume]
        if refused and not force:
            raise UserError(
                refusal(refused, f"--resume {self.source} was written with", "give its value, or --force_resume")
            )
        if content["global_batch"] != self.global_batch and not force:
            raise UserError(
                f"--resume {self.source}: written with {content['global_batch']} images per micro-step over "
                f"{content.get('world_size')} processes, this line has {self.global_batch} over {self.world.size}; choose "
                "--batch_size so that they are equal (then the sample order goes on exactly), or --force_resume"
            )
        images, split = (
            content.get("images", self.images),
            next((k for k in ("val_split", "kfold") if self.options.get(k)), ""),
        )
        if images != self.images:
            if split and not force:  # the split is drawn anew
                raise UserError(
                    f"--resume {self.source}: written with {images} training images, now there are {self.images}, and "
                    f"--{split} would hold out some that were trained on; bring the set back, or --force_resume"
                )
            self.log.say(f"resume: {self.images} training images from here on, {images} before")
        for d in found:
            self.log.say(f"resume: {d.flag.name} {d.now} from here on, {d.before} before")

    def restore(self, content: dict, model, optimizer=None, scaler=None, ema=None, force: bool = False) -> None:
        """Put everything back; learning-rate scales and weight decay stay those of this command line.

        UserError if the checkpoint is of another model or another run (`compare`), or some part of it is not what `state`
        writes. Uses `content` up: it is empty afterwards, so that its tensors do not stay in memory.
        """
        try:
            self.compare(content, force)
            self._restore(content, model, optimizer, scaler, ema)
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            raise UserError(f"--resume: the checkpoint is not whole ({reason})") from None
        self.log.say(f"resume: {self.source} at epoch {self.position.epoch}, step {self.position.step}")
        content.clear()
        for path in self.later if self.world.is_main else ():
            with survive(path, "not removed"):
                os.unlink(path)

    def _restore(self, content: dict, model, optimizer, scaler, ema) -> None:
        load_exactly(model, content["model"], "--resume")
        if ema is not None:
            load_exactly(ema.module, content["ema"] or content["model"], "--resume")
        if optimizer is not None and content["optimizer"] is not None:
            restore_optimizer(optimizer, content["optimizer"])
        if scaler is not None and content["scaler"]:
            scaler.load_state_dict(content["scaler"])
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
            self.position.sums = {k: scale * sum(p[k] for p in parts) for k in parts[0]}
        if len(content["rng"]) == self.world.size:
            set_rng_state(content["rng"][self.world.rank], self.world.device)

    def _step_after(self, step: int, global_batch: int) -> int:
        """The micro-step that comes after `step` steps of an epoch in `global_batch` images each, rounded down to a whole
        update. The epoch's order of samples is the same for any batch size: none is left out and few are seen twice."""
        if global_batch != self.global_batch:
            step = step * global_batch // self.global_batch
        return self.total if step >= self.total else step - step % self.accum_iter


def refuse_other_classes(given: str, old: list[str] | None, new: list[str] | None) -> None:
    """UserError if the outputs of a checkpoint's classifier are other classes than this run's, or in another order.

    given: the checkpoint as the command line has it, with its flag.
    """
    if not old or not new or list(old) == list(new):
        return
    i = next((i for i, (a, b) in enumerate(zip(old, new)) if a != b), min(len(old), len(new)))
    was, now = (repr(names[i]) if i < len(names) else "missing" for names in (old, new))
    raise UserError(
        f"{given}: its class {i} is {was}, in the data it is {now}; give the classes the names that they had, or start "
        "a new run from it with --finetune, which moves the classifier by name"
    )


def load_exactly(model, state: dict, flag: str) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{flag}: the checkpoint is of another model ({' '.join(str(error).split())[:200]})") from None
    name = non_finite(state)
    if name is not None:
        raise UserError(f"{flag}: the checkpoint's {name} holds NaN or infinite values")


def non_finite(state: dict[str, torch.Tensor]) -> str | None:
    """The first entry that holds a NaN or infinite value; None if there is none."""
    names = [k for k, v in state.items() if v.is_floating_point()]
    finite = [torch.isfinite(state[k]).all() for k in names]
    if not finite or torch.stack(finite).all():
        return None
    return next(k for k, ok in zip(names, finite) if not ok)


def restore_optimizer(optimizer, state: dict) -> None:
    """Moments from the checkpoint; lr_scale, weight_decay and the rest from this run's flags, matched by name."""
    fresh = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    by_name, order = {}, []
    for group in state["param_groups"]:
        for name, i in zip(group["names"], group["params"]):
            by_name[name] = i
    for group in optimizer.param_groups:
        order += group["names"]
    if set(order) != set(by_name):
        raise UserError("--resume: the checkpoint's optimizer covers other parameters; was it another model or phase?")
    # Another --layer_decay groups the parameters differently: renumber the moments to this run's order.
    moments = {new: state["state"][by_name[name]] for new, name in enumerate(order) if by_name[name] in state["state"]}
    parameters = [p for g in optimizer.param_groups for p in g["params"]]
    for i, moment in moments.items():
        for value in moment.values():
            if isinstance(value, torch.Tensor) and value.ndim and value.shape != parameters[i].shape:
                raise UserError(
                    f"--resume: the checkpoint's optimizer has {list(value.shape)} for {order[i]}, "
                    f"which is {list(parameters[i].shape)}"
                )
    groups, start = [], 0
    for group in fresh:
        n = len(group["names"])
        groups.append({**group, "params": list(range(start, start + n))})
        start += n
    optimizer.load_state_dict({"state": moments, "param_groups": groups})


def wrap_ddp(model, world: World):
    """DistributedDataParallel, or the model itself in a single process.

    DDP would send rank 0's buffers to the others at every update: 86 MB of attention masks and position tables for
    Swin-V2-B at 384 px, which never change. No training step reads the ones that do, BatchNorm's statistics; what reads
    them takes rank 0's (util.dist.broadcast_buffers before an evaluation, and checkpoints, which rank 0 writes).
    """
    if world.size == 1:
        return model
    DDP = torch.nn.parallel.DistributedDataParallel
    device_ids = [world.device.index] if world.device.type == "cuda" else None
    new = "forward_sync_buffers" in inspect.signature(DDP.__init__).parameters  # its name since torch 2.14
    keep = {"forward_sync_buffers" if new else "broadcast_buffers": False}
    return DDP(model, device_ids=device_ids, gradient_as_bucket_view=True, **keep)
