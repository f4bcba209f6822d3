"""main_finetune.py as users run it: processes, torchrun, resumes, wrong input."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import main_finetune
import main_pretrain_noprop
from bench.ranks import Ranks, empty_store
from models import create_model
from tests.harness import ROOT
from tests.harness.checks import assert_same_run, assert_tensorboard_has_log, undocumented
from tests.harness.runs import NET, PLAIN, TINY, finetune
from util.checkpoint import read_checkpoint
from util.cli.finetune import FinetuneOptions
from util.cli.script import run_main
from util.data.datasets import ArrayDataset, read_split
from util.dist import World
from util.errors import UserError
from util.log import read_log
from util.train.phases import freezing
from util.train.run import Position


@pytest.mark.slow
def test_run_leaves_the_files_of_the_contract(uninterrupted):
    names = set(os.listdir(uninterrupted))
    assert {
        "args.json",
        "log.txt",
        "checkpoint-last.pth",
        "checkpoint-best.pth",
        "checkpoint-0.pth",
        "curves.png",
        "confusion.png",
        "report.md",
        "result.json",
    } <= names
    assert any(n.startswith("events.out.tfevents") for n in names) and not any(n.endswith(".tmp") for n in names)
    assert not undocumented(uninterrupted)
    lines = read_log(str(uninterrupted / "log.txt"))
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    assert {"train_loss", "train_lr", "val_acc1", "val_loss", "n_parameters", "seconds"} <= set(lines[0])
    p, z2 = max(line["val_acc1"] for line in lines) / 100, 1.959963984540054**2
    low, high = sorted(np.roots([1 + z2 / 360, -(2 * p + z2 / 360), p * p]))  # Wilson 1927
    wanted = f"{round(360 * p)} of 360 images are right: 95 % interval {100 * low:.1f} to {100 * high:.1f} % (Wilson)"
    assert wanted in (uninterrupted / "report.md").read_text()
    args = json.loads((uninterrupted / "args.json").read_text())
    assert args["options"]["lr"] == 5e-3 and args["versions"]["torch"] == torch.__version__
    meta = read_checkpoint(str(uninterrupted / "checkpoint-best.pth"))["meta"]
    assert meta["model"] == "vit_custom_patch4" and meta["classes"] == [str(i) for i in range(10)]
    assert meta["img_size"] == [8, 8] and meta["in_chans"] == 1 and len(meta["mean"]) == 1


def test_the_run_that_other_tests_share_learns(uninterrupted):
    """A loss that falls from ln 10 = 2.303 by 0.2 at least, and three times what chance gets right."""
    lines = read_log(str(uninterrupted / "log.txt"))
    assert lines[-1]["val_loss"] < 2.303 - 0.2 and lines[-1]["val_acc1"] > 30
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]


@pytest.mark.slow
def test_tensorboard_has_the_losses_of_steps_and_the_values_of_log_txt(uninterrupted):
    """1437 images in batches of 64, the line of progress every 20 steps; an update takes two."""
    assert_tensorboard_has_log(uninterrupted, steps=[int(1000 * (e + s / 22)) for e in range(3) for s in (20, 22)])


def test_evaluation_of_a_checkpoint_needs_no_flags_of_model_or_data(uninterrupted, capsys):
    lines = read_log(str(uninterrupted / "log.txt"))
    best = max(line["val_acc1"] for line in lines)
    capsys.readouterr()
    assert finetune("--eval", "--resume", uninterrupted / "checkpoint-best.pth", "--device", "cpu") == 0
    said = capsys.readouterr().out
    assert f"360 test images: {best:.2f}%" in said and "note: scored on --dataset digits --data_path .\n" in said


@pytest.mark.parametrize("nproc", [2, 3])
def test_accuracy_is_the_same_number_on_more_ranks(uninterrupted, tmp_path, capsys, nproc):
    """In fp32: bf16 may round a sample's logits in another way in a batch of another size."""
    line = [
        "--eval",
        "--resume",
        uninterrupted / "checkpoint-best.pth",
        *"--dataset digits --device cpu --amp off".split(),
    ]
    assert finetune(*line) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert "360 test images: " in said
    assert Ranks(nproc, lambda: finetune(*line, "--batch_size", 50), tmp_path / "said.txt").exit_codes() == [0] * nproc
    assert said in (tmp_path / "said.txt").read_text().splitlines()


