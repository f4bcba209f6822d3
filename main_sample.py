"""Pictures and measurements of a pretrained net: reconstructions, generated images, attention, Frechet distances.

python main_sample.py output/mae_cifar10_noprop/checkpoint-last.pth
python main_sample.py checkpoint-last.pth --images cat.jpg holiday/ --mode reconstruct attention
python main_sample.py checkpoint-last.pth --mode generate frechet --num_samples 5000 --inception_weights download
"""

from util.cli.sample import get_args_parser, get_options  # noqa: F401 (a public name)
from util.cli.script import check_command_line, run_main, says_flags

if __name__ == "__main__":  # report a mistyped flag before importing torch, which takes seconds
    check_command_line(get_options)

import os
import time

import torch

from augment.decoding import limit_pixels
from models.noprop_mae import NoPropMAE
from util.cli.resolve import resolve_data
from util.cli.settings import Data, Sampling
from util.data.datasets import Dataset, FileDataset, notes_of, read_split
from util.data.image_files import Found, find_images, refuse_output_among_images
from util.data.loader import evaluation_loader
from util.data_specs import IN_MEMORY
from util.dist import init_world
from util.errors import UserError
from util.log import RunLog, claim
from util.probe.frechet import EncoderFeatures, find_inception, load_inception
from util.probe.frozen import load_noprop
from util.probe.sampling import Study
from util.report.page import Notes, Picture, Table, Text, markdown, write_report
from util.seed import mix


@says_flags
def main(argv: list[str] | None = None) -> int:
    options, started = get_options(argv), time.time()
    limit_pixels(options.reading.max_pixels)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("torchrun: main_sample.py runs in one process; start it with python")
    world = init_world(options.machine.device)
    net, content = load_noprop(options.sampling.checkpoint)
    net.to(world.device)
    meta = content["meta"]
    trained = [content["args"].get(key) for key in ("mask_ratio", "mask_ratio_max")]
    trained = [r for r in trained if isinstance(r, float) and 0.0 < r <= 1.0]
    options = resolve_data(options, content)
    options = options.having(
        mask_ratio=options.sampling.mask_ratio or (trained or [0.75])[0],
        output_dir=options.run.output_dir
        or os.path.join(os.path.dirname(os.path.abspath(options.sampling.checkpoint)), "samples"),
    )
    asked, data, output_dir, seed = options.sampling, options.data, options.run.output_dir, options.machine.seed
    for folder in asked.images or ([] if data.dataset in IN_MEMORY else [data.data_path]):
        refuse_output_among_images("--output_dir", output_dir, folder)
    log = claim(output_dir, "sample", world)
    log.say(
        f"{asked.checkpoint}: NoProp-MAE after {content['epoch']} epochs on {meta.get('dataset')}, sigma "
        f"{', '.join(f'{s:.3g}' for s in net.sigmas[:-1])}; on {world.device}, amp off (fp32: what is measured is not "
        "rounded)"
    )
    if {"generate", "frechet"} & set(asked.mode) and trained and max(trained) < 1.0:
        log.say(f"note: trained with mask ratios up to {max(trained):g}; it has not learned to generate (ratio 1)")

    log.write_args(options.flat())
    study = Study(net, meta["mean"], meta["std"], asked.mask_ratio, asked.sampler, seed)
    how = dict(batch_size=max(asked.batch_size, asked.num), reading=options.reading, crop_pct=1.0)
    pictures, tables, notes = [], [], []
    line = {"epoch": content["epoch"], "mask_ratio": asked.mask_ratio}
    if set(asked.mode) != {"generate"}:
        images, others, name = read_images(asked, data, seed)
        loader = evaluation_loader(images, meta, world, **how)
        title, notes = f"{len(images)} {name}", notes_of(images)
        log.notes(notes)
    if "reconstruct" in asked.mode:
        scores = study.reconstruct(loader, asked.num, log.path("reconstruction_{}.png"))
        tables.append(table(f"{title}, {100 * asked.mask_ratio:g}% hidden, filled by", "PSNR (dB)", scores))
        line |= {f"psnr_{k.replace(' ', '_')}": v for k, v in scores.items()}
        pictures += [f"reconstruction_{s}.png" for s in asked.sampler]
    if "generate" in asked.mode:
        study.draw_generated(asked.num, log.path("generated_{}.png"))
        pictures += [f"generated_{s}.png" for s in asked.sampler]
    if "attention" in asked.mode:
        study.draw_attention(next(iter(loader.epoch())).images[: asked.num], log.path("attention_{}.png"))
        pictures += ["attention_heads.png", "attention_blocks.png"]
    if "frechet" in asked.mode:
        if len(images) < 2:
            raise UserError(f"--mode frechet: needs several images, got {len(images)}")
        features = frechet_features(asked.inception_weights, net, meta, log)
        if len(images) <= features.num_features:
            log.say(
                f"note: {len(images)} images for {features.num_features} features, so the distances are too large; "
                "raise --num_samples"
            )
        distances = study.frechet(features, loader, evaluation_loader(others, meta, world, **how) if others else None)
        kind = "encoder's own features" if isinstance(features, EncoderFeatures) else "Inception features"
        tables.append(table(f"{title} against, on {kind}", "Frechet", distances))
        line |= {f"frechet_{k.replace(', ', '_').replace(' ', '_')}": v for k, v in distances.items()}
    for one in tables:
        log.say(markdown([one]).rstrip())
    pictures = [p for p in pictures if os.path.exists(log.path(p))]  # those that could be written
    log.epoch(line)
    shown = [Picture(p.removesuffix(".png").replace("_", " "), p) for p in pictures]
    words = f"NoProp-MAE after {content['epoch']} epochs on {meta.get('dataset')}; {time.time() - started:.0f} s."
    blocks = [Text(words), Notes(notes), *tables, *shown]
    write_report(output_dir, f"Samples of {asked.checkpoint}", blocks, options)
    log.say(f"written to {output_dir}: {', '.join([*pictures, 'report.md', 'report.html'])}")
    return 0


