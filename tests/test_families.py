"""Families of timm unlike a plain ViT: two heads, no stochastic depth, BatchNorm, no gradient checkpointing."""

import shutil

import pytest
import timm
import torch
import torch.nn.functional as F

from main_finetune import seed_all
from main_linprobe import main as probe
from main_predict import main as predict
from models import create_model
from models.loading import load_classifier
from models.vit import classifiers
from tests.harness import ROOT
from tests.harness.runs import finetune
from util.checkpoint import read_checkpoint
from util.errors import UserError
from util.log import read_log
from util.train.phases import freeze_backbone

DIGITS = ["--dataset", "digits", "--batch_size", 256, "--warmup_epochs", 0, "--device", "cpu", "--amp", "off"]
DISTILLED = [
    "--model",
    "deit_tiny_distilled_patch16_224",
    "--input_size",
    8,
    "--model_kwargs",
    "patch_size=4",
    "embed_dim=12",
    "depth=1",
    "num_heads=2",
]


@pytest.mark.parametrize(
    "name,heads",
    [
        ("deit_tiny_distilled_patch16_224", {"head", "head_dist"}),
        ("levit_128s", {"head", "head_dist"}),
        ("swiftformer_xs", {"head", "head_dist"}),
        ("crossvit_9_240", {"head.0", "head.1"}),
        ("volo_d1_224", {"head", "aux_head"}),
        ("swin_tiny_patch4_window7_224", {"head.fc"}),
        ("resnet10t", {"fc"}),
    ],
)
def test_the_head_phase_trains_every_classifier_and_nothing_else(name, heads):
    """heads: the modules that end in `num_classes` numbers, by timm's source."""
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    model = create_model(name, num_classes=7)
    trained = {id(p) for module in classifiers(model) for p in module.parameters()}
    assert {n for n, p in model.named_parameters() if id(p) in trained} == {
        n for n, _ in model.named_parameters() if n.startswith(tuple(f"{h}." for h in heads))
    }
    freeze_backbone(model.train())
    modes = {n: m.training for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m.out_features == 7}
    assert modes and all(modes.values())


@pytest.mark.slow
def test_a_net_with_two_heads_trains_both_resumes_scores_and_predicts(tmp_path, capsys):
    line = [*DIGITS, *DISTILLED, "--lr", "1e-3", "--head_lr", "1e-2", "--output_dir", tmp_path / "out"]
    assert finetune(*line, "--head_epochs", 1, "--epochs", 0) == 0
    head = read_checkpoint(str(tmp_path / "out" / "checkpoint-last.pth"))["model"]
    seed_all(0, 0)
    sizes = dict(patch_size=4, embed_dim=12, depth=1, num_heads=2)
    net = create_model(
        "deit_tiny_distilled_patch16_224", num_classes=10, img_size=8, in_chans=1, drop_path=0.1, **sizes
    )
    for name, start in net.state_dict().items():
        assert torch.equal(start, head[name]) != name.startswith("head"), name
    assert finetune(*line, "--head_epochs", 1, "--epochs", 1, "--resume", "auto") == 0
    logged = read_log(str(tmp_path / "out" / "log.txt"))[-1]["val_acc1"]
    capsys.readouterr()
    last = tmp_path / "out" / "checkpoint-last.pth"
    assert finetune("--eval", "--resume", last, "--dataset", "digits", "--device", "cpu", "--amp", "off") == 0
    assert f"360 test images: {logged:.2f}%" in capsys.readouterr().out
    # The two classifiers' mean, each on its own token (Touvron et al., DeiT, section 4).
    net, _ = load_classifier(str(last))
    x = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        z = net.forward_features(x)
        expected = (
            F.linear(z[:, 0], net.head.weight, net.head.bias)
            + F.linear(z[:, 1], net.head_dist.weight, net.head_dist.bias)
        ) / 2
        assert torch.allclose(net(x), expected, atol=1e-6)
    out = ["--output_dir", str(tmp_path / "predictions")]
    assert predict(["--checkpoints", str(last), "--dataset", "digits", "--views", "1", "--device", "cpu", *out]) == 0