@pytest.mark.slow
def test_two_ranks_train_as_one_with_twice_the_batch(tmp_path):
    finetune(*PLAIN, "--batch_size", 64, "--accum_iter", 2, "--output_dir", tmp_path / "one")
    line = [*PLAIN, "--batch_size", 32, "--accum_iter", 2, "--output_dir", tmp_path / "two"]
    assert Ranks(2, lambda: finetune(*line)).exit_codes() == [0, 0]
    one, two = (read_checkpoint(str(tmp_path / n / "checkpoint-last.pth")) for n in ("one", "two"))
    assert one["progress"]["updates"] == two["progress"]["updates"] and len(two["rng"]) == 2
    for k, v in one["model"].items():
        assert torch.allclose(v, two["model"][k], atol=3e-5), k
    a, b = (read_log(str(tmp_path / n / "log.txt"))[-1] for n in ("one", "two"))
    assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)


@pytest.mark.slow
def test_two_agents_of_torchrun_train_as_one_with_two_processes(tmp_path):
    """As on two nodes: LOCAL_RANK is 0 on both. The files are written once, and are those of two processes on one."""
    two, one = tmp_path / "two", tmp_path / "one"
    port = str(empty_store().port)
    agent = [sys.executable, *"-m torch.distributed.run --nnodes=2 --nproc_per_node=1 --monitor-interval=0.1".split()]
    agent += ["--master_addr=127.0.0.1", f"--master_port={port}"]
    line = [*NET, "--batch_size", "32"]
    command = ["main_finetune.py", *line, "--output_dir", str(two)]
    out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
    agents = [subprocess.Popen([*agent, f"--node_rank={i}", *command], **out) for i in range(2)]
    said = [process.communicate(timeout=120)[0] for process in agents]
    assert [process.returncode for process in agents] == [0, 0], said
    assert "2 x cpu" in said[0] and "epoch 2:" in said[0] and "epoch" not in said[1], said
    assert Ranks(2, lambda: finetune(*line, "--output_dir", one)).exit_codes() == [0, 0]
    assert_same_run(one, two)
    names = [sorted(re.sub(r"(events\.out\.tfevents)\..*", r"\1", p.name) for p in run.iterdir()) for run in (one, two)]
    assert names[0] == names[1] and len(read_log(str(two / "log.txt"))) == 3


@pytest.mark.slow
def test_folder_of_photos_trains_a_convnet_from_safetensors(photo_folder, tmp_path):
    save_file(create_model("convnext_atto", num_classes=5, img_size=32).state_dict(), tmp_path / "w.safetensors")
    assert (
        finetune(
            "--data_path",
            photo_folder,
            "--model",
            "convnext_atto",
            "--finetune",
            tmp_path / "w.safetensors",
            "--input_size",
            32,
            "--epochs",
            2,
            "--head_epochs",
            1,
            "--lr",
            "1e-3",
            "--warmup_epochs",
            0,
            "--batch_size",
            8,
            "--aug",
            "photo",
            "--num_workers",
            1,
            "--device",
            "cpu",
            "--output_dir",
            tmp_path / "out",
        )
        == 0
    )
    assert read_log(str(tmp_path / "out" / "log.txt"))[-1]["val_acc1"] == 100.0


