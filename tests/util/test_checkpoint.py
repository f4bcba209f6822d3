import os
import random
import re

import numpy as np
import pytest
import torch

from tests.harness.training import new_run, new_training
from util.checkpoint import (
    BEST,
    LAST,
    PREVIOUS,
    CheckpointWriter,
    damage,
    find_resume,
    numbered_checkpoints,
    peek_meta,
    read_checkpoint,
    rng_state,
    set_rng_state,
)
from util.errors import UserError
from util.log import RunLog
from util.optim import build_ema
from util.train.run import Found


def state(epoch: int, step: int = 0) -> dict:
    return {
        "format": 1,
        "kind": "finetune",
        "epoch": epoch,
        "step": step,
        "meta": {"model": "x", "classes": ["a"]},
        "model": {"w": torch.full((1000,), float(epoch))},
        "optimizer": {"state": {}},
        "scaler": {},
        "rng": [rng_state(torch.device("cpu"))],
    }


def flip_byte(path, where: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 0x40
    path.write_bytes(data)


def test_checkpoint_round_trip_and_its_neighbours(tmp_path):
    writer = CheckpointWriter(str(tmp_path), keep=2)
    for epoch in range(1, 5):
        assert writer.save_last(state(epoch)) and writer.save_epoch(state(epoch), epoch)
    writer.save_best(state(2))
    assert read_checkpoint(str(tmp_path / LAST))["epoch"] == 4
    assert read_checkpoint(str(tmp_path / PREVIOUS))["epoch"] == 3
    assert [n for n, _ in numbered_checkpoints(str(tmp_path))] == [3, 4]
    best = read_checkpoint(str(tmp_path / BEST))
    assert "optimizer" not in best and torch.equal(best["model"]["w"], torch.full((1000,), 2.0))
    assert peek_meta(str(tmp_path / LAST)) == {"model": "x", "classes": ["a"]}
    assert not [n for n in os.listdir(tmp_path) if n.endswith(".tmp")]


def test_failed_write_keeps_the_previous_checkpoint(tmp_path, capsys, monkeypatch):
    writer = CheckpointWriter(str(tmp_path))
    writer.save_last(state(1))
    real = torch.save

    def full_disk(content, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    assert writer.save_last(state(2)) is False
    assert "No space left" in capsys.readouterr().err
    assert read_checkpoint(str(tmp_path / LAST))["epoch"] == 1 and sorted(os.listdir(tmp_path)) == [LAST]
    monkeypatch.setattr(torch, "save", real)
    assert writer.save_last(state(2)) and read_checkpoint(str(tmp_path / LAST))["epoch"] == 2


@pytest.mark.parametrize(
    "folder,disk_is_full,word",
    [("out", False, "; saved;"), ("out", True, "not saved;"), (None, False, "nothing is saved")],
)
def test_a_stopped_run_says_what_is_on_disk(tmp_path, capsys, monkeypatch, folder, disk_is_full, word):
    log = RunLog(folder and str(tmp_path / folder))
    run = new_run(log=log)
    if disk_is_full:
        monkeypatch.setattr(torch, "save", lambda content, file: (_ for _ in ()).throw(OSError(28, "No space left")))
    run.save(new_training(torch.nn.Linear(1, 1)))
    assert run.stopped() == 75 and word in capsys.readouterr().out
    log.close()


@pytest.mark.parametrize("fault", ["flip", "truncate", "empty"])
def test_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, fault):
    writer = CheckpointWriter(str(tmp_path))
    writer.save_last(state(1)), writer.save_last(state(2))
    last = tmp_path / LAST
    if fault == "flip":
        flip_byte(last, 0.5)
    else:
        last.write_bytes(last.read_bytes()[: 0 if fault == "empty" else -200])
    said = []
    assert find_resume(str(tmp_path), said.append) == str(tmp_path / PREVIOUS)
    assert len(said) == 1 and LAST in said[0]
    with pytest.raises(UserError, match="damaged"):
        read_checkpoint(str(last))


def test_every_flipped_tensor_byte_is_seen(tmp_path):
    CheckpointWriter(str(tmp_path)).save_last(state(7))
    path = tmp_path / LAST
    whole = path.read_bytes()
    payload = whole.find(torch.full((1000,), 7.0).numpy().tobytes())
    for offset in (0, 1999, 3999):
        broken = bytearray(whole)
        broken[payload + offset] ^= 1
        path.write_bytes(broken)
        assert damage(str(path))
    path.write_bytes(whole)
    assert damage(str(path)) is None


def test_newest_by_position_wins_whatever_the_file_times(tmp_path):
    writer = CheckpointWriter(str(tmp_path))
    writer.save_last(state(3, 5)), writer.save_last(state(3, 9))
    os.utime(tmp_path / LAST, (1, 1))
    assert find_resume(str(tmp_path)) == str(tmp_path / LAST)
    os.unlink(tmp_path / LAST)
    assert find_resume(str(tmp_path)) == str(tmp_path / PREVIOUS)
    assert find_resume(str(tmp_path / "nowhere")) is None


def test_newest_by_position_wins_whatever_the_files_are_called(tmp_path):
    """As after a copy from another folder: the last by name is not the furthest. Numbers, not texts: 10 is above 9."""
    for name, position in (
        (LAST, (9, 10)),
        ("checkpoint-next.pth", (2, 30)),
        (PREVIOUS, (9, 9)),
        ("checkpoint-3.pth", (10, 1)),
        ("checkpoint-20.pth", (10, 0)),
    ):
        torch.save(state(*position), tmp_path / name)
    for name in ("checkpoint-3.pth", "checkpoint-20.pth", LAST, PREVIOUS, "checkpoint-next.pth"):
        assert find_resume(str(tmp_path)) == str(tmp_path / name)
        os.unlink(tmp_path / name)


def test_kill_between_the_two_renames_loses_nothing(tmp_path):
    writer = CheckpointWriter(str(tmp_path))
    writer.save_last(state(1)), writer.save_last(state(2))
    os.replace(tmp_path / LAST, tmp_path / "checkpoint-next.pth")  # as if killed before the last rename
    assert find_resume(str(tmp_path)).endswith("checkpoint-next.pth")


def test_generators_go_on_where_they_were():
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    np.random.randn(), random.gauss(0, 1)  # leave a cached normal behind
    saved = rng_state(torch.device("cpu"))
    first = torch.rand(3), np.random.randn(3), random.gauss(0, 1), random.random()
    set_rng_state(saved, torch.device("cpu"))
    second = torch.rand(3), np.random.randn(3), random.gauss(0, 1), random.random()
    assert torch.equal(first[0], second[0]) and (first[1] == second[1]).all() and first[2:] == second[2:]


@pytest.mark.parametrize("part,entry", [("net", "1.running_var"), ("net", "0.weight"), ("ema", "1.running_mean")])
def test_what_is_not_finite_is_neither_saved_nor_resumed_from(tmp_path, part, entry):
    """Buffers too: with NaN in BatchNorm's statistics, evaluation stays at chance for ever."""

    def start(folder):
        net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 1), torch.nn.BatchNorm2d(4))
        return new_run(log=RunLog(str(folder)), meta={"model": "x"}), new_training(net, ema=build_ema(net, 0.9))

    run, training = start(tmp_path)
    run.save(training)
    before = (tmp_path / LAST).read_bytes()
    poisoned = {"net": training.net, "ema": training.ema.module}[part]
    poisoned.state_dict()[entry].view(-1)[1] = float("nan")
    bad = run.state(training)
    with pytest.raises(UserError, match=f"epoch 0: {re.escape(entry)} holds NaN .* the previous checkpoint is kept"):
        run.save(training)
    assert (tmp_path / LAST).read_bytes() == before and not (tmp_path / PREVIOUS).exists()

    fresh, training = start(tmp_path / "fresh")
    with pytest.raises(UserError, match=f"--resume: the checkpoint's {re.escape(entry)} holds NaN"):
        fresh.restore(Found(bad, "", []), training)
