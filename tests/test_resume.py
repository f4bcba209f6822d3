"""Runs that are stopped, killed or given other flags, and go on: they end as undisturbed ones, or say what differs."""

import json
import os
import signal
import weakref

import numpy as np
import pytest
import torch

import engine_finetune
import main_finetune
from bench import chaos
from bench.ranks import Ranks
from models import create_model
from tests.harness.checks import assert_same_run, assert_same_state, comparable, one_line
from tests.harness.runs import PLAIN, TINY, copy_first_epoch, finetune
from tests.harness.training import Order, new_run, new_training
from util.checkpoint import LAST, find_resume, read_checkpoint
from util.cli.script import run_main
from util.data.loader import Loader
from util.dist import Precision
from util.errors import UserError
from util.log import read_log
from util.train.interrupts import Interrupts
from util.train.run import Found


def test_resumed_checkpoint_does_not_stay_in_memory(uninterrupted, tmp_path, monkeypatch):
    copy_first_epoch(uninterrupted, tmp_path)
    real, held = main_finetune.find_checkpoint, []

    def find(*args):
        found = real(*args)
        held.extend(weakref.ref(value) for part in ("model", "ema") for value in found.content[part].values())
        return found

    def trains(*args, **kwargs):
        assert held and not [value for value in held if value() is not None]
        raise InterruptedError

    monkeypatch.setattr(main_finetune, "find_checkpoint", find)
    monkeypatch.setattr(main_finetune, "train_one_epoch", trains)
    with pytest.raises(InterruptedError):
        finetune(*TINY, "--output_dir", tmp_path, "--resume", "auto")


def test_same_line_with_resume_auto_after_the_end_changes_nothing(uninterrupted):
    before = (uninterrupted / "checkpoint-last.pth").read_bytes()
    assert finetune(*TINY, "--output_dir", uninterrupted, "--resume", "auto") == 0
    assert (uninterrupted / "checkpoint-last.pth").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGKILL])
def test_disturbed_run_goes_on_and_ends_as_if_nothing_had_been(uninterrupted, tmp_path, number):
    """The signal comes at some step of epoch 2; SIGKILL costs what was done of it, the others save and exit with 75."""
    line = [*TINY, "--output_dir", tmp_path / "out", "--resume", "auto"]
    ranks = Ranks(1, lambda: run_main(lambda: finetune(*line)), tmp_path / "said.txt")
    while "\nepoch 1:" not in (tmp_path / "said.txt").read_text() and not ranks.wait(0.01):
        pass
    os.kill(ranks.processes[0].pid, number)
    assert ranks.exit_codes() == [-9 if number == signal.SIGKILL else 75]
    said, stopped = (tmp_path / "said.txt").read_text(), read_checkpoint(str(tmp_path / "out" / "checkpoint-last.pth"))
    assert ("stopped by a signal" in said) == (number != signal.SIGKILL) and stopped["epoch"] < 3
    assert finetune(*line) == 0
    assert_same_run(tmp_path / "out", uninterrupted)


@pytest.mark.slow
def test_second_process_in_a_folder_is_refused_and_the_first_goes_on(uninterrupted, tmp_path):
    line = [*TINY, "--output_dir", tmp_path / "out", "--resume", "auto"]
    ranks = Ranks(1, lambda: run_main(lambda: finetune(*line)), tmp_path / "said.txt")
    while "\nepoch 0:" not in (tmp_path / "said.txt").read_text() and not ranks.wait(0.01):
        pass
    os.kill(ranks.processes[0].pid, signal.SIGSTOP)
    with pytest.raises(UserError, match="out: another process is training there"):
        finetune(*line)
    os.kill(ranks.processes[0].pid, signal.SIGCONT)
    assert ranks.exit_codes() == [0]
    assert_same_run(tmp_path / "out", uninterrupted)
    assert finetune(*line) == 0, "the lock ends with its process"


@pytest.mark.slow
def test_resume_with_another_layer_decay_uses_the_new_one(uninterrupted, tmp_path):
    (tmp_path / "checkpoint-0.pth").write_bytes((uninterrupted / "checkpoint-0.pth").read_bytes())
    assert finetune(*TINY, "--output_dir", tmp_path, "--resume", "auto", "--layer_decay", 0.5) == 0
    groups = read_checkpoint(str(tmp_path / "checkpoint-last.pth"))["optimizer"]["param_groups"]
    assert sorted({g["lr_scale"] for g in groups}) == [0.125, 0.25, 0.5, 1.0]


