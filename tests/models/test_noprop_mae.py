"""NoPropMAE against timm's ViT, a dense implementation without gathering, and hand-derived numbers."""

import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from models.edm import precondition
from models.noprop_mae import NoPropConfig, NoPropMAE

SMALL = dict(
    img_size=(8, 16),
    patch_size=4,
    in_chans=3,
    embed_dim=24,
    depth=2,
    num_heads=3,
    decoder_embed_dim=16,
    decoder_depth=2,
    decoder_num_heads=2,
    mlp_ratio=2.0,
    T=3,
)


def build(seed=0, **kwargs):
    torch.manual_seed(seed)
    return NoPropMAE(**{**SMALL, **kwargs})


def images(n=4, size=(8, 16), chans=3, seed=1):
    return torch.randn(n, chans, *size, generator=torch.Generator().manual_seed(seed))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# patches, positions, masks


def test_patches_are_ordered_row_column_channel():
    model = build()
    patches = model.patchify(images())
    assert patches.shape == (4, 8, 48)
    x = images()[2]
    # Patch 6 is row 1, column 2 of the 2 x 4 grid; value 17 is pixel (1, 1), channel 2: (1 * 4 + 1) * 3 + 2.
    assert patches[2, 6, 17] == x[2, 4 + 1, 8 + 1]
    assert torch.equal(model.unpatchify(patches), images())


def test_position_embeddings_are_mae_s_sines():
    model = build(embed_dim=24)
    pos = model.state_dict()["pos_embed"]
    assert pos.shape == (1, 9, 24) and not model.pos_embed.requires_grad
    assert torch.equal(pos[0, 0], torch.zeros(24))
    row, col, k = 1, 3, 2  # channels: 6 sines and 6 cosines of the column, then of the row
    omega = 10000 ** (-k / 6)
    got = pos[0, 1 + row * 4 + col, [k, 6 + k, 12 + k, 18 + k]].tolist()
    want = [math.sin(col * omega), math.cos(col * omega), math.sin(row * omega), math.cos(row * omega)]
    assert got == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize(("ratio", "masked"), [(0.75, 6), (0.5, 4), (1.0, 8), (0.01, 1), (0.9, 7)])
def test_every_sample_has_its_own_mask_of_the_same_ratio(ratio, masked):
    keep, mask = build().random_masking(64, ratio, generator())
    assert keep.shape == (64, 8 - masked) and mask.shape == (64, masked)
    assert torch.equal(torch.cat([keep, mask], 1).sort(1).values, torch.arange(8).expand(64, 8))
    if 1 < masked < 8:
        assert len({tuple(sorted(m.tolist())) for m in mask}) > 5
        again = build(seed=9).random_masking(64, ratio, generator())
        assert torch.equal(again[0], keep)


# the encoder


def timm_twin(model, img_size, **kwargs):
    """timm's ViT with the encoder's weights; everything but the decoders must be accepted."""
    vit = VisionTransformer(
        img_size=img_size,
        patch_size=4,
        in_chans=3,
        embed_dim=24,
        depth=2,
        num_heads=3,
        mlp_ratio=2.0,
        num_classes=0,
        norm_layer=lambda dim, **kw: nn.LayerNorm(dim, eps=1e-6),
        **kwargs,
    )
    report = vit.load_state_dict(model.state_dict(), strict=False)
    assert not report.missing_keys and all("decoder" in key for key in report.unexpected_keys)
    return vit


def test_encoder_of_whole_images_equals_timm_s_vit_with_its_state_dict():
    model = build()
    ids = torch.arange(8).expand(4, 8)
    torch.testing.assert_close(model.encode(images(), ids), timm_twin(model, (8, 16)).forward_features(images()))


def test_encoder_of_visible_patches_equals_timm_s_vit_on_those_tokens():
    """Convolution and positions over the whole grid first, then dropping the masked tokens."""
    model = build()
    keep, _ = model.random_masking(4, 0.75, generator())
    vit = timm_twin(model, (8, 16))
    tokens = vit._pos_embed(vit.patch_embed(images()))
    tokens = torch.stack([t[[0, *(1 + k).tolist()]] for t, k in zip(tokens, keep)])
    for block in vit.blocks:
        tokens = block(tokens)
    torch.testing.assert_close(model.encode(images(), keep), vit.norm(tokens))


def test_encoder_sees_nothing_of_masked_patches():
    model = build()
    keep, mask = model.random_masking(4, 0.5, generator())
    patches = model.patchify(images()).scatter(1, mask[..., None].expand(-1, -1, 48), 1e3)
    assert torch.equal(model.encode(images(), keep), model.encode(model.unpatchify(patches), keep))


# decoders and losses


