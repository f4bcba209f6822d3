"""Containers, prefixes, names and formats of other trainers."""

import math

import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import checkpoint_filter_fn

from models import create_model, load_pretrained
from tests.harness.weights import REGISTERS, as_file, vit
from util.checkpoint import peek_meta
from util.errors import UserError


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
    "head beside the backbone, deep": lambda s, o: {
        "checkpoint": {
            "state_dict": {"model." + ("" if k.startswith("head.") else "backbone.") + k: v for k, v in s.items()}
        }
    },
    **{
        f"{name} before the weights": lambda s, o, name=name: {name: {"momentum": o}, "model": s}
        for name in ("optimizer", "scaler", "rng", "args", "meta", "lr_scheduler")
    },
    **{
        f"{name} after the weights": lambda s, o, name=name: {"model": o, name: s}
        for name in ("ema", "model_ema", "ema_model", "state_dict_ema", "ema_state_dict", "teacher")
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
    if kind in ("DINO", "timm's EMA", "torch's AveragedModel") or kind.endswith("after the weights"):
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
    with pytest.raises(UserError, match=r"not written by torch.save or safetensors"):
        load_pretrained(vit(), tmp_path / "x.pth")
