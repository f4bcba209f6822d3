"""Weights that come in: positions on another grid, containers of other trainers, partial fits, heads by class name."""

import argparse
import inspect
import math
import os

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import resize_rel_pos_bias_table
from timm.models.vision_transformer import checkpoint_filter_fn

from models import create_model, load_pretrained
from models.loading import require_complete
from tests.harness.checks import one_line
from tests.harness.runs import NET, finetune, save_member
from util.checkpoint import peek_meta
from util.errors import UserError

SIZES = {"embed_dim": 12, "depth": 1, "num_heads": 2}
NAME, PATCH = "vit_custom_patch4", 4
REGISTERS = {"reg_tokens": 3, "no_embed_class": True}
TABLE = "relative_position_bias_table"


def vit(size=(32, 32), classes=2, name=NAME, **extra):
    return create_model(name, num_classes=classes, img_size=size, in_chans=1, **{**SIZES, **extra})


def ramp(grid) -> torch.Tensor:
    """[1, H W, 12]: the place of each patch's centre in the image, (row, column) in shares of it, six times."""
    y, x = torch.meshgrid(*((torch.arange(n) + 0.5) / n for n in grid), indexing="ij")
    return torch.stack([y, x], -1).reshape(1, -1, 2).repeat(1, 1, 6)


def as_file(path, state, size=None, classes=("a", "b"), **extra):
    """A state dict; with `size` this project's checkpoint of a ViT for such images."""
    content = {"model": state, "ema": None}
    if size:
        content |= {
            "format": 1,
            "kind": "finetune",
            "meta": {
                "kind": "classifier",
                "model": NAME,
                "model_kwargs": {**SIZES, **extra},
                "global_pool": True,
                "img_size": list(size),
                "in_chans": 1,
                "num_classes": len(classes),
                "classes": list(classes),
                "mean": [0.5],
                "std": [0.5],
            },
        }
    torch.save(content, path)
    return path