@pytest.mark.slow
def test_two_phases_freeze_then_train_and_resume_across_the_boundary(tmp_path):
    line = [
        "--dataset",
        "digits",
        "--model",
        "test_resnet",
        "--input_size",
        8,
        "--epochs",
        1,
        "--head_epochs",
        2,
        *"--head_lr 1e-2 --lr 1e-3 --mixup 0.2".split(),
        "--save_freq",
        1,
        "--device",
        "cpu",
        "--batch_size",
        128,
        "--aug",
        "none",
        "--layer_decay",
        1.0,
        "--warmup_epochs",
        0,
        "--drop_path",
        0,
        "--amp",
        "off",
    ]
    assert finetune(*line, "--output_dir", tmp_path / "whole") == 0
    head_only, end = (read_checkpoint(str(tmp_path / "whole" / n)) for n in ("checkpoint-1.pth", "checkpoint-last.pth"))
    torch.manual_seed(0)
    main_finetune.seed_all(0, 0)
    start = create_model("test_resnet", num_classes=10, img_size=32, in_chans=1).state_dict()
    for k, v in start.items():
        if not k.startswith("fc"):
            assert torch.equal(v, head_only["model"][k]), f"{k} moved in the head phase"
    assert not torch.equal(start["fc.weight"], head_only["model"]["fc.weight"])
    assert not torch.equal(head_only["model"]["conv1.0.weight"], end["model"]["conv1.0.weight"])
    for epoch in (0, 1):
        part = tmp_path / f"from{epoch}"
        part.mkdir()
        (part / "checkpoint-last.pth").write_bytes((tmp_path / "whole" / f"checkpoint-{epoch}.pth").read_bytes())
        assert finetune(*line, "--output_dir", part, "--resume", "auto") == 0
        assert_same_state(
            comparable(part / "checkpoint-last.pth"), comparable(tmp_path / "whole" / "checkpoint-last.pth")
        )


@pytest.mark.slow
def test_other_batch_size_on_resume_is_refused_or_forced(uninterrupted, tmp_path):
    (tmp_path / "checkpoint-0.pth").write_bytes((uninterrupted / "checkpoint-0.pth").read_bytes())
    line = [*TINY, "--output_dir", tmp_path, "--resume", "auto", "--batch_size", 32]
    with pytest.raises(UserError, match=r"64 images per micro-step.*--force_resume"):
        finetune(*line)
    assert finetune(*line, "--force_resume") == 0


@pytest.mark.parametrize(
    "flags,words",
    [
        (["--smoothing", "0.2"], ["--smoothing 0.2", "0.1"]),
        (["--seed", "1"], ["--seed 1", "with 0"]),
        (["--eval_metric", "loss"], ["--eval_metric loss", "acc1"]),
        (["--accum_iter", "4"], ["--accum_iter 4", "with 2"]),
        (["--aa", "none", "--reprob", "0"], ["--aa (not given)", "rand-m9", "--reprob, too"]),
        (["--model_kwargs", "embed_dim=24", "depth=2", "num_heads=3"], ["embed_dim=24", "embed_dim=36"]),
    ],
)
def test_other_value_of_a_flag_that_changes_results_is_refused_at_resume(uninterrupted, tmp_path, flags, words):
    (tmp_path / "checkpoint-last.pth").write_bytes((uninterrupted / "checkpoint-last.pth").read_bytes())
    with pytest.raises(UserError) as caught:
        finetune(*TINY, "--output_dir", tmp_path, "--resume", "auto", *flags)
    assert all(w in one_line(caught) for w in [*words, "--force_resume"]), str(caught.value)


