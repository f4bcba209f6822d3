"""Command-line options of main_linprobe.py."""

import os

from util.cli.parser import (
    Parser,
    add_data_options,
    add_deterministic_option,
    add_pos_grid_option,
    device_name,
    keyword,
    model_name,
    number,
    positive_int,
)
from util.errors import UserError
from util.meta import check_model_kwargs


def get_args_parser() -> Parser:
    parser = Parser(
        description="What a frozen encoder knows: weighted k-NN and a linear probe on features that are "
        "computed once, without augmentation."
    )
    group = parser.add_argument_group("encoder")
    group.add_argument(
        "--checkpoint",
        "--finetune",
        dest="finetune",
        default="",
        metavar="FILE",
        help="a pretraining or fine-tuning checkpoint, or weights of another origin with their --model",
    )
    group.add_argument("--model", type=model_name, default=None, metavar="NAME", help="MAE's name or any timm model")
    group.add_argument("--model_kwargs", type=keyword, nargs="*", default=[], metavar="NAME=VALUE")
    group.add_argument("--pretrained", action="store_true", help="timm's own weights (a download)")
    add_pos_grid_option(group)
    group.add_argument("--random_init", action="store_true", help="the same architecture untrained, to compare with")
    group.add_argument(
        "--global_pool",
        action="store_const",
        const="mean",
        dest="pool",
        help="features are the mean of the patch tokens (default for encoders without a classifier)",
    )
    group.add_argument("--cls_token", action="store_const", const="cls", dest="pool", help="the class token instead")
    group = parser.add_argument_group("k-NN")
    group.add_argument("--knn_k", type=positive_int, default=20, help="neighbours")
    group.add_argument("--knn_t", type=number(float, 1e-4, 1e4), default=0.07, help="temperature of their votes")
    group = parser.add_argument_group("run")
    group.add_argument("--batch_size", type=positive_int, default=256, help="images per process")
    group.add_argument("--output_dir", default="", help="where to put log.txt and report.md; '' saves nothing")
    group.add_argument("--device", type=device_name, default="auto", help="auto, cpu, cuda, cuda:N or mps")
    group.add_argument(
        "--amp",
        "--use_amp",
        nargs="?",
        choices=("off", "mixed", "bf16", "fp16"),
        const="mixed",
        default=None,
        help="precision of the encoder; mixed, or the flag alone: bf16, on GPUs without it fp16 (default: the faster one)",
    )
    group.add_argument("--seed", type=number(int, 0, 2**62), default=0)
    group.add_argument("--dist_url", default="env://", help="where torchrun's processes meet")
    add_deterministic_option(group)
    add_data_options(parser, dataset="folder")
    group = parser.add_argument_group("split")
    group.add_argument(
        "--val_split",
        type=number(float, 0, 1, open_high=True),
        default=0.0,
        help="hold out this share of train/ (stratified) where there is no val/",
    )
    group.add_argument("--split_seed", type=number(int, 0, 2**32 - 1), default=0)
    parser.set_defaults(dataset=None, nb_classes=None)  # the checkpoint's data set, else `folder`
    return parser


def check_linprobe_options(args) -> None:
    """What one flag's type cannot see."""
    if args.finetune and not os.path.isfile(args.finetune):
        raise UserError(f"--checkpoint {args.finetune}: no such checkpoint file")
    check_model_kwargs(args.model_kwargs)
    if not args.finetune and not args.model:
        raise UserError("--checkpoint: give one, or --model NAME with --pretrained or --random_init")
    if not (args.finetune or args.pretrained or args.random_init):
        raise UserError(f"--model {args.model}: needs weights; give --finetune FILE, --pretrained or --random_init")
    if args.pretrained and (args.finetune or args.random_init):
        other = f"--finetune {args.finetune}" if args.finetune else "--random_init"
        raise UserError(f"--pretrained: not together with {other}")
