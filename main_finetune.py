"""Fine-tune an image classifier with alpha-blended diffusion noise (DiffNoise), mixup, cutmix and layer-wise lr decay.

    python main_finetune.py --dataset digits --model vit_tiny_patch4 --epochs 20 --output_dir out
    torchrun --nproc_per_node=8 main_finetune.py --finetune checkpoint-400.pth --model vit_large_patch16 \\
        --data_path ImageNet --output_dir out --epochs 50 --layer_decay 0.75 --drop_path 0.2 --mixup 0.8 --cutmix 1.0
"""

from util.cli.finetune import FinetuneOptions, check, get_args_parser, get_options  # noqa: F401 (MAE's names)
from util.cli.script import check_command_line, run_main, says_flags

if __name__ == "__main__":  # report a mistyped flag before importing torch, which takes seconds
    check_command_line(get_options)

import math
import shlex
from collections.abc import Callable
from dataclasses import asdict

from timm.data import Mixup
from torch import nn

from augment.alpha_blend import AlphaBlend
from augment.batch import BatchTransform, Erasing
from augment.image import PHOTO_JITTER, SCALES, Geometry, build_train_transform
from engine_finetune import build_criterion, evaluate, noise_curve, train_one_epoch
from models import load_pretrained
from models.loading import create_from_meta, require_complete, try_forward
from models.vit import NoStochasticDepth, attach_noise, enable_grad_checkpointing, has_batchnorm
from util.checkpoint import peek, peek_meta
from util.cli.dry_run import describe, noise_table
from util.cli.resolve import Source, resolve_data, resolve_meta
from util.cli.settings import Loss, Noise
from util.data.datasets import ArrayDataset, Dataset, notes_of, to_channels
from util.data.loader import Loader, evaluation_loader
from util.data.splits import load_data
from util.data_specs import DATASETS
from util.dist import Precision, World, broadcast_buffers, prepare_net
from util.errors import UserError
from util.log import RunLog
from util.meta import refuse_other_classes
from util.metrics import Evaluation
from util.optim import build_ema, param_groups
from util.precision import place
from util.report.plots import plot_confusion
from util.report.training import write_finetune_report, write_kfold_report
from util.seed import seed_all
from util.train import folds
from util.train.compiled import compile_net
from util.train.loop import effective_batch
from util.train.phases import enter_phase, freezing
from util.train.run import Run, begin, find_checkpoint, open_log


@says_flags
def main(argv: list[str] | None = None) -> int:
    options = get_options(argv)
    if options.selection.eval:
        options = check(resolve_data(options, peek(options.weights)))
    options, world = begin(options)
    if options.data.kfold and options.data.fold == "all":
        return folds.run_all(options, world, run_one, write_kfold_report)
    if options.data.kfold:
        options = folds.of_fold(options, int(options.data.fold))
    return run_one(options, world)


def run_one(options: FinetuneOptions, world: World) -> int:
    """Prepare data and weights of one network, then evaluate or train. Returns the exit code."""
    evaluating, dry_run = options.selection.eval, options.run.dry_run
    train, val, meta, origin = read_data(options, world)
    seed_all(options.machine.seed, 0)  # the same initial weights on every rank
    log = open_log(options.run, "finetune", world, writes=not (evaluating or dry_run))
    net = build_model(options, meta, world, log)
    noise = build_noise(options.noise, meta["model"], net) if options.noise.noise_eval or not evaluating else None
    if noise is not None:
        attach_noise(net, noise.to(world.device))
    precision = Precision(options.machine.amp, world.device, net)
    loaders = build_loaders(options, meta, train, val, world)
    global_batch, batch_words = effective_batch(loaders[0], options.optimizer)
    lr = options.optimizer.lr_for(global_batch)
    log.say(
        f"{meta['model']} on {options.data.dataset}: {len(train)} train, {len(val)} val, {len(train.classes)} classes; "
        f"{origin.words(meta)}; {words_of(noise)}; {world.size} x {world.device}, {precision}"
        + ("" if evaluating else f", {batch_words}, lr {lr:.3g}")
    )
    log.notes(notes_of(train, val))
    if evaluating:
        shown = ["dataset", "data_path", "val_split", "split_seed", *(["kfold", "fold"] if options.data.kfold else [])]
        log.notes([f"scored on {shlex.join(options.words(*shown))}"])
        return evaluate_only(options, net, loaders[1], precision, meta, log)

    freezing(options.phases, in_head_phase=not options.optimizer.epochs)(net.train())
    try_forward(net, meta, min(2, loaders[0].order.batch_size))
    log.notes(prepare_net(net, precision, (meta["in_chans"], *meta["img_size"])))
    if dry_run:
        decays = options.optimizer.weight_decay, options.optimizer.layer_decay
        groups = param_groups(net, weight_decay=decays[0], layer_decay=decays[1])
        settings = options.noise.resolved(meta["model"], has_batchnorm(net))
        resolved = options.having(alpha_blend=settings.alpha_blend, noise_units=settings.noise_units)
        log.say(describe(resolved, meta, origin, net, groups, loaders[0], precision))
        if noise is not None:
            log.say(noise_table(net, noise, loaders[0], precision))
        return 0
    with Run(options, world, log, meta=meta, loader=loaders[0]) as run:
        return fit(run, net, noise, precision, loaders[1], lr)


