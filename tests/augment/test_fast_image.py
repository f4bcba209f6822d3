"""--loader fast: the PIL pipeline's crops and flips, its pixels within a few levels, and PIL where that is as fast."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from augment.fast_image import FastTrainTransform, decode_crop, is_plain_jpeg, reduction
from augment.image import Geometry, build_train_transform, open_file, open_image
from bench.photos import make_photos
from util.data.datasets import FileDataset
from util.data.loader import SampleReader
from util.seed import sample_rng

POLICY = "rand-m9-mstd0.5-inc1"


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[str]:
    return make_photos(str(tmp_path_factory.mktemp("jpeg")), 3, 400, 300)


@pytest.fixture(scope="module")
def ramp(tmp_path_factory) -> str:
    """A JPEG whose red tells the column and whose green tells the row: 512 x 384, a level per 2 pixels."""
    y, x = np.mgrid[0:384, 0:512]
    path = str(tmp_path_factory.mktemp("ramp") / "ramp.jpg")
    Image.fromarray(np.stack([x / 2, y / 2, 0 * x + 128], -1).astype(np.uint8)).save(path, quality=95, subsampling=0)
    return path


def both(path, transform, seed: int, in_chans: int = 3):
    """(Pillow's pixels, the fast ones), drawn with the same numbers."""
    with sample_rng(0, seed, 0):
        plain = transform(open_image(path, in_chans))
    with sample_rng(0, seed, 0):
        fast = FastTrainTransform(transform, in_chans)(path)
    assert fast.dtype == torch.uint8 and fast.shape == plain.shape
    return plain.float(), fast.float()


def test_reduction_leaves_at_least_the_outputs_pixels():
    assert [
        reduction(h, w, (224, 224))
        for h, w in ((223, 900), (447, 447), (448, 448), (895, 2000), (900, 896), (1792, 1792))
    ] == [1, 1, 2, 2, 4, 8]
    assert reduction(400, 100, (100, 200)) == 1 and reduction(400, 1600, (100, 200)) == 4


@pytest.mark.parametrize(
    "preset,size,scales", [("pretrain", (40, 40), {4, 8}), ("light", (96, 64), {1, 2}), ("pretrain", (224, 224), {1})]
)
def test_crops_and_flips_are_those_of_the_pil_pipeline(ramp, preset, size, scales):
    transform = build_train_transform(size, preset, geometry=Geometry(hflip=0.5, vflip=0.3))
    crop, seen = transform.transforms[0], set()
    for seed in range(20):
        plain, fast = both(ramp, transform, seed)
        for r, c in ((2, 2), (2, -3), (-3, 2), (-3, -3)):  # a level is 2 of the file's pixels
            assert (plain[:2, r, c] - fast[:2, r, c]).abs().max() <= 2, "another box or flip"
        assert (plain - fast).abs().mean() < 0.6
        with sample_rng(0, seed, 0):
            _, _, h, w = crop.get_params(Image.new("RGB", (512, 384)), crop.scale, crop.ratio)
        seen.add(reduction(h, w, size))
    assert seen == scales


def test_the_crop_box_does_not_depend_on_the_decoding_scale(ramp):
    """Many crops by different seeds: their mean colours and left-right differences follow one distribution."""
    transform = build_train_transform((16, 16), "pretrain", geometry=Geometry())
    fast = FastTrainTransform(transform, 3)
    centres = {"pil": [], "fast": []}
    image = open_image(ramp, 3)
    for seed in range(120):
        with sample_rng(1, seed, 0):
            a = transform(image).float()
        with sample_rng(2, seed, 0):
            b = fast(ramp).float()
        for name, x in (("pil", a), ("fast", b)):
            centres[name].append([x[0].mean(), x[1].mean(), x[0, :, -1].mean() - x[0, :, 0].mean()])
    pil, fast = (np.array(centres[k]) for k in ("pil", "fast"))
    for k in range(3):
        assert stats.ks_2samp(pil[:, k], fast[:, k]).pvalue > 0.01


@pytest.mark.parametrize(
    "preset,aa,size", [("pretrain", None, 224), ("light", None, 32), ("photo", None, 64), ("mae", POLICY, 32)]
)
def test_pixels_differ_less_than_bilinear_from_bicubic_and_have_no_bias(photos, preset, aa, size):
    transform = build_train_transform((size, size), preset, aa=aa)
    bilinear = build_train_transform((size, size), preset, aa=aa, interpolation="bilinear")
    off, yardstick, bias, contrast = [], [], [], []
    for k in range(12):
        plain, fast = both(photos[k % 3], transform, k)
        with sample_rng(0, k, 0):
            other = bilinear(open_image(photos[k % 3], 3)).float()
        off.append((plain - fast).abs().mean())
        yardstick.append((plain - other).abs().mean())
        bias.append((fast - plain).mean())
        contrast.append(fast.std() / plain.std())
    off, yardstick, bias, contrast = (float(np.mean(v)) for v in (off, yardstick, bias, contrast))
    assert off < (0.03 if preset == "pretrain" else yardstick), f"{off} of {yardstick}"
    assert abs(bias) < 0.25 and 0.98 < contrast < 1.02


def test_unscaled_crop_is_pillows_within_two_levels(photos):
    box = (11, 7, 131, 201)
    with open_file(photos[0]) as image:
        fast = decode_crop(image, box, (96, 80), build_train_transform((96, 80), "light").transforms[0].interpolation)
    with Image.open(photos[0]) as image:
        plain = image.crop((7, 11, 208, 142)).resize((80, 96), Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(plain).transpose(2, 0, 1).astype(int) - fast.numpy()).max() <= 2


def test_what_is_no_plain_upright_jpeg_takes_pillows_way(tmp_path, photos):
    photo = Image.open(photos[0])
    turned = Image.Exif()
    turned[0x0112] = 6
    cases = {
        "a.png": (photo, {}),
        "cmyk.jpg": (photo.convert("CMYK"), {}),
        "grey.jpg": (photo.convert("L"), {}),
        "turned.jpg": (photo, {"exif": turned}),
        "strip.jpg": (photo.resize((400, 20)), {}),
        "deep.png": (Image.fromarray(np.arange(90000, dtype=np.uint16).reshape(300, 300)), {}),
    }
    transform = build_train_transform((24, 24), "light")
    for k, (name, (image, options)) in enumerate(cases.items()):
        image.save(tmp_path / name, **options)
        with open_file(str(tmp_path / name)) as opened:
            assert not is_plain_jpeg(opened, 3), name
        plain, fast = both(str(tmp_path / name), transform, k)
        assert torch.equal(plain, fast), name
    with open_file(photos[0]) as opened:
        assert is_plain_jpeg(opened, 3) and not is_plain_jpeg(opened, 1)
    grey, fast = both(str(tmp_path / "grey.jpg"), build_train_transform((24, 24), "light", mean=(0.5,)), 3, in_chans=1)
    assert fast.shape == (1, 24, 24) and (grey - fast).abs().mean() < 1.5


def test_a_truncated_file_is_reported_as_pillow_reports_it(tmp_path, photos):
    broken = tmp_path / "broken.jpg"
    with open(photos[0], "rb") as file:
        broken.write_bytes(file.read()[:9000])
    data = FileDataset([str(broken), photos[1]], torch.tensor([0, 1]), ["a", "b"])
    transform = build_train_transform((32, 32), "light")
    slow, fast = (SampleReader(data, transform, in_chans=3, seed=0, train=True, fast=f)[0, 0] for f in (False, True))
    assert slow[0] == fast[0] == 1 and slow[2:] == fast[2:] and "truncated" in fast[2][0]
    whole = SampleReader(data, transform, in_chans=3, seed=0, train=True, fast=True)
    with sample_rng(0, 0, 1):
        assert torch.equal(whole[0, 1][1][0], FastTrainTransform(transform, 3)(photos[1])), (
            "the fast way is the one taken"
        )


def test_the_none_preset_has_no_crop_to_speed_up(photos):
    data = FileDataset(photos[:1], torch.tensor([0]), ["a"])
    transform = build_train_transform((32, 32), "none")
    slow, fast = (SampleReader(data, transform, in_chans=3, seed=0, train=True, fast=f)[0, 0] for f in (False, True))
    assert torch.equal(slow[1][0], fast[1][0])
    with pytest.raises(ValueError, match="begin with a random resized crop"):
        FastTrainTransform(transform, 3)
