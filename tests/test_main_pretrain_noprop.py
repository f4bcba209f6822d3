"""main_pretrain_noprop.py as users run it, and its checkpoint's way into fine-tuning."""

import os
import signal
import weakref
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_finetune
import main_pretrain_noprop
from bench.ranks import Ranks
from models import create_model
from models.noprop_mae import NoPropMAE
from tests.harness.checks import assert_same_run, assert_tensorboard_has_log, one_line, undocumented
from tests.harness.runs import PLAIN, copy_first_epoch, finetune, pretrain
from util.checkpoint import LAST, read_checkpoint
from util.cli.script import run_main
from util.dist import World
from util.errors import UserError
from util.log import read_log
from util.train.run import Run

TINY = """
    --dataset digits --embed_dim 24 --depth 2 --num_heads 3 --decoder_embed_dim 24 --decoder_depth 1 --T 3
    --epochs 3 --warmup_epochs 1 --batch_size 64 --accum_iter 2 --lr 2e-3 --mask_ratio 0.6 --mask_ratio_max 1
    --hflip 0.5 --loss_weighting edm --vis_freq 2 --save_freq 1 --device cpu
""".split()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("pretrain")
    assert pretrain(*TINY, "--output_dir", out) == 0
    return out


@pytest.mark.slow
def test_run_leaves_its_files_and_per_level_losses(uninterrupted):
    assert {
        "args.json",
        "log.txt",
        "checkpoint-last.pth",
        "curves.png",
        "report.md",
        "reconstruction_epoch_1.png",
        "reconstruction_epoch_2.png",
    } <= set(os.listdir(uninterrupted))
    assert not undocumented(uninterrupted)
    lines = read_log(str(uninterrupted / "log.txt"))
    assert {"train_loss", "train_loss_0", "train_loss_1", "train_loss_2", "train_lr"} <= set(lines[0])
    for line in lines:
        assert line["train_loss"] == pytest.approx(sum(line[f"train_loss_{i}"] for i in range(3)))
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    assert Image.open(uninterrupted / "reconstruction_epoch_2.png").width > 200


@pytest.mark.slow
def test_tensorboard_has_the_losses_of_steps_and_the_values_of_log_txt(uninterrupted):
    levels = {f"train_loss_{i}" for i in range(3)}
    steps = [int(1000 * (e + s / 22)) for e in range(3) for s in (20, 22)]
    assert_tensorboard_has_log(uninterrupted, steps=steps, levels=levels)


@pytest.mark.slow
def test_resume_equals_the_uninterrupted_run_bit_for_bit(uninterrupted, tmp_path):
    copy_first_epoch(uninterrupted, tmp_path)
    assert pretrain(*TINY, "--output_dir", tmp_path, "--resume", "auto") == 0
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.slow
def test_each_picture_is_in_tensorboard_once_after_epochs_were_done_again(uninterrupted, tmp_path):
    """--vis_freq 2 of 3 epochs: after the second and the last one; TensorBoard's step is 1000 x the epochs done."""
    copy_first_epoch(uninterrupted, tmp_path)  # with TensorBoard's file of all three epochs
    assert pretrain(*TINY, "--output_dir", tmp_path, "--resume", "auto") == 0
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0})
    events.Reload()
    assert [event.step for event in events.Images("reconstruction")] == [2000, 3000]


def test_a_finished_run_continues_with_more_epochs(uninterrupted, tmp_path, monkeypatch):
    """A run that is finished must be saved or ends in an error; one that is not goes on over a full disk."""
    (tmp_path / LAST).write_bytes((uninterrupted / LAST).read_bytes())
    saved, real = [], Run.save
    monkeypatch.setattr(
        Run, "save", lambda run, *args, **how: (saved.append(asdict(run.position)), real(run, *args, **how))
    )
    line = [*TINY, "--epochs", 4, "--save_every_minutes", "1e-9", "--output_dir", tmp_path, "--resume", "auto"]
    assert pretrain(*line) == 0
    assert len(saved) > 2 and [p["finished"] for p in saved] == [False] * (len(saved) - 1) + [True]


