"""Options of main_pretrain_noprop.py."""

from dataclasses import dataclass

from util.cli.flags import Options
from util.cli.parser import Parser, check_training, default_path
from util.cli.settings import Augmentation, Data, Input, Machine, Masking, NoProp, Optimizer, Reading, Run


@dataclass(frozen=True)
class PretrainOptions(Options):
    """All options of a pretraining run."""

    MAIN = "pretrain"
    DESCRIPTION = (
        "Pretrain a masked ViT encoder with T decoders, each a denoiser for one noise level, without propagation "
        "between them."
    )

    optimizer: Optimizer
    masking: Masking
    input: Input
    data: Data
    run: Run
    reading: Reading
    machine: Machine
    noprop: NoProp
    augmentation: Augmentation


def get_args_parser() -> Parser[PretrainOptions]:
    return Parser(PretrainOptions)


def get_options(argv: list[str] | None = None) -> PretrainOptions:
    """The command line, checked, with the defaults that depend on other flags."""
    options = get_args_parser().options(argv)
    if options.data.data_path is None:
        options = options.having(data_path=default_path(options.data.dataset))
    check_training(options)
    return options
