"""Weights that come in: partial fits, heads by class name, files that are none."""

import argparse
import os

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from models import create_model, load_pretrained, loading
from models.loading import _described, require_complete
from tests.harness.checks import one_line
from tests.harness.runs import NET, finetune, save_member
from tests.harness.weights import NAME, PATCH, SIZES, as_file, vit
from util.errors import UserError


@pytest.mark.parametrize(
    "kind,word",
    [
        ("half of the blocks", "lacks 12 (blocks.1."),
        ("more blocks", "has 12 (blocks.2."),
        ("LayerScale that the model lacks", "has 4 (blocks.0.ls1.gamma"),
        ("no LayerScale that the model has", "lacks 4 (blocks.0.ls1.gamma"),
        ("no biases of the keys", "lacks 2 (blocks.0.attn.qkv.bias"),
        ("no positions", "lacks 1 (pos_embed"),
        ("a norm before the blocks", "has 2 (norm_pre.bias"),
        ("positions that the model lacks", "has 1 (pos_embed"),
        ("a table for all blocks", "has 1 (rel_pos_bias.relative_position_bias_table"),
    ],
)
def test_files_that_fit_in_part_are_refused_unless_a_flag_takes_them(tmp_path, kind, word):
    make = {
        "more blocks": {"depth": 3},
        "LayerScale that the model lacks": {"init_values": 0.1},
        "a norm before the blocks": {"pre_norm": True},
    }
    without = {"half of the blocks": "blocks.1", "no biases of the keys": "attn.qkv.bias", "no positions": "pos_embed"}
    state = {
        k: v + 1
        for k, v in vit(**{"depth": 2, **make.get(kind, {})}).state_dict().items()
        if without.get(kind, "-") not in k
    }
    if kind == "a table for all blocks":
        state["rel_pos_bias.relative_position_bias_table"] = torch.ones(9, 3)
    own = {
        "no LayerScale that the model has": {"init_values": 0.1},
        "positions that the model lacks": {"pos_embed": "none"},
    }
    model = vit(depth=2, **own.get(kind, {}))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    path = as_file(tmp_path / "x.pth", state)
    with pytest.raises(UserError) as caught:
        load_pretrained(model, path)
    assert word in one_line(caught) and "partial" in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "a refused file changes nothing"
    report = load_pretrained(model, path, partial=True)
    key = word.split("(")[1]
    assert any(k.startswith(key) for k in (report.missing if "lacks" in word else report.unexpected))
    assert torch.equal(model.blocks[0].mlp.fc1.weight, state["blocks.0.mlp.fc1.weight"])


def test_a_head_alone_and_running_statistics_that_are_not_there_are_refused(tmp_path):
    torch.save({"head.bias": torch.zeros(2), "features.0.weight": torch.ones(3)}, tmp_path / "x.pth")
    for partial in (False, True):
        with pytest.raises(UserError, match="shares no parameter"):
            load_pretrained(vit(), tmp_path / "x.pth", partial=partial)
    torch.save({k: v + 1 for k, v in vit().state_dict().items() if k != "head.weight"}, tmp_path / "x.pth")
    model = vit()
    report = load_pretrained(model, tmp_path / "x.pth")
    assert set(report.missing) == {"head.weight", "head.bias"} and not model.head.bias.any()
    net = create_model("resnet10t", num_classes=2, in_chans=1)
    torch.save({k: v for k, v in net.state_dict().items() if "running" not in k}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="running_mean"):
        load_pretrained(net, tmp_path / "x.pth")


HEADS = {
    "linear": (vit, ["head"]),
    "two": (
        lambda classes: vit(classes=classes, name="deit_tiny_distilled_patch16_224", patch_size=PATCH),
        ["head", "head_dist"],
    ),
    "convolution": (
        lambda classes: create_model(
            "resnetv2_50", num_classes=classes, in_chans=1, layers=(1, 1, 1, 1), channels=(8, 8, 8, 8), stem_chs=8
        ),
        ["head.fc"],
    ),
}


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize(
    "new", [["plum", "apple", "pear"], ["pear", "quince", "zebra", "apple"], ["plum"], ["one", "two", "three"]]
)
def test_rows_of_the_classifier_go_by_class_name(tmp_path, kind, new):
    make, layers = HEADS[kind]
    old = ["apple", "pear", "plum"]
    state = {k: torch.rand(v.shape) + 1 for k, v in make(classes=3).state_dict().items()}
    path, model = as_file(tmp_path / "x.pth", state, (32, 32), classes=old), make(classes=len(new))
    if kind == "convolution":
        content = torch.load(path, weights_only=True)
        content["meta"].update(
            model="resnetv2_50", model_kwargs={"layers": [1] * 4, "channels": [8] * 4, "stem_chs": 8}
        )
        torch.save(content, path)
    report = load_pretrained(model, path, classes=new)
    kept = [n for n in new if n in old]
    assert report.kept_classes == kept and report.new_classes == [n for n in new if n not in old]
    assert f"kept {len(kept)}" in str(report) and f"new {len(new) - len(kept)}" in str(report)
    for layer in layers:
        for i, name in enumerate(new):
            for part in ("weight", "bias"):
                row = model.state_dict()[f"{layer}.{part}"][i]
                if name in old:
                    assert torch.equal(row, state[f"{layer}.{part}"][old.index(name)])
                else:
                    assert row.abs().max() < 2e-4, "MAE's start: logits near 0"
    if report.new_classes:
        with pytest.raises(UserError, match="lacks weights"):
            require_complete(report, "x.pth")


