import argparse
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from models import create_model, list_models, load_pretrained
from util.choices import MAE_NAMES
from util.errors import UserError

TINY = dict(num_classes=5, img_size=32, embed_dim=24, depth=2, num_heads=3)


def mae_forward(state: dict, x: torch.Tensor, *, depth: int, heads: int, global_pool: bool) -> torch.Tensor:
    """MAE's fine-tuning ViT from its definition, in float64: pre-norm blocks, eps 1e-6, mean of patches or CLS."""
    s = {k: v.double() for k, v in state.items()}
    x = F.conv2d(
        x.double(),
        s["patch_embed.proj.weight"],
        s["patch_embed.proj.bias"],
        stride=s["patch_embed.proj.weight"].shape[-1],
    )
    x = x.flatten(2).transpose(1, 2)
    B, N, D = x.shape
    x = torch.cat([s["cls_token"].expand(B, -1, -1), x], dim=1) + s["pos_embed"]

    def norm(name, t):
        mean, var = t.mean(-1, keepdim=True), t.var(-1, unbiased=False, keepdim=True)
        return (t - mean) / torch.sqrt(var + 1e-6) * s[f"{name}.weight"] + s[f"{name}.bias"]

    for i in range(depth):
        b = f"blocks.{i}"
        qkv = norm(f"{b}.norm1", x) @ s[f"{b}.attn.qkv.weight"].T + s[f"{b}.attn.qkv.bias"]
        q, k, v = qkv.view(B, N + 1, 3, heads, D // heads).permute(2, 0, 3, 1, 4)
        a = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(D // heads), -1) @ v
        x = x + a.transpose(1, 2).reshape(B, N + 1, D) @ s[f"{b}.attn.proj.weight"].T + s[f"{b}.attn.proj.bias"]
        h = norm(f"{b}.norm2", x) @ s[f"{b}.mlp.fc1.weight"].T + s[f"{b}.mlp.fc1.bias"]
        h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
        x = x + h @ s[f"{b}.mlp.fc2.weight"].T + s[f"{b}.mlp.fc2.bias"]
    pooled = norm("fc_norm", x[:, 1:].mean(1)) if global_pool else norm("norm", x)[:, 0]
    return pooled @ s["head.weight"].T + s["head.bias"]


@pytest.mark.parametrize("global_pool", [True, False])
def test_logits_equal_maes_formulas(global_pool):
    torch.manual_seed(0)
    model = create_model("vit_custom_patch8", global_pool=global_pool, **TINY).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x = torch.randn(3, 3, 32, 32)
    expected = mae_forward(model.state_dict(), x, depth=2, heads=3, global_pool=global_pool)
    assert torch.allclose(model(x).double(), expected, atol=2e-4, rtol=1e-4)


def test_mae_names_have_the_papers_sizes(monkeypatch):
    # No memory for the 632 M weights of ViT-H; timm 1.0.15 asks a tensor for its value, which meta has not.
    linspace = torch.linspace
    monkeypatch.setattr(torch, "linspace", lambda *args, **kw: linspace(*args, **{**kw, "device": "cpu"}))
    sizes = {"vit_tiny_patch16": 192, "vit_small_patch16": 384, "vit_base_patch16": 768, "vit_large_patch16": 1024}
    with torch.device("meta"):
        for name, width in {**sizes, "vit_huge_patch14": 1280}.items():
            model = create_model(name, num_classes=1000)
            assert model.embed_dim == width and model.num_prefix_tokens == 1
        n = sum(p.numel() for p in create_model("vit_base_patch16", num_classes=1000).parameters())
    assert n == 86_567_656  # ViT-B/16: 86.57 M with head and one final norm
    assert set(MAE_NAMES) <= set(list_models())
    assert "swinv2_base_window12to24_192to384" in list_models("swinv2*")


@pytest.mark.parametrize("size", [(32, 64), (64, 32)])
def test_size_channels_and_patch_reach_the_model(size):
    model = create_model("vit_tiny_patch8", num_classes=3, img_size=size, in_chans=1)
    assert model.patch_embed.grid_size == (size[0] // 8, size[1] // 8)
    assert model(torch.randn(2, 1, *size)).shape == (2, 3)
    conv = create_model("convnext_atto", num_classes=3, img_size=size, in_chans=1)
    assert conv(torch.randn(2, 1, *size)).shape == (2, 3)


def test_unknown_names_and_impossible_sizes_get_one_line():
    with pytest.raises(UserError, match="vit_gigantic"):
        create_model("vit_gigantic", num_classes=2)
    with pytest.raises(UserError, match="multiples of the patch size"):
        create_model("vit_tiny_patch16", num_classes=2, img_size=30)
    with pytest.raises(UserError, match="drop_path"):
        create_model("vgg11", num_classes=2, drop_path=0.1)
    for name in ("vit_tiny_patch4", "resnet10t"):
        for flag, keywords in {
            "--input_size": [{"img_size": s} for s in (0, -4, (32,), (32, 32, 3), 32.0, "32", (32, 0))],
            "--in_chans": [{"in_chans": n} for n in (0, -1, 1.5)],
            "--nb_classes": [{"num_classes": n} for n in (-1, "a")],
            "--drop_path": [{"drop_path": p} for p in (-1, 2.0)],
        }.items():
            for one in keywords:
                with pytest.raises(UserError, match=f"{flag} .*should be"):
                    create_model(name, **{"num_classes": 2, "img_size": 32, **one})
    assert create_model("resnet10t", num_classes=0, img_size=np.int64(32)).num_classes == 0


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


VIT = dict(embed_dim=24, depth=2, num_heads=3)


def test_keywords_that_create_model_sets_itself_can_be_given():
    create = lambda name, **k: create_model(name, num_classes=5, img_size=32, **k)  # noqa: E731
    assert create("vit_custom_patch8", **VIT, qkv_bias=False).blocks[0].attn.qkv.bias is None
    norm = create("vit_custom_patch8", **VIT, norm_layer="rmsnorm").blocks[0].norm1
    assert type(norm).__name__ == "RmsNorm" and norm.weight.shape == (24,)
    assert create("vit_custom_patch8", **VIT, global_pool="token").state_dict().keys() == (
        create("vit_custom_patch8", **VIT, global_pool=False).state_dict().keys()
    )
    # Average pooling normalises after it (fc_norm), the class token before (norm).
    assert "fc_norm.weight" in create("vit_tiny_patch16_224", **VIT, global_pool="avg").state_dict()
    assert "fc_norm.weight" not in create("vit_tiny_patch16_224", **VIT).state_dict()
    rates = [b.drop_path1.drop_prob for b in create("vit_custom_patch8", **VIT, drop_path=0.2).blocks[1:]]
    assert rates == pytest.approx([0.2])


@pytest.mark.parametrize("name", ["vit_custom_patch8", "vit_tiny_patch16_224"])
@pytest.mark.parametrize(
    "kwargs,word",
    [
        (dict(num_heads=0), "num_heads 0"),
        (dict(num_heads=-3), "num_heads -3"),
        (dict(embed_dim="a"), "embed_dim a"),
        (dict(depth=-1), "depth -1"),
        (dict(depth=1.5), "depth 1.5"),
        (dict(patch_size=0), "patch_size 0"),
        (dict(num_heads=5), "num_heads"),
        (dict(mlp_ratio=-1), "mlp_ratio=-1"),
        (dict(norm_layer="foo"), "foo"),
        (dict(act_layer="foo"), "foo"),
        (dict(foo=1), "foo"),
        (dict(global_pool="foo"), "global_pool=foo"),
        (dict(drop_rate=2), "drop_rate=2"),
    ],
)
def test_keywords_that_make_no_network_are_one_line(name, kwargs, word):
    with pytest.raises(UserError, match=word) as caught:
        create_model(name, num_classes=5, img_size=32, **{**VIT, **kwargs})
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name,kwargs",
    [
        ("vit_tiny_patch0", {}),
        ("vit_tiny_patch8", dict(patch_size=(4, 2, 1))),
        ("swin_tiny_patch4_window7_224", dict(depths=(2, 0, 1, 1))),
        ("resnet10t", dict(layers=(1,))),
        ("convnext_atto", dict(depths=(1, 1), dims=(8, 8))),
        ("crossvit_9_240", dict(depth=3)),
        ("levit_128s", dict(num_heads=0)),
    ],
)
def test_sizes_that_a_family_has_no_use_for_are_one_line(name, kwargs):
    with pytest.raises(UserError, match=f"--model {name}|patch_size") as caught, torch.device("meta"):
        create_model(name, num_classes=5, **kwargs)
    assert "\n" not in str(caught.value)