def test_a_finished_pretraining_says_so_and_fine_tuning_drops_its_decoders(uninterrupted, capsys):
    """--dry_run of the fine-tuning: the file's decoders are told as what they are, and nothing is unexpected."""
    assert pretrain(*TINY, "--output_dir", uninterrupted, "--resume", "auto") == 0
    assert "the run is finished after 3 epochs" in capsys.readouterr().out
    state = read_checkpoint(str(uninterrupted / LAST))["model"]
    decoders = [name for name in state if name.startswith("decoder")]
    line = "--dataset digits --device cpu --num_workers 0 --dry_run --output_dir".split()
    assert finetune(*line, "", "--finetune", uninterrupted / LAST) == 0
    said = capsys.readouterr().out
    assert f"unexpected 2 (norm.weight, norm.bias); {len(decoders)} decoder tensors left out" in said


@pytest.mark.parametrize(
    "flags,words",
    [
        ("--sigma_max 40", ["--sigma_max 40.0", "with 80.0"]),
        ("--target norm_pixel", ["--target norm_pixel", "with pixel"]),
        ("--loss_weighting none --T 2", ["--T 2", "with 3", "--loss_weighting"]),
        ("--sigma_data 0.5", ["--sigma_data 0.5", "with 0.9"]),
        ("--embed_dim 48", ["--embed_dim 48", "with 24"]),
    ],
)
def test_other_method_at_resume_is_refused(uninterrupted, tmp_path, flags, words):
    line = [*TINY, "--resume", uninterrupted / LAST, "--output_dir", tmp_path]
    with pytest.raises(UserError) as caught:
        pretrain(*line, *flags.split())
    assert all(w in one_line(caught) for w in [*words, "--force_resume"]), str(caught.value)


@pytest.mark.slow
def test_sigma_data_is_equal_on_all_ranks_and_after_a_resume(uninterrupted, tmp_path, monkeypatch):
    """It is the standard deviation of all 1437 training digits, in NumPy: fewer than are looked at, and no mirror image
    changes it."""
    options = main_pretrain_noprop.get_options([*TINY, "--data_path", "."])
    train, held_out = main_pretrain_noprop.read_images(options.data, World(), 1)
    meta = {"mean": [0.3], "std": [0.4], "img_size": [8, 8], "in_chans": 1}
    expected = np.std((train.images.numpy() / 255 - 0.3) / 0.4)
    for ranks in (1, 2, 3):
        world = World(rank=ranks - 1, size=ranks)
        *_, loader = main_pretrain_noprop.build_loaders(options, meta, train, held_out, world)
        assert main_pretrain_noprop.measure_std(loader) == pytest.approx(expected, rel=1e-6)
    content = read_checkpoint(str(uninterrupted / LAST))
    content["meta"]["noprop"]["sigma_data"] = content["args"]["sigma_data"] = 0.625  # as if it had been another set
    torch.save(content, tmp_path / LAST)
    monkeypatch.setattr(main_pretrain_noprop, "measure_std", lambda loader: 1 / 0)
    assert pretrain(*TINY, "--epochs", 4, "--output_dir", tmp_path, "--resume", "auto") == 0
    after = read_checkpoint(str(tmp_path / LAST))
    assert after["epoch"] == 4 and after["meta"]["noprop"]["sigma_data"] == 0.625


@pytest.mark.parametrize(
    "flags,words", [("--epochs 0", ["--epochs 0"]), ("--start_epoch 3", ["--start_epoch 3", "3 epochs"])]
)
def test_a_run_with_nothing_to_train_is_one_line(tmp_path, flags, words):
    for main in (pretrain, finetune):
        line = TINY if main is pretrain else PLAIN
        with pytest.raises(UserError) as caught:
            main(*line, "--epochs", 3, "--output_dir", tmp_path, *flags.split())
        assert all(w in one_line(caught) for w in words)
    assert not (tmp_path / "report.md").exists()


def test_resumed_checkpoint_does_not_stay_in_memory(uninterrupted, tmp_path, monkeypatch):
    copy_first_epoch(uninterrupted, tmp_path)
    real, held = main_pretrain_noprop.find_checkpoint, []

    def find(*args):
        found = real(*args)
        held.extend(map(weakref.ref, found.content["model"].values()))
        return found

    def trains(*args, **kwargs):
        assert held and not [value for value in held if value() is not None]
        raise InterruptedError

    monkeypatch.setattr(main_pretrain_noprop, "find_checkpoint", find)
    monkeypatch.setattr(main_pretrain_noprop, "train_one_epoch", trains)
    with pytest.raises(InterruptedError):
        pretrain(*TINY, "--output_dir", tmp_path, "--resume", "auto")


