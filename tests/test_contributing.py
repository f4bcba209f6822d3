"""CONTRIBUTING.md: its map, and its examples, each made in a copy of the product that then trains."""

import ast
import importlib
import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from timm.models import _registry

from models.loading import load_classifier
from models.noprop_mae import NoPropMAE
from tests.harness import ROOT
from tests.harness.runs import PLAIN, pretrain
from tests.test_imports import FLOORS
from util.checkpoint import read_checkpoint
from util.data.datasets import read_split
from util.log import read_log

TEXT = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
SECTIONS = {text.partition("\n")[0]: text for text in TEXT.split("\n### ")[1:]}
EXAMPLES = {title: re.findall(r"```python\n# (\S+)\n(.*?)```", text, re.DOTALL) for title, text in SECTIONS.items()}
LOSS, FLAG, LATENT, NOISE, FAMILY, DATA = EXAMPLES
# One update on all 1,437 images at a learning rate of 0: weights stay, AdamW's first moment is a tenth of the gradient.
ONCE = "--epochs 1 --lr 0 --batch_size 1437 --num_workers 0".split()
LATENTS = """
    --dataset digits --patch_size 2 --embed_dim 16 --depth 1 --num_heads 2 --decoder_embed_dim 8 --decoder_depth 1
    --decoder_num_heads 2 --T 2 --warmup_epochs 0 --vis_freq 0 --device cpu --amp off
""".split()


def merge(old: list[ast.stmt], new: list[ast.stmt]) -> None:
    """Definitions take the place of those of their names; the others, and statements, stand at the end."""
    for node in new:
        name = getattr(node, "name", node)
        at = next((i for i, other in enumerate(old) if getattr(other, "name", None) == name), len(old))
        if isinstance(node, ast.ClassDef) and ast.unparse(node.body[0]) == "...":
            merge(old[at].body, node.body[1:])
        else:
            old[at : at + 1] = [node]


def of_product(module: str) -> bool:
    return re.fullmatch(r"(main_\w+|engine_\w+|(models|augment|util)(\..+)?)", module) is not None


@pytest.fixture
def change(tmp_path, monkeypatch):
    """change(title) -> import_module, for a copy of the product in which that example is done."""
    before = {name: module for name, module in sys.modules.items() if of_product(name)}
    monkeypatch.setattr(_registry, "_model_entrypoints", dict(_registry._model_entrypoints))

    def do(title: str):
        for path in (*ROOT.glob("main_*.py"), *ROOT.glob("engine_*.py")):
            shutil.copy2(path, tmp_path)
        for room in ("models", "augment", "util"):
            shutil.copytree(ROOT / room, tmp_path / room)
        for path, block in EXAMPLES[title]:
            file = tmp_path / path
            if file.exists():
                tree = ast.parse(file.read_text("utf-8"))
                merge(tree.body, ast.parse(block).body)
                block = ast.unparse(tree)
            file.write_text(block, "utf-8")
        for name in before:
            del sys.modules[name]
        monkeypatch.syspath_prepend(tmp_path)
        return importlib.import_module

    yield do
    for name in [name for name in sys.modules if of_product(name)]:
        del sys.modules[name]
    sys.modules.update(before)


def gradients(folder) -> dict[str, torch.Tensor]:
    """By name, of a run of one update."""
    optimizer = read_checkpoint(str(folder / "checkpoint-last.pth"))["optimizer"]
    pairs = [pair for group in optimizer["param_groups"] for pair in zip(group["names"], group["params"])]
    return {name: optimizer["state"][i]["exp_avg"] / 0.1 for name, i in pairs}


def digits(folder, split: str):
    """(net of the last checkpoint, its logits [N, 10] for the split's images as they are, targets)."""
    net, meta = load_classifier(str(folder / "checkpoint-last.pth"))
    data = read_split("digits", ".", split)
    return net, net((data.images / 255 - meta["mean"][0]) / meta["std"][0]), data.targets


def assert_trained(folder, net, loss: torch.Tensor) -> None:
    """The run's logged loss and its gradients are those of `loss`."""
    assert read_log(str(folder / "log.txt"))[0]["train_loss"] == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    for name, gradient in gradients(folder).items():
        torch.testing.assert_close(gradient, net.get_parameter(name).grad, rtol=1e-3, atol=1e-6)


