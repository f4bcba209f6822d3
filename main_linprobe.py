"""What a frozen encoder knows: weighted k-NN and a linear probe on features that are computed once, without augmentation.

python main_linprobe.py --checkpoint output/mae_cifar10_noprop/checkpoint-last.pth
python main_linprobe.py --checkpoint output/mae_cifar10_noprop/checkpoint-last.pth --random_init
python main_linprobe.py --finetune mae_pretrain_vit_base.pth --model vit_base_patch16 --cls_token --data_path ImageNet
torchrun --nproc_per_node=8 main_linprobe.py --model convnext_base.fb_in22k --pretrained --data_path ImageNet
"""

from util.cli.linprobe import get_args_parser, get_options  # noqa: F401 (a public name)
from util.cli.script import check_command_line, run_main

if __name__ == "__main__":  # a mistyped flag is answered before torch is imported, which takes seconds
    check_command_line(get_options)

import json
import time
from argparse import Namespace

from augment.batch import BatchTransform
from augment.decoding import limit_pixels
from augment.image import build_eval_transform
from models.loading import try_forward
from util.data.datasets import ArrayDataset, notes_of, to_channels
from util.data.image_files import refuse_output_among_images
from util.data.loader import Loader
from util.data.splits import load_data
from util.data_specs import IN_MEMORY
from util.dist import Precision, World, init_world, prepare_net
from util.errors import UserError
from util.log import claim
from util.precision import place
from util.predict.calibration import interval_sentence
from util.probe.classify import accuracy, choose_l2, knn_predict, linear_probe
from util.probe.features import extract
from util.probe.frozen import load_encoder, read_content, resolve_data
from util.report import markdown

POOL_NAMES = {"mean": "mean of the patch tokens", "cls": "class token", "head": "what its classifier reads"}


def build_loader(args, meta: dict, data, world: World) -> Loader:
    """Evaluation's view of the images: resize, centre crop, normalise."""
    size = tuple(meta["img_size"])
    if isinstance(data, ArrayDataset):
        data = to_channels(data, meta["in_chans"])
    return Loader(
        data,
        transform=build_eval_transform(size, meta["crop_pct"]),
        batch_transform=BatchTransform(meta["mean"], meta["std"], size=size),
        batch_size=args.batch_size,
        train=False,
        world=world,
        in_chans=meta["in_chans"],
        num_workers=args.num_workers,
        pin_memory=args.pin_mem,
        on_bad_image=args.on_bad_image,
    )


def main(argv: list[str] | None = None) -> int:
    options = get_options(argv)
    args = Namespace(**options.flat())
    limit_pixels(args.max_pixels)
    world = init_world(args.device, args.dist_url, deterministic=args.deterministic)
    content = read_content(args.finetune)
    options = resolve_data(options, content)
    args = Namespace(**options.flat())
    if args.dataset not in IN_MEMORY:
        refuse_output_among_images("--output_dir", args.output_dir, args.data_path)
    log = claim(args.output_dir, "linprobe", world)
    train, val = load_data(args.dataset, args.data_path, world, val_split=args.val_split, seed=args.split_seed)

    model, meta, pool, words = load_encoder(options, train.classes, content)
    try_forward(place(model, world.device), {**meta, "num_classes": model.num_classes}, 1)
    precision = Precision(args.amp, world.device, model)
    prepare_net(model, precision)
    weights = "untrained" if args.random_init else args.finetune or "timm's weights"
    log.say(
        f"{meta['model']} ({weights}) on {args.dataset}: {len(train)} train, {len(val)} val, {len(train.classes)} "
        f"classes; {words}; features: {POOL_NAMES[pool]}; {world.size} x {world.device}, {precision}"
    )
    notes = notes_of(train, val)
    for note in notes:
        log.say(f"note: {note}")

    started = time.time()
    features, targets = extract(model, build_loader(args, meta, train, world), precision, world, pool, "train")
    val_features, val_targets = extract(model, build_loader(args, meta, val, world), precision, world, pool, "val")
    if not world.is_main:
        return 0
    features, targets, val_features, val_targets = (
        t.to(world.device) for t in (features, targets, val_features, val_targets)
    )
    if len(targets.unique()) < 2:  # the others were left out as unreadable
        raise UserError(
            f"--data_path {args.data_path}: its {len(targets)} readable training images are of one class; a probe needs two"
        )
    C, k = len(train.classes), min(args.knn_k, len(features))
    extracted = time.time()
    knn = accuracy(knn_predict(features, targets, val_features, C, k, args.knn_t), val_targets)
    l2 = choose_l2(features, targets, C, args.seed)
    probe = linear_probe(features, targets, C, l2)
    linear, linear_train = (
        accuracy(probe(x).argmax(1), y) for x, y in ((val_features, val_targets), (features, targets))
    )
    line = {
        "epoch": content.get("epoch", 0),
        "knn_acc1": knn,
        "linear_acc1": linear,
        "linear_train_acc1": linear_train,
        "linear_l2": l2,
        "knn_k": k,
        "knn_t": args.knn_t,
        "pool": pool,
        "feature_dim": features.shape[1],
        "n_train": len(features),
        "n_val": len(val_features),
        "dataset": args.dataset,
        "model": meta["model"],
        "weights": weights,
        "seconds": round(extracted - started, 2),
        "scoring_seconds": round(time.time() - extracted, 2),
    }
    log.say(f"k-NN accuracy (k {k}, temperature {args.knn_t:g}): {knn:.2f}%")
    log.say(f"linear probe accuracy: {linear:.2f}% (on its training images {linear_train:.2f}%, l2 {l2:g})")
    if log.output_dir:
        log.write_args(vars(args))
        log.epoch(line)
        write_report(log.output_dir, line, notes)
    return 0


def write_report(output_dir: str, line: dict, notes: list[str]) -> None:
    text = [
        f"Weights: {line['weights']}. Features: {POOL_NAMES[line['pool']]}, {line['feature_dim']} values, of "
        f"{line['n_train']} training and {line['n_val']} validation images without augmentation.",
        "",
        *markdown.note_lines(notes),
        "| top-1 accuracy | |",
        "|---|---|",
        f"| weighted k-NN, k {line['knn_k']}, temperature {line['knn_t']:g} | {line['knn_acc1']:.2f}% |",
        f"| linear probe | {line['linear_acc1']:.2f}% |",
        "",
        f"Of the linear probe, {interval_sentence(line['linear_acc1'], line['n_val'])}",
        "",
        "The probe is a BatchNorm without affine and a linear layer, fitted by L-BFGS to its optimum on the cached "
        f"features; the penalty {line['linear_l2']:g} was chosen on a tenth of the training images.",
        "",
        "    " + json.dumps(line),
        "",
    ]
    markdown.write_report(output_dir, f"Frozen features of {line['model']} on {line['dataset']}", text)


if __name__ == "__main__":
    run_main(main)