def test_main_moves_the_classifier_by_name_and_says_so(photo_folder, tmp_path, capsys):
    family = {"model": NAME, "model_kwargs": {**SIZES, "patch_size": PATCH}}
    save_member(tmp_path / "x.pth", family, classes=("red", "zebra"))
    line = [
        "--data_path",
        photo_folder,
        "--finetune",
        tmp_path / "x.pth",
        "--device",
        "cpu",
        "--num_workers",
        0,
        "--dry_run",
    ]
    assert finetune(*line, "--output_dir", tmp_path / "out") == 0
    assert "kept 1 (red), new 1 (blue)" in capsys.readouterr().out


def test_a_report_counts_and_names_up_to_four_of_each_kind():
    assert str(loading.LoadReport()) == "loaded 0, resized 0, missing 0, unexpected 0"
    report = loading.LoadReport(
        loaded=["a"], missing=["b", "c", "d", "e"], unexpected=["f", "g", "h", "i", "j"], source="ema"
    )
    assert str(report) == "loaded 1 from ema, resized 0, missing 4 (b, c, d, e), unexpected 5 (f, g, h, i, ...)"


def test_paths_that_hold_no_weights_are_named_for_what_they_are(tmp_path):
    pointer = tmp_path / "x.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    for path, words in ((pointer, "git lfs pull"), (tmp_path, "a folder"), (tmp_path / "no.pth", "no such")):
        for name in (path, str(path), os.fsencode(path)):
            with pytest.raises(UserError, match=f"{path.name}: .*{words}"):
                load_pretrained(vit(), name)


def test_flags_of_weights_need_a_file(tmp_path):
    for flag in (["--partial_load"], ["--pos_grid", 4, 4]):
        with pytest.raises(UserError, match=f"{' '.join(map(str, flag))}: .*--finetune"):
            finetune(*NET, "--output_dir", tmp_path, *flag)


TINY = dict(num_classes=5, img_size=32, embed_dim=24, depth=2, num_heads=3)


@pytest.fixture
def encoder_file(tmp_path):
    """As MAE's pretraining saves it: encoder, `norm`, decoder weights, and a Namespace beside them."""
    torch.manual_seed(1)
    source = create_model("vit_custom_patch8", global_pool=False, **TINY)
    state = {k: torch.randn_like(v) for k, v in source.state_dict().items() if not k.startswith("head")}
    state["decoder_pred.weight"] = torch.zeros(3, 3)
    path = tmp_path / "mae_pretrain.pth"
    torch.save({"model": state, "args": argparse.Namespace(lr=1.0), "epoch": 3}, path)
    return path, state


def test_maes_pretraining_file_fills_the_encoder_and_leaves_the_head(encoder_file):
    path, state = encoder_file
    model = create_model("vit_custom_patch8", **TINY)
    report = load_pretrained(model, path)
    assert set(report.missing) == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert set(report.unexpected) == {"norm.weight", "norm.bias", "decoder_pred.weight"}
    assert str(report).endswith("unexpected 2 (norm.weight, norm.bias); 1 decoder tensors left out")
    assert torch.equal(model.blocks[1].attn.qkv.weight, state["blocks.1.attn.qkv.weight"])
    assert not report.resized
    # MAE's fresh head: N(0, 2e-5^2) and no bias, so that the first loss is log(classes).
    assert 0 < model.head.weight.abs().max() < 2e-4 and not model.head.bias.any()


@pytest.mark.parametrize("size", [64, (32, 64), (48, 16)])
def test_position_embeddings_follow_the_grid(encoder_file, size):
    path, state = encoder_file
    model = create_model("vit_custom_patch8", **{**TINY, "img_size": size})
    assert load_pretrained(model, path).resized == ["pos_embed"]
    grid = model.patch_embed.grid_size
    old = state["pos_embed"][:, 1:].reshape(1, 4, 4, 24).permute(0, 3, 1, 2)
    expected = F.interpolate(old, size=grid, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    assert torch.allclose(model.pos_embed[:, 1:], expected, atol=1e-5)
    assert torch.equal(model.pos_embed[:, :1], state["pos_embed"][:, :1])


def test_class_count_change_reinitialises_only_the_head(tmp_path):
    source = create_model("convnext_atto", num_classes=7, img_size=32)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    model = create_model("convnext_atto", num_classes=3, img_size=32)
    report = load_pretrained(model, tmp_path / "w.safetensors")
    head = {"head.fc.weight", "head.fc.bias"}
    assert set(report.missing) == head and not report.unexpected
    for name, value in model.state_dict().items():
        assert name in head or torch.equal(value, source.state_dict()[name]), name
    # As MAE starts a classifier: N(0, 2e-5^2), biases 0.
    assert 1.5e-5 < model.head.fc.weight.std() < 2.5e-5 and not model.head.fc.bias.any()


def test_a_network_that_reads_tensor_values_can_be_described(monkeypatch):
    """timm 1.0.15 does while it builds, and a tensor on meta has none; the random state stays as it was."""

    def build(meta, num_classes):
        torch.rand(1).item()
        return nn.Linear(2, num_classes)

    monkeypatch.setattr(loading, "create_from_meta", build)
    before = torch.get_rng_state()
    assert _described({"num_classes": 3}, "x.pth").weight.shape == (3, 2)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(UserError, match=r"^x\.pth: its meta describes no model .*pos_grid ROWS COLUMNS"):
        _described({"num_classes": "many"}, "x.pth")
