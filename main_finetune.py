"""Fine-tune an image classifier with alpha-blended diffusion noise (DiffNoise), mixup, cutmix and layer-wise lr decay.

    python main_finetune.py --dataset digits --model vit_tiny_patch4 --epochs 20 --output_dir out
    torchrun --nproc_per_node=8 main_finetune.py --finetune checkpoint-400.pth --model vit_large_patch16 \\
        --data_path ImageNet --output_dir out --epochs 50 --layer_decay 0.75 --drop_path 0.2 --mixup 0.8 --cutmix 1.0
"""

from util.cli import parser as options
from util.cli.finetune import check_finetune_options, get_args_parser

if __name__ == "__main__":  # a mistyped flag is answered before torch is imported, which takes seconds
    options.check_command_line(get_args_parser, check_finetune_options)

import copy
import math
import os
import time

import torch
from timm.data import Mixup

from augment.alpha_blend import AlphaBlend
from augment.batch import BatchTransform, Erasing
from augment.decoding import limit_pixels
from augment.image import PHOTO_JITTER, SCALES, Geometry, build_eval_transform, build_train_transform
from engine_finetune import Criterion, evaluate, train_one_epoch
from models import load_pretrained
from models.loading import create_from_meta, require_complete, try_forward
from models.vit import NoStochasticDepth, enable_grad_checkpointing
from util.checkpoint import peek_meta
from util.cli.dry_run import describe
from util.cli.resolve import describe_input, resolve_meta
from util.data.datasets import ArrayDataset, notes_of, to_channels
from util.data.loader import Loader, choose_loader
from util.data.splits import load_data
from util.data_specs import DATASETS
from util.dist import Precision, World, broadcast_buffers, init_world, prepare_net
from util.errors import UserError
from util.files import survive
from util.log import RunLog, claim
from util.optim import build_ema, param_groups
from util.precision import is_convolutional
from util.report.plots import plot_confusion
from util.report.training import write_finetune_report
from util.seed import seed_all
from util.train import folds
from util.train.compiled import compile_net, require_compiler
from util.train.interrupts import Interrupts
from util.train.phases import enter_phase, freezing, phase_schedule
from util.train.profile import StepProfiler
from util.train.run import Run, refuse_other_classes
from util.train.steps import effective_batch


