import copy
import math

import pytest
import torch

from augment.alpha_blend import AlphaBlend, alphas_cumprod
from models import create_model
from models.vit import trunk_blocks


def reference_abar(power: float) -> list[float]:
    """The definition, in Python floats."""
    product, result = 1.0, []
    for i in range(1000):
        beta = (1e-4 + (0.02 - 1e-4) * i / 999) ** power
        product *= 1.0 - beta
        result.append(product)
    return result


@pytest.mark.parametrize("power", [1.0, 1.2])
def test_alphas_cumprod_equals_its_definition(power):
    assert torch.allclose(alphas_cumprod(power), torch.tensor(reference_abar(power), dtype=torch.float64), rtol=1e-12)


def test_alphas_cumprod_at_published_points():
    abar = alphas_cumprod()
    assert abar.dtype == torch.float64
    for t, value in ((15, 0.999228), (100, 0.9711), (500, 0.3971), (999, 0.0151)):
        assert abar[t].item() == pytest.approx(value, abs=5e-5)
    assert math.sqrt(1 - alphas_cumprod(1.0)[15]) == pytest.approx(0.063, abs=5e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_statistics_at_the_default_timestep(dtype):
    torch.manual_seed(0)
    z = torch.full((64, 50, 96), 2.0, dtype=dtype)
    out = AlphaBlend(15).train()(z)
    assert out.dtype == dtype and out.shape == z.shape
    expected = math.sqrt(1 - reference_abar(1.2)[15])  # 0.0278
    assert (out.float() - 2.0).std().item() == pytest.approx(expected, rel=0.02)
    assert out.float().mean().item() == pytest.approx(
        2 * math.sqrt(reference_abar(1.2)[15]), abs=2e-4 if dtype == torch.float32 else 1e-3
    )


def test_evaluation_is_clean_unless_asked_for():
    z = torch.randn(2, 5, 8)
    assert AlphaBlend(500).eval()(z) is z
    assert not torch.equal(AlphaBlend(500, noise_eval=True).eval()(z), z)
    assert AlphaBlend(0).train()(z) is z


def test_noise_prob_is_the_fraction_of_noised_samples():
    torch.manual_seed(0)
    z = torch.ones(4000, 3)
    out = AlphaBlend(500, prob=0.3).train()(z)
    noised = (out != z).any(1).float().mean().item()
    assert noised == pytest.approx(0.3, abs=0.03)


def test_uniform_schedule_draws_each_timestep_up_to_the_limit():
    torch.manual_seed(0)
    z = torch.full((6000, 400), 0.0)
    out = AlphaBlend(3, schedule="uniform", beta_power=0.3).train()(z)
    abar = reference_abar(0.3)
    levels = [math.sqrt(1 - abar[t]) for t in (1, 2, 3)]
    std = out.std(1)
    nearest = torch.stack([(std - level).abs() for level in levels]).argmin(0)
    counts = torch.bincount(nearest, minlength=3) / 6000
    assert torch.allclose(counts, torch.full((3,), 1 / 3), atol=0.03)


@pytest.mark.parametrize("registers,prefix", [(None, 0), (0, 1), (4, 5)])
def test_patches_only_keeps_class_and_register_tokens(registers, prefix):
    """Of a whole net, on a grid of 2 x 3 patches."""
    noise = AlphaBlend(500, tokens="patches")
    tokens = {"class_token": False} if registers is None else {"reg_tokens": registers}
    net, seen = create_model("vit_tiny_patch16", num_classes=4, img_size=(32, 48), alpha_blend=noise, **tokens), []
    net.patch_drop.register_forward_hook(lambda module, inputs, out: seen.append(out.detach()))
    net.blocks[0].norm1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    net.train()(torch.randn(3, 3, 32, 48))
    clean, noised = seen
    assert clean.shape == (3, prefix + 6, 192) and torch.equal(noised[:, :prefix], clean[:, :prefix])
    assert (noised[:, prefix:] != clean[:, prefix:]).float().mean() > 0.999


def test_pixels_have_no_class_token():
    """--noise_tokens patches leaves tokens clean, not colours: every channel of a ViT's image has the noise."""
    noise = AlphaBlend(500, tokens="patches", space="pixel")
    net, x, seen = (
        create_model("vit_tiny_patch16", num_classes=4, img_size=32, alpha_blend=noise),
        torch.randn(2, 3, 32, 32),
        [],
    )
    net.patch_embed.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    net.train()
    torch.manual_seed(1)
    net(x)
    torch.manual_seed(1)
    abar = reference_abar(1.2)[500]
    assert torch.allclose(seen[0], math.sqrt(abar) * x + math.sqrt(1 - abar) * torch.randn(x.shape), atol=1e-6)


@pytest.mark.parametrize(
    "anneal,timesteps",
    [
        ("none", [100, 100, 100, 100, 100]),
        ("linear", [100, 75, 50, 25, 0]),
        ("cosine", [100, 85, 50, 15, 0]),  # (1 + cos(pi / 4)) / 2 = 0.854
    ],
)
def test_annealing_scales_the_timestep(anneal, timesteps):
    noise, seen = AlphaBlend(100, anneal=anneal), []
    for progress in (0.0, 0.25, 0.5, 0.75, 1.0):
        noise.set_progress(progress)
        seen.append(noise.current_timestep)
    assert seen == timesteps


def test_annealed_ratio_between_two_timesteps_is_interpolated():
    """At 0.65 of the timestep of 25 dB, no whole number: decibels on the line between those of its neighbours."""
    decibels = [10 * math.log10(abar / (1 - abar)) for abar in reference_abar(1.2)]
    above = next(t for t, value in enumerate(decibels) if value < 25)
    start = above - 1 + (decibels[above - 1] - 25) / (decibels[above - 1] - decibels[above])
    low = math.floor(0.65 * start)
    assert 0.1 < 0.65 * start - low < 0.9
    noise = AlphaBlend(snr=25.0, anneal="linear").train()
    noise.set_progress(0.35)
    strength = noise.strength(torch.ones(2, 3))
    expected = decibels[low] + (0.65 * start - low) * (decibels[low + 1] - decibels[low])
    assert (20 * (strength.signal / strength.noise).log10()).flatten().tolist() == pytest.approx(
        [expected] * 2, abs=1e-3
    )


@pytest.mark.parametrize(
    "bad",
    [
        dict(timestep=1000),
        dict(timestep=-1),
        dict(prob=1.5),
        dict(schedule="x"),
        dict(space="x"),
        dict(layer=-1),
        dict(snr=201.0),
        dict(snr=math.nan),
    ],
)
def test_values_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match="must be"):
        AlphaBlend(**bad)


