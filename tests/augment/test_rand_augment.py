"""Batched RandAugment and colour jitter against timm's and torchvision's per-image ones."""

import argparse
import math
import random

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from timm.data import auto_augment as timm_aa
from torchvision.transforms import functional as TF

from augment.batch import BatchTransform
from augment.image import build_train_transform
from augment.rand_augment import (
    GEOMETRIC,
    OPS,
    ORDERS,
    affine_matrix,
    apply_layer,
    color_jitter,
    draw_layer,
    op_argument,
    parse_rand_augment,
    rand_augment,
)
from tests.harness.pictures import pictures, to_pil, to_tensor
from util.cli.values import policy_or_none
from util.seed import counted_uniform, sample_rng

pytestmark = pytest.mark.usefixtures("posterize_to_no_bits")

POLICY = "rand-m9-mstd0.5-inc1"


def timm_name(name: str, increasing: bool) -> str:
    if name.startswith("Translate"):
        return name + "Rel"
    enhanced = name in ("Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness")
    return name + "Increasing" if increasing and enhanced else name


@pytest.mark.parametrize("config", [POLICY, "rand-m5-n3-p0.7-mstd101-mmax8", "rand", "rand-n1-inc0", "rand-m12-mmax15"])
def test_config_string_means_what_it_means_in_timm(config):
    # timm 1.0.15 took any `inc`, 0 as well, for True.
    ours, theirs = parse_rand_augment(config), timm_aa.rand_augment_transform(config.removesuffix("-inc0"), {})
    op = theirs.ops[0]
    assert (ours.layers, ours.prob, ours.magnitude) == (theirs.num_layers, op.prob, op.magnitude)
    assert ours.std == op.magnitude_std and ours.maximum == (op.magnitude_max or 10)
    assert {timm_name(n, ours.increasing) for n in OPS} == {o.name for o in theirs.ops}


@pytest.mark.parametrize("config", ["m9", "rand-x3", "rand-tweights", "rand-m", "augmix-m3", "rand-m9--inc1"])
def test_unknown_config_is_an_error(config):
    with pytest.raises(ValueError, match="aa "):
        parse_rand_augment(config)


@pytest.mark.parametrize("increasing", [False, True])
@pytest.mark.parametrize("name", [n for n in OPS if n not in ("AutoContrast", "Equalize", "Invert")])
def test_arguments_equal_timms(name, increasing, monkeypatch):
    level = torch.tensor([0.0, 0.37, 3.3, 5.0, 8.99, 9.0, 10.0])
    for sign, coin in ((1.0, 0.0), (-1.0, 1.0)):
        monkeypatch.setattr(random, "random", lambda coin=coin: coin)  # timm negates above one half
        ours = op_argument(name, level, torch.full_like(level, sign), increasing)
        theirs = [timm_aa.LEVEL_TO_ARG[timm_name(name, increasing)](v, {})[0] for v in level.tolist()]
        assert ours.tolist() == pytest.approx(theirs, rel=1e-6)


def test_drawn_operations_are_uniform_and_applied_with_prob():
    index = torch.arange(30_000)
    op, level, sign = draw_layer(parse_rand_augment(POLICY), 0, 3, index, 0)
    assert abs((op >= 0).float().mean() - 0.5) < 0.015
    counts = torch.bincount(op[op >= 0], minlength=len(OPS))
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4
    assert abs(sign.mean()) < 0.03 and set(sign.tolist()) == {-1.0, 1.0}
    # N(9, 0.5) clipped at 10: below the clip, the normal's distribution; at it, the rest of its mass.
    assert abs((level == 10).float().mean() - stats.norm.sf(10, 9, 0.5)) < 0.004
    inner = level[level < 10].double().numpy()
    assert stats.kstest(inner, lambda v: stats.norm.cdf(v, 9, 0.5) / stats.norm.cdf(10, 9, 0.5)).pvalue > 1e-4
    second, _, _ = draw_layer(parse_rand_augment(POLICY), 0, 3, index, 1)
    both = (op >= 0) & (second >= 0)
    assert abs((op[both] == second[both]).float().mean() - 1 / 15) < 0.01  # with replacement, layers independent


