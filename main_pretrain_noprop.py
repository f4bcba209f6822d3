"""Pretrain a masked ViT encoder with T decoders, each a denoiser for one noise level, without propagation between them.

    python main_pretrain_noprop.py --dataset cifar10 --data_path data --batch_size 128 --lr 1.5e-4 \\
        --mask_ratio 0.75 --T 4 --epochs 1600 --output_dir output/mae_cifar10_noprop
"""

from util.cli.pretrain import PretrainOptions, get_args_parser, get_options  # noqa: F401 (get_args_parser: MAE's name)
from util.cli.script import check_command_line, run_main, says_flags

if __name__ == "__main__":  # report a mistyped flag before importing torch, which takes seconds
    check_command_line(get_options)

import os
from dataclasses import asdict, replace
from functools import partial

import torch

from augment.batch import BatchTransform
from augment.image import Geometry, build_train_transform
from engine_pretrain import EncoderFirst, train_one_epoch
from models.noprop_mae import NoPropMAE
from util.cli.dry_run import describe
from util.cli.resolve import Source
from util.cli.settings import Data
from util.data.datasets import ArrayDataset, Dataset, notes_of, to_channels
from util.data.loader import Loader, evaluation_loader
from util.data.splits import read_splits
from util.data_specs import DATASETS
from util.dist import Precision, World, broadcast_object, prepare_net, wrap_ddp
from util.errors import UserError
from util.files import survive
from util.lr_sched import lr_at
from util.optim import build_adamw, param_groups
from util.report.pictures import reconstruction_grid
from util.report.training import write_pretrain_report
from util.seed import mix, seed_all
from util.train.compiled import compile_noprop
from util.train.loop import effective_batch
from util.train.run import Found, Run, Training, begin, find_checkpoint, open_log

NUM_PICTURES = 8
NUM_MEASURED = 4096  # images for measuring sigma_data


@says_flags
def main(argv: list[str] | None = None) -> int:
    options, world = begin(get_options(argv))
    dry_run = options.run.dry_run
    log = open_log(options.run, "pretrain", world, writes=not dry_run)
    meta, origin = resolve_meta(options)
    train, held_out = read_images(options.data, world, meta["in_chans"])
    loader, picture_loader, measured_loader = build_loaders(options, meta, train, held_out, world)
    if options.masking.vis_freq and options.run.output_dir:
        next(iter(picture_loader.epoch()))  # report unreadable images now, not at the first picture
    found = None if dry_run else find_checkpoint(options.run, log, world)
    sigma_data = options.noprop.sigma_data
    if sigma_data is None and found:
        sigma_data = saved_sigma_data(found)  # it is part of the trained network
    if sigma_data is None:
        measured = measure_std(measured_loader) if world.is_main and options.noprop.target == "pixel" else 1.0
        sigma_data = broadcast_object(measured)
    del measured_loader  # ends its processes
    options = options.having(sigma_data=sigma_data, patch_size=meta["noprop"]["patch_size"])

    seed_all(options.machine.seed, 0)  # the same initial weights on every rank
    net = NoPropMAE(**meta["noprop"], sigma_data=sigma_data).to(world.device)
    meta |= {"noprop": net.config(), "sigmas": net.sigmas}
    precision = Precision(options.machine.amp, world.device, net)
    prepare_net(net, precision)
    global_batch, batch_words = effective_batch(loader, options.optimizer)
    lr = options.optimizer.lr_for(global_batch)
    log.say(
        f"NoProp-MAE on {options.data.dataset}: {len(train)} images; {origin.words(meta)}; "
        f"{sum(p.numel() for p in net.parameters()):,} parameters, "
        f"sigma {', '.join(f'{s:.4g}' for s in net.sigmas)}, sigma_data {sigma_data:.3f}; "
        f"{world.size} x {world.device}, {precision}, {batch_words}, lr {lr:.3g}"
    )
    log.notes(notes_of(train, held_out))
    groups = param_groups(net, weight_decay=options.optimizer.weight_decay)
    if dry_run:
        one_decoder = partial(first_loss, net, mask_ratio=options.masking.mask_ratio)
        log.say(describe(options, meta, origin, net, groups, loader, precision, one_decoder))
        return 0
    with Run(options, world, log, meta=meta, loader=loader) as run:
        return fit(run, net, groups, precision, picture_loader, lr, found)


