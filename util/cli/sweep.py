"""Options of main_sweep.py, and the command lines behind them."""

import sys
from dataclasses import dataclass

from util.cli.flags import Options
from util.cli.parser import Parser
from util.cli.script import require_package
from util.cli.settings import Sweep
from util.errors import UserError


@dataclass(frozen=True)
class SweepOptions(Options):
    """All options of a sweep."""

    MAIN = "sweep"
    DESCRIPTION = (
        "Run a script for every combination of some flags' values, compare the arms, and write a report: "
        "main_sweep.py --grid NAME=VALUES ... -- main_finetune.py FLAGS [-- another script's command]"
    )

    sweep: Sweep


def get_args_parser() -> Parser[SweepOptions]:
    return Parser(SweepOptions)


def get_options(argv: list[str] | None = None) -> tuple[SweepOptions, list[list[str]]]:
    """(options, the words of each stage's command)."""
    own, *stages = split_lines(sys.argv[1:] if argv is None else argv)
    options = get_args_parser().options(own)
    if not stages or not all(stages):
        raise UserError("main_sweep.py: give the command to run after ` -- `, e.g. -- main_finetune.py @recipe.args")
    sweep = options.sweep
    if sweep.search:
        for name, value in (("paired", sweep.paired), ("within", sweep.within), ("base", sweep.base)):
            if value:
                raise UserError(f"--{name}: not together with --search, which compares no arms")
        if len(sweep.grid) > 1:
            raise UserError("--search: takes one --grid; its axes are searched together")
        require_package("optuna", "--search optuna")
    if not sweep.output_dir:
        raise UserError("--output_dir: give a folder for the runs")
    if options.sweep.launcher == "slurm":
        require_package("submitit", "--launcher slurm")
    elif options.sweep.slurm:
        raise UserError("--slurm: only --launcher slurm takes it")
    return options, stages


def split_lines(words: list[str]) -> list[list[str]]:
    """Split at the words `--`."""
    lines: list[list[str]] = [[]]
    for word in words:
        if word == "--":
            lines.append([])
        else:
            lines[-1].append(word)
    return lines
