"""Pictures and measures from a pretraining checkpoint: reconstructions, generated images, attention, Frechet distances.

python main_sample.py output/mae_cifar10_noprop/checkpoint-last.pth
python main_sample.py checkpoint-last.pth --images cat.jpg holiday/ --mode reconstruct attention
python main_sample.py checkpoint-last.pth --mode generate frechet --num_samples 5000 --inception_weights download
"""

from util.cli.sample import get_args_parser, get_options  # noqa: F401 (a public name)
from util.cli.script import check_command_line, run_main

if __name__ == "__main__":  # a mistyped flag is answered before torch is imported, which takes seconds
    check_command_line(get_options)

import os
from argparse import Namespace

import torch

from augment.batch import BatchTransform
from augment.decoding import limit_pixels
from augment.image import build_eval_transform
from util.data.datasets import ArrayDataset, FileDataset, notes_of, read_split, to_channels
from util.data.image_files import Found, find_images, refuse_output_among_images
from util.data.loader import Loader
from util.data_specs import IN_MEMORY
from util.dist import World, init_world
from util.errors import UserError
from util.log import RunLog, claim
from util.probe.frechet import EncoderFeatures, find_inception, load_inception
from util.probe.frozen import load_noprop, resolve_data
from util.probe.sampling import Study
from util.report.markdown import note_lines, write_report
from util.seed import mix


def read_images(args, in_chans: int):
    """(images to look at, other images of the same kind or None, what they are called)."""
    if args.images:
        paths, notes = [], []
        for path in args.images:
            found = find_images(path) if os.path.isdir(path) else Found([path])
            if not found.paths:
                raise UserError(f"--images {path}: no images in it")
            paths += found.paths
            notes += found.notes(path)
        return FileDataset(paths, torch.full((len(paths),), -1), notes=notes), None, "given images"
    held_out = read_split(args.dataset, args.data_path, "val", labelled=False)
    data = held_out or read_split(args.dataset, args.data_path, "train", labelled=False)
    name = f"{'held-out' if held_out else 'training'} images of {args.dataset}"
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(mix(args.seed)))
    first, second = (
        data.subset(part) for part in (order[: args.num_samples], order[args.num_samples :][: args.num_samples])
    )
    if isinstance(data, ArrayDataset):
        first, second = to_channels(first, in_chans), to_channels(second, in_chans)
    return first, second if len(second) == len(first) else None, name


def build_loader(args, data, meta: dict, world: World) -> Loader:
    size = tuple(meta["img_size"])
    return Loader(
        data,
        transform=build_eval_transform(size, crop_pct=1.0),
        in_chans=meta["in_chans"],
        train=False,
        world=world,
        batch_transform=BatchTransform(meta["mean"], meta["std"], size=size),
        batch_size=max(args.batch_size, args.num),
        num_workers=args.num_workers,
        on_bad_image=args.on_bad_image,
    )


def frechet_features(args, net, meta: dict, log: RunLog) -> torch.nn.Module:
    """Inception where its weights are at hand, else the encoder itself; says which."""
    path = find_inception(args.inception_weights)
    if path or args.inception_weights:
        features = load_inception(path)
        log.say(f"Frechet distance on Inception-v3 features ({path or 'downloaded'})")
        return features
    log.say(
        "Frechet distance on this encoder's own features (Inception's weights are not at hand; see "
        "--inception_weights): not comparable to published FIDs, nor from one checkpoint to another"
    )
    return EncoderFeatures(net, meta["mean"], meta["std"])


def table(title: str, unit: str, rows: dict[str, float]) -> list[str]:
    """A Markdown table whose columns stand in line."""
    width = max(len(title), *map(len, rows))
    head = [f"| {title:{width}} | {unit:>9} |", f"|{'-' * (width + 2)}|{'-' * 10}:|"]
    return head + [f"| {name:{width}} | {value:9.4g} |" for name, value in rows.items()]


