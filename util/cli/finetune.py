"""Command-line options of main_finetune.py."""

import os

from util.choices import ANNEALS, SCHEDULES, SPACES, TOKENS
from util.cli.parser import (
    Parser,
    add_data_options,
    add_optimizer_options,
    add_pos_grid_option,
    add_run_options,
    count,
    fraction,
    keyword,
    model_name,
    number,
    parse_and_check_paths,
    policy_or_none,
    positive_int,
    rate,
)
from util.errors import UserError
from util.meta import LEAST_CROP_PCT, check_model_kwargs


def get_args_parser() -> Parser:
    parser = Parser(
        description="Fine-tune an image classifier with alpha-blended diffusion noise (DiffNoise), "
        "mixup, cutmix and layer-wise lr decay."
    )
    add_run_options(parser, batch_size=64, epochs=50)
    add_optimizer_options(parser, blr=1e-3, min_lr=1e-6, warmup_epochs=5, weight_decay=0.05)
    add_data_options(parser, dataset="folder")
    add_noise_options(parser)
    add_finetune_options(parser)
    return parser


def add_noise_options(parser: Parser) -> None:
    group = parser.add_argument_group("DiffNoise: alpha-blended noise (training only)")
    group.add_argument("--alpha_blend", type=number(int, 0, 999), default=15, help="timestep t of abar; 0 switches off")
    group.add_argument(
        "--noise_timestep", choices=SCHEDULES, default="fixed", help="t for all, or t ~ U{1..t} per sample"
    )
    group.add_argument("--noise_prob", type=fraction, default=1.0, help="fraction of samples that get noise")
    group.add_argument("--noise_anneal", choices=ANNEALS, default="none", help="scale t towards 0 over the epochs")
    group.add_argument(
        "--noise_tokens", choices=TOKENS, default="all", help="with or without class and register tokens"
    )
    group.add_argument("--noise_space", choices=SPACES, default="embedding")
    group.add_argument("--noise_layer", type=count, default=0, help="noise the input of this block")
    group.add_argument(
        "--noise_beta_power",
        type=number(float, 0, 100, open_low=True),
        default=1.2,
        help="exponent on DDPM's linear betas",
    )
    group.add_argument("--noise_eval", action="store_true", help="keep the noise in evaluation (the released code did)")


