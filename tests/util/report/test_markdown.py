"""The parts that all reports share."""

import shlex
import sys

from util.report.markdown import cell, note_lines, write_report


def test_a_report_begins_with_the_command_that_a_shell_would_run_again(tmp_path, monkeypatch):
    words = ["main_x.py", "--data_path", "my photos", "--class", "it's"]
    monkeypatch.setattr(sys, "argv", [f"/anywhere/{words[0]}", *words[1:]])
    write_report(str(tmp_path), "What came out", ["text", ""])
    title, _, command, _, *rest = (tmp_path / "report.md").read_text().split("\n")
    assert title == "# What came out" and rest == ["text", ""]
    assert command.startswith("    ") and shlex.split(command) == words


def test_names_of_any_characters_stay_inside_their_cell():
    assert cell("a|b\nc<d>") == "a\\|b c&lt;d>"
    assert note_lines([]) == [] and note_lines(["x", "y|z"]) == ["- x", "- y\\|z", ""]