@pytest.mark.slow
def test_kfold_writes_out_of_fold_probabilities_and_repeats_nothing(tmp_path, capsys):
    line = [*PLAIN, "--epochs", 1, "--kfold", 3, "--output_dir", tmp_path]
    assert finetune(*line) == 0
    assert not undocumented(tmp_path) and not undocumented(tmp_path / "fold-0")
    header, *rows = [r.split(",") for r in (tmp_path / "oof.csv").read_text().splitlines()]
    assert header == ["ID", "fold", "True", *[str(i) for i in range(10)]]
    assert len(rows) == len({r[0] for r in rows}) == 1437
    assert np.allclose([sum(map(float, r[3:])) for r in rows], 1, atol=1e-4)
    summary = json.loads((tmp_path / "summary.json").read_text())["val_acc1"]
    correct = np.mean([header[3 + int(np.argmax([float(p) for p in r[3:]]))] == r[2] for r in rows])
    assert summary["mean"] == pytest.approx(100 * correct, abs=0.3) and len(summary["folds"]) == 3
    capsys.readouterr()
    assert finetune(*line) == 0
    assert capsys.readouterr().out.count("finished before") == 3
    with pytest.raises(UserError, match=r"--lr 0.5"):
        finetune(*line, "--lr", "0.5")