def test_magnitude_without_noise_and_with_uniform_noise():
    index = torch.arange(5000)
    _, level, _ = draw_layer(parse_rand_augment("rand-m7"), 0, 0, index, 0)
    assert (level == 7).all()
    _, level, _ = draw_layer(parse_rand_augment("rand-m8-mstd101"), 0, 0, index, 0)
    assert stats.kstest(level.double().numpy() / 8, "uniform").pvalue > 1e-4


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("increasing", [False, True])
def test_layer_equals_timms_operations_on_pil_images(increasing, channels):
    """All 15 operations and `none` in one shuffled batch, each image against timm's function on it alone."""
    x = pictures(channels)[:3].repeat(16, 1, 1, 1)  # 48 images
    op = torch.arange(-1, 15).repeat_interleave(3)
    shuffle = torch.randperm(48, generator=torch.Generator().manual_seed(1))
    x, op = x[shuffle], op[shuffle]
    level = torch.linspace(2.0, 10.0, 48)
    sign = torch.where(torch.arange(48) % 2 == 0, 1.0, -1.0)
    fill = [124, 116, 104][:channels]
    before = x.clone()
    y = apply_layer(x, op, level, sign, increasing, fill)
    assert torch.equal(x, before)
    for i, number in enumerate(op.tolist()):
        if number < 0:
            assert torch.equal(y[i], x[i])
            continue
        name = OPS[number]
        arguments = ()
        if name not in ("AutoContrast", "Equalize", "Invert"):
            arguments = (op_argument(name, level[i : i + 1], sign[i : i + 1], increasing).item(),)
        function = timm_aa.NAME_TO_OP[timm_name(name, increasing)]
        image = function(to_pil(x[i]), *arguments, fillcolor=tuple(fill), resample=Image.BILINEAR)
        difference = (y[i].int() - to_tensor(image).int()).abs()
        if name in GEOMETRIC:
            # One level from rounding, or a border pixel on the other side of the edge.
            assert difference.float().mean() < 0.05 and (difference > 1).float().mean() < 0.002, name
        else:
            assert difference.max() == 0, name


def test_rotation_matrix_turns_about_the_centre():
    m = affine_matrix("Rotate", torch.tensor([90.0]), 10, 20)[0]
    assert torch.allclose(m @ torch.tensor([10.0, 5.0, 1.0], dtype=torch.float64), torch.tensor([10.0, 5.0]).double())
    # Counter-clockwise on the screen: what is right of the centre moves above it, so (10, 3) shows (12, 5).
    assert torch.allclose(m @ torch.tensor([10.0, 3.0, 1.0], dtype=torch.float64), torch.tensor([12.0, 5.0]).double())


def test_result_depends_on_the_sample_only_and_input_stays():
    x = pictures(3).repeat(8, 1, 1, 1)
    index = torch.arange(100, 140)
    before = x.clone()
    args = dict(seed=1, epoch=2, fill=[1, 2, 3])
    whole = rand_augment(x, POLICY, index=index, **args)
    assert torch.equal(x, before) and whole.dtype == torch.uint8
    order = torch.randperm(40)
    assert torch.equal(rand_augment(x[order], POLICY, index=index[order], **args), whole[order])
    assert torch.equal(rand_augment(x[7:8], POLICY, index=index[7:8], **args), whole[7:8])
    args["epoch"] = 3
    assert not torch.equal(rand_augment(x, POLICY, index=index, **args), whole)


def test_channels_last_and_strided_batches_give_the_same():
    x = pictures(3)
    index = torch.arange(5)
    args = dict(seed=0, epoch=0, index=index, fill=[0, 0, 0])
    expected = rand_augment(x, "rand-p1.0-n4", **args)
    assert torch.equal(rand_augment(x.contiguous(memory_format=torch.channels_last), "rand-p1.0-n4", **args), expected)
    padded = torch.nn.functional.pad(x, (2, 2))[..., 2:-2]
    assert torch.equal(rand_augment(padded, "rand-p1.0-n4", **args), expected)


def test_other_channel_counts_are_an_error():
    with pytest.raises(ValueError, match="2 channels"):
        rand_augment(
            torch.zeros(1, 2, 8, 8, dtype=torch.uint8), POLICY, seed=0, epoch=0, index=torch.arange(1), fill=[0, 0]
        )


