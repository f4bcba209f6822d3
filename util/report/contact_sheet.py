"""Contact sheets: thumbnails of images worth checking, with their predictions and probabilities."""

from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageDraw

from util.files import survive
from util.report.pictures import font, save_png

COLUMNS = 6
THUMB, PAD, BAR = 200, 12, 6  # pixels
LINE = 19  # pixels of a line of text
INK, FAINT, PAPER, TILE = (28, 28, 30), (120, 120, 126), (255, 255, 255), (240, 240, 242)
# Blue and vermilion, safe for the colour-blind; a mark shows the same.
RIGHT, WRONG, TRACK, FIRST = (0, 92, 158), (190, 66, 0), (222, 222, 226), (96, 96, 102)


@dataclass
class Entry:
    """One image of a sheet. ranking: (class, probability), most probable first; truth: the label, or None."""

    image: int
    name: str
    ranking: list[tuple[str, float]]
    truth: str | None = None


def draw_sheet(entries: list[Entry], open_image: Callable[[int], Image.Image], title: str, path: str) -> None:
    """Save the entries as a PNG grid. open_image(number) -> RGB, decoded one at a time."""
    with survive(path):
        save_png(_sheet(entries, open_image, title), path)


def _sheet(entries: list[Entry], open_image: Callable[[int], Image.Image], title: str) -> Image.Image:
    thumbs = [thumbnail(open_image(entry.image)) for entry in entries]
    tile = (THUMB, max(thumb.height for thumb in thumbs))  # no empty bands for wide photos
    columns = min(COLUMNS, len(entries))
    lines = 4 if any(e.truth is not None for e in entries) else 3
    cell = (tile[0] + PAD, tile[1] + BAR + 8 + lines * LINE + PAD)
    head = 2 * PAD + 24
    width = max(PAD + columns * cell[0], int(font(19, bold=True).getlength(title)) + 2 * PAD)
    sheet = Image.new("RGB", (width, head + -(-len(entries) // columns) * cell[1] + PAD), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((PAD, PAD), title, INK, font(19, bold=True))
    for k, (entry, thumb) in enumerate(zip(entries, thumbs)):
        x, y = PAD + (k % columns) * cell[0], head + (k // columns) * cell[1]
        draw.rectangle((x, y, x + tile[0] - 1, y + tile[1] - 1), TILE)
        sheet.paste(thumb, (x + (tile[0] - thumb.width) // 2, y + (tile[1] - thumb.height) // 2))
        _caption(draw, entry, x, y + tile[1])
    return sheet


def thumbnail(image: Image.Image) -> Image.Image:
    """The whole image within THUMB x THUMB; tiny images are enlarged with square pixels."""
    scale = THUMB / max(image.size)
    size = [max(1, round(side * scale)) for side in image.size]
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST if scale >= 3 else Image.Resampling.LANCZOS)


def _caption(draw: ImageDraw.ImageDraw, entry: Entry, x: int, y: int) -> None:
    (best, p), *others = entry.ranking
    y += 4
    draw.rectangle((x, y, x + THUMB - 1, y + BAR - 1), TRACK)
    draw.rectangle((x, y, x + max(1, round(THUMB * p)) - 1, y + BAR - 1), FIRST)
    y += BAR + 4
    color = INK if entry.truth is None else RIGHT if entry.truth == best else WRONG
    _line(draw, x, y, best, percent(p), color, font(14, bold=True))
    if others:
        _line(draw, x, y + LINE, others[0][0], percent(others[0][1]), FAINT, font(13))
    if entry.truth is not None:
        mark = "✓" if entry.truth == best else "✗"
        _line(draw, x, y + 2 * LINE, f"true: {entry.truth}", mark, color, font(13))
    _line(draw, x, y + (2 if entry.truth is None else 3) * LINE, entry.name, "", FAINT, font(11), keep_end=True)


def percent(p: float) -> str:
    """In percent, but 100 % only if p is 1."""
    return f"{100 * p:.1f} %" if p < 0.9995 else f"{100 * min(p, 0.99999):.3f} %"


def _line(draw, x: int, y: int, left: str, right: str, color, face, keep_end: bool = False) -> None:
    """Text on the left, shortened with an ellipsis to fit beside the text on the right."""
    room = THUMB - (face.getlength(right) + 8 if right else 0)
    left = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in left)
    draw.text((x, y), shorten(left, room, face, keep_end), color, face)
    if right:
        draw.text((x + THUMB, y), right, color, face, anchor="ra")


def shorten(text: str, room: float, face, keep_end: bool) -> str:
    """Shorten `text` to `room` pixels; keep_end: cut in the middle, because file names differ at their ends."""
    if face.getlength(text) <= room:
        return text
    for kept in range(len(text) - 1, 0, -1):
        end = kept * 2 // 3 if keep_end else 0
        short = text[: kept - end].rstrip() + "…" + text[len(text) - end :]
        if face.getlength(short) <= room:
            return short
    return "…"
