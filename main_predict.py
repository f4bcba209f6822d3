"""Predict images with one or many fine-tuned networks: 12 views of each image, probabilities averaged over views and members.

python main_predict.py --checkpoints out/swin out/convnext --data_path photos/test --output_dir predictions
torchrun --nproc_per_node=8 main_predict.py --checkpoints out/*/checkpoint-best.pth --data_path test --labels labels.csv
python main_predict.py --checkpoints out/swin out/convnext --data_path photos/train --out_of_fold --output_dir out_of_fold
"""

import argparse
import os
import time

import torch

from augment.views import VIEW_NAMES
from engine_predict import predict
from util import options
from util.checkpoint import LAST, numbered_checkpoints
from util.datasets import DATASETS
from util.dist import Precision, init_world
from util.ensemble import build_combiners
from util.errors import UserError
from util.labels import read_images
from util.log import make_folder, write_args
from util.members import find_members, load_nets, short_names
from util.out_of_fold import fold_of_images, fold_of_nets, predict_out_of_fold
from util.predict_report import write_all


def view_list(text: str) -> list[int]:
    """--views: 1 is the centre crop, 12 is all; a list has numbers 1 to 12 or names -> numbers from 0 on."""
    if text in ("1", "12"):
        return list(range(int(text)))
    views = []
    for word in text.split(","):
        word = word.strip()
        if word in VIEW_NAMES:
            views.append(VIEW_NAMES.index(word))
        elif "," in text and word.isdecimal() and 1 <= int(word) <= len(VIEW_NAMES):
            views.append(int(word) - 1)
        else:
            raise argparse.ArgumentTypeError(
                f"{text!r} should be 1, 12, or a list such as 1,2,5 of {', '.join(VIEW_NAMES)}"
            )
    if len(set(views)) < len(views):
        raise argparse.ArgumentTypeError(f"{text!r} should have each view once")
    return views


def get_args_parser() -> options.Parser:
    parser = options.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoints", nargs="+", required=True, metavar="PATH",
                        help="the members: .pth files, folders of runs, folders of k-fold runs (their folds are one member)")  # fmt: skip
    parser.add_argument("--weights", choices=("equal", "val", "stacked"), default="equal",
                        help="of the members: equal, by their validation accuracy, or a logistic regression on their "
                        "out-of-fold predictions")  # fmt: skip
    parser.add_argument("--views", type=view_list, default="12", metavar="1|12|LIST",
                        help="1: centre crop; 12: all; or a list of numbers 1 to 12 or names: 1,2,5 or centre,blur")  # fmt: skip
    parser.add_argument("--margin", type=options.count, default=None,
                        help="pixels that the centre views cut off in all, of the image resized to cover input + margin; 0: "
                        "whole images, where what matters reaches the border (default: 32, less below 224 pixels)")  # fmt: skip
    parser.add_argument(
        "--data_path", default=None, help="folder of images; labelled if in folders named after the classes"
    )
    parser.add_argument("--dataset", default="folder", choices=sorted(DATASETS), help="another one: its test split")
    parser.add_argument(
        "--labels", default=None, metavar="CSV", help="labels of some or all images: ID (path or file name),label"
    )
    parser.add_argument("--out_of_fold", action="store_true",
                        help="--data_path is what k-fold members were trained on: each image by the networks that had "
                        "not seen it")  # fmt: skip
    parser.add_argument("--output_dir", default="./predictions", help="where predictions.csv and report.md go")
    parser.add_argument("--batch_size", type=options.positive_int, default=64, help="images x views per process")
    parser.add_argument("--num_workers", type=options.count, default=10, help="loader processes, at most one per core")
    parser.add_argument("--on_bad_image", choices=("error", "skip"), default="error",
                        help="an unreadable image ends the run, or has an empty row in predictions.csv")  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--amp", choices=("off", "bf16", "fp16"), default=None,
                        help="mixed precision (default: bf16 where the device computes it, else off)")  # fmt: skip
    parser.add_argument("--dist_url", default="env://", help="where torchrun's processes meet")
    return parser


