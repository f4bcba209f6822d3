"""The parts that all reports share."""

import shlex
import sys

import pytest

from util.report.markdown import cell, note_lines, write_report

LOCAL = ["--nproc_per_node=4"]


@pytest.mark.parametrize(
    "ranks,here,launcher",
    [(1, 1, ["python"]), (4, 4, ["torchrun", "--nproc_per_node=4"]), (8, 4, ["torchrun", "--nnodes=2", *LOCAL])],
)
def test_a_report_begins_with_the_command_that_a_shell_would_run_again(tmp_path, monkeypatch, ranks, here, launcher):
    words = ["../main_x.py", "--data_path", "my photos", "--class", "it's", "x" * 500]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
    monkeypatch.chdir(tmp_path)
    write_report(str(tmp_path), "What came out", ["text", ""])
    title, _, command, _, where, _, *rest = (tmp_path / "report.md").read_text().split("\n")
    assert title == "# What came out" and where == f"Started in `{tmp_path}`." and rest == ["text", ""]
    assert command.startswith("    ") and shlex.split(command) == [*launcher, *words]


def test_names_of_any_characters_stay_inside_their_cell():
    assert cell("a|b\nc<d>") == "a\\|b c&lt;d>"
    assert note_lines([]) == [] and note_lines(["x", "y|z"]) == ["- x", "- y\\|z", ""]
