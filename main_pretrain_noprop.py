"""Pretrain a masked ViT encoder with T decoders, each a denoiser of one noise level, no propagation between them.

    python main_pretrain_noprop.py --dataset cifar10 --data_path data --batch_size 128 --lr 1.5e-4 \\
        --mask_ratio 0.75 --T 4 --epochs 1600 --output_dir output/mae_cifar10_noprop
"""

from util.cli import parser as options
from util.cli.pretrain import check_pretrain_options, get_args_parser

if __name__ == "__main__":  # a mistyped flag is answered before torch is imported, which takes seconds
    options.check_command_line(get_args_parser, check_pretrain_options)

import os
import time

import torch

from augment.batch import BatchTransform
from augment.decoding import limit_pixels
from augment.image import Geometry, build_eval_transform, build_train_transform
from engine_pretrain import EncoderFirst, train_one_epoch
from models.noprop_mae import NoPropMAE
from util.cli.dry_run import describe
from util.data.datasets import ArrayDataset, notes_of, read_split, to_channels
from util.data.loader import Loader, choose_loader
from util.data_specs import DATASETS
from util.dist import Precision, World, barrier, broadcast_object, init_world, prepare_net
from util.errors import UserError
from util.files import survive
from util.log import RunLog, claim
from util.lr_sched import lr_at
from util.optim import build_adamw, param_groups
from util.report.pictures import reconstruction_grid
from util.report.training import write_pretrain_report
from util.seed import mix, seed_all
from util.train.compiled import compile_noprop, require_compiler
from util.train.interrupts import Interrupts
from util.train.profile import StepProfiler
from util.train.run import Run, wrap_ddp
from util.train.steps import effective_batch

NUM_PICTURES = 8
NUM_MEASURED = 4096  # images that tell --sigma_data


def read_images(args, world: World, in_chans: int):
    """(training images, held-out images for the pictures; the training ones where there are no others)."""
    if world.is_main:  # first and alone, so that a download happens once
        read_split(args.dataset, args.data_path, "train", labelled=False)
    barrier()
    train, val = (read_split(args.dataset, args.data_path, s, labelled=False) for s in ("train", "val"))
    if isinstance(train, ArrayDataset):
        train, val = to_channels(train, in_chans), to_channels(val, in_chans)
    return train, train if val is None else val


def build_loaders(args, train, held_out, size, in_chans: int, mean, std, world: World) -> tuple[Loader, Loader, Loader]:
    """Loaders of training, of the pictures, and of the images that --sigma_data is measured on, the same on any ranks."""
    in_memory = isinstance(train, ArrayDataset)
    hflip = DATASETS[args.dataset].hflip if args.hflip is None else args.hflip
    geometry = Geometry(hflip=hflip)
    batch_transform = BatchTransform(
        mean, std, size=size, geometry=geometry if in_memory else Geometry(), seed=args.seed
    )
    common = dict(
        batch_transform=batch_transform,
        seed=args.seed,
        in_chans=in_chans,
        pin_memory=args.pin_mem,
        on_bad_image=args.on_bad_image,
    )
    transform, alone = build_train_transform(size, "pretrain", geometry=geometry), World(device=world.device)
    train_loader = Loader(
        train,
        transform=transform,
        batch_size=args.batch_size,
        train=True,
        world=world,
        num_workers=args.num_workers,
        fast=args.loader == "fast",
        **common,
    )
    some = torch.randperm(len(train), generator=torch.Generator().manual_seed(mix(args.seed)))[:NUM_MEASURED]
    measured_loader = Loader(
        train.subset(some),
        transform=transform,
        batch_size=64,
        train=False,
        world=alone,
        num_workers=args.num_workers,
        **common,
    )
    measured_loader.bad_images = train_loader.bad_images  # each is named once
    few = held_out.subset(torch.linspace(0, len(held_out) - 1, min(NUM_PICTURES, len(held_out))).long())
    picture_loader = Loader(
        few, transform=build_eval_transform(size), batch_size=NUM_PICTURES, train=False, world=alone, **common
    )
    return train_loader, picture_loader, measured_loader


def measure_std(loader: Loader) -> float:
    """Standard deviation of the normalised pixels of a loader's images."""
    count, total, squares = 0, 0.0, 0.0
    for batch in loader.epoch():
        x = batch.images.double() if batch.images.device.type != "mps" else batch.images
        count, total, squares = count + x.numel(), total + x.sum().item(), squares + x.square().sum().item()
    if not count:
        raise UserError(f"--data_path: none of {len(loader.data)} images can be read")
    return max(squares / count - (total / count) ** 2, 1e-12) ** 0.5