def fit(
    run: Run,
    net: NoPropMAE,
    groups: list[dict],
    precision: Precision,
    picture_loader: Loader,
    lr: float,
    found: Found | None,
) -> int:
    """Train from `found`, or from scratch; log, save and draw each epoch. Returns the exit code."""
    options, optimizer, masking, log, loader = (
        run.options,
        run.options.optimizer,
        run.options.masking,
        run.log,
        run.loader,
    )
    model = wrap_ddp(EncoderFirst(net), run.world)
    if options.machine.compile:
        compile_noprop(net)
    curve = dict(min_lr=optimizer.min_lr, warmup_epochs=optimizer.warmup_epochs, epochs=optimizer.epochs)
    training = Training(
        net,
        model,
        build_adamw(groups, lr=lr, betas=(0.9, 0.95)),
        precision,
        lr_at=lambda epoch: lr_at(epoch, lr=lr, **curve),
    )
    run.begin(training, optimizer.epochs, found, lr=lr)
    position = run.position

    def pictures_due() -> bool:
        return masking.vis_freq > 0 and (position.epoch % masking.vis_freq == 0 or position.finished)

    if (
        options.run.resume and position.epoch and position.step == 0 and pictures_due()
    ):  # the run was killed between saving and drawing
        save_pictures(run, net, picture_loader, position.epoch - 1, only_missing=True)
    for epoch in run.epochs():
        stats = train_one_epoch(
            training,
            loader,
            run,
            mask_ratio=masking.mask_ratio,
            mask_ratio_max=masking.mask_ratio_max,
            clip_grad=optimizer.clip_grad,
        )
        if stats is None:
            return run.stopped()
        parts = " + ".join(f"{v:.3g}" for k, v in stats.items() if k.startswith("loss_"))
        log.say(f"epoch {epoch}: loss {stats['loss']:.4f} = {parts}  ({run.describe_speed()})")
        run.end_epoch(training, {f"train_{k}": v for k, v in stats.items()})
        if pictures_due():
            save_pictures(run, net, picture_loader, epoch)
    notes = notes_of(loader.data, picture_loader.data)
    run.report(lambda folder: write_pretrain_report(folder, options, run.meta, notes))
    return 0


def resolve_meta(options: PretrainOptions) -> tuple[dict, Source]:
    """(meta, source of the input). Fine-tuning, the probe and samples rebuild the net from meta.

    `noprop` has NoPropMAE's keywords without sigma_data, which may have to be measured.
    """
    noprop, spec = options.noprop, DATASETS[options.data.dataset]
    in_chans = options.input.in_chans or spec.in_chans
    size = options.input.size or (spec.img_size, spec.img_size)
    mean, std = options.input.normalisation(in_chans, spec.normalisation(in_chans))
    patch_size = noprop.patch_size or (2 if min(size) < 16 else 4 if min(size) <= 64 else 16)
    keywords = {**asdict(noprop), "patch_size": patch_size, "img_size": size, "in_chans": in_chans}
    del keywords["sigma_data"]
    named = "the data set's"
    given = [
        flag for flag, value in (("--mean", options.input.mean), ("--std", options.input.std)) if value is not None
    ]
    origin = Source("--input_size" if options.input.size else named, " and ".join(given) or named)
    return {
        "kind": "pretrain",
        "model": f"vit_custom_patch{patch_size}",
        "model_kwargs": {k: keywords[k] for k in ("embed_dim", "depth", "num_heads", "mlp_ratio")},
        "global_pool": True,
        "img_size": list(size),
        "in_chans": in_chans,
        "num_classes": 0,
        "mean": list(mean),
        "std": list(std),
        "dataset": options.data.dataset,
        "noprop": keywords,
    }, origin