def dense_losses(model, imgs, keep, mask, eps):
    """The method on full grids: noise everywhere, tokens in grid order, losses averaged by mask. eps [T, B, M, P]."""
    B, N = len(imgs), model.num_patches
    removed = torch.zeros(B, N).scatter(1, mask, 1.0)
    x = model.patchify(imgs)
    if model.target == "norm_pixel":
        x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    latent = model.encode(imgs, keep)
    losses = []
    for i, decoder in enumerate(model.decoders):
        sigma = model.sigmas[i]
        c_skip, c_out, c_in = precondition(sigma, model.sigma_data)
        noise = torch.zeros_like(x).scatter(1, mask[..., None].expand(-1, -1, x.shape[-1]), eps[i])
        y = x + sigma * noise
        grid = decoder.patch_embed(c_in * y)
        visible = decoder.latent_embed(latent)
        for b in range(B):
            for j, n in enumerate(keep[b].tolist()):
                grid = grid.index_put((torch.tensor(b), torch.tensor(n)), visible[b, 1 + j])
        tokens = torch.cat([visible[:, :1], grid], dim=1) + model.decoder_pos_embed
        for block in decoder.blocks:
            tokens = block(tokens)
        D = c_skip * y + c_out * decoder.pred(decoder.norm(tokens))[:, 1:]
        losses.append((((D - x) ** 2).mean(-1) * removed).sum() / removed.sum())
    return torch.stack(losses)


