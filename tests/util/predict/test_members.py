"""Members of an ensemble from the paths that a user gives."""

import pytest

from tests.harness.prediction import CLASSES, save_folds, save_head
from util.errors import UserError
from util.predict.members import find_members, short_names


def test_a_member_is_a_file_a_run_or_all_folds(tmp_path):
    save_head(tmp_path / "one.pth")
    save_head(tmp_path / "run" / "checkpoint-best.pth", ["owl", "cat", "dog"])
    save_folds(tmp_path / "folds", range(11), 11)
    members, classes = find_members([str(tmp_path / n) for n in ("one.pth", "run", "folds")])
    assert classes == CLASSES and short_names(members) == ["one.pth", "run", "folds"]
    assert [len(m.paths) for m in members] == [1, 1, 11]
    assert members[2].paths[10] == str(tmp_path / "folds" / "fold-10" / "checkpoint-best.pth")


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["nowhere"], ["--checkpoints", "nowhere", "no such file or folder"]),
        (["empty"], ["empty", "checkpoint-best.pth"]),
        (["a.pth", "./a.pth"], ["a.pth", "twice"]),
        (["a.pth", "other.pth"], ["a.pth and", "other.pth", "only the first has owl", "only the second has emu"]),
        (["damaged.pth"], ["damaged.pth", "damaged or truncated"]),
        (["pretrained.pth"], ["pretrained.pth", "without a classifier"]),
        (["w.safetensors"], ["w.safetensors", "weights only"]),
        (["hole"], ["hole", "fold-1 of 3 folds is missing"]),
        (["running"], ["fold-1", "not finished"]),
    ],
)
def test_a_wrong_member_is_one_line(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    save_head(tmp_path / "a.pth")
    save_head(tmp_path / "other.pth", ["cat", "dog", "emu"])
    save_head(tmp_path / "pretrained.pth", kind="noprop_mae")
    (tmp_path / "damaged.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:-200])
    (tmp_path / "w.safetensors").write_bytes(b"")
    save_folds(tmp_path / "hole", (0, 2), 3)
    save_folds(tmp_path / "running", (0, 1), 2)
    (tmp_path / "running" / "fold-1" / "result.json").unlink()
    with pytest.raises(UserError) as caught:
        find_members(arguments)
    assert all(w in str(caught.value) for w in words) and "\n" not in str(caught.value), str(caught.value)