def read_images(data: Data, world: World, in_chans: int) -> tuple[Dataset, Dataset]:
    """(training images, images for the pictures: held-out ones if there are any, else the training images)."""
    train, held_out = read_splits(data, world, labelled=False)
    held_out = train if held_out is None else held_out
    if isinstance(train, ArrayDataset):
        train, held_out = to_channels(train, in_chans), to_channels(held_out, in_chans)
    return train, held_out


def build_loaders(
    options: PretrainOptions, meta: dict, train: Dataset, held_out: Dataset, world: World
) -> tuple[Loader, Loader, Loader]:
    """Loaders for training, for pictures, and for measuring sigma_data; the last does not depend on the ranks."""
    reading, seed, size = options.reading, options.machine.seed, tuple(meta["img_size"])
    in_memory = isinstance(train, ArrayDataset)
    hflip = options.augmentation.hflip
    hflip = DATASETS[options.data.dataset].hflip if hflip is None else hflip
    geometry = Geometry(hflip=hflip)
    batch_transform = BatchTransform(
        meta["mean"], meta["std"], size=size, geometry=geometry if in_memory else Geometry(), seed=seed
    )
    transform, alone = build_train_transform(size, "pretrain", geometry=geometry), World(device=world.device)
    common = dict(transform=transform, batch_transform=batch_transform, reading=reading)
    train_loader = Loader(train, batch_size=options.optimizer.batch_size, train=True, world=world, **common)
    some = torch.randperm(len(train), generator=torch.Generator().manual_seed(mix(seed)))[:NUM_MEASURED]
    measured_loader = Loader(train.subset(some), batch_size=64, train=False, world=alone, **common)
    measured_loader.bad_images = train_loader.bad_images  # each is reported once
    few = held_out.subset(torch.linspace(0, len(held_out) - 1, min(NUM_PICTURES, len(held_out))).long())
    here = replace(reading, num_workers=0)
    picture_loader = evaluation_loader(few, meta, alone, batch_size=NUM_PICTURES, reading=here)
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


def saved_sigma_data(found: Found) -> float:
    value = found.content["meta"].get("noprop", {}).get("sigma_data")
    if not isinstance(value, float) or not value > 0:
        raise UserError(f"--resume {found.path}: its meta lacks sigma_data; give --sigma_data")
    return value


def first_loss(net: NoPropMAE, images: torch.Tensor, mask_ratio: float) -> torch.Tensor:
    """For --dry_run: a step keeps the activations of the encoder and one decoder at a time."""
    ids_keep, ids_mask = net.random_masking(len(images), mask_ratio)
    latent, pos = net.encode(images, ids_keep), net.decoder_positions(ids_keep, ids_mask)
    return net.decoder_loss(0, net.targets(images, ids_mask), latent, pos)


def save_pictures(run: Run, net: NoPropMAE, loader: Loader, epoch: int, *, only_missing: bool = False) -> None:
    """reconstruction_epoch_N.png, also in TensorBoard, with the same masks and noise every time."""
    log, meta, masking = run.log, run.meta, run.options.masking
    if not log.output_dir:
        return
    path = log.path(f"reconstruction_epoch_{epoch}.png")
    if only_missing and os.path.exists(path):
        return
    with survive(path):
        images = next(iter(loader.epoch())).images
        generator = torch.Generator(device=images.device).manual_seed(run.options.machine.seed)
        net.eval()
        out = net.reconstruct(images, masking.mask_ratio, sampler=masking.vis_type, generator=generator)
        picture = reconstruction_grid(images, out, meta["mean"], meta["std"], path, net.sigmas[:-1])
        # Like the epoch's other values, dropped if the epoch is repeated.
        log.image("reconstruction", picture, (epoch + 1) * 1000)
        log.flush()  # the file's existence means that both are written


if __name__ == "__main__":
    run_main(main)