def with_ramp(size, prefix=(), **extra):
    """State dict of a ViT: `prefix` holds the value of each position before the patches, which hold a ramp."""
    state = vit(size, **extra).state_dict()
    rows = torch.tensor(prefix).view(1, -1, 1).expand(1, -1, 12)
    state["pos_embed"] = torch.cat([rows, ramp([s // PATCH for s in size])], 1)
    return state


@pytest.mark.parametrize("old", [(32, 32), (16, 32), (16, 64), (48, 80), (8, 128)])
@pytest.mark.parametrize("new", [(32, 32), (32, 16), (16, 64), (96, 96), (64, 64)])
def test_positions_of_this_projects_files_come_from_their_place_in_the_image(tmp_path, old, new):
    state = with_ramp(old, (100.0,))
    model = vit(new)
    report = load_pretrained(model, as_file(tmp_path / "x.pth", state, old))
    grids = [tuple(s // PATCH for s in size) for size in (old, new)]
    image = state["pos_embed"][:, 1:].double().reshape(1, *grids[0], 12).permute(0, 3, 1, 2)
    oracle = F.interpolate(image, size=grids[1], mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    assert torch.allclose(model.pos_embed[:, 1:].double(), oracle, atol=1e-5)
    # A cubic bends at the border, by less than 0.4 patches of the old grid.
    assert (model.pos_embed[:, 1:] - ramp(grids[1])).abs().max() < 0.4 / min(grids[0])
    assert (model.pos_embed[0, 0] == 100).all() and report.resized == ["pos_embed"] * (old != new)


def test_positions_of_tokens_go_to_the_same_tokens(tmp_path):
    """(file, model, its positions before the patches, what is added to its class token); a token of the model that the
    file lacks keeps the model's own position."""
    deit = {"name": "deit_tiny_distilled_patch16_224", "patch_size": PATCH}
    for number, (old, new, before, rows, added) in enumerate(
        [
            ({}, {}, (7.0,), [7.0], 0.0),
            (deit, {}, (7.0, 9.0), [7.0], 0.0),
            ({}, deit, (7.0,), [7.0, None], 0.0),
            (REGISTERS, {}, (), [0.0], 0.0),
            ({}, REGISTERS, (7.0,), [], 7.0),
            ({"reg_tokens": 3}, REGISTERS, (7.0, 1.0, 2.0, 3.0), [], 7.0),
            (REGISTERS, {"reg_tokens": 3}, (), [0.0] * 4, 0.0),
            ({"reg_tokens": 3}, {}, (7.0, 1.0, 2.0, 3.0), [7.0], 0.0),
            (
                {"reg_tokens": 3, "class_token": False},
                {"reg_tokens": 3, "class_token": False},
                (1.0, 2.0, 3.0),
                [1.0, 2.0, 3.0],
                0.0,
            ),
            ({"class_token": False}, {}, (), [None], 0.0),
            ({}, {"class_token": False}, (7.0,), [], 0.0),
        ]
    ):
        state = with_ramp((32, 32), before, **old)
        model = vit((48, 32), **new)
        own = model.state_dict()["pos_embed"].clone()
        load_pretrained(model, as_file(tmp_path / "x.pth", state))
        n = model.pos_embed.shape[1] - 12 * 8
        assert n == len(rows), number
        for i, value in enumerate(rows):
            expected = own[0, i] if value is None else torch.full((12,), value)
            assert torch.equal(model.pos_embed[0, i], expected), (number, i)
        assert (model.pos_embed[:, n:] - ramp((12, 8))).abs().max() < 0.06, number
        if model.cls_token is not None and "cls_token" in state:
            assert torch.allclose(model.cls_token, state["cls_token"] + added, atol=1e-6), number
        if new == REGISTERS and "reg_token" in state:
            assert torch.allclose(model.reg_token[0, :, 0], state["reg_token"][0, :, 0] + torch.tensor([1.0, 2.0, 3.0]))


@pytest.mark.parametrize(
    "old,new,could",
    [
        ((16, 32), (32, 16), "8 x 4"),
        ((16, 32), (16, 32), "4 x 8 after 1"),
        ((32, 32), (16, 64), "8 x 8"),
        ((48, 80), (96, 96), "no square"),
    ],
)
def test_a_grid_that_cannot_be_told_is_refused_and_settled_by_a_flag(tmp_path, old, new, could):
    path = as_file(tmp_path / "x.pth", with_ramp(old, (7.0,)))
    with pytest.raises(UserError) as caught:
        load_pretrained(vit(new), path)
    assert could in one_line(caught) and "--pos_grid" in str(caught.value)
    model = vit(new)
    load_pretrained(model, path, pos_grid=(old[0] // PATCH, old[1] // PATCH))
    assert (model.pos_embed[:, 1:] - ramp((new[0] // PATCH, new[1] // PATCH))).abs().max() < 0.06
    with pytest.raises(UserError, match="--pos_grid 5 9"):
        load_pretrained(vit(new), path, pos_grid=(5, 9))


def test_dinov2_files_with_registers_come_in_as_timm_takes_them(tmp_path):
    """Publisher's names: `register_tokens` without positions, a class position, a mask token, `w12` of SwiGLU."""
    torch.manual_seed(0)
    model = vit(**REGISTERS, init_values=1e-5, mlp_ratio=2)
    state = {k: torch.randn_like(v) for k, v in model.state_dict().items()}
    published = {**state, "register_tokens": state.pop("reg_token"), "mask_token": torch.zeros(1, 12)}
    del published["reg_token"]
    published["pos_embed"] = torch.randn(1, 65, 12)
    load_pretrained(model, as_file(tmp_path / "x.pth", published))
    oracle = vit(**REGISTERS, init_values=1e-5, mlp_ratio=2)
    oracle.load_state_dict(checkpoint_filter_fn(dict(published), oracle))
    images = torch.randn(2, 1, 32, 32)
    assert torch.allclose(model.eval()(images), oracle.eval()(images), atol=1e-6)
    with_positions = vit(reg_tokens=3, init_values=1e-5, mlp_ratio=2)  # of the class token and the registers, too
    load_pretrained(with_positions, tmp_path / "x.pth")
    assert torch.allclose(with_positions.eval()(images), oracle(images), atol=1e-6)


def convnext_file(state):
    """The names of ConvNeXt's authors."""
    names = {}
    for k, v in state.items():
        k = k.replace("stem.", "downsample_layers.0.").replace(".downsample.", ".down.").replace("blocks.", "")
        k = (
            k.replace("conv_dw", "dwconv")
            .replace("mlp.fc", "pwconv")
            .replace("head.fc.", "head.")
            .replace("head.norm", "norm")
        )
        parts = k.split(".")
        names[".".join(["downsample_layers", parts[1], *parts[3:]]) if "down" in parts else k] = v
    return names


def swin_file(state):
    """The names of Swin's authors: a stage ends with the downsampling, and holds its masks."""
    names = {
        "layers.0.blocks.1.attn_mask": torch.zeros(4, 4, 4),
        "layers.0.blocks.0.attn.relative_position_index": torch.zeros(4, 4),
    }
    for k, v in state.items():
        parts = k.split(".")
        if "downsample" in parts:
            parts[1] = str(int(parts[1]) - 1)
        names[".".join(parts).replace("head.fc.", "head.")] = v
    return names


@pytest.mark.parametrize(
    "name,rename,sizes",
    [
        ("convnext_atto", convnext_file, dict(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16))),
        (
            "swin_tiny_patch4_window7_224",
            swin_file,
            dict(img_size=64, window_size=4, embed_dim=8, depths=(2, 1), num_heads=(1, 2)),
        ),
    ],
)
def test_publishers_names_are_understood_in_ddps_container(tmp_path, name, rename, sizes):
    source, model = (create_model(name, num_classes=3, **sizes) for _ in range(2))
    state = {k: torch.rand_like(v) for k, v in source.state_dict().items()}
    torch.save({"model": {f"module.{k}": v for k, v in rename(state).items()}, "epoch": 3}, tmp_path / "x.pth")
    report = load_pretrained(model, tmp_path / "x.pth")
    assert not report.missing and all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def beit(size, **extra):
    keywords = {"embed_dim": 8, "depth": 2, "num_heads": 2, "patch_size": 16, **extra}
    return create_model("beit_base_patch16_224", num_classes=2, img_size=size, in_chans=1, **keywords)


def swin(size, window=7):
    return create_model(
        "swin_tiny_patch4_window7_224",
        num_classes=2,
        img_size=size,
        in_chans=1,
        window_size=window,
        embed_dim=8,
        depths=(1, 1),
        num_heads=(1, 2),
    )


def loud(model):
    for name, p in model.named_parameters():
        if name.endswith(TABLE):
            torch.nn.init.normal_(p)
    return model.state_dict()


@pytest.mark.parametrize("make,old,new", [(beit, (64, 64), (96, 64)), (swin, (56, 56), (40, 64))])
def test_relative_position_tables_are_interpolated_as_timm_does(tmp_path, make, old, new):
    state, model = loud(make(old)), make(new)
    torch.save(state, tmp_path / "x.pth")
    report = load_pretrained(model, tmp_path / "x.pth")
    tables = [k for k in state if k.endswith(TABLE) and state[k].shape != model.state_dict()[k].shape]
    assert tables and set(tables) == {k for k in report.resized if k.endswith(TABLE)} and not report.missing
    for key in tables:
        module = model.get_submodule(key.removesuffix(f".{TABLE}"))
        own = module.relative_position_bias_table
        expected = resize_rel_pos_bias_table(state[key], module.window_size, own.shape)
        assert torch.allclose(own, expected, atol=1e-6) and own.std() > 0.3


@pytest.mark.skipif(
    "old_window_size" not in inspect.signature(resize_rel_pos_bias_table).parameters, reason="no oracle"
)
def test_tables_of_rectangular_windows_take_their_shape_from_the_checkpoint(tmp_path):
    """4 x 8 patches to 8 x 4 has as many rows; foreign files of such a shape are refused, or told by --pos_grid."""
    state, model = loud(beit((64, 128))), beit((128, 64))
    meta = {
        "kind": "classifier",
        "model": "beit_base_patch16_224",
        "model_kwargs": {"embed_dim": 8, "depth": 2, "num_heads": 2},
        "img_size": [64, 128],
        "in_chans": 1,
        "num_classes": 2,
        "classes": ["a", "b"],
        "mean": [0.5],
        "std": [0.5],
    }
    for content, how in (({"format": 1, "meta": meta, "model": state}, {}), (state, {"pos_grid": (4, 8)})):
        torch.save(content, tmp_path / "x.pth")
        load_pretrained(model, tmp_path / "x.pth", **how)
        for i in range(2):
            own = model.blocks[i].attn.relative_position_bias_table
            old = state[f"blocks.{i}.attn.{TABLE}"]
            expected = resize_rel_pos_bias_table(old, (8, 4), tuple(own.shape), old_window_size=(4, 8))
            assert torch.allclose(own, expected, atol=1e-6) and not torch.allclose(own, old)
        torch.nn.init.zeros_(own)
    with pytest.raises(UserError, match="--pos_grid"):
        load_pretrained(model, tmp_path / "x.pth")
    report = load_pretrained(model, tmp_path / "x.pth", partial=True)
    assert f"blocks.0.attn.{TABLE}" in report.missing


def test_beits_shared_table_is_given_to_every_block_at_another_size(tmp_path):
    shared = beit((64, 64), use_rel_pos_bias=False, use_shared_rel_pos_bias=True)
    state = loud(shared)
    torch.save({"model": state}, tmp_path / "x.pth")
    same, larger = beit((64, 64)), beit((96, 96))
    shared_larger = beit((96, 96), use_rel_pos_bias=False, use_shared_rel_pos_bias=True)
    for model in (same, larger, shared_larger):
        assert not load_pretrained(model, tmp_path / "x.pth").missing
    for block in same.blocks:
        assert torch.equal(block.attn.relative_position_bias_table, state[f"rel_pos_bias.{TABLE}"])
    expected = resize_rel_pos_bias_table(state[f"rel_pos_bias.{TABLE}"], (6, 6), (11 * 11 + 3, 2))
    assert torch.allclose(larger.blocks[1].attn.relative_position_bias_table, expected, atol=1e-6)
    assert torch.allclose(shared_larger.rel_pos_bias.relative_position_bias_table, expected, atol=1e-6)


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
    own = {"depth": 2, "init_values": 0.1} if kind.startswith("no LayerScale") else {"depth": 2}
    model = vit(**own)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    path = as_file(tmp_path / "x.pth", state)
    with pytest.raises(UserError) as caught:
        load_pretrained(model, path)
    assert word in one_line(caught) and "--partial_load" in str(caught.value)
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


def under(prefix, state):
    return {prefix + k: v for k, v in state.items()}


CONTAINERS = {
    "compiled DDP": lambda s, o: under("_orig_mod.module.", s),
    "DDP of a compiled net": lambda s, o: {"model": under("module._orig_mod.", s)},
    "compiled blocks": lambda s, o: {k.replace("blocks.0.", "blocks.0._orig_mod."): v for k, v in s.items()},
    "FSDP": lambda s, o: {k.replace("blocks.", "_fsdp_wrapped_module.blocks."): v for k, v in s.items()},
    "Lightning": lambda s, o: {
        "state_dict": {**under("model.", s), "criterion.weight": torch.ones(2)},
        "optimizer_states": [],
        "epoch": 1,
    },
    "Lightning, compiled": lambda s, o: {"state_dict": under("model._orig_mod.", s), "hyper_parameters": {"lr": 0.1}},
    "Lightning, any attribute": lambda s, o: {"state_dict": under("classifier_under_test.", s)},
    "DINO": lambda s, o: {
        "student": under("module.backbone.", o),
        "teacher": {**under("backbone.", s), "head.last_layer.weight": torch.ones(2)},
    },
    "model_state_dict": lambda s, o: {
        "epoch": 1,
        "optimizer_state_dict": {"state": {0: {"exp_avg": torch.ones(2)}}},
        "model_state_dict": s,
    },
    "head beside the backbone": lambda s, o: {
        "state_dict": {"model." + ("" if k.startswith("head.") else "backbone.") + k: v for k, v in s.items()}
    },
    "deep": lambda s, o: {"checkpoint": {"model": {"state_dict": under("module.encoder.", s)}}},
    "ema of another library": lambda s, o: {"model": s, "ema": {"decay": 0.99, "shadow_params": list(o.values())}},
    "ema of another net": lambda s, o: {
        "ema": {"head.weight": torch.ones(2, 12), "conv.weight": torch.ones(3)},
        "model": s,
    },
    "timm's EMA": lambda s, o: {"state_dict": o, "state_dict_ema": s, "arch": "vit"},
    "torch's AveragedModel": lambda s, o: {
        "model": o,
        "model_ema": {"n_averaged": torch.tensor(3), **under("module.", s)},
    },
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_containers_and_prefixes_of_other_trainers(tmp_path, kind):
    state = {k: torch.rand_like(v) for k, v in vit().state_dict().items()}
    other = {k: torch.rand_like(v) for k, v in state.items()}
    torch.save(CONTAINERS[kind](state, other), tmp_path / "x.pth")
    model = vit()
    report = load_pretrained(model, tmp_path / "x.pth")
    assert not report.missing and all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    if kind in ("DINO", "timm's EMA", "torch's AveragedModel"):
        load_pretrained(model, tmp_path / "x.pth", ema=False)
        assert all(torch.equal(v, other[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2", "bfloat16", "float16"])
def test_small_floats_are_read_as_the_numbers_they_are(tmp_path, kind):
    state = {k: torch.randn_like(v).to(getattr(torch, kind)) for k, v in vit().state_dict().items()}
    path, model = as_file(tmp_path / "x.pth", state), vit()
    load_pretrained(model, path)
    assert all(v.dtype == torch.float32 and torch.equal(v, state[k].float()) for k, v in model.state_dict().items())
    state["head.bias"] = torch.full((2,), math.nan).to(getattr(torch, kind))
    with pytest.raises(UserError, match="bias holds NaN"):
        load_pretrained(vit(), as_file(path, state))


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
    assert f"kept {len(kept)}" in str(report) and f"anew {len(new) - len(kept)}" in str(report)
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
    assert "kept 1 (red), anew 1 (blue)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name,sizes",
    [
        ("levit_128s", {"embed_dim": [8] * 3, "num_heads": [2] * 3, "key_dim": 4, "depth": [1] * 3}),
        ("hiera_tiny_224", {"stages": [1] * 4, "embed_dim": 8, "num_heads": 1}),
    ],
)
def test_positions_that_cannot_be_turned_are_refused_at_the_turned_size(tmp_path, name, sizes):
    """Their tensors have equal shapes at 64 x 128 and 128 x 64."""
    wide, high = (create_model(name, num_classes=2, img_size=s, in_chans=1, **sizes) for s in ((64, 128), (128, 64)))
    assert all(v.shape == high.state_dict()[k].shape for k, v in wide.named_parameters())
    path = as_file(tmp_path / "x.pth", wide.state_dict(), (64, 128))
    content = torch.load(path, weights_only=True)
    content["meta"].update(model=name, model_kwargs=sizes)
    torch.save(content, path)
    with pytest.raises(UserError, match=r"64 x 128 pixels.*--input_size 64 128"):
        load_pretrained(high, path)
    assert not load_pretrained(wide, path).missing


def test_a_grid_other_than_the_one_that_the_file_states_is_refused(tmp_path):
    path = as_file(tmp_path / "x.pth", with_ramp((32, 64), (0.0,)), (32, 64))
    with pytest.raises(UserError, match=r"--pos_grid 16 8: .* 8 x 16 patches"):
        load_pretrained(vit((32, 64)), path, pos_grid=(16, 8))
    model = vit((32, 64))
    load_pretrained(model, path, pos_grid=(8, 16))
    assert torch.equal(model.pos_embed[:, 1:], ramp((8, 16)))


def test_positions_without_the_batchs_dimension_are_read_on_the_models_grid(tmp_path):
    state = {k: torch.rand_like(v) for k, v in vit().state_dict().items()}
    torch.save({**state, "pos_embed": state["pos_embed"][0]}, tmp_path / "x.pth")
    model, larger, oracle = vit(), vit((64, 32)), vit((64, 32))
    load_pretrained(model, tmp_path / "x.pth")
    assert torch.equal(model.pos_embed, state["pos_embed"])
    load_pretrained(larger, tmp_path / "x.pth")
    torch.save(state, tmp_path / "y.pth")
    load_pretrained(oracle, tmp_path / "y.pth")
    assert torch.equal(larger.pos_embed, oracle.pos_embed)


def test_paths_that_hold_no_weights_are_named_for_what_they_are(tmp_path):
    pointer = tmp_path / "x.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    for path, words in ((pointer, "git lfs pull"), (tmp_path, "a folder"), (tmp_path / "no.pth", "no such")):
        for name in (path, str(path), os.fsencode(path)):
            with pytest.raises(UserError, match=f"{path.name}: .*{words}"):
                load_pretrained(vit(), name)


def test_safetensors_are_known_by_their_content(tmp_path):
    state = {k: torch.rand_like(v) for k, v in vit().state_dict().items()}
    for name in ("x.SAFETENSORS", "x.pth"):
        save_file(state, tmp_path / name)
        model = vit()
        load_pretrained(model, tmp_path / name)
        assert (
            all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
            and peek_meta(str(tmp_path / name)) is None
        )
    (tmp_path / "x.pth").write_text("version 2 of a page in place of the file")
    with pytest.raises(UserError, match=r"no file of torch.save or safetensors"):
        load_pretrained(vit(), tmp_path / "x.pth")


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
    assert set(report.missing) == {"head.fc.weight", "head.fc.bias"} and not report.unexpected
    assert torch.equal(model.stem[0].weight, source.stem[0].weight)


def test_ddp_prefix_and_plain_state_dicts_are_understood(tmp_path):
    source = create_model("vit_custom_patch8", **TINY)
    torch.save({f"module.{k}": v for k, v in source.state_dict().items()}, tmp_path / "plain.pth")
    report = load_pretrained(create_model("vit_custom_patch8", **TINY), tmp_path / "plain.pth")
    assert not report.missing and not report.unexpected


class Evil:
    def __reduce__(self):
        import os

        return os.system, ("touch /tmp/noisevit_executed",)


def test_bad_files_are_named_and_never_executed(tmp_path):
    import os

    model = create_model("vit_custom_patch8", **TINY)
    torch.save({"model": model.state_dict(), "x": Evil()}, tmp_path / "evil.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    (tmp_path / "bad.safetensors").write_bytes(b"\x00" * 40)
    torch.save({"model": {"something.else": torch.zeros(2)}}, tmp_path / "foreign.pth")
    torch.save(
        {"model": {**model.state_dict(), "patch_embed.proj.weight": torch.zeros(24, 1, 8, 8)}}, tmp_path / "grey.pth"
    )
    nan = {k: torch.full_like(v, math.nan) for k, v in model.state_dict().items()}
    torch.save({"model": nan}, tmp_path / "nan.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    for name, word in {
        "evil.pth": "never executed",
        "text.pth": "not a readable",
        "bad.safetensors": "not a readable",
        "foreign.pth": "shares no parameter",
        "grey.pth": "in_chans",
        "nan.pth": "NaN",
        "list.pth": "list",
        "missing.pth": "no such",
    }.items():
        with pytest.raises(UserError, match=word) as caught:
            load_pretrained(model, tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    assert not os.path.exists("/tmp/noisevit_executed")