@pytest.mark.slow
def test_finished_run_stays_as_it_is_whatever_the_schedule_says_now(uninterrupted, tmp_path, capsys):
    """Its args.json, result.json and report.md name the flags that it was trained with, unless it trains on."""
    for name in ("checkpoint-last.pth", "log.txt"):
        (tmp_path / name).write_bytes((uninterrupted / name).read_bytes())
    line = [*TINY, "--output_dir", tmp_path, "--resume", "auto"]
    assert finetune(*line) == 0, "killed between its last checkpoint and its report"
    told = ["report.md", "result.json", "log.txt"]
    before = {name: (tmp_path / name).read_bytes() for name in told}
    assert finetune(*line, "--lr", "0.5") == 0 and "the run is finished" in capsys.readouterr().out
    assert {name: (tmp_path / name).read_bytes() for name in told} == before
    with pytest.raises(UserError, match=r"is finished after 3 epochs; give more --epochs"):
        finetune(*TINY, "--output_dir", tmp_path / "new", "--resume", tmp_path / "checkpoint-last.pth")
    assert finetune(*line, "--epochs", 4, "--lr", "1e-3") == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["options"]["lr"], result["options"]["epochs"], result["last"]["epoch"]) == (1e-3, 4, 3)


def test_going_back_in_a_folder_removes_what_is_later_or_is_refused(uninterrupted, tmp_path, monkeypatch):
    """Otherwise a stop on the new way would be resumed on the old one, whose checkpoints are further on."""
    for path in uninterrupted.glob("checkpoint-*.pth"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    line = [*TINY, "--output_dir", tmp_path, "--lr", "1e-3", "--resume"]
    with pytest.raises(UserError, match=r"checkpoint-0\.pth: .*checkpoint-last\.pth is later.*--overwrite"):
        finetune(*line, tmp_path / "checkpoint-0.pth")
    real, calls = Interrupts.poll, []
    monkeypatch.setattr(
        Interrupts, "poll", lambda self: calls.append(1) or ((True, False) if len(calls) == 5 else real(self))
    )
    assert finetune(*line, tmp_path / "checkpoint-0.pth", "--overwrite") == 75
    assert sorted(p.name for p in tmp_path.glob("*.pth")) == [f"checkpoint-{n}.pth" for n in ("0", "best", "last")]
    content = read_checkpoint(find_resume(str(tmp_path)))
    assert (content["epoch"], content["step"], content["args"]["lr"]) == (1, 10, 1e-3)


def test_other_metric_by_force_starts_the_best_anew(uninterrupted, tmp_path):
    """By accuracy the best so far is a number above 0, by loss each is below: it would never be reached."""
    (tmp_path / "checkpoint-last.pth").write_bytes((uninterrupted / "checkpoint-last.pth").read_bytes())
    line = [
        *TINY,
        "--epochs",
        4,
        "--output_dir",
        tmp_path,
        "--resume",
        "auto",
        "--force_resume",
        "--eval_metric",
        "loss",
    ]
    assert finetune(*line) == 0
    progress, [last] = (
        read_checkpoint(str(tmp_path / "checkpoint-last.pth"))["progress"],
        read_log(str(tmp_path / "log.txt")),
    )
    assert (progress["best_epoch"], progress["best_by"]) == (3, "loss") and progress["best"] == -last["val_loss"]


def test_other_number_of_images_is_told_and_with_a_random_split_refused(capsys):
    """--val_split draws anew: of 1400 + 100 images, some that were trained on would be validated on."""
    net = torch.nn.Linear(1, 1)
    for flags in ({}, {"val_split": 0.2}, {"kfold": 5}):
        state = new_run(Order(n=1400), **flags).state(new_training(net))
        if flags:
            with pytest.raises(
                UserError, match=rf"1400 training images, now there are 1437, and --{next(iter(flags))}"
            ):
                new_run(Order(n=1437), **flags).restore(Found(dict(state), "", []), new_training(net))
        after = new_run(Order(n=1437), force_resume=bool(flags), **flags)
        after.restore(Found(state, "", []), new_training(net))
        assert "1437 training images from here on, 1400 before" in capsys.readouterr().out


def test_flags_that_change_nothing_or_what_comes_later_may_differ_at_resume(uninterrupted, tmp_path, capsys):
    """The finished run is read and compared; nothing is left to train."""
    line = [*TINY, "--output_dir", tmp_path, "--resume", "auto"]
    (tmp_path / "checkpoint-last.pth").write_bytes((uninterrupted / "checkpoint-last.pth").read_bytes())
    assert (
        finetune(
            *line,
            "--num_workers",
            1,
            "--print_freq",
            7,
            "--timeout_minutes",
            3,
            "--save_freq",
            9,
            *"--lr 0.5 --weight_decay 0.1 --clip_grad 1".split(),
            "--patience",
            9,
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "resume: --lr 0.5 from here on, 0.005 before" in said and "--patience 9 from here on" in said
    assert "--print_freq" not in said and "--num_workers" not in said
    content = read_checkpoint(str(tmp_path / "checkpoint-last.pth"))
    del content["args"]["smoothing"]  # as a version without the flag would have written it
    torch.save(content, tmp_path / "checkpoint-last.pth")
    assert finetune(*line, "--smoothing", 0.2) == 0
    assert finetune(*line, "--reprob", 0.5, "--force_resume") == 0
    assert "resume: --reprob 0.5 from here on, 0.25 before" in capsys.readouterr().out


@pytest.mark.parametrize(
    "done,batch,accum,total,goes_on",
    [
        (7, 64, 1, 22, 7),  # as it was
        (7, 64, 4, 22, 4),  # rounded down to a whole update
        (23, 64, 2, 23, 23),  # stopped during the evaluation: the last update was of one micro-step
        (6, 48, 1, 29, 8),  # 384 images
        (6, 48, 3, 29, 6),
        (3, 512, 1, 2, 0),
        (22, 32, 4, 44, 44),
        (22, 32, 4, 30, 30),  # fewer images than there were
    ],
)
def test_resume_with_other_steps_counts_each_step_once(capsys, done, batch, accum, total, goes_on):
    """Every micro-step of 64 images before the stop had a loss of 2: so has the sum of as many steps as are kept."""
    net = torch.nn.Linear(1, 1)
    before, after = new_run(Order(64, done)), new_run(Order(batch, total), accum_iter=accum, force_resume=True)
    before.position.step, before.position.sums = done, {"loss": 2.0 * done, "noise_snr": 25.0}
    after.restore(Found(before.state(new_training(net)), "", []), new_training(net))
    measured = {"noise_snr": 25.0} if (goes_on, batch) == (done, 64) else {}  # decibels are no sum over steps
    assert after.position.step == goes_on and after.position.sums == pytest.approx({"loss": 2.0 * goes_on, **measured})
    assert f"at epoch 0, step {goes_on}\n" in capsys.readouterr().out


def test_the_scale_of_the_loss_goes_on_where_it_was():
    """fp16: from its start at 65536 the scaler would skip steps again until the gradients fit."""
    net, (before, after) = torch.nn.Linear(1, 1), (Precision("fp16", torch.device("cpu")) for _ in range(2))
    before.scaler.scale(torch.ones(()))  # starts it
    before.scaler.update(512.0)
    state = new_run().state(new_training(net, precision=before))
    new_run().restore(Found(state, "", []), new_training(net, precision=after))
    assert after.scaler.get_scale() == 512.0


@pytest.mark.slow
def test_other_world_size_goes_on_with_the_same_samples_and_learning_rates(tmp_path, monkeypatch):
    """Two ranks are stopped in epoch 0 after 6 of 22 micro-steps of 2 x 32 images; one process goes on."""
    real_poll, real_epoch, real_lr, polls, seen, lrs = Interrupts.poll, Loader.epoch, engine_finetune.set_lr, [], [], []

    def stop_at_the_third_update(self):
        polls.append(1)
        return (True, False) if len(polls) == 3 else real_poll(self)

    def watched(self, *args):
        for batch in real_epoch(self, *args):
            if self.train:
                seen.extend(batch.index.tolist())
            yield batch

    def go_on(name, *argv):
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkpoint-last.pth").write_bytes((tmp_path / "two" / "checkpoint-last.pth").read_bytes())
        seen.clear(), lrs.clear()
        assert finetune(*line, "--resume", "auto", "--output_dir", tmp_path / name, *argv) == 0
        return list(seen)

    line = [*PLAIN, "--accum_iter", 2]
    with monkeypatch.context() as patch:
        patch.setattr(Interrupts, "poll", stop_at_the_third_update)
        two = Ranks(2, lambda: finetune(*line, "--batch_size", 32, "--output_dir", tmp_path / "two"))
        assert two.exit_codes() == [75, 75]
    assert read_checkpoint(str(tmp_path / "two" / "checkpoint-last.pth"))["step"] == 6
    monkeypatch.setattr(Loader, "epoch", watched)
    monkeypatch.setattr(engine_finetune, "set_lr", lambda optimizer, lr: lrs.append(lr) or real_lr(optimizer, lr))
    assert finetune(*line, "--batch_size", 64, "--output_dir", tmp_path / "one") == 0
    order = list(seen)
    assert go_on("equal", "--batch_size", 64) == order[6 * 64 :], "as many images at a time: exactly"
    one, equal = (comparable(tmp_path / n / "checkpoint-last.pth")["model"] for n in ("one", "equal"))
    assert all(torch.allclose(v, equal[k], atol=3e-5) for k, v in one.items())
    a, b = (read_log(str(tmp_path / n / "log.txt"))[0]["train_loss"] for n in ("one", "equal"))
    assert a == pytest.approx(b, rel=1e-4)
    rest = go_on("forced", "--batch_size", 48, "--force_resume")
    seen_of_epoch = 1437 // 48 * 48  # 384 of them before the stop: 8 steps of 48
    assert rest[: seen_of_epoch - 384] == order[384:seen_of_epoch]
    assert lrs[0] == pytest.approx(1e-6 + (1e-3 - 1e-6) * 0.5 * (1 + np.cos(np.pi * 8 / 29 / 2)))


@pytest.mark.slow
def test_stop_during_evaluation_goes_on_bit_for_bit(uninterrupted, tmp_path, monkeypatch):
    """Epoch 0 polls 11 times in training (22 micro-steps, 2 an update), then for each of its 6 evaluation batches."""
    real, calls = Interrupts.poll, []

    def stop_at_the_third_evaluation_batch(self):
        calls.append(1)
        return (True, False) if len(calls) == 14 else real(self)

    monkeypatch.setattr(Interrupts, "poll", stop_at_the_third_evaluation_batch)
    assert finetune(*TINY, "--output_dir", tmp_path) == 75
    stopped = read_checkpoint(str(tmp_path / "checkpoint-last.pth"))
    assert (stopped["epoch"], stopped["step"]) == (0, 22) and not (tmp_path / "checkpoint-best.pth").exists()
    assert finetune(*TINY, "--output_dir", tmp_path, "--resume", "auto") == 0
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.slow
def test_random_disturbances_and_a_comparison_that_can_fail(tmp_path, capsys):
    assert chaos.main(["--main", "pretrain", "--num_workers", "1", "--kills", "2"]) == 0
    assert "2 of 2 disturbances" in capsys.readouterr().out
    torch.save({"format": 1, "meta": {}, "args": {}, "model": {"w": torch.zeros(2)}}, tmp_path / "checkpoint-last.pth")
    (tmp_path / "log.txt").write_text('{"epoch": 0, "train_loss": 1.0}\n')
    (tmp_path / "other").mkdir()
    torch.save(
        {"format": 1, "meta": {}, "args": {}, "model": {"w": torch.full((2,), 1e-45)}},
        tmp_path / "other" / "checkpoint-last.pth",
    )
    differ = [name for name, where in chaos.compare(str(tmp_path / "other"), str(tmp_path)).items() if where]
    assert differ == ["checkpoint-last.pth model", "log.txt"]


@pytest.mark.slow
def test_resume_with_other_classes_is_refused_and_names_the_first_difference(whole_run, tmp_path):
    meta = read_checkpoint(str(whole_run / LAST))["meta"]
    for classes, word in (
        (["1", "0", *meta["classes"][2:]], "class 0 is '0', in the data it is '1'"),
        (meta["classes"][:-1], "class 9 is '9', in the data it is missing"),
        ([*meta["classes"][:4], "four", *meta["classes"][5:]], "class 4 is '4', in the data it is 'four'"),
    ):
        run, path = new_run(meta={**meta, "classes": classes}), str(whole_run / LAST)
        with pytest.raises(UserError) as caught:
            run.restore(Found(read_checkpoint(path), path, []), new_training(torch.nn.Linear(1, 1)))
        assert word in one_line(caught)
