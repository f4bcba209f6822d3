"""What is written below the images of a contact sheet."""

from PIL import Image

from util.report import contact_sheet
from util.report.contact_sheet import Entry, draw_sheet


def test_right_and_wrong_differ_by_more_than_their_colour(tmp_path, monkeypatch):
    lines: list[tuple[str, str]] = []
    monkeypatch.setattr(
        contact_sheet, "_line", lambda draw, x, y, left, right, *how, **more: lines.append((left, right))
    )
    truths = ("fish", "nut", None)
    entries = [Entry(i, f"{i}.jpg", [("fish", 0.9), ("nut", 0.1)], truth) for i, truth in enumerate(truths)]
    draw_sheet(entries, lambda i: Image.new("RGB", (8, 8)), "title", str(tmp_path / "sheet.png"))
    guess = [("fish", "90.0 %"), ("nut", "10.0 %")]
    assert lines[:8] == [*guess, ("true: fish", "✓"), ("0.jpg", ""), *guess, ("true: nut", "✗"), ("1.jpg", "")]
    assert lines[8:] == [*guess, ("2.jpg", "")]
