"""Options of main_sample.py."""

import os
from dataclasses import dataclass

from util.cli.flags import Options
from util.cli.parser import Parser
from util.cli.script import require_package
from util.cli.settings import Data, Machine, Reading, Run, Sampling
from util.errors import UserError


@dataclass(frozen=True)
class SampleOptions(Options):
    """All options of main_sample.py."""

    MAIN = "sample"
    DESCRIPTION = (
        "Pictures and measures from a pretraining checkpoint: reconstructions, generated images, attention, Frechet "
        "distances."
    )
    NETWORK_FROM = "the checkpoint"

    sampling: Sampling
    data: Data
    run: Run
    reading: Reading
    machine: Machine


def get_args_parser() -> Parser[SampleOptions]:
    return Parser(SampleOptions)


def get_options(argv: list[str] | None = None) -> SampleOptions:
    """The command line, checked."""
    options = get_args_parser().options(argv)
    if "frechet" in options.sampling.mode:
        require_package("torchmetrics", "--mode frechet")
    if not os.path.isfile(options.sampling.checkpoint):
        raise UserError(f"{options.sampling.checkpoint}: no such checkpoint file")
    for path in options.sampling.images or ():
        if not os.path.exists(path):
            raise UserError(f"--images {path}: no such file or folder")
    if options.run.output_dir == "":
        raise UserError("--output_dir: give a folder for the pictures and report.md, or leave the flag out")
    return options
