"""MAE's ViT against its formulas and the papers' sizes."""

import math

import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from augment.alpha_blend import AlphaBlend
from models import create_model, list_models
from models.noprop_mae import NoPropConfig, NoPropMAE
from models.vit import attach_noise, trunk_blocks
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
    # Width, depth, heads: tiny and small of DeiT's table 1, the others of ViT's.
    sizes = {
        "vit_tiny_patch16": (192, 12, 3),
        "vit_small_patch16": (384, 12, 6),
        "vit_base_patch16": (768, 12, 12),
        "vit_large_patch16": (1024, 24, 16),
        "vit_huge_patch14": (1280, 32, 16),
    }
    with torch.device("meta"):
        for name, size in sizes.items():
            model = create_model(name, num_classes=1000)
            assert (model.embed_dim, len(model.blocks), model.blocks[-1].attn.num_heads) == size
            assert model.num_prefix_tokens == 1
        n = sum(p.numel() for p in create_model("vit_base_patch16", num_classes=1000).parameters())
    assert n == 86_567_656  # ViT-B/16: 86.57 M with head and one final norm
    assert set(MAE_NAMES) <= set(list_models())
    assert "swinv2_base_window12to24_192to384" in list_models("swinv2*")


@pytest.mark.parametrize(
    "kwargs", [{}, {"reg_tokens": 3, "no_embed_class": True}, {"class_token": False}, {"pre_norm": True}]
)
def test_a_vit_from_scratch_begins_as_pretrainings_encoder(kwargs):
    """Positions are equal; weights are of the same law, xavier_uniform: U(-a, a), a^2 = 6 / (in + out)."""
    torch.manual_seed(0)
    size = dict(img_size=(24, 40), in_chans=1, embed_dim=48, depth=2, num_heads=3)
    pool = "avg" if kwargs else True
    net = create_model("vit_custom_patch8", num_classes=5, global_pool=pool, **size, **kwargs)
    encoder = NoPropMAE(NoPropConfig(patch_size=8, decoder_embed_dim=24, decoder_num_heads=3, **size))
    assert torch.equal(net.pos_embed[:, -15:], encoder.pos_embed[:, 1:]) and net.pos_embed.requires_grad
    assert not net.pos_embed[:, :-15].any()
    ours, theirs = dict(net.named_parameters()), dict(encoder.named_parameters())
    for name in [n for n in theirs if n.startswith(("patch_embed", "blocks")) and n in ours]:
        assert ours[name].shape == theirs[name].shape
        for p in (ours[name], theirs[name]):
            if p.ndim == 1:
                assert (p == (1.0 if "norm" in name and name.endswith("weight") else 0.0)).all(), name
            else:
                bound = (6 / (len(p) + p[0].numel())) ** 0.5
                law = stats.uniform(-bound, 2 * bound)
                assert p.abs().max() <= bound and stats.kstest(p.detach().flatten().numpy(), law.cdf).pvalue > 1e-4, (
                    name
                )
    for token in (net.cls_token, net.reg_token):
        assert token is None or 0.01 < token.std() < 0.03
    assert 0 < net.head.weight.abs().max() < 2e-4 and not net.head.bias.any()


def test_timms_initialisations_keep_their_names():
    """Positions: timm's are small and random in all of them, and so are ours without a width for sines and cosines."""
    odd = dict(num_classes=5, img_size=32, embed_dim=18, depth=1, num_heads=3)
    for keywords in (
        *(dict(TINY, weight_init=name) for name in ("", "jax", "moco")),
        odd,
        dict(odd, weight_init="skip"),
    ):
        net = create_model("vit_custom_patch8", **keywords)
        assert 0.01 < net.pos_embed.std() < 0.03
    encoders = [create_model("vit_custom_patch8", **TINY, **keywords) for keywords in ({}, {"weight_init": "skip"})]
    assert torch.equal(*(net.pos_embed for net in encoders)) and encoders[1].cls_token.std() < 0.05


def test_noise_without_a_place_in_the_network_is_one_line():
    """No block, a block that is called without a tensor, no grid that a spectrum could be of."""
    with pytest.raises(UserError, match="Linear: has no block"):
        trunk_blocks(torch.nn.Linear(2, 2))
    net = torch.nn.Module()
    net.blocks = torch.nn.Sequential(torch.nn.Linear(2, 2))
    attach_noise(net, AlphaBlend(500))
    with pytest.raises(UserError, match=r"Linear: its input is not a single tensor; use alpha_blend 0"):
        net.blocks[0]((torch.zeros(1, 2), torch.zeros(1, 2)))
    net.num_prefix_tokens = 1
    with pytest.raises(UserError, match="noise_kind colour: Module has no grid of patches"):
        attach_noise(net, AlphaBlend(500, kind="colour", colour="red"))


@pytest.mark.parametrize(
    "name,size,keywords,last",
    [
        ("vit_custom_patch8", (24, 40), dict(embed_dim=24, depth=1, num_heads=3), False),
        ("deit_tiny_distilled_patch16_224", (96, 64), dict(depth=1), False),
        ("swinv2_tiny_window8_256", (64, 128), dict(depths=(1, 1, 1, 1)), True),
        ("convnext_atto", (64, 96), {}, False),
    ],
)
def test_noise_knows_the_axes_of_the_tensor_that_it_gets(name, size, keywords, last):
    model = create_model(name, num_classes=2, img_size=size, **keywords)
    noise, shapes = AlphaBlend(500), []
    noise.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape)))
    attach_noise(model, noise)
    model.eval()(torch.zeros(3, 3, *size))
    layout, shape = noise.layout, shapes[0]
    assert layout.channels_last == last and layout.tokens == name.startswith(("vit", "deit"))
    if layout.tokens:
        assert shape[1] == layout.prefix + layout.grid[0] * layout.grid[1] and len(shape) == 3
    elif layout.grid:
        assert shape[1:3] == layout.grid if last else shape[2:] == layout.grid


def test_the_trunk_ends_before_heads_of_any_name_and_begins_after_a_stem_of_several_patterns():
    class Net(torch.nn.Sequential):
        def group_matcher(self, coarse=False):
            return {"stem": [(r"^0", None), (r"^1", (0,))], "blocks": r"^2"}

    net = Net(*(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)) for _ in range(4)))
    net.default_cfg = {"classifier": ("3.0", "3.1")}
    assert trunk_blocks(net) == [*net[2]]