def saved_sigma_data(content: dict, path: str) -> float:
    value = content["meta"].get("noprop", {}).get("sigma_data")
    if not isinstance(value, float) or not value > 0:
        raise UserError(f"--resume {path}: its meta lacks sigma_data; give --sigma_data")
    return value


def save_pictures(
    net: NoPropMAE, loader: Loader, args, meta: dict, log: RunLog, epoch: int, *, only_missing: bool = False
) -> None:
    """reconstruction_epoch_N.png and the same in TensorBoard; the same masks and noise every time."""
    if not log.output_dir:
        return
    path = log.path(f"reconstruction_epoch_{epoch}.png")
    if only_missing and os.path.exists(path):
        return
    with survive(path):
        images = next(iter(loader.epoch())).images
        generator = torch.Generator(device=images.device).manual_seed(args.seed)
        net.eval()
        out = net.reconstruct(images, args.mask_ratio, sampler=args.vis_type, generator=generator)
        picture = reconstruction_grid(
            images,
            out["masked"],
            out["steps"],
            out["final"],
            meta["mean"],
            meta["std"],
            path,
            net.sigmas[:-1],
            mask=out["mask"],
        )
        # As the epoch's other values: dropped if it is done again.
        log.image("reconstruction", picture, (epoch + 1) * 1000)
        log.flush()  # the picture's file says that both are there


def main(argv: list[str] | None = None) -> int:
    args = get_args_parser().parse_args(argv)
    check_pretrain_options(args)
    limit_pixels(args.max_pixels)
    world = init_world(args.device, args.dist_url, args.timeout_minutes, args.deterministic)
    args.loader = choose_loader(args.loader, args.dataset, world)
    if args.compile:
        require_compiler(world.device)
    spec = DATASETS[args.dataset]
    in_chans = args.in_chans or spec.in_chans
    size = options.image_size(args.input_size) or (spec.img_size, spec.img_size)
    mean, std = options.choose_normalisation(args, in_chans, spec.normalisation(in_chans))
    if args.patch_size is None:
        args.patch_size = 2 if min(size) < 16 else 4 if min(size) <= 64 else 16
    sizes = {k: getattr(args, k) for k in ("embed_dim", "depth", "num_heads", "mlp_ratio")}
    keywords = dict(
        img_size=size,
        patch_size=args.patch_size,
        in_chans=in_chans,
        **sizes,
        decoder_embed_dim=args.decoder_embed_dim,
        decoder_depth=args.decoder_depth,
        decoder_num_heads=args.decoder_num_heads,
        T=args.T,
        sigma_min=args.sigma_min,
        sigma_max=args.sigma_max,
        rho=args.rho,
        target=args.target,
        propagate=args.propagate,
        loss_weighting=args.loss_weighting,
        use_checkpoint=args.use_checkpoint,
    )
    log = claim(
        None if args.dry_run else args.output_dir,
        "pretrain",
        world,
        log_dir=args.log_dir,
        resume=args.resume,
        overwrite=args.overwrite,
    )

    train, held_out = read_images(args, world, in_chans)
    loader, picture_loader, measured_loader = build_loaders(args, train, held_out, size, in_chans, mean, std, world)
    if args.vis_freq and args.output_dir:
        next(iter(picture_loader.epoch()))  # what cannot be read is told now, not at the first picture
    run = Run(
        world,
        log,
        kind="pretrain",
        options=vars(args),
        meta={},
        save_freq=args.save_freq,
        keep=args.keep,
        flags=get_args_parser().flags,
    )
    run.follow(loader, args.accum_iter)
    content = run.find(args.resume) if args.resume and not args.dry_run else None
    if args.sigma_data is None and content:
        args.sigma_data = saved_sigma_data(content, args.resume)  # part of the network that was trained
    if args.sigma_data is None:
        measured = measure_std(measured_loader) if world.is_main and args.target == "pixel" else 1.0
        args.sigma_data = broadcast_object(measured)
    del measured_loader  # and its processes
    seed_all(args.seed, 0)  # initial weights are the same on every rank
    net = NoPropMAE(**keywords, sigma_data=args.sigma_data).to(world.device)
    precision = Precision(args.amp, world.device, net)
    prepare_net(net, precision)
    # What fine-tuning, probing and sampling need to rebuild this encoder, or all of it, without a flag.
    run.meta = meta = {
        "kind": "pretrain",
        "model": f"vit_custom_patch{args.patch_size}",
        "model_kwargs": sizes,
        "global_pool": True,
        "img_size": list(size),
        "in_chans": in_chans,
        "num_classes": 0,
        "mean": list(mean),
        "std": list(std),
        "dataset": args.dataset,
        "noprop": net.config(),
        "sigmas": net.sigmas,
    }
    global_batch, batch_text = effective_batch(loader, args.accum_iter)
    lr = args.blr * global_batch / 256 if args.lr is None else args.lr
    groups = param_groups(net, weight_decay=args.weight_decay)
    log.say(
        f"NoProp-MAE on {args.dataset}: {len(train)} images, {sum(p.numel() for p in net.parameters()):,} parameters, "
        f"sigma {', '.join(f'{s:.4g}' for s in net.sigmas)}, sigma_data {args.sigma_data:.3f}; "
        f"{world.size} x {world.device}, {precision}, {batch_text}, lr {lr:.3g}"
    )
    for note in notes_of(train, held_out):
        log.say(f"note: {note}")
    if args.dry_run:

        def one_decoder(images):  # the step keeps the encoder's activations and one decoder's at a time
            ids_keep, ids_mask = net.random_masking(len(images), args.mask_ratio)
            latent, pos = net.encode(images, ids_keep), net.decoder_positions(ids_keep, ids_mask)
            return net.decoder_loss(0, net.targets(images, ids_mask), latent, pos)

        log.say(describe(args, meta, net, groups, loader, precision, global_batch, lr, one_decoder))
        return 0

    interrupts = Interrupts(args.save_every_minutes, args.timeout_minutes)
    try:
        return fit(args, world, run, net, groups, (loader, picture_loader), precision, interrupts, lr, content)
    finally:
        interrupts.close()
        log.close()


