"""main_pretrain_noprop.py as users run it, and its checkpoint's way into fine-tuning."""

import os
import signal

import pytest
import torch
from PIL import Image
from tests_common import assert_same_run, copy_first_epoch

import main_finetune
import main_pretrain_noprop
from bench.ranks import Ranks
from models import create_model
from models.noprop_mae import NoPropMAE
from util.checkpoint import read_checkpoint
from util.errors import UserError
from util.log import read_log
from util.options import run_main

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = ["--dataset", "digits", "--embed_dim", "24", "--depth", "2", "--num_heads", "3", "--decoder_embed_dim", "24", "--decoder_depth", "1", "--T", "3", "--epochs", "3", "--warmup_epochs", "1", "--batch_size", "64", "--accum_iter", "2", "--lr", "2e-3", "--mask_ratio", "0.6", "--mask_ratio_max", "1", "--hflip", "0.5", "--loss_weighting", "edm", "--vis_freq", "2", "--save_freq", "1", "--device", "cpu"]  # fmt: skip


def pretrain(*argv) -> int:
    return main_pretrain_noprop.main([*map(str, argv)])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("pretrain")
    assert pretrain(*TINY, "--output_dir", out) == 0
    return out


def test_run_leaves_its_files_and_per_level_losses(uninterrupted):
    assert {"args.json", "log.txt", "checkpoint-last.pth", "curves.png", "report.md", "reconstruction_epoch_1.png",
            "reconstruction_epoch_2.png"} <= set(os.listdir(uninterrupted))  # fmt: skip
    lines = read_log(str(uninterrupted / "log.txt"))
    assert {"train_loss", "train_loss_0", "train_loss_1", "train_loss_2", "train_lr"} <= set(lines[0])
    for line in lines:
        assert line["train_loss"] == pytest.approx(sum(line[f"train_loss_{i}"] for i in range(3)))
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    assert Image.open(uninterrupted / "reconstruction_epoch_2.png").width > 200


def test_resume_equals_the_uninterrupted_run_bit_for_bit(uninterrupted, tmp_path):
    copy_first_epoch(uninterrupted, tmp_path)
    assert pretrain(*TINY, "--output_dir", tmp_path, "--resume", "auto") == 0
    assert_same_run(tmp_path, uninterrupted)


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
    assert pretrain(*TINY, "--dataset", "folder", "--data_path", photo_folder, "--input_size", 16, "--patch_size", 4, "--epochs", 1, "--batch_size", 8,
                    "--propagate", "none", "--num_workers", 0, "--output_dir", tmp_path) == 0  # fmt: skip
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
    with pytest.raises(UserError, match="a checkpoint of pretrain, this is finetune"):
        main_finetune.main(["--resume", str(uninterrupted / "checkpoint-last.pth"), "--dataset", "digits", "--device", "cpu",
                            "--model", "vit_custom_patch2", "--model_kwargs", "embed_dim=24", "depth=2", "num_heads=3", "--output_dir", str(tmp_path)])  # fmt: skip