@pytest.mark.parametrize("main", [main_finetune, main_pretrain_noprop])
@pytest.mark.parametrize("accum_iter,images", [(4, 256), (22, 1408), (23, 1408), (2**31 - 1, 1408)])
def test_effective_batch_and_learning_rate_are_those_of_an_update(main, accum_iter, images, tmp_path, capsys):
    """1437 images are 22 micro-steps of 64: no update sees more."""
    line = ["--dataset", "digits", "--batch_size", 64, "--accum_iter", accum_iter, "--blr", "0.128", "--device", "cpu"]
    line += ["--embed_dim", 12, "--depth", 1] if main is main_pretrain_noprop else ["--model", "test_vit2"]
    assert main.main([*map(str, line), "--dry_run", "--output_dir", str(tmp_path / "none")]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    note = f" (--accum_iter {accum_iter}: an epoch has 22 micro-steps)" if accum_iter > 22 else ""
    assert first.endswith(f"effective batch {images}{note}, lr {0.128 * images / 256:.3g}"), first
    assert any(text.startswith(f"effective batch: {images} (= 64 x accum {images // 64} x 1") for text in rest)


def test_a_smaller_batch_and_an_endless_warm_up_are_announced(tmp_path, capsys):
    line = [*NET, "--epochs", 2, "--batch_size", 4000, "--warmup_epochs", 3, "--output_dir", tmp_path]
    assert finetune(*line) == 0
    said = capsys.readouterr().out
    assert "(--batch_size 4000: 1437 of 1437 training images make a batch)" in said.splitlines()[0]
    assert "warning: --epochs 2 ends within --warmup_epochs 3" in said


def test_a_default_model_that_does_not_fit_names_one_that_does(tmp_path):
    with pytest.raises(
        UserError, match=r"--model: is not given, .* 8 x 8 pixels .*--model vit_tiny_patch2, "
    ) as caught:
        finetune("--dataset", "digits", "--device", "cpu", "--output_dir", tmp_path)
    named = str(caught.value).split("--model ")[1].split(",")[0]
    assert create_model(named, num_classes=10, img_size=8, in_chans=1) is not None


def test_a_run_that_fails_at_its_start_leaves_no_folder_behind(tmp_path):
    """Neither those that it made nor, in one that was there, its mark."""
    (tmp_path / "there").mkdir()
    for folder in ("a/b", "there"):
        line = [
            "--dataset",
            "digits",
            "--model",
            "vit_custom_patch3",
            "--device",
            "cpu",
            "--output_dir",
            tmp_path / folder,
        ]
        assert Ranks(1, lambda line=line: run_main(lambda: finetune(*line)), tmp_path / "said").exit_codes() == [2]
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["said", "there"]


def dry_run_values(said: str) -> dict[str, str]:
    return dict(re.findall(r"(?m)^  (--\w+) +(.*)$", said))


def test_dry_run_prints_resolved_values_groups_and_memory_and_writes_nothing(tmp_path, capsys):
    assert finetune(*TINY, "--output_dir", tmp_path / "none", "--dry_run") == 0
    said = capsys.readouterr().out
    values = dry_run_values(said)
    assert list(values) == [flag.name for flag in FinetuneOptions.flags().values()]
    assert values["--lr"] == "0.005" and values["--device"] == "cpu" and values["--loader"] == "fast"
    assert re.match(r"(off|bf16) \(.+\)$", values["--amp"]) and values["--noise_units"] == "absolute"
    assert values["--input_size"] == "8 8 (the data set's)" and values["--mean"] == "0.3053 (the data set's)"
    assert values["--model_kwargs"] == "embed_dim=36 depth=2 num_heads=3" and values["--nb_classes"] == "10"
    assert values["--hflip"] == "0" and values["--clip_grad"] == "no clipping" and values["--dry_run"] == "on"
    titles = re.findall(r"(?m)^(\S.*):$", said)
    assert titles[:3] == ["optimizer (AdamW, warm-up, half a cosine)", "model", "input of the network"]
    for word in ("lr_scale 0.75", "effective batch: 128", "steps per epoch: 22 (11 updates)"):
        assert word in said, word
    # Weights, gradients, two moments and the average, float32; the second number is of this many parameters.
    parameters = int(re.search(r"parameters: ([\d,]+)", said).group(1).replace(",", ""))
    assert f"({5 * 4 * parameters / 1024:.1f} KiB weights" in said and 0 < parameters < 50000
    assert not (tmp_path / "none").exists()
    assert finetune(*TINY, "--blr", "1e-3", "--amp", "mixed", "--input_size", "16", "--dry_run") == 0
    values = dry_run_values(capsys.readouterr().out)
    assert values["--amp"].startswith("bf16") and values["--input_size"] == "16 16 (--input_size)"


@pytest.mark.parametrize(
    "argv,words",
    [
        (["--model", "vit_tiny_patch3"], ["--input_size 8 8", "patch size 3"]),
        (["--noise_layer", "7"], ["--noise_layer 7", "0 to 1"]),
        (["--nb_classes", "3"], ["--nb_classes 3", "10 classes"]),
        (["--dataset", "folder", "--data_path", "/nowhere"], ["--data_path /nowhere", "no such folder"]),
        (["--mean", "1", "2"], ["--mean 1.0 2.0"]),
        (["--device", "tpu9"], ["--device", "'tpu9'"]),
        (["--aug", "light", "--color_jitter", "0.1"], ["--color_jitter 0.1", "--aug light"]),
        (["--scale", "0.9", "0.5"], ["--scale 0.9 0.5", "MIN MAX"]),
        (["--aug", "none", "--vflip", "0.5"], ["--aug none", "--vflip"]),
        (["--crop_pct", "0.9"], ["--crop_pct 0.9", "digits"]),
    ],
)
def test_wrong_values_are_one_line(argv, words, tmp_path):
    with pytest.raises(UserError) as caught:
        finetune(*TINY, "--output_dir", tmp_path, *argv)
    assert all(w in str(caught.value) for w in words), str(caught.value)


@pytest.mark.slow
def test_error_is_one_line_exit_two_and_keeps_what_was_there(uninterrupted, run):
    before = {n: os.path.getmtime(uninterrupted / n) for n in os.listdir(uninterrupted)}
    result = run("main_finetune.py", *TINY, "--output_dir", uninterrupted, check=2)
    assert result.stderr.count("\n") == 1 and "--resume auto" in result.stderr and "Traceback" not in result.stderr
    result = run("main_finetune.py", *TINY, "--output_dir", uninterrupted, "--lr", "fast", check=2)
    assert result.stderr.count("\n") == 1 and "--lr" in result.stderr
    assert before == {n: os.path.getmtime(uninterrupted / n) for n in os.listdir(uninterrupted)}


@pytest.mark.slow
def test_deterministic_refuses_what_is_not_and_on_a_cpu_changes_no_bit(tmp_path, monkeypatch, capsys):
    line = [*TINY, "--epochs", 1, "--output_dir"]
    assert finetune(*line, tmp_path / "plain") == 0 and not torch.are_deterministic_algorithms_enabled()
    real = main_finetune.train_one_epoch

    def looks(*args, **kwargs):
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"]
        return real(*args, **kwargs)

    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(main_finetune, "train_one_epoch", looks)
    assert finetune(*line, tmp_path / "deterministic", "--deterministic") == 0
    assert_same_run(tmp_path / "plain", tmp_path / "deterministic")

    def has_none(*args, **kwargs):
        raise RuntimeError("x_cuda does not have a deterministic implementation, but you set\n...")

    monkeypatch.setattr(main_finetune, "train_one_epoch", has_none)
    with pytest.raises(SystemExit) as caught:
        run_main(lambda: finetune(*line, tmp_path / "none", "--deterministic"))
    said = capsys.readouterr().err
    assert caught.value.code == 2 and said.count("\n") == 1 and "--deterministic: x_cuda" in said
    torch.use_deterministic_algorithms(False)


def test_evaluating_incomplete_weights_is_an_error(tmp_path):
    """A file without the head would score at chance without a word."""
    state = create_model(
        "vit_custom_patch4", num_classes=10, img_size=8, embed_dim=36, depth=2, num_heads=3
    ).state_dict()
    torch.save({"model": {k: v for k, v in state.items() if not k.startswith("head")}}, tmp_path / "encoder.pth")
    for flag in ("--resume", "--finetune"):
        with pytest.raises(UserError, match=r"lacks weights.*head"):
            finetune(*TINY, "--eval", flag, tmp_path / "encoder.pth")


@pytest.mark.slow
def test_colour_weights_fine_tune_on_a_grey_data_set_in_memory(tmp_path):
    save_file(create_model("convnext_atto", num_classes=5, img_size=32).state_dict(), tmp_path / "w.safetensors")
    assert (
        finetune(
            "--dataset",
            "digits",
            "--model",
            "convnext_atto",
            "--finetune",
            tmp_path / "w.safetensors",
            "--input_size",
            32,
            "--epochs",
            1,
            "--batch_size",
            256,
            "--device",
            "cpu",
            "--output_dir",
            tmp_path / "out",
        )
        == 0
    )
    meta = read_checkpoint(str(tmp_path / "out" / "checkpoint-best.pth"))["meta"]
    assert meta["in_chans"] == 3 and len(meta["mean"]) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags,weights_stay,statistics_stay",
    [(["--freeze_bn"], (), ("",)), (["--freeze_layers", 2], ("conv1", "bn1", "layer1"), ("conv1", "bn1", "layer1"))],
)
def test_what_is_frozen_stays_and_the_rest_moves(tmp_path, flags, weights_stay, statistics_stay):
    """Timm's layers of a ResNet: the stem, then one per block; resnet10t has one block in each of layer1 to layer4."""
    line = [
        "--dataset",
        "digits",
        "--model",
        "resnet10t",
        "--input_size",
        32,
        "--epochs",
        1,
        "--lr",
        "1e-3",
        "--device",
        "cpu",
        "--batch_size",
        256,
        "--aug",
        "none",
        "--warmup_epochs",
        0,
        "--drop_path",
        0,
        *flags,
        "--output_dir",
        tmp_path,
    ]
    assert finetune(*line) == 0
    main_finetune.seed_all(0, 0)
    net = create_model("resnet10t", num_classes=10, img_size=32, in_chans=1)
    end = read_checkpoint(str(tmp_path / "checkpoint-last.pth"))["model"]
    trained = dict(net.named_parameters())
    for name, start in net.state_dict().items():
        if name in trained:
            assert torch.equal(start, end[name]) == name.startswith(weights_stay), name
        elif "running" in name:
            assert torch.equal(start, end[name]) == name.startswith(statistics_stay), name


