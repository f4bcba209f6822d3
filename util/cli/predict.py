"""Command-line options of main_predict.py."""

import argparse
import os

from util.choices import VIEW_NAMES
from util.cli.parser import Parser, add_max_pixels_option, count, device_name, positive_int
from util.data.image_files import refuse_output_among_images
from util.data_specs import DATASETS
from util.errors import UserError


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


def get_args_parser() -> Parser:
    parser = Parser(
        description="Predict images with one or many fine-tuned networks: 12 views of each image, "
        "probabilities averaged over views and members.",
        network_from="each of --checkpoints",
    )
    parser.add_argument(
        "--checkpoints",
        nargs="+",
        required=True,
        metavar="PATH",
        help="the members: .pth files, folders of runs, folders of k-fold runs (their folds are one member)",
    )
    parser.add_argument(
        "--weights",
        choices=("equal", "val", "stacked"),
        default="equal",
        help="of the members: equal, by their validation accuracy, or a logistic regression on their "
        "out-of-fold predictions",
    )
    parser.add_argument(
        "--views",
        type=view_list,
        default="12",
        metavar="1|12|LIST",
        help="1: centre crop; 12: all; or a list of numbers 1 to 12 or names: 1,2,5 or centre,blur",
    )
    parser.add_argument(
        "--margin",
        type=count,
        default=None,
        help="pixels that the centre views cut off in all, of the image resized to cover input + margin; 0: "
        "whole images (default: what each checkpoint's evaluation saw, its --crop_pct)",
    )
    parser.add_argument(
        "--data_path", default=None, help="folder of images; labelled if in folders named after the classes"
    )
    parser.add_argument("--dataset", default="folder", choices=sorted(DATASETS), help="another one: its test split")
    parser.add_argument(
        "--labels", default=None, metavar="CSV", help="labels of some or all images: ID (path or file name),label"
    )
    parser.add_argument(
        "--out_of_fold",
        action="store_true",
        help="--data_path is what k-fold members were trained on: each image by the networks that had not seen it",
    )
    parser.add_argument(
        "--spreadsheet_safe",
        action="store_true",
        help="an apostrophe in predictions.csv before names that begin with = + - @, which a spreadsheet would "
        "run as formulas; a join on the ID then misses these rows",
    )
    parser.add_argument("--output_dir", default="./predictions", help="where predictions.csv and report.md go")
    parser.add_argument("--batch_size", type=positive_int, default=64, help="images x views per process")
    parser.add_argument("--num_workers", type=count, default=10, help="loader processes, at most one per core")
    parser.add_argument(
        "--on_bad_image",
        choices=("error", "skip"),
        default="error",
        help="an unreadable image ends the run, or has an empty row in predictions.csv",
    )
    add_max_pixels_option(parser)
    parser.add_argument("--device", type=device_name, default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument(
        "--amp",
        choices=("off", "mixed", "bf16", "fp16"),
        default=None,
        help="mixed: bf16, on GPUs without it fp16 (default: the faster one for this device and each network)",
    )
    parser.add_argument("--dist_url", default="env://", help="where torchrun's processes meet")
    return parser


def check_predict_options(args) -> None:
    """What one flag's type cannot see."""
    for path in args.checkpoints:
        if not os.path.exists(path):
            raise UserError(f"--checkpoints {path}: no such file or folder")
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
    if args.dataset == "folder":
        refuse_output_among_images("--output_dir", args.output_dir, args.data_path)