def add_finetune_options(parser: Parser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        type=model_name,
        default=None,
        metavar="NAME",
        help="MAE's name or any timm model (default: the checkpoint's, or vit_large_patch16)",
    )
    group.add_argument(
        "--model_kwargs",
        type=keyword,
        nargs="*",
        default=[],
        metavar="NAME=VALUE",
        help="passed to the model, e.g. embed_dim=96 depth=6 num_heads=3, drop_rate=0.2",
    )
    group.add_argument(
        "--drop_path", type=number(float, 0, 1, open_high=True), default=0.1, help="stochastic depth rate"
    )
    group.add_argument("--finetune", default="", help="start from the weights in this file (.pth or .safetensors)")
    group.add_argument(
        "--partial_load",
        action="store_true",
        help="take what fits of --finetune's file, and start the rest of the trunk anew",
    )
    add_pos_grid_option(group)
    group.add_argument("--pretrained", action="store_true", help="start from timm's own weights (a download)")
    # True where neither flag is given: then a checkpoint's own pooling goes before it.
    group.add_argument(
        "--global_pool",
        action="store_const",
        const="avg",
        default=True,
        help="average pooling, of MAE's names (default: the checkpoint's, or this)",
    )
    group.add_argument("--cls_token", action="store_false", dest="global_pool", help="class token instead")
    group.add_argument(
        "--nb_classes",
        type=positive_int,
        default=None,
        help="classes of the head (default: the checkpoint's for the same classes, or from the data)",
    )
    group.add_argument(
        "--grad_checkpointing",
        changes_results=False,
        action="store_true",
        help="recompute activations: less memory, slower",
    )

    group = parser.add_argument_group("augmentation and regularisation")
    group.add_argument(
        "--aug",
        choices=("mae", "photo", "light", "none"),
        default="mae",
        help="mae: crop, flip, RandAugment; photo: for a folder of photos; light: crop and flip",
    )
    group.add_argument(
        "--aa",
        type=policy_or_none,
        default="rand-m9-mstd0.5-inc1",
        help="timm's policy for --aug mae: rand, original, originalr, v0, v0r, 3a or augmix with its numbers; `none`",
    )
    group.add_argument(
        "--color_jitter",
        type=number(float, 0, 10),
        default=None,
        help="strength (default: photo: 0.3; mae: none, and used without --aa only)",
    )
    group.add_argument("--hflip", type=fraction, default=None, help="mirror probability (default: 0.5; digits: 0)")
    group.add_argument("--vflip", type=fraction, default=0.0, help="upside-down probability: for views from above")
    group.add_argument(
        "--scale",
        type=fraction,
        nargs=2,
        default=None,
        metavar=("MIN", "MAX"),
        help="area share of the random crop (default: 0.08 1; photo: 0.7 1)",
    )
    group.add_argument(
        "--crop_pct",
        type=number(float, LEAST_CROP_PCT, 1),
        default=None,
        help="share of the resized image that evaluation and view 1 of main_predict see (default: the "
        "checkpoint's, or 0.875 up to 224 pixels, else 1)",
    )
    group.add_argument("--smoothing", type=number(float, 0, 1, open_high=True), default=0.1, help="label smoothing")
    group.add_argument(
        "--reprob", type=fraction, default=None, help="random erasing (default: 0.25; photo: 0.2; light, none: 0)"
    )
    group.add_argument("--remode", choices=("const", "rand", "pixel"), default="pixel")
    group.add_argument("--recount", type=positive_int, default=1)
    group.add_argument("--mixup", type=number(float, 0, 1e6), default=0.0)
    group.add_argument("--cutmix", type=number(float, 0, 1e6), default=0.0)
    group.add_argument(
        "--cutmix_minmax", type=fraction, nargs=2, default=None, help="box size range; overrides --cutmix's"
    )
    group.add_argument("--mixup_prob", type=fraction, default=1.0, help="probability of mixing a batch")
    group.add_argument("--mixup_switch_prob", type=fraction, default=0.5, help="of cutmix where both are on")
    group.add_argument("--mixup_mode", choices=("batch", "pair", "elem"), default="batch")
    group.add_argument(
        "--class_weights",
        choices=("none", "balanced"),
        default="none",
        help="balanced: a sample weighs images / (classes x images of its class)",
    )
    group.add_argument(
        "--ema_decay",
        type=number(float, 0, 1, open_high=True),
        default=0.0,
        help="average the weights; the average is validated, selected and used",
    )

    group = parser.add_argument_group("fine-tuning schedule")
    group.add_argument("--layer_decay", free_at_resume=True, type=number(float, 0, 1, open_low=True), default=0.75)
    group.add_argument("--head_epochs", type=count, default=0, help="first train the head alone, on a frozen backbone")
    group.add_argument("--head_lr", free_at_resume=True, type=rate, default=1e-3)
    group.add_argument(
        "--freeze_layers",
        type=count,
        default=0,
        help="keep the first N layers as they are (1: the embedding): cheaper, for small data",
    )
    group.add_argument(
        "--freeze_bn", action="store_true", help="keep the pretrained BatchNorm statistics: for small data"
    )
    group.add_argument(
        "--patience",
        free_at_resume=True,
        type=count,
        default=0,
        help="stop after this many epochs without gain (0: never)",
    )
    group.add_argument(
        "--eval_metric",
        choices=("acc1", "balanced_acc", "macro_f1", "loss"),
        default="acc1",
        help="what checkpoint-best.pth and --patience go by",
    )
    group.add_argument(
        "--dist_eval",
        changes_results=False,
        action="store_true",
        default=True,
        help="share the evaluation among the ranks, each image once: the accuracy is the same number",
    )
    group.add_argument("--no_dist_eval", action="store_false", dest="dist_eval", help="every rank evaluates all of it")
    group.add_argument(
        "--eval",
        changes_results=False,
        action="store_true",
        help="evaluate the weights of --resume or --finetune, and stop",
    )
    group.add_argument(
        "--val_split",
        type=number(float, 0, 1, open_high=True),
        default=0.0,
        help="hold out this share of train/ (stratified) where there is no val/",
    )
    group.add_argument("--kfold", type=number(int, 0, 1000), default=0, help="stratified folds of train/ (0: none)")
    group.add_argument("--fold", changes_results=False, default="all", help="0 .. kfold - 1, or `all`")
    group.add_argument("--split_seed", type=number(int, 0, 2**32 - 1), default=0, help="of --val_split and --kfold")


