"""Options of main_linprobe.py."""

import os
from dataclasses import dataclass

from util.cli.flags import Options
from util.cli.parser import Parser
from util.cli.settings import Data, Input, Machine, Model, Probe, Reading, Run
from util.errors import UserError
from util.meta import check_model_kwargs


@dataclass(frozen=True)
class LinprobeOptions(Options):
    """All options of a probe of a frozen encoder."""

    MAIN = "linprobe"
    DESCRIPTION = (
        "Evaluate a frozen encoder: weighted k-NN and a linear probe on features that are computed once, without "
        "augmentation."
    )

    model: Model
    probe: Probe
    input: Input
    data: Data
    run: Run
    reading: Reading
    machine: Machine


def get_args_parser() -> Parser[LinprobeOptions]:
    return Parser(LinprobeOptions)


def get_options(argv: list[str] | None = None) -> LinprobeOptions:
    """The command line, checked."""
    options = get_args_parser().options(argv)
    model = options.model
    if model.finetune and not os.path.isfile(model.finetune):
        raise UserError(f"--checkpoint {model.finetune}: no such checkpoint file")
    check_model_kwargs(model.model_kwargs)
    if not model.finetune and not model.model:
        raise UserError("--checkpoint: give one, or --model NAME with --pretrained or --random_init")
    if not (model.finetune or model.pretrained or model.random_init):
        raise UserError(f"--model {model.model}: needs weights; give --finetune FILE, --pretrained or --random_init")
    if model.pretrained and (model.finetune or model.random_init):
        other = f"--finetune {model.finetune}" if model.finetune else "--random_init"
        raise UserError(f"--pretrained: not together with {other}")
    return options
