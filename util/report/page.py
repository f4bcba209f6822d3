"""Reports: a list of blocks, written as report.md and as report.html, one file that fetches nothing.

Text may be any characters: names of files and classes are escaped in both. A part that is a Code is set as code.
"""

import base64
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from jinja2 import Environment, PackageLoader
from markupsafe import Markup, escape
from PIL import Image

from util.cli.flags import Options, shown
from util.files import write_text
from util.log import git_commit, versions

NUMBER = r"[-+]?(\d[\d.]*(e[-+]?\d+)?|inf)( to [-+]?\d[\d.]*)? ?%?"
LARGEST = 7_500_000  # bytes of pictures inside a page, where they take 10 MB; what does not fit is named instead


class Code(str):
    """A part of a text that is code: a path, a command."""


Inline = str | Sequence[str]  # a text, or its parts


@dataclass(frozen=True)
class Heading:
    text: Inline


@dataclass(frozen=True)
class Text:
    text: Inline


@dataclass(frozen=True)
class Notes:
    """A list; nothing if it is empty."""

    items: Sequence[Inline]


@dataclass(frozen=True)
class Lines:
    """Preformatted lines."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Table:
    """rows: cells as text, '' where there is none. bold: numbers of rows. sortable: by a press on a column's name."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    bold: Sequence[int] = ()
    sortable: bool = False

    def numeric(self, column: int) -> bool:
        """True if all its cells are numbers or intervals, or say that there is none."""
        cells = [row[column] for row in self.rows if row[column] not in ("", "base", "not finite")]
        return bool(cells) and all(re.fullmatch(NUMBER, cell) for cell in cells)


@dataclass(frozen=True)
class Picture:
    """A PNG in the report's folder or, in report.html only, an SVG."""

    alt: str
    file: str = ""
    caption: str = ""
    svg: str = ""


@dataclass(frozen=True)
class Folded:
    """Blocks that report.html shows on a click."""

    summary: str
    blocks: "Sequence[Block]"


Block = Heading | Text | Notes | Lines | Table | Picture | Folded


def commands(*lines: Sequence[str]) -> Lines:
    """Shell commands, each given by its words."""
    return Lines([shlex.join(words) for words in lines])


def command_of(script: str, *words: str) -> list[str]:
    """The words of a command that runs another script from this process's working folder."""
    started = sys.argv[0] if os.path.basename(sys.argv[0]).startswith("main_") else ""
    return ["python", os.path.join(os.path.dirname(started), script), *words]


def write_report(
    output_dir: str, title: str, blocks: Sequence[Block], options: Options | None = None, flag: str = ""
) -> None:
    """report.md and report.html: title, command line and working folder, `blocks`, settings and versions.

    flag: if the files cannot be written, an error that names it; without it, a warning.
    """
    ranks, here = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    nodes = [f"--nnodes={ranks // here}"] if ranks > here else []
    launcher = ["python"] if ranks == 1 else ["torchrun", *nodes, f"--nproc_per_node={here}"]
    page: list[Block] = [commands([*launcher, *sys.argv]), Text(["Started in ", Code(os.getcwd()), "."])]
    page += [*blocks, *how_it_was_made(options)]
    write_text(os.path.join(output_dir, "report.md"), f"# {for_markdown(title)}\n\n{markdown(page)}", flag)
    write_text(os.path.join(output_dir, "report.html"), html(title, page, output_dir), flag)


def how_it_was_made(options: Options | None) -> list[Block]:
    """The settings that are not the defaults, and the versions."""
    flags, values = (options.flags(), options.flat()) if options is not None else ({}, {})
    changed = [[f.name, shown(values[k]), shown(f.default)] for k, f in flags.items() if values[k] != f.default]
    made = "; ".join(f"{name} {version}" for name, version in versions().items())
    table = [Table(["flag", "value", "default"], changed)] if changed else []
    said = Text(f"{made}; commit {git_commit() or 'unknown'}; {date.today():%Y-%m-%d}.")
    return [Heading("Settings and versions"), *table, said]