def test_the_map_has_every_room_and_goes_down_the_floors():
    rooms = re.findall(r"(?m)^    (\w+_\*\.py|[a-z/]+/) ", TEXT[: TEXT.index("**How a value goes")])
    floors = [FLOORS[room.removesuffix("*.py")] for room in rooms]
    assert floors == sorted(floors, reverse=True) and len(rooms) == len(set(rooms))
    folders = {f"{path.parent.relative_to(ROOT)}/" for path in ROOT.glob("util/**/*.py")} | {"models/", "augment/"}
    assert set(rooms) == folders | {"main_*.py", "engine_*.py"}


def test_each_change_takes_two_files_at_most_and_a_formula_one():
    files = {title: len({path for path, _ in blocks}) for title, blocks in EXAMPLES.items()}
    assert files == {LOSS: 1, FLAG: 2, LATENT: 1, NOISE: 2, FAMILY: 1, DATA: 2}
    paths = {path for blocks in EXAMPLES.values() for path, _ in blocks}
    named = paths | {path[: path.rindex("/") + 1] for path in paths if "/" in path}
    table = re.findall(r"`([\w/]+(?:\.py|/))`", "".join(re.findall(r"(?m)^\| .*", TEXT)))
    assert set(table) <= named and len(table) >= 8


def test_the_focal_loss_is_trained_and_logged(change, tmp_path):
    out = tmp_path / "out"
    line = [*PLAIN, *ONCE, "--smoothing", "0.2", "--class_weights", "balanced", "--output_dir", str(out)]
    assert change(LOSS)("main_finetune").main(line) == 0
    net, logits, targets = digits(out, "train")
    p, (N, C) = logits.softmax(1), logits.shape
    loss = 0
    for c in range(C):  # class by class, of the images that are of it and of the others
        t = torch.where(targets == c, 0.8 + 0.2 / C, 0.2 / C)
        loss = loss - t * (1 - p[:, c]).square() * p[:, c].log()
    weights = torch.tensor([N / (C * (targets == c).sum()) for c in range(C)])
    assert_trained(out, net, (loss * weights[targets]).sum() / N)
    _, logits, targets = digits(out, "val")
    plain = -logits.log_softmax(1)[range(len(targets)), targets].mean().item()
    assert read_log(str(out / "log.txt"))[0]["val_loss"] == pytest.approx(plain, rel=1e-5)


def test_a_flag_is_parsed_checked_trained_and_compared_at_resume(change, tmp_path):
    product, out = change(FLAG), tmp_path / "out"
    main, refused = product("main_finetune").main, product("util.errors").UserError
    line = [*PLAIN, *ONCE, "--smoothing", "0", "--output_dir", str(out)]
    with pytest.raises(refused, match="--logit_penalty"):
        main([*line, "--logit_penalty", "-1"])
    assert main([*line, "--logit_penalty", "0.3"]) == 0
    net, logits, targets = digits(out, "train")
    assert_trained(out, net, F.cross_entropy(logits, targets) + 0.3 * logits.exp().sum(1).log().pow(2).mean())
    assert json.loads((out / "args.json").read_text())["options"]["logit_penalty"] == 0.3
    with pytest.raises(refused, match=r"--logit_penalty 0\.4: .* 0\.3"):
        main([*line, "--epochs", "2", "--resume", "auto", "--logit_penalty", "0.4"])


def test_a_pretraining_loss_is_trained_and_logged_beside_the_others(change, tmp_path, monkeypatch):
    plain, out, given = tmp_path / "plain", tmp_path / "out", []
    assert pretrain(*LATENTS, *ONCE, "--output_dir", plain) == 0
    product = change(LATENT)
    encoder = product("engine_pretrain").EncoderFirst
    encode = encoder.forward
    monkeypatch.setattr(encoder, "forward", lambda self, *inputs: given.append(inputs) or encode(self, *inputs))
    assert product("main_pretrain_noprop").main([*LATENTS, *ONCE, "--output_dir", str(out)]) == 0

    content = read_checkpoint(str(out / "checkpoint-last.pth"))
    net = NoPropMAE(**content["meta"]["noprop"])
    net.load_state_dict(content["model"])
    z = net.encode(*given[0])[:, 0]  # [B, D]
    deviations = ((z - z.mean(0)).square().sum(0) / (len(z) - 1) + 1e-4).sqrt()
    loss = (1 - deviations).clamp(min=0).mean()
    [before], [after] = (read_log(str(folder / "log.txt")) for folder in (plain, out))
    assert loss > 0.01 and after["train_loss_variance"] == pytest.approx(loss.item(), rel=1e-4)
    assert (after["train_loss_0"], after["train_loss_1"]) == (before["train_loss_0"], before["train_loss_1"])
    assert after["train_loss"] == pytest.approx(before["train_loss"] + loss.item(), rel=1e-5)
    loss.backward()
    without = gradients(plain)
    for name, gradient in gradients(out).items():
        parameter = net.get_parameter(name)
        own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(gradient - without[name], own, rtol=1e-3, atol=1e-5)