def test_freezing_more_layers_than_there_are_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"--freeze_layers 4: .* has 4 layers; should be 0 to 3"):
        finetune(*TINY, "--output_dir", tmp_path, "--freeze_layers", 4)


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["loss", "acc1"])
def test_epoch_with_a_nan_loss_is_never_the_best(tmp_path, monkeypatch, metric):
    """NaN compares as neither above nor below: taken as the first best, it would stay it."""
    real, calls = main_finetune.evaluate, []

    def nan_in_the_first_and_last_epoch(*args, **kwargs):
        result = real(*args, **kwargs)
        calls.append(1)
        if len(calls) != 2:
            result.loss, result.acc1 = float("nan"), 99.9
        return result

    monkeypatch.setattr(main_finetune, "evaluate", nan_in_the_first_and_last_epoch)
    assert finetune(*NET, "--eval_metric", metric, "--output_dir", tmp_path) == 0
    best = read_checkpoint(str(tmp_path / "checkpoint-best.pth"))
    line = read_log(str(tmp_path / "log.txt"))[1]
    assert best["progress"]["best_epoch"] == 1 and best["epoch"] == 2
    assert best["progress"]["best"] == (-line["val_loss"] if metric == "loss" else line["val_acc1"])
    assert Position(best=float("nan")).improves(0.5), "a checkpoint written before"


