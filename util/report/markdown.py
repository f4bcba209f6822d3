"""What all reports share: report.md's title and command, its notes, text inside a table."""

import os
import shlex
import sys

from util.files import write_text


def write_report(output_dir: str, title: str, lines: list[str]) -> None:
    """report.md: the title, the command line that ran, `lines`."""
    command = shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]])
    text = [f"# {title}", "", f"    {command}", "", *lines]
    write_text(os.path.join(output_dir, "report.md"), "\n".join(text))


def note_lines(notes: list[str]) -> list[str]:
    """What the data set left out and the like, as a list."""
    return [*(f"- {cell(note)}" for note in notes), *([""] if notes else [])]


def cell(text: str) -> str:
    """Text inside a Markdown table."""
    return "".join(c if c.isprintable() else " " for c in text).replace("|", "\\|").replace("<", "&lt;")
