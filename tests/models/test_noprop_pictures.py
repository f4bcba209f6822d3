"""NoPropMAE's pictures: what reconstruct, generate and attention_maps promise."""

import pytest
import torch
import torch.nn.functional as F

from tests.models.test_noprop_mae import build, generator, images, timm_twin


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
    """An image whose brightness grows along the columns: the masked patch between two gets their mean."""
    model = build(target="norm_pixel", img_size=(4, 12))
    texture = images(1, (4, 4), seed=3)
    texture = (texture - texture.mean()) / texture.std(correction=0)
    imgs = torch.cat([10.0 + 1.0 * texture, 20.0 + 2.0 * texture, 30.0 + 3.0 * texture], dim=-1)
    keep, mask = torch.tensor([[0, 2]]), torch.tensor([[1]])
    x = model.targets(imgs, mask)
    torch.testing.assert_close(x.mean(), torch.tensor(0.0), rtol=0, atol=1e-5)
    torch.testing.assert_close(x.std(correction=0), torch.tensor(1.0), rtol=1e-5, atol=0)
    monkeypatch.setattr(model, "denoise", lambda i, y, latent, pos: x)
    torch.testing.assert_close(model.reconstruct(imgs, ids=(keep, mask))["final"], imgs, rtol=1e-4, atol=1e-3)


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