def read_images(asked: Sampling, data: Data, seed: int) -> tuple[Dataset, Dataset | None, str]:
    """(images, other images of the same kind or None, their description)."""
    if asked.images:
        paths, notes = [], []
        for path in asked.images:
            found = find_images(path) if os.path.isdir(path) else Found([path])
            if not found.paths:
                raise UserError(f"--images {path}: no images in it")
            paths += found.paths
            notes += found.notes(path)
        return FileDataset(paths, torch.full((len(paths),), -1), notes=notes), None, "given images"
    held_out = read_split(data.dataset, data.data_path, "val", labelled=False)
    images = held_out or read_split(data.dataset, data.data_path, "train", labelled=False)
    name = f"{'held-out' if held_out else 'training'} images of {data.dataset}"
    order, n = torch.randperm(len(images), generator=torch.Generator().manual_seed(mix(seed))), asked.num_samples
    first, second = images.subset(order[:n]), images.subset(order[n : 2 * n])
    return first, second if len(second) == len(first) else None, name


def frechet_features(weights: str | None, net: NoPropMAE, meta: dict, log: RunLog) -> torch.nn.Module:
    """Inception if its weights are available, else the encoder; logs which."""
    path = find_inception(weights)
    if path or weights:
        features = load_inception(path)
        log.say(f"Frechet distance on Inception-v3 features ({path or 'downloaded'})")
        return features
    log.say(
        "Frechet distance on this encoder's own features (Inception's weights are not available; see "
        "--inception_weights): not comparable to published FIDs, nor from one checkpoint to another"
    )
    return EncoderFeatures(net, meta["mean"], meta["std"])


def table(title: str, unit: str, values: dict[str, float]) -> Table:
    return Table([title, unit], [[name, f"{value:.4g}"] for name, value in values.items()])


if __name__ == "__main__":
    run_main(main)
