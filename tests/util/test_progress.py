"""Lines of progress."""

import re

from util.progress import Progress


def test_a_line_stands_after_every_few_steps_and_after_the_last(capsys):
    progress = Progress("Epoch: [3]", 7, every=3, start=1)
    for i in range(1, 7):
        progress.update({"loss": float(i)} if progress.due else None)
    shown = re.findall(r"Epoch: \[3\]  \[(\d)/7\].*loss: (\d)", capsys.readouterr().out)
    assert shown == [("3", "2"), ("6", "5"), ("7", "6")]


def test_other_ranks_are_silent(capsys):
    progress = Progress("Epoch: [0]", 1, enabled=False)
    progress.update({"loss": 1.0})
    assert progress.step == 1 and capsys.readouterr().out == ""
