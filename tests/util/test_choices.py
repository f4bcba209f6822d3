"""Names that flags choose from, and mains that answer a wrong command line before torch is imported."""

import pytest
from timm.models import _registry

from tests.harness import ROOT
from util.choices import is_mae_name, parse_mae_name, timm_names

MAINS = sorted(path.name for path in ROOT.glob("main_*.py"))


def test_names_read_from_timms_source_are_those_of_its_registry():
    assert timm_names() == set(_registry._model_entrypoints)


def test_mae_names_have_a_size_and_a_patch():
    assert parse_mae_name("vit_base_patch16") == ("base", 16)
    assert parse_mae_name("vit_custom_patch4") == ("custom", 4)
    for other in (
        "vit_base_patch16_224",
        "vit_giant_patch14",
        "deit_base_patch16",
        "vit_base_patch",
        "vit_base_patch16\n",
    ):
        assert not is_mae_name(other)


# Runs a script as __main__ and prints which heavy packages it imported.
PROBE = """
import atexit, runpy, sys
atexit.register(lambda: print("heavy:", sorted({"torch", "timm", "numpy", "PIL", "cv2", "sklearn"} & set(sys.modules))))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("main", MAINS)
def test_help_and_wrong_flags_are_answered_without_importing_torch(run, main):
    shown = run("-c", PROBE, main, "--help")
    assert "--output_dir" in shown.stdout and "heavy: []" in shown.stdout
    wrong = run("-c", PROBE, main, "--no_such_flag", check=2)
    assert wrong.stderr.strip().startswith(f"{main}: error: ") and wrong.stderr.count("\n") == 1
    assert "heavy: []" in wrong.stdout


@pytest.mark.parametrize(
    "line,words",
    [
        ("main_finetune.py --model vit_base_patch16_22", ["--model", "'vit_base_patch16_22'", "vit_base_patch16_224"]),
        ("main_finetune.py --dataset cifar", ["--dataset", "'cifar'", "cifar10"]),
        ("main_finetune.py --noise_space colour", ["--noise_space", "'colour'", "pixel"]),
        ("main_finetune.py --resume nowhere.pth", ["--resume nowhere.pth", "no such file"]),
        ("main_finetune.py --data_path nowhere", ["--data_path nowhere", "no such folder"]),
        ("main_finetune.py --dataset digits --kfold 2 --output_dir=", ["--output_dir", "k-fold"]),
        ("main_pretrain_noprop.py --dataset digits --input_size 8 8 8", ["--input_size 8 8 8", "H W"]),
        ("main_linprobe.py --checkpoint nowhere.pth", ["--checkpoint nowhere.pth", "no such checkpoint file"]),
        ("main_sample.py nowhere.pth", ["nowhere.pth", "no such checkpoint file"]),
        ("main_sample.py README.md --output_dir=", ["--output_dir", "give a folder"]),
        ("main_predict.py --checkpoints nowhere", ["--checkpoints nowhere", "no such file or folder"]),
        ("main_predict.py --checkpoints tests --dataset folder", ["--data_path", "give the folder"]),
        ("main_predict.py --checkpoints tests --dataset digits --device gpu", ["--device", "'gpu'", "cuda:N"]),
    ],
)
def test_wrong_values_are_answered_without_importing_torch(run, line, words):
    wrong = run("-c", PROBE, *line.split(), check=2)
    assert "heavy: []" in wrong.stdout and wrong.stderr.count("\n") == 1
    for word in words:
        assert word in wrong.stderr
