"""The argument parser of a main: its flags, recipes (@file), one-line errors."""

import argparse
import difflib
import os
import re
import shutil
from typing import Any, Generic, TypeVar

from util.cli.flags import Options, flags_of_group
from util.cli.script import require_package
from util.cli.settings import Input, Model
from util.data.image_files import refuse_output_among_images
from util.data_specs import IN_MEMORY
from util.errors import UserError

O = TypeVar("O", bound=Options)
# Flags of MAE's scripts that no main has, and what does their work here.
MAES = {
    "--world_size": "torchrun tells the number of processes: --nproc_per_node, --nnodes",
    "--local_rank": "torchrun tells each process its rank",
    "--dist_on_itp": "start the processes with torchrun",
    "--resplit": "erasing treats all images of a batch alike",
    "--norm_pix_loss": "main_pretrain_noprop.py has --target norm_pixel",
}


class Formatter(argparse.HelpFormatter):
    """Adds the default to each help text that does not state it. A switch is off unless its text says otherwise."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30, width=max(80, min(120, shutil.get_terminal_size().columns)))

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        short = {"whole number": "N", "number": "X"}.get(getattr(action.type, "__name__", ""))
        return short or super()._get_default_metavar_for_optional(action)

    def _get_help_string(self, action: argparse.Action) -> str:
        return described(action.help or "", action.default)


def described(text: str, default: Any) -> str:
    """A flag's help, with the default if that is a value and the text does not state it."""
    if "(default" in text or isinstance(default, bool) or default in (None, "", [], argparse.SUPPRESS):
        return text
    values = default if isinstance(default, (list, tuple)) else [default]
    return f"{text} (default: {' '.join(f'{v:g}' if isinstance(v, float) else str(v) for v in values)})"


class Parser(argparse.ArgumentParser, Generic[O]):
    """The flags of a main's Options, with one-line errors, no abbreviations, and recipes: @file contains flags, several
    per line, and comments."""

    def __init__(self, options: type[O]):
        self.kind = options
        positional = "".join(f"{f.name.upper()} " for f in options.flags().values() if not f.name.startswith("-"))
        super().__init__(
            usage=f"%(prog)s {positional}[flags, or @FILE with flags]",
            description=options.DESCRIPTION,
            fromfile_prefix_chars="@",
            allow_abbrev=False,
            formatter_class=Formatter,
        )
        for group in options.groups().values():
            section = self.add_argument_group((group.__doc__ or "").strip())
            for flag in flags_of_group(group, options.MAIN):
                keywords = dict(flag.argparse)
                if flag.name.startswith("-"):  # not allowed for a positional argument
                    keywords |= {"dest": flag.dest, "default": flag.default}
                section.add_argument(*flag.names, **keywords)
                for name, more in flag.also.items():
                    section.add_argument(name, dest=flag.dest, default=argparse.SUPPRESS, **more)

    def options(self, argv: list[str] | None = None) -> O:
        """The options of a command line (default: this process's)."""
        return self.kind.of(**vars(self.parse_args(argv)))

    def convert_arg_line_to_args(self, line: str) -> list[str]:
        return words_of(line)

    def error(self, message: str):
        raise UserError(re.sub(r"(\S{200})\S+", r"\1...", message))  # cut values of thousands of characters

    def parse_args(self, args=None, namespace=None):
        try:
            options, unknown = self.parse_known_args(args, namespace)
        except UserError:
            raise
        except RecursionError:
            raise UserError("@file: a recipe includes itself") from None
        except (ValueError, OSError) as error:  # an unclosed quote, a file that is not text, a loop of files
            raise UserError(f"@file: cannot be read ({error})") from None
        if unknown:
            name = unknown[0].split("=")[0]
            known = [o for action in self._actions for o in action.option_strings]
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
            hint = f"did you mean {close[0]}?" if close else f"{self.prog} --help lists the flags"
            if self.kind.NETWORK_FROM and name in flags_of_the_network():
                hint = f"it is what {self.kind.NETWORK_FROM} was trained with, and is in the file"
            elif name in MAES:
                hint = f"of MAE's, and gone; {MAES[name]}"
            raise UserError(f"{unknown[0]}: no such flag; {hint}")
        return options


def flags_of_the_network() -> set[str]:
    """Flags of other mains that describe a network and its input."""
    flags = [flag for group in (Input, Model) for flag in flags_of_group(group, "finetune")]
    return {name for flag in flags for name in (*flag.names, *flag.also)}


_WORD = re.compile(r"""(?:^\\#|\\[\s"']|"[^"]*"|'[^']*'|[^\s"'])+""")
_QUOTED = re.compile(r"""^\\(#)|\\([\s"'])|"([^"]*)"|'([^']*)'""")


def words_of(line: str) -> list[str]:
    """The words of a line of a recipe. A `#` at the start of a word begins a comment; everything in quotes is literal.

    A backslash escapes a space, a quote, or a `#` at the start of a word; elsewhere, as in a Windows path, it is
    literal. ValueError for an unclosed quote.
    """
    if "\0" in line:
        raise ValueError("not UTF-8 text; save it as UTF-8")
    words, rest = [], line.removeprefix("\ufeff").strip()  # editors on Windows write a byte-order mark
    while rest and not rest.startswith("#"):
        word = _WORD.match(rest)
        rest = rest[word.end() :] if word else rest
        if rest and not rest[0].isspace():
            raise ValueError(f"unclosed quote: {rest[:40]}")
        if word:
            words.append(_QUOTED.sub(lambda m: "".join(g or "" for g in m.groups()), word[0]))
        rest = rest.lstrip()
    return words[:-1] if words[-1:] == ["\\"] else words  # a backslash at the end continues a line in a shell


def check_training(options) -> None:
    """Checks shared by both trainings, which need no data."""
    run, data = options.run, options.data
    if run.resume and run.resume != "auto" and not os.path.isfile(run.resume):
        raise UserError(f"--resume {run.resume}: no such file; give a checkpoint or `auto`")
    if run.log_dir and "tensorboard" not in run.logger:
        raise UserError(f"--log_dir {run.log_dir}: is TensorBoard's folder; add tensorboard to --logger")
    for name in set(run.logger) - {"csv"}:
        require_package(name, f"--logger {name}")
    if run.profile and not run.output_dir:
        raise UserError(f"--profile {run.profile}: needs an --output_dir for trace.json and profile.txt")
    if run.output_dir == "" and run.resume == "auto":
        raise UserError("--resume auto: needs an --output_dir to look in")
    if data.data_path is not None and data.dataset not in IN_MEMORY:
        refuse_output_among_images("--output_dir", run.output_dir, data.data_path)
        refuse_output_among_images("--log_dir", run.log_dir, data.data_path)


def default_path(dataset: str) -> str:
    """The default --data_path."""
    return "." if dataset == "digits" else "data"