def fit(
    args,
    world: World,
    run: Run,
    net: NoPropMAE,
    groups: list,
    loaders,
    precision,
    interrupts,
    lr: float,
    content: dict | None,
) -> int:
    """Train from where the checkpoint `content` was, or anew, to the last epoch; after each one log, draw and save."""
    loader, picture_loader = loaders
    log, meta = run.log, run.meta
    optimizer = build_adamw(groups, lr=lr, betas=(0.9, 0.95))
    model = wrap_ddp(EncoderFirst(net), world)
    if args.compile:
        compile_noprop(net)
    profiler = (
        StepProfiler(args.profile, log, world.device, precision.dtype) if args.profile and log.output_dir else None
    )
    if content:
        run.restore(content, net, optimizer, precision.scaler, force=args.force_resume)
    else:
        run.start_at(args.start_epoch, args.epochs)
    run.plan(args.epochs)
    position, was_finished = run.position, run.position.finished
    log.start(position.epoch + position.step / len(loader))
    if not was_finished:
        log.write_args({**vars(args), "resolved": meta, "lr": lr})

    def pictures_due() -> bool:
        return args.vis_freq > 0 and (position.epoch % args.vis_freq == 0 or position.finished)

    if args.resume and position.epoch and position.step == 0 and pictures_due():  # killed between save and pictures?
        save_pictures(net, picture_loader, args, meta, log, position.epoch - 1, only_missing=True)

    while position.epoch < args.epochs:
        epoch, tic = position.epoch, time.time()
        stats = train_one_epoch(
            model,
            loader,
            optimizer,
            precision,
            run,
            interrupts,
            lr_at_epoch=lambda e: lr_at(
                e, lr=lr, min_lr=args.min_lr, warmup_epochs=args.warmup_epochs, epochs=args.epochs
            ),
            mask_ratio=args.mask_ratio,
            mask_ratio_max=args.mask_ratio_max,
            accum_iter=args.accum_iter,
            clip_grad=args.clip_grad,
            seed=args.seed,
            print_freq=args.print_freq,
            max_bad_steps=args.max_bad_steps,
            profiler=profiler,
        )
        if stats is None:
            return run.stopped()
        seconds = time.time() - tic
        line = {
            **{f"train_{k}": v for k, v in stats.items()},
            "epoch": epoch,
            "n_parameters": sum(p.numel() for p in net.parameters()),
            "bad_steps": position.bad_total,
            "seconds": round(seconds, 2),
            **run.speed,
        }
        log.epoch(line)
        log.scalars({f"epoch/{k}": v for k, v in stats.items()}, (epoch + 1) * 1000)
        levels = " ".join(f"{v:.2e}" for k, v in stats.items() if k.startswith("loss_"))
        log.say(
            f"epoch {epoch}: loss {stats['loss']:.4f}  per level {levels}  ({seconds:.1f} s, {run.describe_speed()})"
        )
        position.next_epoch()
        position.finished = position.epoch >= args.epochs
        run.save(run.state(net, optimizer, precision.scaler), finished_epoch=epoch)
        if pictures_due():
            save_pictures(net, picture_loader, args, meta, log, epoch)
    if profiler is not None:
        profiler.close()
    if log.output_dir and not (was_finished and os.path.exists(log.path("report.md"))):
        with survive(log.path("report.md")):
            write_pretrain_report(log.output_dir, args, meta, notes_of(loader.data, picture_loader.data))
    return 0


if __name__ == "__main__":
    options.run_main(main)