def check_options(args) -> None:
    """What one flag's type cannot see."""
    if args.data_path is None:
        if args.dataset == "folder":
            raise UserError("--data_path: give the folder of images to predict")
        args.data_path = "." if args.dataset == "digits" else "data"
    if args.labels is not None and args.dataset != "folder":
        raise UserError(f"--labels {args.labels}: --dataset {args.dataset} has its own labels")
    if args.labels is not None and not os.path.isfile(args.labels):
        raise UserError(f"--labels {args.labels}: no such file")
    if not args.output_dir:
        raise UserError("--output_dir: give a folder for predictions.csv")
    out, inside = os.path.realpath(args.output_dir), os.path.realpath(args.data_path)
    if args.dataset == "folder" and os.path.commonpath([out, inside]) == inside:
        raise UserError(
            f"--output_dir {args.output_dir}: lies in --data_path; its pictures would be predicted the next time"
        )
    if os.path.isdir(out) and (os.path.exists(os.path.join(out, LAST)) or numbered_checkpoints(out)):
        raise UserError(
            f"--output_dir {args.output_dir}: holds a training run, whose report would be lost; choose another"
        )


def main(argv: list[str] | None = None) -> int:
    args, started = get_args_parser().parse_args(argv), time.time()
    check_options(args)
    world = init_world(args.device, args.dist_url)
    # The fastest algorithm is chosen by timing, and so may differ between ranks and runs, and with it the last digits.
    torch.backends.cudnn.benchmark = False
    say = print if world.is_main else lambda *text, **kwargs: None

    members, classes = find_members(args.checkpoints)
    combiners = build_combiners(members, classes, args.weights)
    data, ids, notes = read_images(args.dataset, args.data_path, classes, args.labels)
    notes += combiners.notes
    if args.out_of_fold:
        fold_of_nets(members)  # a single network is refused before its weights are read
        image_folds = fold_of_images(members, classes, ids)
        notes.append("out of fold: each image is predicted by the networks that had not seen it")
    if world.is_main:
        make_folder(args.output_dir, "--output_dir")
        write_args(os.path.join(args.output_dir, "args.json"), vars(args))
    nets = load_nets(members, classes, world.device)
    precision = Precision(args.amp, world.device)
    for name, member in zip(short_names(members), members):
        say(f"member {name}: {len(member.paths)} x {member.model}, input {member.metas[0]['img_size']}")
    say(f"{len(ids)} images, {int((data.targets >= 0).sum())} with labels, {len(classes)} classes, {len(args.views)} view(s); "
        f"{world.size} x {world.device}, amp {precision.name}", flush=True)  # fmt: skip

    how = dict(world=world, precision=precision, batch_size=args.batch_size, num_workers=args.num_workers,
               on_bad_image=args.on_bad_image, margin=args.margin)  # fmt: skip
    if args.out_of_fold:
        prediction = predict_out_of_fold(nets, fold_of_nets(members), data, image_folds, args.views, **how)
        combiners.cross_fit(image_folds[prediction.index])
    else:
        prediction = predict(nets, data, args.views, **how)
    if not world.is_main:
        return 0
    for i, reason in prediction.bad.items():
        notes.append(f"not readable, its row is empty: {ids[i]} ({reason})")
    text = write_all(
        args.output_dir, args=args, members=members, combiners=combiners, data=data, ids=ids, classes=classes,
        prediction=prediction, views=args.views, notes=notes, seconds=time.time() - started,
    )  # fmt: skip
    say("\n".join([text, "", *(f"note: {note}" for note in notes)]))
    say(
        f"predictions: {os.path.join(args.output_dir, 'predictions.csv')}, report: {os.path.join(args.output_dir, 'report.md')}"
    )
    return 0


if __name__ == "__main__":
    options.run_main(main)