def main(argv: list[str] | None = None) -> int:
    options = get_options(argv)
    args = Namespace(**options.flat())
    limit_pixels(args.max_pixels)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("torchrun: main_sample.py runs in one process; start it with python")
    world = init_world(args.device)
    net, content = load_noprop(args.checkpoint)
    net.to(world.device)
    meta = content["meta"]
    args = Namespace(**resolve_data(options, content).flat())
    ratios = [content["args"].get(key) for key in ("mask_ratio", "mask_ratio_max")]
    ratios = [r for r in ratios if isinstance(r, float) and 0.0 < r <= 1.0]
    args.mask_ratio = args.mask_ratio or (ratios or [0.75])[0]
    if args.output_dir is None:
        args.output_dir = os.path.join(os.path.dirname(os.path.abspath(args.checkpoint)), "samples")
    for folder in args.images or ([] if args.dataset in IN_MEMORY else [args.data_path]):
        refuse_output_among_images("--output_dir", args.output_dir, folder)
    log = claim(args.output_dir, "sample", world)
    log.say(
        f"{args.checkpoint}: NoProp-MAE after {content['epoch']} epochs on {meta.get('dataset')}, "
        f"sigma {', '.join(f'{s:.3g}' for s in net.sigmas[:-1])}; on {world.device}, amp off (fp32: what is measured is "
        "not rounded)"
    )
    if {"generate", "frechet"} & set(args.mode) and ratios and max(ratios) < 1.0:
        log.say(f"note: trained with mask ratios up to {max(ratios):g}; generating (ratio 1) is new to it")

    log.write_args(vars(args))
    study = Study(net, meta["mean"], meta["std"], args.mask_ratio, args.sampler, args.seed)
    pictures, tables, notes = [], [], []
    line = {"epoch": content["epoch"], "mask_ratio": args.mask_ratio}
    if set(args.mode) != {"generate"}:
        data, others, name = read_images(args, meta["in_chans"])
        loader = build_loader(args, data, meta, world)
        title, notes = f"{len(data)} {name}", notes_of(data)
        for note in notes:
            log.say(f"note: {note}")
    if "reconstruct" in args.mode:
        scores = study.reconstruct(loader, args.num, log.path("reconstruction_{}.png"))
        tables.append(table(f"{title}, {100 * args.mask_ratio:g}% hidden, filled by", "PSNR (dB)", scores))
        line |= {f"psnr_{k.replace(' ', '_')}": v for k, v in scores.items()}
        pictures += [f"reconstruction_{s}.png" for s in args.sampler]
    if "generate" in args.mode:
        study.draw_generated(args.num, log.path("generated_{}.png"))
        pictures += [f"generated_{s}.png" for s in args.sampler]
    if "attention" in args.mode:
        study.draw_attention(next(iter(loader.epoch())).images[: args.num], log.path("attention_{}.png"))
        pictures += ["attention_heads.png", "attention_blocks.png"]
    if "frechet" in args.mode:
        if len(data) < 2:
            raise UserError(f"--mode frechet: needs several images, got {len(data)}")
        features = frechet_features(args, net, meta, log)
        if len(data) <= features.num_features:
            log.say(
                f"note: {len(data)} images for {features.num_features} features, so the distances are too large; "
                "raise --num_samples"
            )
        distances = study.frechet(features, loader, build_loader(args, others, meta, world) if others else None)
        kind = "encoder's own features" if isinstance(features, EncoderFeatures) else "Inception features"
        tables.append(table(f"{title} against, on {kind}", "Frechet", distances))
        line |= {f"frechet_{k.replace(', ', '_').replace(' ', '_')}": v for k, v in distances.items()}
    for rows in tables:
        log.say("\n".join(rows))
    pictures = [p for p in pictures if os.path.exists(log.path(p))]  # those that the disk had room for
    log.epoch(line)
    text = [*note_lines(notes), *(part for rows in tables for part in (*rows, ""))]
    text += [f"![{p.removesuffix('.png').replace('_', ' ')}]({p})\n" for p in pictures]
    write_report(args.output_dir, f"Samples of {args.checkpoint}", text)
    log.say(f"written to {args.output_dir}: {', '.join([*pictures, 'report.md'])}")
    return 0


if __name__ == "__main__":
    run_main(main)