def test_a_net_without_stochastic_depth_trains_under_the_default_drop_path(tmp_path, capsys):
    line = [*DIGITS, "--model", "ghostnet_050", "--input_size", 32, "--dry_run"]
    assert finetune(*line) == 0
    assert "--drop_path 0.1: ignored, ghostnet_050 has no stochastic depth" in capsys.readouterr().out
    assert finetune(*line, "--drop_path", 0) == 0
    assert "stochastic depth" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv,words",
    [
        (["--model", "resnet10t", "--input_size", 32, "--batch_size", 1], ["--batch_size 1", "BatchNorm", "resnet10t"]),
        (
            ["--model", "convit_tiny", "--input_size", 32, "--grad_checkpointing"],
            ["--grad_checkpointing", "convit_tiny"],
        ),
        (
            ["--model", "vgg11", "--input_size", 32, "--grad_checkpointing", "--model_kwargs", "mlp_ratio=0.01"],
            ["--grad_checkpointing", "vgg11"],
        ),
        (
            ["--model", "resnet10t", "--input_size", 32, "--model_kwargs", "global_pool="],
            ["resnet10t", "--model_kwargs"],
        ),
        (
            "--model vit_custom_patch4 --model_kwargs embed_dim=12 depth=1 num_heads=2 global_pool=".split(),
            ["vit_custom_patch4", "[2, 5, 10]"],
        ),
        (
            ["--batch_size", 1, "--mixup", 0.2, "--model", "vit_tiny_patch4"],
            ["--batch_size 1", "--mixup", "give 2 or more"],
        ),
    ],
)
def test_what_a_family_cannot_do_is_one_line_before_any_work(argv, words, tmp_path):
    with pytest.raises(UserError) as caught:
        finetune(*DIGITS, "--output_dir", tmp_path, "--dry_run", *argv)
    assert all(w in str(caught.value) for w in words) and "\n" not in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    "argv,words",
    [
        (["--model", "crossvit_tiny_240", "--input_size", 96], ["crossvit_tiny_240", "3 x 96 x 96", "--input_size"]),
        (["--model", "crossvit_tiny_240", "--input_size", 240, "--cls_token"], ["--cls_token", "CrossVit"]),
        (["--model", "vit_tiny_patch4", "--model_kwargs", "num_heads=0"], ["num_heads 0"]),
    ],
)
def test_what_the_probe_cannot_read_of_a_family_is_one_line(argv, words, photo_folder):
    line = ["--random_init", "--data_path", photo_folder, "--batch_size", 1, "--num_workers", 0, "--device", "cpu"]
    with pytest.raises(UserError) as caught:
        probe([str(a) for a in (*line, *argv)])
    assert all(w in str(caught.value) for w in words), str(caught.value)


def test_batchnorm_trains_at_batch_1_if_frozen_or_with_pixels(tmp_path):
    line = [*DIGITS, "--model", "resnet10t", "--batch_size", 1, "--dry_run", "--output_dir", ""]
    assert finetune(*line, "--input_size", 32, "--freeze_bn") == 0
    assert finetune(*line, "--input_size", 64) == 0


def test_the_trial_pass_leaves_running_statistics_and_generators_alone():
    from models.loading import try_forward

    torch.manual_seed(0)
    net = create_model("resnet10t", num_classes=3, img_size=32, in_chans=1).train()
    before, state = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    try_forward(net, {"model": "resnet10t", "in_chans": 1, "img_size": [32, 32], "num_classes": 3}, 2)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


@pytest.mark.slow
def test_a_family_that_timm_lacks_is_one_file(run, tmp_path):
    """In a copy of the product with that file in models/families; what it can do is asserted there."""
    for room in ("models", "augment", "util"):
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    for script in (*ROOT.glob("main_*.py"), *ROOT.glob("engine_*.py"), ROOT / "tests/harness/tiny_cells_works.py"):
        shutil.copy(script, tmp_path)
    shutil.copy(ROOT / "tests/harness/tiny_cells.py", tmp_path / "models" / "families")
    run("tiny_cells_works.py", cwd=tmp_path)
    wrong = run("main_finetune.py", "--dataset", "digits", "--model", "tiny_cell", cwd=tmp_path, check=2)
    assert "tiny_cells" in wrong.stderr and wrong.stderr.count("\n") == 1
