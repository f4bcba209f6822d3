"""Command-line options of main_sample.py."""

import os

from util.choices import SAMPLERS
from util.cli.parser import Parser, add_max_pixels_option, count, device_name, number, positive_int, require_package
from util.data_specs import DATASETS
from util.errors import UserError

MODES = ("reconstruct", "generate", "attention", "frechet")


def get_args_parser() -> Parser:
    parser = Parser(
        description="Pictures and measures from a pretraining checkpoint: reconstructions, generated "
        "images, attention, Frechet distances.",
        network_from="the checkpoint",
    )
    parser.add_argument("checkpoint", help="of main_pretrain_noprop.py")
    parser.add_argument("--mode", nargs="+", choices=MODES, default=["reconstruct"], help="one or several")
    parser.add_argument("--sampler", nargs="+", choices=SAMPLERS, default=list(SAMPLERS), help="one or several")
    parser.add_argument(
        "--mask_ratio",
        type=number(float, 0, 1, open_low=True),
        default=None,
        help="share of hidden patches (default: the one of training)",
    )
    parser.add_argument("--images", nargs="+", default=None, metavar="PATH", help="image files and folders of them")
    parser.add_argument(
        "--dataset",
        choices=sorted(DATASETS),
        default=None,
        help="without --images: draw from its held-out images (default: the checkpoint's)",
    )
    parser.add_argument("--data_path", default=None, help="its folder (default: the one of training, or data)")
    parser.add_argument("--num", type=positive_int, default=8, help="rows of a picture")
    parser.add_argument(
        "--num_samples",
        type=positive_int,
        default=1000,
        help="held-out images that are measured: PSNR, Frechet distance",
    )
    parser.add_argument(
        "--inception_weights",
        default=None,
        metavar="FILE|download",
        help="torch-fidelity's file for the Frechet distance (default: its earlier download, else the "
        "encoder's own features serve)",
    )
    parser.add_argument("--output_dir", default=None, help="default: the folder `samples` beside the checkpoint")
    parser.add_argument("--batch_size", type=positive_int, default=100)
    parser.add_argument("--num_workers", type=count, default=10, help="loader processes, at most one per core")
    parser.add_argument("--on_bad_image", choices=("error", "skip"), default="error", help="unreadable images")
    add_max_pixels_option(parser)
    parser.add_argument("--device", type=device_name, default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--seed", type=number(int, 0, 2**62), default=0)
    return parser


def check_sample_options(args) -> None:
    """What one flag's type cannot see."""
    if "frechet" in args.mode:
        require_package("torchmetrics", "--mode frechet")
    if not os.path.isfile(args.checkpoint):
        raise UserError(f"{args.checkpoint}: no such checkpoint file")
    for path in args.images or ():
        if not os.path.exists(path):
            raise UserError(f"--images {path}: no such file or folder")
    if args.output_dir == "":
        raise UserError("--output_dir: give a folder for the pictures and report.md, or leave the flag out")