def build_loaders(args, meta: dict, train, val, world: World) -> tuple[Loader, Loader]:
    size, aug = tuple(meta["img_size"]), args.aug
    in_memory = isinstance(train, ArrayDataset)
    hflip = DATASETS[args.dataset].hflip if args.hflip is None else args.hflip
    # Small images keep their pixels under a padded window; resampled crops are for photos, or on demand.
    crop = "none" if aug == "none" else "rrc" if aug == "photo" or args.scale else "pad"
    geometry = Geometry(
        crop,
        padding=min(4, max(1, size[0] // 8)),
        scale=args.scale or SCALES.get(aug),
        hflip=0.0 if aug == "none" else hflip,
        vflip=args.vflip,
    )
    jitter = PHOTO_JITTER if aug == "photo" and args.color_jitter is None else args.color_jitter
    batch_transform = BatchTransform(
        meta["mean"],
        meta["std"],
        size=size,
        # Files were cropped and flipped in the workers; in-memory sets are augmented here, by the batch.
        geometry=geometry if in_memory else Geometry(),
        aa=args.aa if in_memory else None,
        color_jitter=jitter if in_memory and not args.aa else None,
        erasing=Erasing(args.reprob, args.remode, args.recount, (0.02, 0.15) if aug == "photo" else (0.02, 1 / 3)),
        seed=args.seed,
    )
    common = dict(
        batch_transform=batch_transform,
        seed=args.seed,
        in_chans=meta["in_chans"],
        num_workers=args.num_workers,
        pin_memory=args.pin_mem,
        on_bad_image=args.on_bad_image,
    )
    train_transform = build_train_transform(
        size, aug, geometry=geometry, aa=args.aa, color_jitter=args.color_jitter, mean=meta["mean"]
    )
    mixing = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    train_loader = Loader(
        train,
        transform=train_transform,
        batch_size=args.batch_size,
        train=True,
        even=mixing,
        world=world,
        fast=args.loader == "fast",
        **common,
    )
    val_loader = Loader(
        val,
        transform=build_eval_transform(size, meta["crop_pct"]),
        batch_size=args.batch_size,
        train=False,
        world=world if args.dist_eval else World(device=world.device),
        **common,
    )
    return train_loader, val_loader


def build_mixup(args, num_classes: int) -> Mixup | None:
    if not (args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None):
        return None
    return Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )


def build_noise(args) -> AlphaBlend | None:
    """The AlphaBlend that the flags describe; None when it is off."""
    if args.alpha_blend == 0:
        return None
    return AlphaBlend(
        args.alpha_blend,
        schedule=args.noise_timestep,
        prob=args.noise_prob,
        anneal=args.noise_anneal,
        tokens=args.noise_tokens,
        space=args.noise_space,
        layer=args.noise_layer,
        beta_power=args.noise_beta_power,
        noise_eval=args.noise_eval,
    )


def build_model(args, meta: dict, world: World, noise, log: RunLog):
    """The network on its device, with the weights that --finetune or --pretrained name."""
    extra = {"pretrained": True} if args.pretrained else {}
    described = {**meta, "model_kwargs": {**meta["model_kwargs"], **extra}}
    try:
        net = create_from_meta(described, drop_path=0.0 if args.eval else args.drop_path, alpha_blend=noise)
    except NoStochasticDepth:
        log.say(f"note: --drop_path {args.drop_path}: does nothing, {meta['model']} has no stochastic depth")
        net = create_from_meta(described, alpha_blend=noise)
    if args.finetune and not (args.eval and args.resume):
        report = load_pretrained(
            net, args.finetune, partial=args.partial_load, classes=meta["classes"], pos_grid=args.pos_grid
        )
        log.say(f"finetune: {args.finetune}: {report}")
        if args.eval:
            require_complete(report, args.finetune)
    if args.eval and args.resume:
        require_complete(load_pretrained(net, args.resume, pos_grid=args.pos_grid), args.resume)
    net.to(world.device)
    if is_convolutional(net):
        net.to(memory_format=torch.channels_last)
    if args.grad_checkpointing:
        enable_grad_checkpointing(net, meta["model"])
    return net


def run_fold(args, world: World, output_dir: str, fold: int) -> int:
    """One run: data, model, loop or evaluation, report. Returns the exit code."""
    source = peek_meta((args.resume if args.eval else "") or args.finetune)
    train, val = load_data(
        args.dataset, args.data_path, world, val_split=args.val_split, kfold=args.kfold, fold=fold, seed=args.split_seed
    )
    meta = resolve_meta(args, train.classes, source)
    if isinstance(train, ArrayDataset):
        if args.crop_pct is not None:
            raise UserError(f"--crop_pct {args.crop_pct}: cuts image files; {args.dataset} is evaluated whole")
        meta["crop_pct"] = 1.0
        train, val = to_channels(train, meta["in_chans"]), to_channels(val, meta["in_chans"])
    if args.eval and source:
        given = f"--resume {args.resume}" if args.resume else f"--finetune {args.finetune}"
        refuse_other_classes(given, source.get("classes"), meta["classes"])
    seed_all(args.seed, 0)  # initial weights are the same on every rank
    noise = build_noise(args) if args.noise_eval or not args.eval else None
    log = claim(
        None if args.eval or args.dry_run else output_dir,
        "finetune",
        world,
        log_dir=args.log_dir,
        resume=args.resume,
        overwrite=args.overwrite,
    )
    net = build_model(args, meta, world, noise, log)
    precision = Precision(args.amp, world.device, net)
    loaders = build_loaders(args, meta, train, val, world)
    global_batch, batch_text = effective_batch(loaders[0], args.accum_iter)
    lr = args.blr * global_batch / 256 if args.lr is None else args.lr
    training = "" if args.eval else f", {batch_text}, lr {lr:.3g}"
    log.say(
        f"{meta['model']} on {args.dataset}: {len(train)} train, {len(val)} val, {len(train.classes)} classes; "
        f"{describe_input(args, meta, source)}; {world.size} x {world.device}, {precision}{training}"
    )
    for note in notes_of(train, val):
        log.say(f"note: {note}")
    if args.eval:
        try_forward(net.eval(), meta, 1)
        prepare_net(net, precision)
        result = evaluate(net, loaders[1], precision, meta["num_classes"])
        log.say("  ".join(f"{k}: {v:.4f}" for k, v in result.scores().items()))
        log.say(f"Accuracy of the network on the {result.confusion.sum()} test images: {result.acc1:.2f}%")
        return 0
    freezing(args, in_head_phase=not args.epochs)(net.train())
    try_forward(net, meta, min(2, loaders[0].order.batch_size))
    for note in prepare_net(net, precision, (meta["in_chans"], *meta["img_size"])):
        log.say(note)
    if args.dry_run:
        groups = param_groups(net, weight_decay=args.weight_decay, layer_decay=args.layer_decay)
        log.say(describe(args, meta, net, groups, loaders[0], precision, global_batch, lr))
        return 0

    run = Run(
        world,
        log,
        kind="finetune",
        options=vars(args),
        meta=meta,
        save_freq=args.save_freq,
        keep=args.keep,
        flags=get_args_parser().flags,
    )
    run.follow(loaders[0], args.accum_iter)
    interrupts = Interrupts(args.save_every_minutes, args.timeout_minutes)
    try:
        return fit(args, world, fold, run, net, noise, loaders, precision, interrupts, lr)
    finally:
        interrupts.close()
        log.close()


def fit(args, world: World, fold: int, run: Run, net, noise, loaders, precision, interrupts, lr: float) -> int:
    """Train from where --resume says to the last epoch; after each one evaluate, log and save."""
    train_loader, val_loader = loaders
    train, val, log, meta = train_loader.data, val_loader.data, run.log, run.meta
    ema = build_ema(net, args.ema_decay)
    if args.compile:
        compile_net(net)
    profiler = (
        StepProfiler(args.profile, log, world.device, precision.dtype) if args.profile and log.output_dir else None
    )
    best_net = net if ema is None else ema.module
    mixup = build_mixup(args, meta["num_classes"])
    criterion = Criterion(args.smoothing, class_weights(args, train, meta["num_classes"])).to(world.device)
    content = run.find(args.resume) if args.resume else None
    start, total_epochs = content["epoch"] if content else args.start_epoch, args.head_epochs + args.epochs
    in_head_phase = start < args.head_epochs
    model, optimizer = enter_phase(args, net, in_head_phase, lr, world)
    if content:
        # Saved at the end of the head phase: its optimizer knows the head only, and the next phase starts its own.
        at_boundary = args.head_epochs and content["epoch"] == args.head_epochs and content["step"] == 0
        run.restore(content, net, None if at_boundary else optimizer, precision.scaler, ema, args.force_resume)
    else:
        run.start_at(start, total_epochs)
    run.plan(total_epochs)
    position, was_finished = run.position, run.position.finished
    if position.best_by not in ("", args.eval_metric):  # --force_resume: the best so far is another metric's
        position.best = None
    log.start(start + position.step / len(train_loader))
    if not was_finished:
        log.write_args({**vars(args), "resolved": meta, "lr": lr})

    while not position.finished:
        epoch, tic = position.epoch, time.time()
        if (epoch < args.head_epochs) != in_head_phase:
            in_head_phase = False
            model, optimizer = enter_phase(args, net, in_head_phase, lr, world)
        if noise is not None:
            noise.set_progress(max(0, epoch - args.head_epochs) / max(1, args.epochs))
        stats = train_one_epoch(
            model,
            train_loader,
            optimizer,
            criterion,
            precision,
            run,
            interrupts,
            lr_at_epoch=phase_schedule(args, lr, in_head_phase),
            accum_iter=args.accum_iter,
            clip_grad=args.clip_grad,
            mixup=None if in_head_phase else mixup,
            ema=ema,
            freeze=freezing(args, in_head_phase),
            seed=args.seed,
            print_freq=args.print_freq,
            max_bad_steps=args.max_bad_steps,
            profiler=profiler,
        )
        if stats is None:
            return run.stopped()
        seconds = time.time() - tic
        broadcast_buffers(best_net)
        result = evaluate(
            best_net,
            val_loader,
            precision,
            meta["num_classes"],
            collect=args.kfold > 0,
            poll=lambda: interrupts.poll()[0],
        )
        if result is None:
            run.save(run.state(net, optimizer, precision.scaler, ema))
            return run.stopped()
        scores = result.scores()
        value = -scores["loss"] if args.eval_metric == "loss" else scores[args.eval_metric]
        # Where an image's probabilities are NaN, the accuracy is that of another image's class.
        is_best = position.improves(value if math.isfinite(scores["loss"]) else math.nan)
        if is_best:
            position.best, position.best_epoch, position.best_by = value, epoch, args.eval_metric
            if log.output_dir and args.kfold:
                folds.write_oof(log.output_dir, fold, val, result)
        line = {
            **{f"train_{k}": v for k, v in stats.items()},
            **{f"val_{k}": v for k, v in scores.items()},
            "epoch": epoch,
            "n_parameters": sum(p.numel() for p in net.parameters()),
            "bad_steps": position.bad_total,
            "seconds": round(seconds, 2),
            **run.speed,
        }
        if not math.isfinite(scores["loss"]):
            log.say(f"warning: epoch {epoch}: the validation loss is {scores['loss']}, so it is not the best epoch")
        log.scalars({f"val/{k}": v for k, v in scores.items()}, (epoch + 1) * 1000)
        log.epoch(line)
        log.say(
            f"epoch {epoch}: train loss {stats['loss']:.4f}  "
            + "  ".join(f"val {k} {v:.2f}" for k, v in scores.items())
            + f"  ({seconds:.1f} s, {run.describe_speed()}){'  *' if is_best else ''}"
        )
        position.next_epoch()
        waited = 0 if in_head_phase else epoch - max(position.best_epoch, args.head_epochs)
        stop_early = bool(args.patience) and waited >= args.patience
        position.finished = stop_early or position.epoch >= total_epochs
        run.save(run.state(net, optimizer, precision.scaler, ema), finished_epoch=epoch, is_best=is_best)
        if is_best and log.output_dir:
            plot_confusion(result.confusion, train.classes, log.path("confusion.png"))
        if stop_early:
            log.say(f"--patience {args.patience}: no gain since epoch {position.best_epoch}, stopped")
    if profiler is not None:
        profiler.close()
    if log.output_dir and not (was_finished and os.path.exists(log.path("report.md"))):
        with survive(log.path("report.md")):
            validated = len(val) - len(val_loader.bad_images)
            write_finetune_report(log.output_dir, args, meta, position, notes_of(train, val), validated)
    return 0


def class_weights(args, train, num_classes: int) -> torch.Tensor | None:
    """`balanced`: n / (C n_c), scikit-learn's rule, so that the mean weight over the training set is 1.

    C counts the classes that have images; the others, those of --nb_classes above the data's, have weight 0.
    """
    if args.class_weights == "none":
        return None
    counts = torch.bincount(train.targets, minlength=num_classes).float()
    return torch.where(counts > 0, len(train) / ((counts > 0).sum() * counts), 0.0)


def main(argv: list[str] | None = None) -> int:
    args = get_args_parser().parse_args(argv)
    check_finetune_options(args)
    limit_pixels(args.max_pixels)
    world = init_world(args.device, args.dist_url, args.timeout_minutes, args.deterministic)
    args.loader = choose_loader(args.loader, args.dataset, world)
    if args.compile:
        require_compiler(world.device)
    if args.kfold and args.fold == "all":
        return folds.run_all(args, get_args_parser().flags, world, run_fold)
    if args.kfold:
        one, output_dir = folds.of_fold(args, int(args.fold))
        return run_fold(one, world, output_dir, int(args.fold))
    return run_fold(copy.copy(args), world, args.output_dir, 0)


if __name__ == "__main__":
    options.run_main(main)
