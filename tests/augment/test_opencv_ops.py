"""RandAugment's operations by OpenCV against timm's own on the same pictures."""

import random

import cv2
import numpy as np
import pytest
from PIL import Image
from timm.data import auto_augment
from timm.data.auto_augment import AugmentOp, rand_augment_transform

from augment import opencv_ops
from augment.opencv_ops import decode_jpeg, on_arrays
from bench.photos import make_photos

pytestmark = pytest.mark.usefixtures("posterize_to_no_bits")

POLICY = "rand-m9-mstd0.5-inc1"
FILL = (124, 116, 104)
SHIFTS = ("ShearX", "ShearY", "TranslateX", "TranslateY", "TranslateXRel", "TranslateYRel")
TABLES = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Posterize",
    "PosterizeIncreasing",
    "Solarize",
    "SolarizeIncreasing",
    "SolarizeAdd",
    "Contrast",
    "ContrastIncreasing",
    "Brightness",
    "BrightnessIncreasing",
)
BLENDS = ("Color", "ColorIncreasing", "Sharpness", "SharpnessIncreasing")


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return make_photos(str(tmp_path_factory.mktemp("jpeg")), 1, 120, 90)[0]


def both(name: str, image: Image.Image, magnitude: float, interpolation, seed: int):
    """(timm's pixels, ours) as float arrays, of one operation with the same draws."""
    fill = FILL if image.mode == "RGB" else FILL[0]
    hparams = {"img_mean": fill, "translate_const": 30, "interpolation": interpolation, "magnitude_std": 0.5}
    op = AugmentOp(name, prob=1.0, magnitude=magnitude, hparams=hparams)
    ours = on_arrays(auto_augment.RandAugment([op], 1)).ops[0]
    outputs = []
    for f, x in ((op, image), (ours, np.array(image))):
        random.seed(seed)
        outputs.append(np.asarray(f(x)).astype(float))
    assert outputs[0].shape == outputs[1].shape
    return outputs


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", TABLES + BLENDS)
def test_colours_are_pillows(path, name, mode):
    image = Image.open(path).convert(mode)
    for magnitude in (0, 2, 5, 9, 10):
        plain, fast = both(name, image, magnitude, None, magnitude)
        off = np.abs(plain - fast)
        # The grey that contrast is taken from may round to the next level, and so may a blend.
        assert off.max() <= (0 if name in TABLES and "Contrast" not in name[:8] else 1), off.max()


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", SHIFTS)
def test_shears_and_translations_are_pillows_within_a_level(path, name, mode):
    image = Image.open(path).convert(mode)
    for interpolation in (Image.Resampling.NEAREST, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC):
        for seed in range(4):
            plain, fast = both(name, image, 9, interpolation, seed)
            off = np.abs(plain - fast)
            assert off.max() <= 1 and off.mean() < 0.1


def test_shears_and_translations_reach_beyond_the_picture():
    picture = np.arange(1, 61, dtype=np.uint8).reshape(4, 5, 3)
    for function, ours, amounts in (
        (auto_augment.translate_x_abs, opencv_ops._translate_x, (-7, -5, -4.6, -4.4, 0, 4.4, 4.6, 5, 80)),
        (auto_augment.translate_y_abs, opencv_ops._translate_y, (-7, -4, -3.6, -3.4, 0, 3.4, 3.6, 4, 80)),
        (auto_augment.shear_x, opencv_ops._shear_x, (-9, -1.5, 1.5, 9)),
        (auto_augment.shear_y, opencv_ops._shear_y, (-9, -1.5, 1.5, 9)),
    ):
        for amount in amounts:
            how = {"fillcolor": FILL, "resample": Image.Resampling.BICUBIC}
            plain = np.asarray(function(Image.fromarray(picture), amount, **how)).astype(int)
            assert np.abs(plain - ours(picture, amount, **how)).max() <= 1, (ours, amount)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_rotations_are_pillows_but_for_the_kernel_and_the_border(path, mode):
    image = Image.open(path).convert(mode)
    for seed in range(6):
        linear, fast = both("Rotate", image, 9, Image.Resampling.BILINEAR, seed)
        cubic, fast_cubic = both("Rotate", image, 9, Image.Resampling.BICUBIC, seed)
        # Pillow truncates what OpenCV rounds: up to half a level everywhere.
        for plain, ours in ((linear, fast), (cubic, fast_cubic)):
            assert np.median(np.abs(plain - ours)) <= 1 and abs((plain - ours).mean()) < 0.5
        assert np.abs(linear - fast).mean() < 0.7
        assert np.abs(cubic - fast_cubic).mean() < max(0.75 * np.abs(linear - cubic).mean(), 0.5)


def test_flat_pictures_stay_and_the_random_interpolation_is_timms_draw(path):
    flat = Image.new("RGB", (20, 10), (7, 200, 255))
    for name in ("AutoContrast", "Equalize"):
        plain, fast = both(name, flat, 5, None, 0)
        assert np.array_equal(plain, fast)
    image, pair = Image.open(path), (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
    for seed in range(8):
        random.seed(seed)
        plain, fast = both("Rotate", image, 9, pair, seed)
        alone = [both("Rotate", image, 9, r, seed)[1] for r in pair]
        nearest = np.argmin([np.abs(plain - other).mean() for other in alone])
        assert np.array_equal(fast, alone[nearest])


def test_whole_policy_draws_what_timm_draws(path):
    policy = rand_augment_transform(
        POLICY, {"img_mean": FILL, "interpolation": Image.Resampling.BILINEAR, "translate_const": 30}
    )
    fast, image = on_arrays(policy), Image.open(path)
    assert fast is not policy and all(op.aug_fn.__module__ == "timm.data.auto_augment" for op in policy.ops)
    differences = []
    for seed in range(40):
        states = []
        for f, x in ((policy, image), (fast, np.array(image))):
            random.seed(seed)
            np.random.seed(seed)
            states.append((np.asarray(f(x)).astype(float), random.getstate(), np.random.get_state()[1].tolist()))
        assert states[0][1:] == states[1][1:]
        differences.append(np.abs(states[0][0] - states[1][0]).mean())
    assert np.mean(differences) < 1 and np.max(differences) < 6, differences


def test_a_policy_with_an_unknown_operation_is_left_to_timm():
    assert on_arrays(rand_augment_transform("rand-m5-t3a", {"img_mean": FILL})) is None
    assert on_arrays(auto_augment.RandAugment([AugmentOp("GaussianBlur", hparams={})])) is None
    assert on_arrays(auto_augment.auto_augment_transform("original", {"img_mean": FILL})) is None


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_decoded_pixels_are_pillows(path, tmp_path, mode):
    Image.open(path).convert(mode).save(tmp_path / "x.jpg", quality=90)
    data = (tmp_path / "x.jpg").read_bytes()
    for scale in (1, 2, 4, 8):
        with Image.open(tmp_path / "x.jpg") as image:
            image.draft(mode, (image.width // scale, image.height // scale))
            assert np.array_equal(np.asarray(image), decode_jpeg(data, scale, grey=mode == "L"))
    with pytest.raises(OSError, match="cannot decode"):
        decode_jpeg(b"\xff\xd8 nothing")
    assert cv2.getNumThreads() == 1