def check_finetune_options(args) -> None:
    """What one flag's type cannot see."""
    parse_and_check_paths(args)
    check_model_kwargs(args.model_kwargs)
    if args.kfold == 1:
        raise UserError("--kfold 1: needs 2 or more folds")
    if args.fold != "all" and args.fold not in map(str, range(max(1, args.kfold))):
        raise UserError(f"--fold {args.fold}: should be 0 to {max(0, args.kfold - 1)}, or all")
    if args.kfold and args.val_split:
        raise UserError(f"--val_split {args.val_split}: not together with --kfold {args.kfold}")
    if args.kfold and args.fold == "all" and not args.output_dir:
        raise UserError("--output_dir: k-fold needs one, for its out-of-fold files")
    if not args.kfold:
        args.fold = "0"
    if args.eval and args.kfold and args.fold == "all":
        raise UserError(f"--kfold {args.kfold}: with --eval give the --fold whose network it is")
    if args.kfold and args.resume not in ("", "auto") and not args.eval:
        raise UserError(f"--resume {args.resume}: with --kfold give `auto`; every fold has its own checkpoints")
    if args.finetune and not os.path.isfile(args.finetune):
        raise UserError(f"--finetune {args.finetune}: no such file")
    if args.partial_load and not args.finetune:
        raise UserError("--partial_load: is for the file of --finetune; give one")
    if args.pos_grid and not (args.finetune or (args.eval and args.resume)):
        raise UserError(f"--pos_grid {args.pos_grid[0]} {args.pos_grid[1]}: is for the file of --finetune; give one")
    if args.eval and not (args.resume or args.finetune or args.pretrained):
        raise UserError("--eval: needs weights; give --resume CHECKPOINT")
    if args.eval and args.resume == "auto":
        raise UserError("--resume auto: with --eval name the checkpoint file")
    if args.cutmix_minmax is not None and args.cutmix_minmax[0] > args.cutmix_minmax[1]:
        raise UserError(f"--cutmix_minmax {args.cutmix_minmax[0]} {args.cutmix_minmax[1]}: should be MIN MAX")
    if args.scale is not None and not 0 < args.scale[0] <= args.scale[1]:
        raise UserError(f"--scale {args.scale[0]} {args.scale[1]}: should be MIN MAX above 0")
    if args.aug == "none" and (args.scale or args.vflip):
        raise UserError("--aug none: neither crops nor flips; leave --scale and --vflip away")
    if args.reprob is None:
        args.reprob = {"mae": 0.25, "photo": 0.2}.get(args.aug, 0.0)
    if args.color_jitter is not None and args.aug in ("light", "none"):
        raise UserError(
            f"--color_jitter {args.color_jitter}: --aug {args.aug} leaves colours alone; use --aug photo, or mae with --aa none"
        )
    if args.aug != "mae":
        args.aa = None