@pytest.mark.parametrize("target", ["pixel", "norm_pixel"])
@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_gathered_losses_and_gradients_equal_the_dense_ones(target, ratio):
    model = build(target=target, sigma_data=0.7).double()
    imgs = images().double()
    keep, mask = model.random_masking(4, ratio, generator())
    latent, x = model.encode(imgs, keep), model.targets(imgs, mask)
    pos = model.decoder_positions(keep, mask)
    got = torch.stack([model.decoder_loss(i, x, latent, pos, generator(i)) for i in range(3)])
    eps = torch.stack([torch.randn(x.shape, generator=generator(i), dtype=x.dtype) for i in range(3)])
    want = dense_losses(model, imgs, keep, mask, eps)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    for a, b in zip(
        torch.autograd.grad(got.sum(), trained),
        torch.autograd.grad(want.sum(), trained, allow_unused=True, materialize_grads=True),
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_losses_at_initialisation_are_the_preconditioning_s():
    """E loss_i = (1 - c_skip)^2 sd^2 + c_skip^2 sigma^2 + c_out^2 Var F, for data of deviation sd.

    Var F at init: LayerNorm gives unit inputs, xavier_uniform weights of variance 2 / (D' + P): 2 D' / (D' + P).
    """
    model = build(img_size=32, decoder_embed_dim=96, T=4)
    _, losses = model(images(32, (32, 32)), 0.75, generator())
    variance = 2 * 96 / (96 + 48)  # so 1 + 4/3 at sigma 80 and 0.002^2 (1 + 4/3) = 9.3e-6 at the other end
    for loss, sigma in zip(losses.tolist(), (80.0, 9.7232, 0.46998, 0.002)):
        c_skip, c_out, _ = precondition(sigma, 1.0)
        want = (1 - c_skip) ** 2 + c_skip**2 * sigma**2 + c_out**2 * variance
        assert loss == pytest.approx(want, rel=0.25)


def test_edm_weighting_makes_the_levels_equal_at_initialisation():
    kwargs = dict(img_size=32, decoder_embed_dim=96, T=4, sigma_data=0.5)
    imgs = 0.5 * images(16, (32, 32))
    _, plain = build(**kwargs)(imgs, 0.75, generator())
    total, weighted = build(loss_weighting="edm", **kwargs)(imgs, 0.75, generator())
    for a, b, s in zip(plain.tolist(), weighted.tolist(), (80.0, 9.7232, 0.46998, 0.002)):
        assert b == pytest.approx(a * (s**2 + 0.25) / (0.5 * s) ** 2, rel=1e-3)
    assert weighted.max() < 1.5 * weighted.min()
    assert total.item() == pytest.approx(weighted.sum().item(), rel=1e-6)


def has_gradient(module):
    return [p.grad is not None and bool(p.grad.any()) for p in module.parameters()]


@pytest.mark.parametrize("propagate", ["latent", "none"])
def test_a_level_s_loss_reaches_its_own_decoder_only(propagate):
    model = build(propagate=propagate)
    for i in range(3):
        model.zero_grad()
        _, losses = model(images(), 0.5, generator())
        losses[i].backward()
        for j in range(3):
            assert any(has_gradient(model.decoders[j])) == (i == j)
        assert any(has_gradient(model.blocks)) == (propagate == "latent")


@pytest.mark.parametrize("propagate", ["latent", "none"])
@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_every_parameter_gets_a_gradient(propagate, ratio):
    """None missing at any ratio, so DDP needs no search for unused parameters; none dead at an ordinary ratio."""
    model = build(propagate=propagate)
    model(images(), ratio, generator())[0].backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert set(dict(model.named_parameters())) - set(trained) == {"pos_embed", "decoder_pos_embed"}
    assert all(p.grad is not None for p in trained.values())
    still = {n for n, p in trained.items() if not p.grad.any()}
    assert still == (set() if ratio < 1 else {"patch_embed.proj.weight", "patch_embed.proj.bias"})


def test_without_propagation_the_encoder_learns_from_its_own_head():
    model, plain = build(propagate="none"), build()
    assert {n.split(".")[0] for n in model.state_dict()} - {n.split(".")[0] for n in plain.state_dict()} == {
        "encoder_head"
    }
    assert [len(part.blocks) for part in (*model.decoders, model.encoder_head)] == [2, 2, 2, 1]
    total, losses = model(images(), 0.5, generator())
    assert losses.shape == (3,) and total > losses.sum()
    (total - losses.sum()).backward()
    assert all(has_gradient(model.blocks)) and not any(has_gradient(model.decoders))


def test_checkpointing_changes_no_gradient():
    grads = []
    for use_checkpoint in (False, True):
        model = build(use_checkpoint=use_checkpoint)
        model(images(), 0.5, generator())[0].backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_preconditioning_stays_float32_under_autocast():
    """At sigma 0.002, bf16 would round x itself by more than the noise: the loss would grow a thousandfold."""
    model = build(T=4)
    plain = model(images(), 0.5, generator())[1]
    with torch.autocast("cpu", torch.bfloat16):
        total, losses = model(images(), 0.5, generator())
    assert total.dtype == losses.dtype == torch.float32
    torch.testing.assert_close(losses, plain, rtol=0.05, atol=0)


# keywords


def test_config_rebuilds_the_model_and_is_plain():
    model = build(propagate="none", loss_weighting="edm", sigma_data=0.9, target="norm_pixel")
    config = json.loads(json.dumps(model.config()))
    twin = NoPropMAE(**config)
    twin.load_state_dict(model.state_dict())
    assert twin.config() == model.config() and twin.weights == model.weights and twin.sigmas == model.sigmas
    assert torch.equal(twin(images(), 0.5, generator())[1], model(images(), 0.5, generator())[1])


def test_a_config_and_keywords_are_two_ways_to_the_same_model():
    config = NoPropConfig(**SMALL)
    assert NoPropMAE(config).config() == build().config() == {**dataclasses.asdict(config), "img_size": [8, 16]}
    assert NoPropMAE(config, img_size=8, T=1).config() == build(img_size=[8, 8], T=1).config()
    with pytest.raises(TypeError, match="levels"):
        NoPropMAE(config, levels=3)


def test_one_level_trains_and_samples():
    model = build(T=1)
    loss, losses = model(images(), 0.75, generator())
    assert losses.shape == (1,) and torch.isfinite(loss)
    for sampler in ("stochastic", "heun", "euler"):
        assert torch.isfinite(model.reconstruct(images(), sampler=sampler)["final"]).all()


@pytest.mark.parametrize(
    ("bad", "names"),
    [
        (dict(T=0), "T 0"),
        (dict(img_size=30), "img_size 30 30"),
        (dict(img_size=(32, 30)), "img_size 32 30"),
        (dict(sigma_min=2.0, sigma_max=1.0), "sigma_min 2.0"),
        (dict(sigma_data=0.0), "sigma_data 0.0"),
        (dict(embed_dim=25), "embed_dim 25"),
        (dict(decoder_embed_dim=18, decoder_num_heads=3), "decoder_embed_dim 18"),
        (dict(depth=0), "depth 0"),
        (dict(target="pixels"), "target pixels"),
        (dict(propagate="all"), "propagate all"),
        (dict(loss_weighting="snr"), "loss_weighting snr"),
    ],
)
def test_bad_keywords_are_refused_in_one_line(bad, names):
    with pytest.raises(ValueError) as error:
        NoPropMAE(**{**SMALL, **bad})
    assert names in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.5, float("nan")])
def test_mask_ratio_outside_its_range_is_refused(ratio):
    with pytest.raises(ValueError, match="mask_ratio"):
        build().random_masking(2, ratio)


def test_images_of_another_size_and_unknown_samplers_are_refused():
    with pytest.raises(ValueError, match=r"should be \[B, 3, 8, 16\]"):
        build()(images(2, (16, 8)))
    with pytest.raises(ValueError, match="sampler ddim"):
        build().reconstruct(images(), sampler="ddim")


# pictures: reconstruct, generate and attention_maps