def fit(run: Run, net: nn.Module, noise: AlphaBlend | None, precision: Precision, val_loader: Loader, lr: float) -> int:
    """Train from --resume, or from scratch; evaluate, log and save after each epoch. Returns the exit code."""
    options, world, log, meta, train_loader = run.options, run.world, run.log, run.meta, run.loader
    head_epochs, epochs, num_classes = options.phases.head_epochs, options.optimizer.epochs, meta["num_classes"]
    ema = build_ema(net, options.selection.ema_decay)
    best_net = net if ema is None else ema.module
    if options.machine.compile:
        compile_net(net)
    mixup = build_mixup(options.loss, num_classes, noise)
    criterion = build_criterion(options.loss, train_loader.data, num_classes).to(world.device)

    found = find_checkpoint(options.run, log, world)
    start = found.content["epoch"] if found else options.run.start_epoch
    # At the end of the head phase: its optimizer has only the head, and the next phase creates its own.
    at_boundary = found is not None and 0 < head_epochs == start and found.content["step"] == 0
    in_head_phase = start < head_epochs
    training = enter_phase(options, net, in_head_phase, lr, world, precision, ema)
    words = words_of(noise)
    run.begin(training, head_epochs + epochs, found, lr=lr, new_optimizer=at_boundary, noted={"noise": words})
    position = run.position
    if position.best_by not in ("", options.selection.eval_metric):  # another metric, with --force_resume
        position.best = None

    for epoch in run.epochs():
        if in_head_phase and epoch >= head_epochs:
            in_head_phase = False
            training = enter_phase(options, net, in_head_phase, lr, world, precision, ema)
        if noise is not None:
            noise.set_progress(max(0, epoch - head_epochs) / max(1, epochs))
        stats = train_one_epoch(
            training,
            train_loader,
            criterion,
            run,
            mixup=None if in_head_phase else mixup,
            clip_grad=options.optimizer.clip_grad,
        )
        if stats is None:
            return run.stopped()
        broadcast_buffers(best_net)
        result = evaluate(
            best_net, val_loader, precision, num_classes, collect=options.data.kfold > 0, poll=run.stop_requested
        )
        if result is None:
            run.save(training)
            return run.stopped()
        is_best = judge(run, result)
        if is_best and log.output_dir and options.data.kfold:
            folds.write_oof(log.output_dir, int(options.data.fold), val_loader.data, result)
        waited = 0 if in_head_phase else epoch - max(position.best_epoch, head_epochs)
        stop_early = 0 < options.selection.patience <= waited
        scores = result.scores()
        log.say(
            f"epoch {epoch}: train loss {stats['loss']:.4f}  "
            + "  ".join(f"val {k} {v:.2f}" for k, v in scores.items())
            + f"  ({run.describe_speed()}){'  * best so far' if is_best else ''}"
        )
        values = {**{f"train_{k}": v for k, v in stats.items()}, **{f"val_{k}": v for k, v in scores.items()}}
        run.end_epoch(training, values, is_best=is_best, finished=stop_early)
        if is_best and log.output_dir:
            plot_confusion(result.confusion, train_loader.data.classes, log.path("confusion.png"))
        if stop_early:
            log.say(
                f"--patience {options.selection.patience}: no improvement since epoch {position.best_epoch}, stopped"
            )
    notes, validated = notes_of(train_loader.data, val_loader.data), len(val_loader.data) - len(val_loader.bad_images)
    curve = under_noise(options, best_net, val_loader, precision, meta, log) if run.speed else []
    run.report(lambda folder: write_finetune_report(folder, options, meta, position, words, notes, validated, curve))
    return 0


