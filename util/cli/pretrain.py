"""Command-line options of main_pretrain_noprop.py."""

from util.choices import LOSS_WEIGHTINGS, PROPAGATE, SAMPLERS, TARGETS
from util.cli.parser import (
    Parser,
    add_data_options,
    add_optimizer_options,
    add_run_options,
    count,
    fraction,
    number,
    parse_and_check_paths,
    positive_int,
)
from util.errors import UserError

sigma = number(float, 1e-6, 1e6)


def sigma_data(text: str) -> float | None:
    """A number as --sigma_max takes, or `auto` (None)."""
    return None if text == "auto" else sigma(text)


def get_args_parser() -> Parser:
    parser = Parser(
        description="Pretrain a masked ViT encoder with T decoders, each a denoiser of one noise level, "
        "no propagation between them."
    )
    add_run_options(parser, batch_size=128, epochs=1600)
    # 3e-4 is the method's lr of 1.5e-4 at batch 128.
    add_optimizer_options(parser, blr=3e-4, min_lr=1e-6, warmup_epochs=10, weight_decay=0.05)
    add_data_options(parser, dataset="cifar10")
    add_pretrain_options(parser)
    return parser


def add_pretrain_options(parser: Parser) -> None:
    group = parser.add_argument_group("NoProp-MAE")
    group.add_argument(
        "--patch_size", type=positive_int, default=None, help="default: 2 below 16 px, 4 up to 64, else 16"
    )
    group.add_argument("--embed_dim", type=positive_int, default=192, help="encoder width")
    group.add_argument("--depth", type=positive_int, default=12, help="encoder blocks")
    group.add_argument("--num_heads", type=positive_int, default=3, help="encoder heads")
    group.add_argument("--decoder_embed_dim", type=positive_int, default=96)
    group.add_argument("--decoder_depth", type=positive_int, default=4, help="blocks of each decoder")
    group.add_argument("--decoder_num_heads", type=positive_int, default=3)
    group.add_argument("--mlp_ratio", type=number(float, 0, 64, open_low=True), default=4.0)
    group.add_argument("--T", type=positive_int, default=4, help="noise levels, a decoder each")
    group.add_argument("--sigma_min", type=sigma, default=0.002)
    group.add_argument("--sigma_max", type=sigma, default=80.0)
    group.add_argument("--rho", type=number(float, 0.1, 1e3), default=7.0, help="spacing of the levels (EDM, eq. 5)")
    group.add_argument(
        "--sigma_data",
        type=sigma_data,
        default=None,
        metavar="auto|FLOAT",
        help="standard deviation of the normalised data; auto (the default) measures it",
    )
    group.add_argument("--mask_ratio", type=number(float, 0, 1, open_low=True), default=0.75)
    group.add_argument(
        "--mask_ratio_max",
        type=number(float, 0, 1, open_low=True),
        default=None,
        help="draw the ratio per batch from [mask_ratio, this]; 1 trains generation from nothing",
    )
    group.add_argument(
        "--propagate",
        choices=PROPAGATE,
        default="latent",
        help="latent: all losses reach the encoder; none: it learns from a head of its own",
    )
    group.add_argument(
        "--loss_weighting", choices=LOSS_WEIGHTINGS, default="none", help="edm: every level counts alike"
    )
    group.add_argument("--target", choices=TARGETS, default="pixel", help="norm_pixel: patches normalised one by one")
    group.add_argument(
        "--use_checkpoint",
        changes_results=False,
        action="store_true",
        help="gradient checkpointing: less memory, slower",
    )
    group.add_argument("--hflip", type=fraction, default=None, help="mirror probability (default: 0.5; digits: 0)")
    group.add_argument(
        "--vis_freq", changes_results=False, type=count, default=50, help="epochs between pictures (0: never)"
    )
    group.add_argument(
        "--vis_type", changes_results=False, choices=SAMPLERS, default="stochastic", help="sampler of the pictures"
    )


def check_pretrain_options(args) -> None:
    """What one flag's type cannot see."""
    parse_and_check_paths(args)
    if args.mask_ratio_max is not None and args.mask_ratio_max < args.mask_ratio:
        raise UserError(f"--mask_ratio_max {args.mask_ratio_max}: should not be below --mask_ratio {args.mask_ratio}")
    if args.sigma_min >= args.sigma_max:
        raise UserError(f"--sigma_min {args.sigma_min}: should be below --sigma_max {args.sigma_max}")