@pytest.mark.parametrize("sampler", ["stochastic", "heun", "euler"])
@pytest.mark.parametrize("target", ["pixel", "norm_pixel"])
def test_reconstruction_keeps_visible_patches_at_every_step(sampler, target):
    model = build(target=target)
    out = model.reconstruct(images(), 0.5, sampler=sampler, generator=generator())
    assert out["mask"].sum(1).tolist() == [4.0] * 4 and len(out["steps"]) == 3
    visible = out["mask"] == 0
    want = model.patchify(images())[visible]
    for picture in (out["masked"], *out["steps"], out["final"]):
        assert picture.shape == (4, 3, 8, 16)
        assert torch.equal(model.patchify(picture)[visible], want)
    assert not model.patchify(out["masked"])[~visible].any()
    torch.testing.assert_close(out["steps"][-1], out["final"], rtol=0, atol=1e-5)  # at sigma 0 nothing else is left
    again = model.reconstruct(images(), 0.5, sampler=sampler, generator=generator())
    assert torch.equal(out["final"], again["final"])


@pytest.mark.parametrize("sampler", ["stochastic", "heun", "euler"])
def test_decoders_that_know_the_answer_reconstruct_the_image(sampler, monkeypatch):
    """Level i's estimate is the image at every i, so that a wrong patch order or mask would show."""
    model = build()
    keep, mask = model.random_masking(4, 0.75, generator())
    x = model.targets(images(), mask)
    monkeypatch.setattr(model, "denoise", lambda i, y, latent, pos: x)
    out = model.reconstruct(images(), ids=(keep, mask), sampler=sampler, generator=generator())
    for picture in (*out["steps"], out["final"]):
        torch.testing.assert_close(picture, images(), rtol=0, atol=1e-5)


def test_norm_pixel_reconstruction_takes_contrast_from_visible_neighbours(monkeypatch):
    """Weights exp(-d^2 / 2) by hand, on a grid of 2 x 3 patches. Visible: (0, 0), (0, 1), (1, 2)."""
    model = build(target="norm_pixel", img_size=(8, 12))
    texture = images(1, (4, 4), seed=3)
    texture = (texture - texture.mean()) / texture.std(correction=0)
    means, stds = [10.0, 20.0, 5.0, 40.0, 7.0, 30.0], [1.0, 2.0, 9.0, 4.0, 8.0, 3.0]
    patches = [m + s * texture for m, s in zip(means, stds)]
    imgs = torch.cat([torch.cat(patches[:3], -1), torch.cat(patches[3:], -1)], -2)
    keep, mask = torch.tensor([[0, 1, 5]]), torch.tensor([[2, 3, 4]])
    x = model.targets(imgs, mask)
    torch.testing.assert_close(x.mean(-1), torch.zeros(1, 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(x.std(-1, correction=0), torch.ones(1, 3), rtol=1e-5, atol=0)
    monkeypatch.setattr(model, "denoise", lambda i, y, latent, pos: x)
    final = model.reconstruct(imgs, ids=(keep, mask))["final"]
    # Squared distances to the three visible patches: of (0, 2), of (1, 0), of (1, 1).
    for (row, column), distances in (((0, 2), (4, 1, 1)), ((1, 0), (1, 2, 4)), ((1, 1), (2, 1, 1))):
        weights = [math.exp(-d / 2) for d in distances]
        mean, std = (sum(w * v[i] for w, i in zip(weights, (0, 1, 5))) / sum(weights) for v in (means, stds))
        got = final[..., 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        torch.testing.assert_close(got, mean + std * texture, rtol=1e-4, atol=1e-3)


def test_generation_masks_everything_and_follows_its_generator():
    model = build()
    out = model.generate(2, generator=generator())
    assert out["final"].shape == (2, 3, 8, 16) and bool(out["mask"].all()) and not out["masked"].any()
    assert torch.equal(out["final"], model.generate(2, generator=generator())["final"])
    assert not torch.equal(out["final"], model.generate(2, generator=generator(1))["final"])


def test_attention_maps_are_those_that_mix_the_values():
    """softmax(q k^T) applied to v by hand must give what timm's attention gives in the running model."""
    model = build()
    maps = model.attention_maps(images())
    assert maps.shape == (2, 4, 3, 9, 9)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 4, 3, 9))
    vit = timm_twin(model, (8, 16))
    tokens = vit._pos_embed(vit.patch_embed(images()))
    for depth, block in enumerate(vit.blocks):
        x = block.norm1(tokens)
        v = F.linear(x, block.attn.qkv.weight[48:], block.attn.qkv.bias[48:])  # rows: q 0-23, k 24-47, v 48-71
        v = v.view(4, 9, 3, 8).transpose(1, 2)
        mixed = (maps[depth] @ v).transpose(1, 2).reshape(4, 9, 24)
        torch.testing.assert_close(block.attn.proj(mixed), block.attn(x), rtol=1e-4, atol=1e-6)
        tokens = block(tokens)
