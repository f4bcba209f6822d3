"""docs/flags.md: every flag of every main, from the same declarations as --help.

python -m util.cli.reference        # or `make docs`: writes docs/flags.md
"""

import re
from argparse import Action
from pathlib import Path

from util.cli.finetune import FinetuneOptions
from util.cli.flags import Options
from util.cli.linprobe import LinprobeOptions
from util.cli.parser import Formatter, Parser, described
from util.cli.predict import PredictOptions
from util.cli.pretrain import PretrainOptions
from util.cli.sample import SampleOptions
from util.cli.sweep import SweepOptions

PATH = Path(__file__).parents[2] / "docs" / "flags.md"
MAINS: dict[str, type[Options]] = {
    "main_pretrain_noprop.py": PretrainOptions,
    "main_finetune.py": FinetuneOptions,
    "main_linprobe.py": LinprobeOptions,
    "main_sample.py": SampleOptions,
    "main_predict.py": PredictOptions,
    "main_sweep.py": SweepOptions,
}
HEAD = """# Flags

The flags of each script, as in its `--help`; `make docs` writes this file. Flags that MAE's scripts also have keep
their names and come first in each group. `@FILE` reads flags from a file, as in `@recipes/photos_first.args`; later
flags win.
"""


def reference() -> str:
    """The text of docs/flags.md."""
    lines = [HEAD]
    for main, options in MAINS.items():
        lines += [f"## {main}", "", options.DESCRIPTION, ""]
        for group in Parser(options)._action_groups[2:]:  # after argparse's own: positional arguments and --help
            lines += [f"### {group.title}", "", "| flag | default | |", "|---|---|---|"]
            lines += [row(action) for action in group._group_actions] + [""]
    return "\n".join(lines)


def row(action: Action) -> str:
    formatter = Formatter("")
    values = formatter._format_args(action, formatter._get_default_metavar_for_optional(action))
    flag = f"{', '.join(action.option_strings) or action.dest} {values}".strip()
    text = described(action.help or "", action.default)
    found = re.search(r" \(default: (.*)\)$", text)
    switch = "off" if action.nargs == 0 and action.default is False else ""
    default = found.group(1) if found else "required" if action.required else switch
    cells = [f"`{flag}`", default, text[: found.start()] if found else text]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"


if __name__ == "__main__":
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(reference(), "utf-8")
    print(f"wrote {PATH}")
