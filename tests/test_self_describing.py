"""A checkpoint says what its network is: evaluation, fine-tuning, the probe and prediction need no flag of it again."""

import re
import shlex
from pathlib import Path

import pytest
from safetensors.torch import save_file

import main_linprobe
import main_predict
import main_pretrain_noprop
import main_sample
from models import create_model
from tests.harness.runs import VIT, finetune, save_member
from tests.harness.training import resolve
from util.checkpoint import peek_meta, read_checkpoint
from util.cli.finetune import check, get_options
from util.cli.resolve import resolve_data
from util.data_specs import DATASETS, IMAGENET_MEAN
from util.errors import UserError
from util.log import read_log

QUICK = ["--device", "cpu", "--amp", "off", "--warmup_epochs", 0]
DIGITS = ["--dataset", "digits", "--epochs", 1, "--lr", "1e-3", "--batch_size", 128, *QUICK]
TINY = ["--model", "vit_custom_patch8", "--model_kwargs", "embed_dim=12", "depth=1", "num_heads=2"]
FAMILIES = {
    "class token, more classes than the data's": [
        *TINY,
        "qkv_bias=False",
        "--input_size",
        32,
        "--cls_token",
        "--nb_classes",
        5,
    ],
    "another pooling": [*TINY, "global_pool=map", "--input_size", 32],
    "a timm name with another pooling": [
        "--model",
        "vit_tiny_patch16_224",
        *TINY[2:],
        "patch_size=8",
        "global_pool=avg",
        "--input_size",
        32,
    ],
    "without stochastic depth": [
        "--model",
        "densenet121",
        "--model_kwargs",
        "growth_rate=4",
        "block_config=(1, 1)",
        "--input_size",
        32,
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_no_flag_of_the_network_is_given_twice(photo_folder, tmp_path, family, capsys):
    data = ["--data_path", photo_folder, "--num_workers", 0, "--device", "cpu", "--amp", "off"]
    line = [*data, "--epochs", 1, "--lr", "1e-3", "--batch_size", 8, "--warmup_epochs", 0]
    assert finetune(*line, *family, "--output_dir", tmp_path / "out") == 0
    best, score = tmp_path / "out" / "checkpoint-best.pth", read_log(str(tmp_path / "out" / "log.txt"))[0]["val_acc1"]
    capsys.readouterr()
    assert finetune("--eval", "--resume", best, *data) == 0
    assert f"12 test images: {score:.2f}%" in capsys.readouterr().out
    assert finetune("--eval", "--finetune", best, *data) == 0
    assert f"12 test images: {score:.2f}%" in capsys.readouterr().out

    assert finetune(*line, "--finetune", best, "--output_dir", tmp_path / "next") == 0
    first, second = peek_meta(str(best)), peek_meta(str(tmp_path / "next" / "checkpoint-best.pth"))
    assert first == second
    assert "missing 0" in capsys.readouterr().out.partition("finetune:")[2].splitlines()[0]

    where = [
        "--checkpoints",
        str(best),
        "--output_dir",
        str(tmp_path / "predictions"),
        "--data_path",
        str(photo_folder / "val"),
    ]
    assert main_predict.main([*where, "--views", "1", "--num_workers", "0", "--device", "cpu"]) == 0
    assert main_linprobe.main(["--checkpoint", str(best), *map(str, data)]) == 0
    assert "input 3 x 32 x 32 (the checkpoint's)" in capsys.readouterr().out


def test_a_flag_goes_before_the_checkpoint(tmp_path):
    line = ["--dataset", "digits", "--finetune", "x"]
    source = {
        "model": "vit_tiny_patch4",
        "global_pool": False,
        "classes": ["a", "b"],
        "num_classes": 3,
        "in_chans": 1,
        "img_size": [8, 8],
        "mean": [0.1],
        "std": [0.2],
        "model_kwargs": {"depth": 2},
    }
    assert resolve(line, ["a", "b"], source)[0]["num_classes"] == 3
    assert resolve(line, ["a", "b", "c"], source)[0]["num_classes"] == 3
    assert resolve(line, ["a", "b", "c", "d"], source)[0]["num_classes"] == 4
    for flags, expected in (([], False), (["--global_pool"], True), (["--cls_token"], False)):
        meta, _ = resolve([*line, *flags, "--nb_classes", "5"], ["a", "b"], source)
        assert meta["global_pool"] is expected and meta["num_classes"] == 5 and meta["model_kwargs"] == {"depth": 2}
    meta, _ = resolve([*line, "--model", "vit_small_patch4"], ["a", "b"], source)
    assert meta["global_pool"] is True and meta["model_kwargs"] == {}


@pytest.mark.parametrize(
    "flags,source,size,mean,words",
    [
        # MAE and DeiT published these at 224 pixels with ImageNet's statistics.
        ("--model vit_base_patch16 --finetune x", {}, 224, IMAGENET_MEAN, "the weights'"),
        ("--model vit_huge_patch14 --finetune x --input_size 28", {}, 28, IMAGENET_MEAN, "--input_size"),
        ("--model vit_base_patch16 --finetune x --mean 0.5", {}, 224, (0.5,) * 3, "--mean"),
        # timm's own: the second was trained with 0.5 for mean and deviation.
        ("--model deit_tiny_patch16_224 --finetune x", {}, 224, IMAGENET_MEAN, "the weights'"),
        ("--model vit_tiny_patch16_224 --finetune x", {}, 224, (0.5,) * 3, "the weights'"),
        # Nobody published weights under these names, or none were given.
        ("--model vit_tiny_patch4 --finetune x", {}, 32, DATASETS["cifar10"].mean, "the data set's"),
        ("--model vit_base_patch16", {}, 32, DATASETS["cifar10"].mean, "the data set's"),
        ("--model resnet10t", {}, 32, DATASETS["cifar10"].mean, "the data set's"),
        (
            "--finetune x",
            {"model": "vit_base_patch16", "img_size": [48, 48], "in_chans": 3, "mean": [0.1] * 3, "std": [0.2] * 3},
            48,
            (0.1,) * 3,
            "the checkpoint's",
        ),
    ],
)
def test_input_comes_from_flag_checkpoint_weights_or_data_set_in_order(flags, source, size, mean, words):
    meta, said = resolve(["--dataset", "cifar10", *flags.split()], ["a", "b"], source)
    assert meta["img_size"] == [size, size] and meta["mean"] == pytest.approx(list(mean))
    assert f"input 3 x {size} x {size}" in said and " ".join(f"{v:.4g}" for v in mean) in said and words in said


def test_a_tag_that_timm_does_not_have_is_one_line():
    with pytest.raises(UserError, match=r"--model vit_tiny_patch16_224.mae: .*tag"):
        resolve(["--dataset", "digits", "--model", "vit_tiny_patch16_224.mae"], ["a", "b"])


def test_weights_under_maes_name_are_fine_tuned_as_under_timms(tmp_path, capsys):
    """A DeiT file under both names, on grey images of 8 pixels: the same input."""
    sizes = ["embed_dim=12", "depth=1", "num_heads=2"]
    net = create_model("deit_tiny_patch16_224", num_classes=5, embed_dim=12, depth=1, num_heads=2)
    save_file(net.state_dict(), tmp_path / "deit.safetensors")
    inputs = []
    for name in ("vit_tiny_patch16", "deit_tiny_patch16_224"):
        line = [
            *DIGITS,
            "--model",
            name,
            "--model_kwargs",
            *sizes,
            "--cls_token",
            "--finetune",
            tmp_path / "deit.safetensors",
        ]
        assert finetune(*line, "--dry_run") == 0
        inputs.append(re.search(r"input .*?\) *, mean .*?\)", capsys.readouterr().out).group(0))
    assert inputs[0] == inputs[1] and inputs[0].startswith("input 3 x 224 x 224 (the weights'), mean 0.485 0.456 0.406")


def commands_of(folder) -> list[list[str]]:
    """The words of the commands in a report, but for the one that ran."""
    lines = re.findall(r"(?m)^    (python main_.*)$", (folder / "report.md").read_text())
    return [shlex.split(line)[1:] for line in lines]


@pytest.mark.parametrize("split", [["--val_split", 0.25, "--split_seed", 3], ["--kfold", 2, "--fold", 1]])
def test_the_reports_command_scores_the_run_where_it_was_started(photo_folder, tmp_path, monkeypatch, capsys, split):
    """Paths with a space and a quote; a data set without val/."""
    monkeypatch.chdir(tmp_path)
    Path("it's mine").symlink_to(photo_folder / "train")
    line = ["--data_path", "it's mine", *TINY, "--input_size", 32, "--epochs", 2, "--lr", "1e-3", "--batch_size", 8]
    assert finetune(*line, "--num_workers", 0, *QUICK, *split, "--output_dir", "my out") == 0
    folder = Path("my out", "fold-1") if "--kfold" in split else Path("my out")
    lines = read_log(str(folder / "log.txt"))
    best = lines[read_checkpoint(str(folder / "checkpoint-best.pth"))["progress"]["best_epoch"]]
    [[script, *words]] = commands_of(folder)
    amp = ["--amp", "off"] if "off" in QUICK else []
    expected = ["--eval", "--resume", str(folder / "checkpoint-best.pth"), "--batch_size", "8", *amp]
    assert script == "main_finetune.py" and words == expected
    capsys.readouterr()
    assert finetune(*words, "--device", "cpu", "--num_workers", 0) == 0
    said = capsys.readouterr().out
    assert f"loss: {best['val_loss']:.4f}" in said and f" test images: {best['val_acc1']:.2f}%" in said
    taken = shlex.split(re.search("note: scored on (.*)", said).group(1))
    assert taken == ["--dataset", "folder", "--data_path", "it's mine", *map(str, split)]


def test_evaluation_takes_the_data_from_the_checkpoint_unless_a_flag_names_them(photo_folder, tmp_path, monkeypatch):
    def data(*line, **saved) -> tuple:
        args = {"data_path": str(photo_folder), "val_split": 0.2, "kfold": 0, "fold": "0", "split_seed": 3, **saved}
        content = {"meta": {"dataset": "folder"}, "args": args}
        d = check(resolve_data(get_options(["--eval", "--finetune", __file__, *map(str, line)]), content)).data
        return d.dataset, d.data_path, d.val_split, d.kfold, d.fold, d.split_seed

    here, other = str(photo_folder), str(tmp_path)
    assert data() == ("folder", here, 0.2, 0, "0", 3)
    assert data(val_split=0.0, kfold=5, fold="4") == ("folder", here, 0.0, 5, "4", 3)
    assert data("--data_path", f"{here}/train/..") == ("folder", f"{here}/train/..", 0.2, 0, "0", 3)
    assert data("--data_path", other) == ("folder", other, 0.0, 0, "0", 0)  # other images are divided by flags alone
    assert data("--data_path", other, data_path="/gone") == ("folder", other, 0.2, 0, "0", 3)  # they were moved
    assert data("--kfold", 2, "--fold", 1) == ("folder", here, 0.0, 2, "1", 0)
    assert data("--dataset", "digits") == ("digits", ".", 0.0, 0, "0", 0)
    with pytest.raises(UserError, match=r"--data_path: give it; .* /gone, which does not exist"):
        data(data_path="/gone")
    for hostile in ({"val_split": [1] * 9999}, {"val_split": 2}, {"kfold": 5, "fold": "7", "val_split": 0}):
        with pytest.raises(UserError, match=r"should be") as caught:
            data(**hostile)
        assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)


def test_a_pretraining_reports_commands_run_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = "--embed_dim 12 --depth 1 --num_heads 3 --decoder_embed_dim 12 --decoder_depth 1 --T 2".split()
    line = ["--dataset", "digits", *sizes, *"--epochs 1 --batch_size 256 --device cpu --amp off".split()]
    assert main_pretrain_noprop.main([*line, "--output_dir", "my out"]) == 0
    checkpoint = "my out/checkpoint-last.pth"
    (finetuning, probe, samples) = commands_of(Path("my out"))
    assert finetuning == ["main_finetune.py", "--finetune", checkpoint, "--dataset", "digits"]
    assert probe == ["main_linprobe.py", "--checkpoint", checkpoint] and samples == ["main_sample.py", checkpoint]
    assert finetune(*finetuning[1:], "--dry_run", "--device", "cpu") == 0
    assert main_linprobe.main([*probe[1:], "--device", "cpu"]) == 0
    assert main_sample.main([*samples[1:], "--num", "1", "--num_samples", "2", "--device", "cpu"]) == 0


def test_evaluating_a_fold_needs_its_number():
    with pytest.raises(UserError, match=r"--kfold 5: .* --fold"):
        get_options(["--eval", "--resume", __file__, "--kfold", "5", "--dataset", "digits"])


def test_evaluation_on_other_classes_names_the_first_difference(photo_folder, tmp_path):
    save_member(tmp_path / "x.pth", VIT, classes=("blue", "green"))
    for flag in ("--resume", "--finetune"):
        with pytest.raises(UserError, match=f"{flag} .*x.pth: its class 1 is 'green', in the data it is 'red'"):
            finetune(
                "--eval", flag, tmp_path / "x.pth", "--data_path", photo_folder, "--num_workers", 0, "--device", "cpu"
            )