FAMILIES = [
    ("vit_tiny_patch16", (32, 48), "blocks.0"),
    ("swinv2_tiny_window8_256", (64, 128), "layers.0.blocks.0"),
    ("convnext_atto", (64, 96), "stages.0.blocks.0"),
    ("eva02_tiny_patch14_224", (28, 42), "blocks.0"),
    ("tf_efficientnet_lite0", (64, 96), "blocks.0.0"),
    ("resnet18", (96, 64), "layer1.0"),
]


@pytest.mark.slow
@pytest.mark.parametrize("name,size,point", FAMILIES)
def test_noise_enters_every_family_at_its_embedding_and_only_in_training(name, size, point):
    torch.manual_seed(0)
    plain = create_model(name, num_classes=4, img_size=size)
    noised = create_model(name, num_classes=4, img_size=size, alpha_blend=AlphaBlend(500))
    assert list(plain.state_dict()) == list(noised.state_dict())
    noised.load_state_dict(plain.state_dict())
    names = {id(m): n for n, m in noised.named_modules()}
    assert names[id(trunk_blocks(noised)[0])] == point

    x = torch.randn(3, 3, *size)
    assert torch.equal(plain.eval()(x), noised.eval()(x))

    # The block's input in training is the clean embedding blended with the noise of the same generator state.
    seen = {}
    dict(noised.named_modules())[point].register_forward_pre_hook(lambda m, a: seen.update(noised=a[0].detach()))
    dict(plain.named_modules())[point].register_forward_pre_hook(lambda m, a: seen.update(clean=a[0].detach()))
    plain.eval()(x)
    noised.eval()
    noised.alpha_blend.train()
    torch.manual_seed(1)
    noised(x)
    torch.manual_seed(1)
    eps = torch.randn(seen["clean"].shape)
    abar = reference_abar(1.2)[500]
    assert torch.allclose(seen["noised"], math.sqrt(abar) * seen["clean"] + math.sqrt(1 - abar) * eps, atol=1e-5)


def test_noise_layer_and_pixel_space_move_the_noise():
    x = torch.randn(2, 3, 32, 32)
    later = create_model("vit_tiny_patch16", num_classes=4, img_size=32, alpha_blend=AlphaBlend(500, layer=3))
    inputs = {}
    for k in (2, 3):
        later.blocks[k].register_forward_pre_hook(lambda m, a, k=k: inputs.setdefault(k, []).append(a[0].detach()))
    later.blocks[2].register_forward_hook(lambda m, a, out: inputs.setdefault("out2", []).append(out.detach()))
    later.eval()
    later.alpha_blend.train()
    later(x), later(x)
    assert torch.equal(inputs[2][0], inputs[2][1]) and torch.equal(*inputs["out2"])
    assert not torch.equal(inputs[3][0], inputs[3][1]) and not torch.equal(inputs[3][0], inputs["out2"][0])

    pixel = create_model("vit_tiny_patch16", num_classes=4, img_size=32, alpha_blend=AlphaBlend(500, space="pixel"))
    got = []
    pixel.patch_embed.register_forward_pre_hook(lambda m, a: got.append(a[0].detach()))
    pixel.train()(x)
    assert not torch.equal(got[0], x)
    with pytest.raises(ValueError, match="noise_layer 12"):
        create_model("vit_tiny_patch16", num_classes=4, img_size=32, alpha_blend=AlphaBlend(15, layer=12))


@pytest.mark.parametrize("space", ["embedding", "pixel"])
def test_copy_of_a_model_has_noise_of_its_own(space):
    """An EMA is a deep copy: evaluated while the original trains, it must be clean."""
    model = create_model(
        "vit_tiny_patch16", num_classes=4, img_size=32, alpha_blend=AlphaBlend(500, space=space)
    ).train()
    twin = copy.deepcopy(model).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(twin(x), twin(x))
    twin.train(), model.eval()
    assert not torch.equal(twin(x), twin(x)) and torch.equal(model(x), model(x))
