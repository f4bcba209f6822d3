"""create_model: what reaches the network, and names, sizes and keywords of which none can be built."""

import socket
from urllib.parse import urlsplit

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import constants

import main_finetune
from models import create_model
from util.errors import UserError


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
            "img_size": [{"img_size": s} for s in (0, -4, (32,), (32, 32, 3), 32.0, "32", (32, 0))],
            "in_chans": [{"in_chans": n} for n in (0, -1, 1.5)],
            "num_classes": [{"num_classes": n} for n in (-1, "a")],
            "drop_path": [{"drop_path": p} for p in (-1, 2.0)],
        }.items():
            for one in keywords:
                with pytest.raises(UserError, match=f"{flag} .*should be"):
                    create_model(name, **{"num_classes": 2, "img_size": 32, **one})
    assert create_model("resnet10t", num_classes=0, img_size=np.int64(32)).num_classes == 0


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
        ("vit_custom_patch4", dict(embed_dim=24, depth=1)),
        ("vit_tiny_patch4", dict(pretrained=True)),
    ],
)
def test_sizes_that_a_family_has_no_use_for_are_one_line(name, kwargs):
    with pytest.raises(UserError, match=f"model {name}|patch_size") as caught, torch.device("meta"):
        create_model(name, num_classes=5, **kwargs)
    assert "\n" not in str(caught.value)


def test_pretrained_weights_offline_fail_after_one_try_in_one_line(monkeypatch):
    tries = []

    def no_network(host, *args, **kwargs):
        tries.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for proxy in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    with pytest.raises(UserError, match=r"pretrained: the weights of vit_tiny_patch16_224 are not .* with finetune$"):
        create_model("vit_tiny_patch16_224", num_classes=2, img_size=224, pretrained=True)
    assert tries == [urlsplit(constants.ENDPOINT).hostname]


def test_weights_that_the_hub_does_not_give_end_with_its_reason(monkeypatch):
    def refused(name, pretrained=False, **kwargs):
        if pretrained:
            raise OSError("401 for this address")

    monkeypatch.setattr(timm, "create_model", refused)
    monkeypatch.setattr("models.vit.do_not_retry_offline", lambda: None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(UserError, match="vit_tiny_patch16_224 are not on this machine, and 401 for this address; give"):
        create_model("vit_tiny_patch16_224", num_classes=2, img_size=224, pretrained=True)


def test_errors_name_keywords_in_python_and_flags_in_a_main(tmp_path):
    with pytest.raises(UserError, match=r"^img_size 10 8: must be multiples"):
        create_model("vit_tiny_patch4", num_classes=2, img_size=(10, 8))
    line = "--dataset digits --model vit_tiny_patch4 --input_size 10 8 --device cpu --output_dir"
    with pytest.raises(UserError, match=r"^--input_size 10 8: must be multiples"):
        main_finetune.main([*line.split(), str(tmp_path)])