@pytest.mark.parametrize("channels", [1, 3])
def test_color_jitter_is_torchvisions_in_the_drawn_order(channels):
    x = pictures(channels).repeat(8, 1, 1, 1)
    index = torch.arange(40)
    y = color_jitter(x, 0.4, seed=5, epoch=6, index=index)
    u = counted_uniform(5, 6, index, 4, 3)
    adjust = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)
    for i in range(40):
        image = to_pil(x[i])
        for number in ORDERS[math.floor(u[i, 3] * 6)]:
            image = adjust[number](image, 0.6 + 0.8 * float(u[i, number]))
        # A factor one float32 step away may move a pixel that lies on a level's border.
        difference = (y[i].int() - to_tensor(image).int()).abs()
        assert difference.max() <= 1 and difference.float().mean() < 0.01
    assert len({math.floor(v * 6) for v in u[:, 3].tolist()}) == 6


def test_color_jitter_of_strength_zero_changes_nothing_and_negative_is_an_error():
    x = pictures(3)
    assert torch.equal(color_jitter(x, 0.0, seed=0, epoch=0, index=torch.arange(5)), x)
    with pytest.raises(ValueError, match=r"color_jitter -0\.1"):
        color_jitter(x, -0.1, seed=0, epoch=0, index=torch.arange(5))


# ---- timm's other policies


@pytest.mark.parametrize(
    "aa", ["original", "originalr-mstd0.5", "v0", "v0r", "3a", "augmix-m3-w3", "rand-m9-tweights", "rand-t3a"]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_other_policies_are_timms_image_by_image(aa, channels):
    """timm's own function for the string, on Pillow images, with the generators that the counters seed."""
    mean = (0.25, 0.5, 0.75)[:channels]
    hparams = {
        "translate_const": int(0.45 * 24),
        "img_mean": tuple(round(255 * m) for m in mean),
        "interpolation": Image.Resampling.BILINEAR,
    }
    build = {"augmix": timm_aa.augment_and_mix_transform, "rand": timm_aa.rand_augment_transform}
    if aa.startswith("augmix"):
        hparams["translate_pct"] = 0.3
    policy = build.get(aa.split("-")[0], timm_aa.auto_augment_transform)(aa, hparams)
    x = torch.randint(0, 256, (6, channels, 24, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    transform = BatchTransform(mean, (1.0,) * channels, aa=aa, seed=7)
    index = torch.tensor([5, 3, 9, 11, 2, 40])
    if aa.startswith("augmix"):
        try:
            policy(Image.new("RGB", (30, 24)))
        except ValueError:
            pytest.skip("AugMix of timm 1.0.15 takes square images only")
    before = torch.get_rng_state()
    ours = transform(x, index, 4, True)
    assert torch.equal(torch.get_rng_state(), before)
    different = 0
    for i, number in enumerate(index.tolist()):
        image = Image.fromarray(x[i].permute(1, 2, 0).squeeze(-1).numpy())
        with sample_rng(7, 4, number):
            expected = np.asarray(policy(image)).reshape(24, 30, channels)
        levels = (ours[i] + torch.tensor(mean)[:, None, None]).mul(255).round().to(torch.uint8)
        assert np.array_equal(levels.permute(1, 2, 0).numpy(), expected)
        different += not np.array_equal(expected, x[i].permute(1, 2, 0).numpy())
    assert different >= 2, "the policy does something"


def test_policies_that_the_command_line_takes_are_timms():
    for text in (
        "rand",
        POLICY,
        "rand-m9-n3-p0.7-mmax12-mstdinf-inc0-tweights",
        "augmix-m3-w3-d2-a1.0-b1-mstd0.5",
        "3a",
        "v0r-mstd0.5",
    ):
        assert policy_or_none(text) == text
        build_train_transform((32, 32), "mae", aa=text)
    assert policy_or_none("none") is None
    for text in ("foo", "rand-x3", "rand-m", "rand-m9.5", "original-m9", "augmix-q1", "v1", "rand-tnone", "rand m9"):
        with pytest.raises(
            argparse.ArgumentTypeError, match=r"should be none or timm's rand-m9-mstd0.5-inc1, original"
        ):
            policy_or_none(text)