@pytest.mark.slow
def test_signal_in_mid_epoch_on_two_ranks_goes_on_bit_for_bit(tmp_path):
    def start(out):
        line = [*TINY, "--batch_size", "32", "--print_freq", "2", "--resume", "auto", "--output_dir", tmp_path / out]
        return Ranks(2, lambda: run_main(lambda: pretrain(*line)), tmp_path / f"{out}.txt")

    ranks = start("stopped")
    while "Epoch: [1]" not in (tmp_path / "stopped.txt").read_text() and not ranks.wait(0.01):
        pass
    os.kill(ranks.processes[1].pid, signal.SIGTERM)  # one rank alone: both agree on the step
    assert ranks.exit_codes() == [75, 75]
    position = read_checkpoint(str(tmp_path / "stopped" / "checkpoint-last.pth"))
    assert position["epoch"] == 1 and position["step"] % 2 == 0, "stopped between updates, in epoch 1"
    for out in ("stopped", "whole"):
        assert start(out).exit_codes() == [0, 0]
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_fine_tuning_rebuilds_the_encoder_without_flags(uninterrupted, tmp_path):
    source = read_checkpoint(str(uninterrupted / "checkpoint-last.pth"))
    main = [
        "--finetune",
        uninterrupted / "checkpoint-last.pth",
        "--dataset",
        "digits",
        "--epochs",
        0,
        "--device",
        "cpu",
    ]
    assert main_finetune.main([*map(str, main), "--output_dir", str(tmp_path), "--dry_run"]) == 0
    model = create_model(
        source["meta"]["model"], num_classes=10, img_size=(8, 8), in_chans=1, **source["meta"]["model_kwargs"]
    )
    from models import load_pretrained

    report = load_pretrained(model, uninterrupted / "checkpoint-last.pth")
    assert set(report.missing) == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    net = NoPropMAE(**source["meta"]["noprop"])
    net.load_state_dict(source["model"])
    images = torch.randn(2, 1, 8, 8)
    latent = net.encode(images, torch.arange(16).expand(2, -1))
    model.norm, model.fc_norm = net.norm, torch.nn.Identity()
    assert torch.allclose(model.eval().forward_features(images), latent, atol=1e-5)


def test_any_folder_of_photos_pretrains_without_labels(photo_folder, tmp_path):
    assert (
        pretrain(
            *TINY,
            "--dataset",
            "folder",
            "--data_path",
            photo_folder,
            "--input_size",
            16,
            "--patch_size",
            4,
            "--epochs",
            1,
            "--batch_size",
            8,
            "--propagate",
            "none",
            "--num_workers",
            0,
            "--output_dir",
            tmp_path,
        )
        == 0
    )
    assert "train_loss_encoder" in read_log(str(tmp_path / "log.txt"))[0]


@pytest.mark.parametrize(
    "argv,words",
    [
        ("--T 0", ["--T", "'0'"]),
        ("--mask_ratio 0", ["--mask_ratio", "(0, 1]"]),
        ("--mask_ratio 1.5", ["--mask_ratio", "(0, 1]"]),
        ("--mask_ratio 0.75 --mask_ratio_max 0.5", ["--mask_ratio_max 0.5", "0.75"]),
        ("--patch_size 3", ["--input_size 8 8", "patch size 3"]),
        ("--sigma_min 80 --sigma_max 80", ["--sigma_min 80.0", "--sigma_max 80.0"]),
        ("--embed_dim 25", ["--embed_dim 25"]),
        ("--vis_type ddim", ["--vis_type", "heun"]),
        ("--sigma_data -1", ["--sigma_data"]),
    ],
)
def test_bad_values_are_one_line(argv, words, tmp_path):
    with pytest.raises(UserError) as caught:
        pretrain(*TINY, "--output_dir", tmp_path, *argv.split())
    assert all(w in str(caught.value) for w in words) and "\n" not in str(caught.value), str(caught.value)


def test_pretraining_and_fine_tuning_checkpoints_are_not_mixed_up(uninterrupted, tmp_path):
    with pytest.raises(UserError, match="a pretrain checkpoint, this is finetune"):
        main_finetune.main(
            [
                "--resume",
                str(uninterrupted / "checkpoint-last.pth"),
                *"""
                    --dataset digits --device cpu --model vit_custom_patch2
                    --model_kwargs embed_dim=24 depth=2 num_heads=3
                """.split(),
                "--output_dir",
                str(tmp_path),
            ]
        )