def test_a_new_kind_of_noise_is_what_a_net_is_trained_under(change, tmp_path):
    product, seen = change(NOISE), []
    kind, abar = product("augment.noise").Laplace, product("augment.alpha_blend").alphas_cumprod()[500].item()
    call = kind.__call__
    kind.__call__ = lambda self, *args: seen.append(call(self, *args)[1]) or call(self, *args)
    line = [*PLAIN, *ONCE, "--alpha_blend", "500", "--noise_kind", "laplace", "--output_dir", str(tmp_path / "out")]
    assert product("main_finetune").main(line) == 0
    eps = seen[-1].flatten()[:100_000].numpy() / ((1 - abar) / abar) ** 0.5
    assert len(eps) == 100_000 and stats.kstest(eps, stats.laplace(0, 0.5**0.5).cdf).pvalue > 0.01  # of variance 1
    assert stats.kstest(eps, stats.norm().cdf).pvalue < 1e-9


def test_a_family_trains_with_noise_and_layer_decay(change, tmp_path):
    product, out = change(FAMILY), tmp_path / "out"
    line = "--dataset digits --model bag_of_patches --epochs 3 --warmup_epochs 0 --lr 3e-2"
    line += " --layer_decay 0.5 --batch_size 64 --aug none --device cpu --amp off --num_workers 0 --output_dir"
    assert product("main_finetune").main([*line.split(), str(out)]) == 0
    assert read_log(str(out / "log.txt"))[-1]["val_acc1"] > 50
    net, _ = product("models.loading").load_classifier(str(out / "checkpoint-last.pth"))
    images = torch.randn(5, 1, 8, 8)
    turned = images.roll(4, 2)  # the upper patches below
    torch.testing.assert_close(net(images), net(turned))
    groups = read_checkpoint(str(out / "checkpoint-last.pth"))["optimizer"]["param_groups"]
    scales = {name: group["lr_scale"] for group in groups for name in group["names"]}
    names = "patch_embed.proj.weight", "blocks.0.0.weight", "blocks.1.0.bias", "head.bias"
    assert [scales[name] for name in names] == [0.125, 0.25, 0.5, 1.0]


def test_a_data_set_is_found_by_its_name_by_each_training(change, tmp_path, capsys):
    product = change(DATA)
    line = "--dataset stripes --warmup_epochs 0 --batch_size 64 --device cpu --amp off --num_workers 0".split()
    net = "--model vit_custom_patch4 --model_kwargs embed_dim=24 depth=1 num_heads=2 --lr 1e-2 --epochs 5".split()
    assert product("main_finetune").main([*line, *net, "--output_dir", str(tmp_path / "out")]) == 0
    assert "512 train, 128 val, 2 classes; input 1 x 16 x 16 (the data set's)" in capsys.readouterr().out
    assert read_log(str(tmp_path / "out" / "log.txt"))[-1]["val_acc1"] > 90
    assert product("main_pretrain_noprop").main([*line, "--dry_run"]) == 0
    assert "NoProp-MAE on stripes: 512 images" in capsys.readouterr().out
    for split in ("train", "val"):
        data = product("util.data.datasets").read_split("stripes", ".", split)
        pixels = data.images.numpy()[:, 0] / 255
        down = pixels.std(axis=1).mean(axis=1) < pixels.std(axis=2).mean(axis=1)  # alike along a column
        assert np.array_equal(down, np.array([data.classes[t] == "down" for t in data.targets]))
        assert abs(pixels.mean() - 0.5) < 0.02 and abs(pixels.std() - 0.29) < 0.01