def test_the_best_checkpoints_model_is_what_was_validated(tmp_path):
    """With an EMA, the average: loaded by hand and scored in NumPy, it has the run's best accuracy."""
    assert finetune(*NET, "--output_dir", tmp_path) == 0
    best, last = (torch.load(tmp_path / f"checkpoint-{name}.pth", weights_only=True) for name in ("best", "last"))
    assert "ema" not in best and not torch.equal(last["model"]["head.weight"], last["ema"]["head.weight"])
    meta = best["meta"]
    net = create_model(meta["model"], num_classes=10, img_size=8, in_chans=1, **meta["model_kwargs"]).eval()
    net.load_state_dict(best["model"])
    val = read_split("digits", ".", "val")
    with torch.no_grad():
        logits = net((val.images / 255 - meta["mean"][0]) / meta["std"][0]).numpy()
    accuracy = 100 * np.mean(logits.argmax(1) == val.targets.numpy())
    assert accuracy == pytest.approx(best["progress"]["best"], abs=0.3)  # one image of 360


def test_run_without_a_finite_validation_loss_ends_and_says_so(tmp_path, monkeypatch):
    real = main_finetune.evaluate

    def nan(*args, **kwargs):
        result = real(*args, **kwargs)
        result.loss = float("nan")
        return result

    monkeypatch.setattr(main_finetune, "evaluate", nan)
    assert finetune(*NET, "--epochs", 1, "--output_dir", tmp_path) == 0
    report = (tmp_path / "report.md").read_text()
    assert "no validation loss was finite" in report and "best" not in report
    assert not (tmp_path / "checkpoint-best.pth").exists()


def test_photo_recipe_jitters_images_in_memory_too():
    """Brightness of flat grey images: a factor of U(0.7, 1.3), whose standard deviation is 0.6 / sqrt(12)."""
    options = main_finetune.get_options([*NET, "--aug", "photo", "--reprob", "0"])
    flat = ArrayDataset(torch.full((1024, 1, 8, 8), 100, dtype=torch.uint8), torch.zeros(1024, dtype=torch.long), ["a"])
    meta = {"img_size": [8, 8], "mean": [0.0], "std": [1.0], "in_chans": 1, "crop_pct": 1.0}
    loader, _ = main_finetune.build_loaders(options, meta, flat, flat, World())
    level = torch.cat([batch.images.mean((1, 2, 3)) for batch in loader.epoch(0)]) * 255 / 100
    assert level.min() >= 0.695 and level.max() <= 1.305
    assert level.std().item() == pytest.approx(0.6 / 12**0.5, rel=0.1)


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16", "swinv2_tiny_window8_256", "test_convnext", "test_resnet", "test_efficientnet"]
)
def test_head_phase_drops_before_the_classifier_and_nowhere_else(name):
    """ViT has a `head_drop`, Swin and ConvNeXt a `head.drop`, ResNet and EfficientNet call F.dropout."""
    size = 64 if name.startswith("test") else 256 if "256" in name else 32
    kwargs = {} if name == "test_resnet" else {"drop_path": 0.5}
    net = create_model(name, num_classes=5, img_size=size, drop_rate=0.5, **kwargs)
    torch.nn.init.normal_(net.get_classifier().weight)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    freezing(None, in_head_phase=True)(net.train())
    features, x = [], torch.randn(2, 3, size, size)
    with torch.no_grad():
        for _ in range(2):
            features.append(net.forward_features(x))
        logits = [net.forward_head(features[0]) for _ in range(2)]
    assert torch.equal(*features) and not torch.equal(*logits)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
