"""Faults around a run: full disks, places that cannot be written to, processes that are killed."""

import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main_finetune
import main_predict
import main_pretrain_noprop
from bench.ranks import Ranks, empty_store
from tests.harness import ROOT
from tests.harness.checks import assert_same_state, comparable, log_without_times, one_line
from tests.harness.runs import NET, VIT, save_member
from util.checkpoint import BEST, LAST, find_resume, read_checkpoint
from util.cli.script import known_failure, run_main
from util.data import loader as data
from util.data import views
from util.dist import gather_objects, init_world
from util.errors import UserError
from util.files import TolerantStream
from util.log import RunLog, read_log
from util.report.contact_sheet import Entry, draw_sheet
from util.report.plots import plot_class_distribution, plot_confusion
from util.report.prediction import PICTURES

PRETRAIN = """
    --dataset digits --embed_dim 12 --depth 1 --num_heads 2 --decoder_embed_dim 12 --decoder_depth 1 --T 1
    --batch_size 512 --device cpu --num_workers 0
""".split()


@contextmanager
def largest_file(size: int):
    """As a full disk: no file of this process grows beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.slow
def test_disk_that_is_full_for_an_epoch_costs_nothing_in_the_end(whole_run, tmp_path, capsys, monkeypatch):
    """Epoch 1 cannot write its checkpoints and its picture; epoch 2 can, and all ends as if nothing had been."""
    from util import log

    real, limit = log.RunLog.epoch, largest_file(5000)
    seen = {}

    def epoch(self, line):
        real(self, line)
        if line["epoch"] == 1:
            limit.__enter__()
        if line["epoch"] == 2:
            seen.update(read_checkpoint(str(tmp_path / LAST)))
            limit.__exit__(None, None, None)

    monkeypatch.setattr(log.RunLog, "epoch", epoch)
    assert main_finetune.main([*NET, "--output_dir", str(tmp_path)]) == 0
    said = capsys.readouterr().err
    assert "checkpoint-next.pth: not written" in said and "try again" in said
    assert seen["epoch"] == 1, "the checkpoint of epoch 0 was kept"
    for name in (LAST, BEST):
        assert_same_state(comparable(tmp_path / name), comparable(whole_run / name))
    assert log_without_times(tmp_path) == log_without_times(whole_run)


def test_a_disk_that_stays_full_is_one_line(tmp_path):
    with largest_file(20_000), pytest.raises(UserError, match="could not be written; free some space") as caught:
        main_finetune.main([*NET, "--epochs", "1", "--output_dir", str(tmp_path)])
    one_line(caught)
    assert not os.path.exists(tmp_path / LAST) and os.path.exists(tmp_path / "log.txt")


def full_for(folder, *names) -> None:
    """No room for these files, once each: the temporary ones that they are written to are /dev/full."""
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / f"{name}.tmp").symlink_to("/dev/full")


@pytest.mark.slow
def test_pretraining_saves_before_it_draws_and_goes_on_without_its_pictures(tmp_path, capsys, monkeypatch):
    real, saved = main_pretrain_noprop.reconstruction_grid, []

    def drawn_after(*args, **kwargs):
        saved.append(read_checkpoint(str(tmp_path / LAST))["epoch"])
        return real(*args, **kwargs)

    monkeypatch.setattr(main_pretrain_noprop, "reconstruction_grid", drawn_after)
    full_for(tmp_path, "reconstruction_epoch_0.png", "curves.png")
    line = [*PRETRAIN, "--epochs", "2", "--vis_freq", "1", "--output_dir", str(tmp_path)]
    assert main_pretrain_noprop.main(line) == 0 and saved == [1, 2]
    said = capsys.readouterr().err
    assert "reconstruction_epoch_0.png: not written (No space" in said and "curves.png: not written (No space" in said
    assert not (tmp_path / "reconstruction_epoch_0.png").exists() and (tmp_path / "report.md").exists()
    # Killed between its save and its picture, or without room for it: the same line draws it.
    picture = tmp_path / "reconstruction_epoch_1.png"
    first = picture.read_bytes()
    picture.unlink()
    assert main_pretrain_noprop.main([*line, "--resume", "auto"]) == 0 and picture.read_bytes() == first

    def breaks(*args, **kwargs):
        raise ValueError("drawn from what is not there")

    monkeypatch.setattr(main_pretrain_noprop, "reconstruction_grid", breaks)
    assert main_pretrain_noprop.main([*line, "--epochs", "3", "--resume", "auto"]) == 0
    assert "reconstruction_epoch_2.png: not written (ValueError: drawn" in capsys.readouterr().err


@pytest.mark.slow
def test_fine_tuning_saves_before_it_draws_and_goes_on_without_its_pictures(tmp_path, capsys, monkeypatch):
    real, saved = main_finetune.plot_confusion, []

    def drawn_after(*args):
        saved.append(read_checkpoint(str(tmp_path / BEST))["progress"]["best_epoch"])
        real(*args)

    monkeypatch.setattr(main_finetune, "plot_confusion", drawn_after)
    full_for(tmp_path, "confusion.png", "curves.png", "report.md", "report.html", "result.json")
    assert main_finetune.main([*NET, "--epochs", "1", "--output_dir", str(tmp_path)]) == 0 and saved == [0]
    said = capsys.readouterr().err
    for name in ("confusion.png", "curves.png", "report.md", "report.html", "result.json"):
        assert f"{name}: not written (No space" in said and not (tmp_path / name).exists()
    assert read_checkpoint(str(tmp_path / LAST))["progress"]["finished"]


@pytest.mark.slow
def test_prediction_survives_failed_pictures_with_a_warning(photo_folder, tmp_path, capsys):
    save_member(tmp_path / "a.pth", VIT)
    content = torch.load(tmp_path / "a.pth", weights_only=True)
    content["model"]["head.bias"][0] = 1e3  # every image is blue to it, so the sheet of wrong ones has some
    torch.save(content, tmp_path / "a.pth")
    line = [
        "--checkpoints",
        str(tmp_path / "a.pth"),
        "--data_path",
        str(photo_folder / "val"),
        *"--views 1 --num_workers 0 --device cpu".split(),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    full_for(tmp_path / "out", *PICTURES)
    assert main_predict.main(line) == 0
    said = capsys.readouterr().err
    report = (tmp_path / "out" / "report.md").read_text()
    for name in PICTURES:
        assert f"{name}: not written (No space" in said and name not in report
    assert {"predictions.csv", "results.json", "results.md"} <= set(os.listdir(tmp_path / "out"))
    full_for(tmp_path / "out", "predictions.csv")
    with pytest.raises(UserError, match=r"--output_dir .*predictions.csv: cannot be written \(No space") as caught:
        main_predict.main(line)
    one_line(caught)


def test_contact_sheet_whose_image_has_gone_costs_the_sheet(tmp_path, capsys):
    draw_sheet([Entry(0, "x", [("a", 0.9)])], lambda i: Image.open(tmp_path / "gone.png"), "t", str(tmp_path / "s.png"))
    assert "s.png: not written (No such file" in capsys.readouterr().err and not os.listdir(tmp_path)


def test_class_names_are_drawn_as_they_are(tmp_path, capsys):
    """Between dollar signs, Matplotlib reads formulas, and refuses wrong ones."""
    names = ["$a^$", r"$\frac$", "b_{"]
    plot_confusion(np.eye(3, dtype=int), names, str(tmp_path / "confusion.png"))
    plot_class_distribution(names, np.arange(3), None, str(tmp_path / "class_distribution.png"))
    for name in ("confusion.png", "class_distribution.png"):
        assert Image.open(tmp_path / name).width > 100 and not capsys.readouterr().err


def test_log_and_tensorboard_faults_do_not_end_a_run(tmp_path, capsys):
    log = RunLog(str(tmp_path))
    log.start()
    with largest_file(0):
        for i in range(30):
            log.scalars({"x": 1.0}, i)
        log.flush()
        log.epoch({"epoch": 0})
        log.scalars({"x": 1.0}, 99), log.image("picture", np.zeros((4, 4, 3), np.uint8), 99), log.flush()
    with largest_file(5):
        log.epoch({"epoch": 1})
    log.epoch({"epoch": 2})
    log.close()
    said = capsys.readouterr().err
    assert "log.txt: not written" in said and "Traceback" not in said
    assert said.count("--logger tensorboard: off from here on") == 1
    assert read_log(str(tmp_path / "log.txt")) == [{"epoch": 2}]


def test_output_dir_that_is_a_file_or_not_writable(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below", "bad\0name"):
        with pytest.raises(UserError, match="--output_dir") as caught:
            main_finetune.main([*NET, "--output_dir", str(path)])
        one_line(caught)
    with pytest.raises(UserError, match="--log_dir"):
        main_finetune.main([*NET, "--output_dir", str(tmp_path / "a"), "--log_dir", str(tmp_path / "file")])
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=r"--output_dir .*no permission to write"):
        main_finetune.main([*NET, "--output_dir", str(tmp_path / "b")])


@pytest.mark.slow
def test_output_that_goes_nowhere_does_not_end_a_run(tmp_path):
    """A full disk under `> out.txt`, and a pipe whose reader has gone."""
    line = [*NET, "--epochs", "1", "--output_dir", str(tmp_path)]
    assert Ranks(1, lambda: run_main(lambda: main_finetune.main(line)), "/dev/full").exit_codes() == [0]
    assert read_checkpoint(str(tmp_path / LAST))["epoch"] == 1
    reader, writer = os.pipe()
    os.close(reader)
    with pytest.raises(BrokenPipeError), os.fdopen(writer, "w") as plain:
        stream = TolerantStream(plain)
        print("x", file=stream, flush=True)
        assert not stream.isatty()
        plain.flush()  # what print would have met


def test_a_dead_loader_process_is_one_line_with_its_file(photo_folder, tmp_path, monkeypatch):
    """torch raises where it notices, in the middle of anything: in the loader or in a step."""
    line = [
        "--data_path",
        str(photo_folder),
        *"""
            --model vit_custom_patch8 --model_kwargs embed_dim=12 depth=1 num_heads=2 --input_size 16 --aug none
            --epochs 3 --batch_size 4 --num_workers 1 --device cpu
        """.split(),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    real, seen = data.open_image, []

    def dies_at_its_second_time(path, *args):
        seen.append(path)
        if seen.count(path) == 2 and path.endswith("blue_03.png"):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(path, *args)

    monkeypatch.setattr(data, "open_image", dies_at_its_second_time)
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5)  # not every 5 s
    said = tmp_path / "said.txt"
    assert Ranks(1, lambda: run_main(lambda: main_finetune.main(line)), said).exit_codes() == [2]
    errors = [text for text in said.read_text().splitlines() if "error: " in text]
    assert len(errors) == 1 and "--num_workers" in errors[0] and "blue_03.png" in errors[0], said.read_text()
    assert "Traceback" not in said.read_text() and known_failure(RuntimeError("something else")) is None


def test_prediction_names_the_file_at_which_a_loader_process_died(photo_folder, tmp_path, monkeypatch):
    save_member(tmp_path / "a.pth", VIT)
    real = views.open_file

    def dies(path):
        if path.endswith("blue_03.png"):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(path)

    monkeypatch.setattr(views, "open_file", dies)
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5)  # not every 5 s
    line = [
        "--checkpoints",
        str(tmp_path / "a.pth"),
        "--data_path",
        str(photo_folder / "train"),
        *"--views 1 --num_workers 1 --batch_size 2 --device cpu".split(),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    said = tmp_path / "said.txt"
    assert Ranks(1, lambda: run_main(lambda: main_predict.main(line)), said).exit_codes() == [2]
    errors = [text for text in said.read_text().splitlines() if "error: " in text]
    assert len(errors) == 1 and "--num_workers" in errors[0] and "blue_03.png" in errors[0], said.read_text()
    assert "Traceback" not in said.read_text()


def children(parent: int) -> list[int]:
    """Process ids, oldest first."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if int(Path("/proc", pid, "stat").read_text().rsplit(")", 1)[1].split()[1]) == parent:
                found.append(int(pid))
        except OSError:
            continue
    return sorted(found)


