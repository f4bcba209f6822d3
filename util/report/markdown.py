"""Parts shared by all reports: title and command, notes, text in tables."""

import os
import shlex
import sys

from util.files import write_text


def write_report(output_dir: str, title: str, lines: list[str]) -> None:
    """Write report.md: title, command line and working folder, then `lines`."""
    ranks, here = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    nodes = [f"--nnodes={ranks // here}"] if ranks > here else []
    launcher = ["python"] if ranks == 1 else ["torchrun", *nodes, f"--nproc_per_node={here}"]
    started = command_block([*launcher, *sys.argv])
    text = [f"# {title}", "", *started, f"Started in `{cell(os.getcwd())}`.", "", *lines]
    write_text(os.path.join(output_dir, "report.md"), "\n".join(text))


def command_of(script: str, *words: str) -> list[str]:
    """The words of a command that runs another script from this process's working folder."""
    started = sys.argv[0] if os.path.basename(sys.argv[0]).startswith("main_") else ""
    return ["python", os.path.join(os.path.dirname(started), script), *words]


def command_block(*commands: list[str]) -> list[str]:
    """A code block of shell commands, one per line."""
    return [*(f"    {shlex.join(words)}" for words in commands), ""]


def note_lines(notes: list[str]) -> list[str]:
    """Notes, such as files that were left out, as a list."""
    return [*(f"- {cell(note)}" for note in notes), *([""] if notes else [])]


def cell(text: str) -> str:
    """Text escaped for a Markdown table."""
    return "".join(c if c.isprintable() else " " for c in text).replace("|", "\\|").replace("<", "&lt;")