def judge(run: Run, result: Evaluation) -> bool:
    """Whether this epoch is the best so far by --eval_metric; if so, store it in the position."""
    position, metric, scores = run.position, run.options.selection.eval_metric, result.scores()
    value = -scores["loss"] if metric == "loss" else scores[metric]
    if not math.isfinite(scores["loss"]):
        # NaN probabilities count as some class, so the accuracy would look valid.
        run.log.say(
            f"warning: epoch {position.epoch}: the validation loss is {scores['loss']}, so it is not the best epoch"
        )
        return False
    if not position.improves(value):
        return False
    position.best, position.best_epoch, position.best_by = value, position.epoch, metric
    return True


def evaluate_only(
    options: FinetuneOptions, net: nn.Module, loader: Loader, precision: Precision, meta: dict, log: RunLog
) -> int:
    """--eval: score the weights; with --noise_curve, also under noise."""
    try_forward(net.eval(), meta, 1)
    prepare_net(net, precision)
    result = evaluate(net, loader, precision, meta["num_classes"])
    log.say("  ".join(f"{k}: {v:.4f}" for k, v in result.scores().items()))
    log.say(f"Accuracy of the network on the {result.confusion.sum()} test images: {result.acc1:.2f}%")
    under_noise(options, net, loader, precision, meta, log)
    return 0


def under_noise(
    options: FinetuneOptions, net: nn.Module, loader: Loader, precision: Precision, meta: dict, log: RunLog
) -> list[dict[str, float]]:
    """The points of --noise_curve, each also logged; [] without the flag."""
    if not options.selection.noise_curve:
        return []
    noise = build_noise(options.noise, meta["model"], net) or AlphaBlend(tokens=options.noise.noise_tokens)
    levels = sorted(options.selection.noise_curve, reverse=True)
    points = noise_curve(net, loader, precision, meta["num_classes"], noise.config, levels)
    for p in points:
        log.say(
            f"noise of {p['snr']:g} dB: acc1 {p['acc1']:.2f}, same class {p['agreement']:.1f} %, probability moved "
            f"{p['change']:.3f}, distance where it is added {p['distance']:.3f}"
        )
    return points


def read_data(options: FinetuneOptions, world: World) -> tuple[Dataset, Dataset, dict, Source]:
    """(training set, validation set, meta, source of the input); a checkpoint's settings precede the data set's."""
    data = options.data
    source = peek_meta(options.weights)
    train, val = load_data(data, world)
    meta, origin = resolve_meta(
        options.model,
        options.input,
        data.dataset,
        train.classes,
        source,
        weights=options.weights,
        evaluating=options.selection.eval,
    )
    if isinstance(train, ArrayDataset):
        if options.input.crop_pct is not None:
            raise UserError(
                f"--crop_pct {options.input.crop_pct}: only for image files; {data.dataset} is evaluated uncropped"
            )
        meta["crop_pct"] = 1.0
        train, val = to_channels(train, meta["in_chans"]), to_channels(val, meta["in_chans"])
    if options.selection.eval and source:
        flag = "--resume" if options.run.resume else "--finetune"
        refuse_other_classes(f"{flag} {options.weights}", source.get("classes"), meta["classes"])
    return train, val, meta, origin


def build_model(options: FinetuneOptions, meta: dict, world: World, log: RunLog) -> nn.Module:
    """The network on its device, with the weights of --finetune, --pretrained or, with --eval, --resume."""
    asked, evaluating = options.model, options.selection.eval
    extra = {"pretrained": True} if asked.pretrained else {}
    described = {**meta, "model_kwargs": {**meta["model_kwargs"], **extra}}
    try:
        net = create_from_meta(described, drop_path=0.0 if evaluating else asked.drop_path)
    except NoStochasticDepth:
        log.say(f"note: --drop_path {asked.drop_path}: ignored, {meta['model']} has no stochastic depth")
        net = create_from_meta(described)
    if options.weights:
        report = load_pretrained(
            net,
            options.weights,
            partial=asked.partial_load and options.weights == asked.finetune,
            classes=meta["classes"],
            pos_grid=asked.pos_grid,
        )
        if evaluating:
            require_complete(report, options.weights)
        else:
            log.say(f"finetune: {options.weights}: {report}")
    place(net, world.device)
    if asked.grad_checkpointing:
        enable_grad_checkpointing(net, meta["model"])
    return net