def rank_process(launcher: int, rank: int) -> int:
    return next(
        p for p in children(launcher) if f"\0RANK={rank}\0".encode() in Path("/proc", str(p), "environ").read_bytes()
    )


@pytest.mark.slow
def test_a_rank_killed_under_torchrun_restarts_and_the_result_is_equal(tmp_path):
    line = [*NET, "--batch_size", "32", "--epochs", "4", "--resume", "auto", "--output_dir"]
    command = [
        sys.executable,
        *"""
            -m torch.distributed.run --standalone --nproc_per_node=2 --max-restarts=1
            --monitor-interval=0.1 main_finetune.py
        """.split(),
        *line,
        str(tmp_path / "killed"),
    ]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    said, killed = [], False
    for text in process.stdout:
        said.append(text)
        if text.startswith("epoch 1:") and not killed:
            os.kill(rank_process(process.pid, 1), signal.SIGKILL)
            killed = True
    assert process.wait(timeout=60) == 0 and any(text.startswith("resume: ") for text in said), "".join(said)[-4000:]
    errors = [text for text in said if "main_finetune.py: error: " in text]
    assert len(errors) == 1 and "rank 0 of 2: another rank died" in errors[0], "".join(said)[-4000:]
    assert Ranks(2, lambda: main_finetune.main([*line, str(tmp_path / "whole")])).exit_codes() == [0, 0]
    for name in (LAST, BEST):
        assert_same_state(comparable(tmp_path / "killed" / name), comparable(tmp_path / "whole" / name))
    assert log_without_times(tmp_path / "killed") == log_without_times(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("number,why", [(signal.SIGUSR1, "because torchrun is gone"), (signal.SIGTERM, "by a signal")])
def test_a_signal_to_torchrun_saves_and_leaves_no_rank_behind(tmp_path, number, why):
    """SIGUSR1 kills torchrun, which does not handle it: the ranks notice. SIGTERM it hands on to them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "main_finetune.py"]
    command += [*NET, "--batch_size", "32", "--epochs", "500", "--output_dir", str(tmp_path)]
    out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, **out)
    said = []
    for text in process.stdout:  # ends when the last rank has closed it
        said.append(text)
        if text.startswith("epoch 0:"):
            process.send_signal(number)
    assert any(text.startswith(f"stopped {why} at epoch ") and "saved; " in text for text in said), "".join(said)[
        -3000:
    ]
    assert process.wait(timeout=60) in (-number, 1)
    assert find_resume(str(tmp_path)) == str(tmp_path / LAST)


@pytest.mark.slow
def test_ranks_that_are_started_again_do_not_look_for_the_dead(monkeypatch):
    """torchrun's store outlives a restart. The first rank of the second attempt is late, as it may be: without keys of
    its own for each attempt, the second rank would find the address where the first one was before."""
    store = empty_store()

    def call() -> int:
        if os.environ["RANK"] == "0" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "1":
            time.sleep(0.5)
        world = init_world("cpu")
        return 0 if gather_objects(world.rank) == [0, 1] else 1

    for attempt in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        assert Ranks(2, call, store=store).exit_codes() == [0, 0]


@pytest.mark.slow
def test_a_hanging_rank_ends_the_others_with_a_message(tmp_path, monkeypatch):
    """Rank 1 stops for good in its second epoch; rank 0 waits the 9 s that it was told to, and no longer."""
    import torch.utils.tensorboard  # noqa: F401 (seconds on a busy machine: not between the ranks)

    real = main_finetune.train_one_epoch

    def hangs(training, loader, criterion, run, **kwargs):
        if run.world.rank == 1 and run.position.epoch == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        return real(training, loader, criterion, run, **kwargs)

    monkeypatch.setattr(main_finetune, "train_one_epoch", hangs)
    line = [*NET, "--batch_size", "32", "--timeout_minutes", "0.15", "--output_dir", str(tmp_path)]

    def call() -> None:
        run_main(lambda: main_finetune.main(line))

    assert Ranks(2, call, tmp_path / "said.txt").exit_codes() == [2, -signal.SIGKILL]
    said = (tmp_path / "said.txt").read_text().splitlines()
    errors = [text for text in said if "error: " in text]
    assert errors == said[-1:] and "rank 0 of 2: waited for another rank longer than --timeout_minutes" in said[-1], (
        said
    )
    assert read_checkpoint(str(tmp_path / LAST))["epoch"] == 1
