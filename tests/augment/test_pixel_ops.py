"""Batched pixel operations against Pillow's own, through the functions that timm applies to PIL images."""

import math
import random

import pytest
import torch
from PIL import Image
from timm.data import auto_augment as timm_aa

from augment import pixel_ops as ops
from tests.harness.pictures import pictures, to_pil, to_tensor

pytestmark = pytest.mark.usefixtures("posterize_to_no_bits")


def each(x: torch.Tensor, function, arguments) -> torch.Tensor:
    """`function(PIL image, argument)` on every picture by itself."""
    return torch.stack([to_tensor(function(to_pil(i), a)) for i, a in zip(x, arguments)])


FACTORS = torch.tensor([0.1, 0.55, 1.0, 1.37, 1.9])
TABLES = {
    "AutoContrast": (lambda i, a: timm_aa.auto_contrast(i), torch.zeros(5)),
    "Equalize": (lambda i, a: timm_aa.equalize(i), torch.zeros(5)),
    "Invert": (lambda i, a: timm_aa.invert(i), torch.zeros(5)),
    "Brightness": (timm_aa.brightness, FACTORS),
    "Contrast": (timm_aa.contrast, FACTORS),
    "Posterize": (timm_aa.posterize, torch.tensor([0, 1, 3, 4, 8])),
    "Solarize": (timm_aa.solarize, torch.tensor([0, 26, 128, 255, 256])),
    "SolarizeAdd": (timm_aa.solarize_add, torch.tensor([0, 1, 55, 99, 128])),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ops.TABLES)
def test_table_operations_equal_pillow(name, channels):
    reference, arguments = TABLES[name]
    x = pictures(channels)
    for shift in range(5):  # every picture with every argument
        a = arguments.roll(shift)
        assert torch.equal(ops.apply_table(x, ops.lookup_table(name, x, a)), each(x, reference, a.tolist())), (
            f"shift {shift}"
        )


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["color", "sharpness"])
def test_color_and_sharpness_equal_pillow(name, channels):
    x = pictures(channels)
    for shift in range(5):
        a = FACTORS.roll(shift)
        assert torch.equal(getattr(ops, name)(x, a), each(x, getattr(timm_aa, name), a.tolist()))


def test_grey_is_pillows_luma():
    x = pictures(3)
    assert torch.equal(ops.grey(x).to(torch.uint8), torch.stack([to_tensor(to_pil(i).convert("L")) for i in x]))


@pytest.mark.parametrize("channels", [1, 3])
def test_affine_equals_pillow_bilinear(channels):
    x = pictures(channels)
    fill = [10, 130, 250][:channels]
    rng = random.Random(0)
    for _ in range(4):
        matrix = torch.tensor(
            [
                [
                    [1 + rng.uniform(-0.3, 0.3), rng.uniform(-0.4, 0.4), rng.uniform(-9, 9)],
                    [rng.uniform(-0.4, 0.4), 1 + rng.uniform(-0.3, 0.3), rng.uniform(-9, 9)],
                ]
                for _ in range(5)
            ],
            dtype=torch.float64,
        )
        expected = each(
            x,
            lambda i, m: i.transform(i.size, Image.AFFINE, m, resample=Image.BILINEAR, fillcolor=tuple(fill)),
            [m.flatten().tolist() for m in matrix],
        )
        difference = (ops.affine(x, matrix, fill).int() - expected.int()).abs()
        assert difference.max() <= 1 and difference.float().mean() < 0.01


def test_affine_identity_and_whole_pixel_shift_are_exact():
    x = pictures(3)
    matrix = torch.eye(2, 3, dtype=torch.float64).repeat(5, 1, 1)
    assert torch.equal(ops.affine(x, matrix, [0, 0, 0]), x)
    matrix[:, 0, 2], matrix[:, 1, 2] = 3.0, -2.0  # output (x, y) shows input (x + 3, y - 2)
    y = ops.affine(x, matrix, [7, 8, 9])
    assert torch.equal(y[:, :, 2:, :-3], x[:, :, :-2, 3:])
    assert (y[:, :, :2] == torch.tensor([7, 8, 9]).view(3, 1, 1)).all()


def test_sharpness_leaves_images_without_interior():
    x = torch.randint(0, 256, (1, 3, 2, 9), dtype=torch.uint8)
    assert torch.equal(ops.sharpness(x, torch.tensor([0.3])), x)
    assert math.prod(ops.sharpness(x[..., :1, :], torch.tensor([0.3])).shape) == 27