def build_loaders(
    options: FinetuneOptions, meta: dict, train: Dataset, val: Dataset, world: World
) -> tuple[Loader, Loader]:
    """Loaders for training (augmented) and validation."""
    aug, reading, size = options.augmentation, options.reading, tuple(meta["img_size"])
    in_memory = isinstance(train, ArrayDataset)
    hflip = DATASETS[options.data.dataset].hflip if aug.hflip is None else aug.hflip
    # Small images get padded crops, which keep their pixels; resampled crops are for photos, or on request.
    crop = "none" if aug.aug == "none" else "rrc" if aug.aug == "photo" or aug.scale else "pad"
    geometry = Geometry(
        crop,
        padding=min(4, max(1, size[0] // 8)),
        scale=aug.scale or SCALES.get(aug.aug),
        hflip=0.0 if aug.aug == "none" else hflip,
        vflip=aug.vflip,
    )
    jitter = PHOTO_JITTER if aug.aug == "photo" and aug.color_jitter is None else aug.color_jitter
    batch_transform = BatchTransform(
        meta["mean"],
        meta["std"],
        size=size,
        # Files are cropped and flipped in the workers; in-memory sets are augmented here, by the batch.
        geometry=geometry if in_memory else Geometry(),
        aa=aug.aa if in_memory else None,
        color_jitter=jitter if in_memory and not aug.aa else None,
        erasing=Erasing(aug.reprob, aug.remode, aug.recount, (0.02, 0.15) if aug.aug == "photo" else (0.02, 1 / 3)),
        seed=options.machine.seed,
    )
    train_transform = build_train_transform(
        size, aug.aug, geometry=geometry, aa=aug.aa, color_jitter=aug.color_jitter, mean=meta["mean"]
    )
    batch_size = options.optimizer.batch_size
    train_loader = Loader(
        train,
        transform=train_transform,
        batch_transform=batch_transform,
        batch_size=batch_size,
        train=True,
        even=options.loss.mixes,
        world=world,
        reading=reading,
    )
    shared = world if options.selection.dist_eval else World(device=world.device)
    return train_loader, evaluation_loader(val, meta, shared, batch_size=batch_size, reading=reading)


def words_of(noise: AlphaBlend | None) -> str:
    """The noise in words, for log lines, args.json and the report."""
    return noise.config.words if noise is not None else "no noise"


def build_noise(noise: Noise, model: str, net: nn.Module) -> AlphaBlend | None:
    """The AlphaBlend that the flags describe; None when it is off."""
    noise = noise.resolved(model, has_batchnorm(net))
    if noise.alpha_blend == 0:
        return None
    keywords = {name.removeprefix("noise_"): value for name, value in asdict(noise).items()}
    timestep, schedule, layer, noise_eval = (keywords.pop(k) for k in ("alpha_blend", "timestep", "layer", "eval"))
    keywords |= {"layer": tuple(layer), "noise_eval": noise_eval}
    return AlphaBlend(timestep or 0, schedule=schedule, **keywords)


def build_mixup(loss: Loss, num_classes: int, noise: AlphaBlend | None) -> Callable | None:
    """(images, targets) -> mixed: timm's mixup and cutmix, then manifold mixup's targets; None if all are off."""
    mixup = None
    if loss.mixes:
        mixup = Mixup(
            mixup_alpha=loss.mixup,
            cutmix_alpha=loss.cutmix,
            cutmix_minmax=loss.cutmix_minmax,
            prob=loss.mixup_prob,
            switch_prob=loss.mixup_switch_prob,
            mode=loss.mixup_mode,
            label_smoothing=loss.smoothing,
            num_classes=num_classes,
        )
    if noise is None or noise.config.kind != "manifold_mixup":
        return mixup

    def both(images, targets):
        images, targets = mixup(images, targets) if mixup is not None else (images, targets)
        return images, noise.mix_targets(targets, num_classes, loss.smoothing)

    return both


if __name__ == "__main__":
    run_main(main)
