"""What all reports share: report.md's title and command, its notes, text inside a table."""

import os
import shlex
import sys

from util.files import write_text


def write_report(output_dir: str, title: str, lines: list[str]) -> None:
    """report.md: the title, the command line that ran and where, `lines`."""
    ranks, here = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    nodes = [f"--nnodes={ranks // here}"] if ranks > here else []
    launcher = ["python"] if ranks == 1 else ["torchrun", *nodes, f"--nproc_per_node={here}"]
    started = command_block([*launcher, *sys.argv])
    text = [f"# {title}", "", *started, f"Started in `{cell(os.getcwd())}`.", "", *lines]
    write_text(os.path.join(output_dir, "report.md"), "\n".join(text))


def command_of(script: str, *words: str) -> list[str]:
    """The words of a command that runs another script, from where this process was started."""
    started = sys.argv[0] if os.path.basename(sys.argv[0]).startswith("main_") else ""
    return ["python", os.path.join(os.path.dirname(started), script), *words]


def command_block(*commands: list[str]) -> list[str]:
    """Commands as a shell takes them, each whole in a line of a code block."""
    return [*(f"    {shlex.join(words)}" for words in commands), ""]


def note_lines(notes: list[str]) -> list[str]:
    """What the data set left out and the like, as a list."""
    return [*(f"- {cell(note)}" for note in notes), *([""] if notes else [])]


def cell(text: str) -> str:
    """Text inside a Markdown table."""
    return "".join(c if c.isprintable() else " " for c in text).replace("|", "\\|").replace("<", "&lt;")