def visible(text: str) -> str:
    """Text without control characters; bytes of a file name that are no text become escapes, as on the terminal."""
    text = re.sub("[\udc80-\udcff]", lambda byte: f"\\x{ord(byte[0]) - 0xDC00:x}", text)
    text = text.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else " " for c in text)


def parts(text: Inline) -> Sequence[str]:
    return [text] if isinstance(text, str) else text


def markdown(blocks: Sequence[Block]) -> str:
    return "\n\n".join(filter(None, map(block_markdown, blocks))) + "\n"


def block_markdown(block: Block) -> str:
    match block:
        case Heading(text):
            return f"## {for_markdown(text)}"
        case Text(text):
            return for_markdown(text)
        case Notes(items):
            return "\n".join(f"- {for_markdown(item)}" for item in items)
        case Lines(lines):
            return "\n".join(f"    {visible(line)}" for line in lines)
        case Table(columns, rows, bold):
            cells = [[for_markdown(cell) for cell in row] for row in (columns, *rows)]
            for i in bold:
                cells[i + 1] = [f"**{cell}**" if cell else "" for cell in cells[i + 1]]
            head, *body = ("|" + "".join(f" {cell} |" if cell else " |" for cell in row) for row in cells)
            return "\n".join([head, "|---" * len(columns) + "|", *body])
        case Picture(alt, file, caption):
            return "\n\n".join([f"![{for_markdown(alt)}]({file})", for_markdown(caption)]).strip() if file else ""
        case Folded(summary, blocks):
            return f"{for_markdown(summary)}:\n\n{markdown(blocks)}".strip()


def for_markdown(text: Inline) -> str:
    """Escaped, so that no character of a name is read as Markdown or HTML."""
    return "".join(code_span(p) if isinstance(p, Code) else escape_markdown(visible(p)) for p in parts(text))


def escape_markdown(text: str) -> str:
    text = re.sub(r"&(?=#?\w+;)", "&amp;", text).replace("<", "&lt;")
    text = re.sub(r"\\(?=[^\w\s])", r"\\\\", text)  # before punctuation only, where it would escape it
    # Underscores inside words are literal, as in val_acc1.
    return re.sub(r"[`*|$~]|(?<=\])\(|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text)


def code_span(text: str) -> str:
    text = visible(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if len(fence) > 1 else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def html(title: str, blocks: Sequence[Block], folder: str) -> str:
    """The page. Pictures are read from `folder`."""
    environment = Environment(
        loader=PackageLoader("util.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else visible(str(value)),
    )
    environment.filters |= {"inline": for_html, "kind": lambda block: type(block).__name__}
    pictures = Pictures(folder)
    return environment.get_template("page.html").render(title=title, blocks=blocks, picture=pictures.show)


def for_html(text: Inline) -> Markup:
    shown = (Markup("<code>{}</code>" if isinstance(p, Code) else "{}").format(visible(p)) for p in parts(text))
    return Markup("").join(shown)


@dataclass
class Pictures:
    """Puts a folder's pictures into a page, up to LARGEST bytes in all."""

    folder: str
    size: int = 0

    def show(self, picture: Picture) -> Markup:
        if picture.svg:
            return Markup('<div role="img" aria-label="{}">{}</div>').format(visible(picture.alt), Markup(picture.svg))
        path = Path(self.folder, picture.file)
        try:
            data = path.read_bytes()
            with Image.open(path) as image:
                width, height, dpi = *image.size, image.info.get("dpi", (96,))[0]
        except OSError:
            return escape(f"{picture.file} could not be written.")
        if self.size + len(data) > LARGEST:
            return escape(f"Left out: {picture.file}, of {len(data) / 1e6:.1f} MB, is beside this page.")
        self.size += len(data)
        return Markup(
            '<img alt="{}" width="{}" height="{}" style="min-width: {}px" src="data:image/png;base64,{}">'
        ).format(
            visible(picture.alt),
            round(width * 96 / dpi),
            round(height * 96 / dpi),
            width // 2,  # in a narrow window it is scrolled: half of its size can be read
            base64.b64encode(data).decode(),
        )
