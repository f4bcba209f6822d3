"""On-device batch operations against torchvision's, timm's and Pillow's per-image ones and naive loops."""

import math
import random
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import stats
from timm.data.random_erasing import RandomErasing
from torchvision import transforms
from torchvision.transforms import functional as TF

from augment.batch import (
    BatchTransform,
    Erasing,
    crop_flip,
    erase_boxes,
    normalize,
    random_erase,
    resize,
    resized_crop,
    rrc_boxes,
)
from augment.image import Geometry
from tests.harness.pictures import pictures, to_pil, to_tensor
from util.seed import counted_uniform

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RATIO = (3 / 4, 4 / 3)


def noise_images(B: int = 16, C: int = 3, H: int = 20, W: int = 24) -> torch.Tensor:
    return torch.randint(0, 256, (B, C, H, W), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


# ---- normalise


def test_normalize_equals_torchvision_and_leaves_the_input():
    x = noise_images()
    before = x.clone()
    expected = torch.stack([TF.normalize(i.float() / 255, MEAN, STD) for i in x])
    for layout in (x, x.contiguous(memory_format=torch.channels_last), F.pad(x, (3, 3))[..., 3:-3]):
        y = normalize(layout, MEAN, STD)
        assert y.dtype == torch.float32 and torch.allclose(y, expected, atol=1e-6)
    assert torch.equal(x, before)


def test_normalize_takes_uint8_batches_only():
    for wrong in (torch.rand(2, 3, 4, 4), torch.zeros(3, 4, 4, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="uint8"):
            normalize(wrong, MEAN, STD)


# ---- crop and flip


@pytest.mark.parametrize("padding", [0, 1, 4])
def test_crop_flip_equals_pad_crop_hflip_image_by_image(padding):
    x = noise_images(64)
    g = torch.Generator().manual_seed(1)
    top, left = torch.randint(0, 2 * padding + 1, (2, 64), generator=g)
    flip = torch.rand(64, generator=g) < 0.5
    y = crop_flip(x, top, left, flip, padding)
    for i in range(64):
        expected = TF.crop(TF.pad(x[i], padding), int(top[i]), int(left[i]), 20, 24)
        assert torch.equal(y[i], TF.hflip(expected) if flip[i] else expected)


def test_crop_flip_reads_any_memory_format():
    x = noise_images(6)
    args = torch.tensor([0, 1, 2, 3, 4, 2]), torch.tensor([4, 3, 2, 1, 0, 2]), torch.arange(6) % 2 == 0, 2
    assert torch.equal(crop_flip(x.contiguous(memory_format=torch.channels_last), *args), crop_flip(x, *args))


def test_pad_crop_offsets_are_uniform_and_flips_have_their_probability():
    """A picture whose every pixel is unique shows which window it became."""
    x = torch.arange(100, dtype=torch.uint8).view(1, 1, 10, 10).add(100).repeat(8000, 1, 1, 1)
    y = (
        BatchTransform((0.0,), (1.0,), geometry=Geometry("pad", padding=2, hflip=0.3))(x, torch.arange(8000), 0, True)
        * 255
    )
    y = y.round().long()[:, 0]
    flipped = y[:, 5, 5] < y[:, 5, 4]
    assert abs(flipped.float().mean() - 0.3) < 0.02
    upright = torch.where(flipped[:, None, None], y.flip(-1), y)
    origin = upright[:, 5, 5] - 155  # 10 rows down + columns right of (5, 5), each in -2..2
    top, left = (origin + 5).div(10, rounding_mode="floor"), (origin + 5) % 10 - 5
    counts = torch.bincount((top + 2) * 5 + left + 2, minlength=25)
    assert counts.sum() == 8000 and stats.chisquare(counts.numpy()).pvalue > 1e-4
    assert ((y == 0).any(2).any(1) == ((top != 0) | (left != 0))).all()  # zero padding shows where it moved


def test_vflip_turns_its_share_upside_down_and_nothing_else():
    x = torch.arange(12, dtype=torch.uint8).view(1, 1, 4, 3).repeat(4000, 1, 1, 1)
    y = (
        BatchTransform((0.0,), (1.0,), geometry=Geometry(vflip=0.3))(x, torch.arange(4000), 0, True)
        .mul(255)
        .round()
        .to(torch.uint8)
    )
    turned = (y == x.flip(-2)).flatten(1).all(1)
    assert (turned | (y == x).flatten(1).all(1)).all()
    assert abs(turned.float().mean() - 0.3) < 0.03


# ---- random resized crop


def naive_rrc(u: list[float], height: int, width: int, scale, ratio) -> tuple[int, int, int, int]:
    """torchvision's rule, fed with given uniforms."""
    for area_u, ratio_u in zip(u[:10], u[10:20]):
        area = (scale[0] + (scale[1] - scale[0]) * area_u) * height * width
        aspect = math.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * ratio_u)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(u[20] * (height - h + 1)), int(u[21] * (width - w + 1)), h, w
    box = transforms.RandomResizedCrop.get_params(torch.empty(1, height, width), (50.0, 60.0), ratio)  # its fallback
    return tuple(box)


@pytest.mark.parametrize(
    "height,width,scale", [(32, 32, (0.08, 1.0)), (20, 47, (0.5, 1.0)), (47, 20, (0.9, 1.0)), (8, 8, (0.001, 0.02))]
)
def test_rrc_boxes_equal_the_naive_loop(height, width, scale):
    u = counted_uniform(0, 0, torch.arange(300), 22)
    boxes = torch.stack(rrc_boxes(u, height, width, scale, RATIO), dim=1)
    assert boxes.tolist() == [list(naive_rrc(row, height, width, scale, RATIO)) for row in u.double().tolist()]


def test_rrc_boxes_have_torchvisions_distribution():
    n, image = 1500, torch.empty(1, 40, 56)
    torch.manual_seed(0)
    theirs = np.array([transforms.RandomResizedCrop.get_params(image, (0.08, 1.0), RATIO) for _ in range(n)])
    ours = torch.stack(rrc_boxes(counted_uniform(0, 1, torch.arange(n), 22), 40, 56, (0.08, 1.0), RATIO), 1).numpy()
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(24, 32), (48, 40), (9, 13)])
def test_resized_crop_equals_pillow(size, channels):
    x = pictures(channels).repeat(6, 1, 1, 1)  # 30 images of 24 x 32
    box = rrc_boxes(counted_uniform(0, 2, torch.arange(30), 22), 24, 32, (0.08, 1.0), RATIO)
    flip = torch.arange(30) % 2 == 0
    y = resized_crop(x, box, flip, size)
    off = []
    for i in range(30):
        top, left, h, w = (int(b[i]) for b in box)
        # One axis at a time: Pillow 13 takes the cheaper axis first, before it was always the columns.
        image = to_pil(x[i]).crop((left, top, left + w, top + h)).resize((size[1], h), Image.BICUBIC)
        image = image.resize(size[::-1], Image.BICUBIC)
        expected = to_tensor(image.transpose(Image.FLIP_LEFT_RIGHT) if flip[i] else image)
        off.append((y[i].int() - expected.int()).abs())
    # Pillow's fixed-point weights may put a value near one half on the other side.
    assert torch.stack(off).max() <= 1 and torch.stack(off).float().mean() < 0.01


def test_whole_image_box_at_its_own_size_is_the_identity():
    x = noise_images(2)
    zero, h, w = torch.zeros(2, dtype=torch.int64), torch.tensor([20, 20]), torch.tensor([24, 24])
    assert torch.equal(resized_crop(x, (zero, zero, h, w), zero.bool(), (20, 24)), x)


@pytest.mark.parametrize("size", [(40, 40), (10, 12)])
def test_resize_equals_pillow_bicubic(size):
    x = pictures(3)
    expected = torch.stack([to_tensor(to_pil(i).resize(size[::-1], Image.BICUBIC)) for i in x])
    assert (resize(x, size).int() - expected.int()).abs().max() <= 1
    assert resize(x, (24, 32)) is x


# ---- the whole transform

FULL = dict(geometry=Geometry("pad", hflip=0.5), aa="rand-m9-mstd0.5-inc1", erasing=Erasing(0.25, recount=2))


@pytest.mark.parametrize(
    "options",
    [
        FULL,
        dict(geometry=Geometry("rrc", hflip=0.5), size=16, color_jitter=0.4),
        dict(geometry=Geometry("pad"), size=(20, 30), erasing=Erasing(1.0, "rand")),
    ],
)
def test_transform_depends_on_seed_epoch_and_index_only(options):
    x, index = pictures(3, 24, 24).repeat(8, 1, 1, 1), torch.arange(40) + 3
    before = x.clone()
    transform = BatchTransform(MEAN, STD, **options, seed=4)
    torch.manual_seed(0)
    whole = transform(x, index, 2, True)
    assert torch.equal(x, before) and whole.dtype == torch.float32
    torch.manual_seed(1)
    order = torch.randperm(40)
    # To a rounding of the matrix products, whose order of sums may differ with the batch.
    assert torch.allclose(transform(x[order], index[order], 2, True), whole[order], atol=1e-5)
    assert torch.allclose(transform(x[9:10], index[9:10], 2, True), whole[9:10], atol=1e-5)
    for other in (transform(x, index, 3, True), BatchTransform(MEAN, STD, **options, seed=5)(x, index, 2, True)):
        assert (other != whole).flatten(1).any(1).float().mean() > 0.8


def test_evaluation_only_resizes_and_normalises():
    x = pictures(3)
    y = BatchTransform(MEAN, STD, **FULL)(x, None, 0, False)
    assert torch.allclose(y, normalize(x, MEAN, STD))
    y = BatchTransform(MEAN, STD, geometry=Geometry("rrc", hflip=1.0), erasing=Erasing(1.0), size=(12, 16))(
        x, None, 0, False
    )
    expected = torch.stack([to_tensor(to_pil(i).resize((16, 12), Image.BICUBIC)) for i in x])
    assert (y - normalize(expected, MEAN, STD)).abs().max() <= 1.01 / 255 / min(STD)


@pytest.mark.parametrize(
    "build,options,message",
    [
        (Geometry, dict(crop="random"), "crop 'random'"),
        (Erasing, dict(mode="black"), "remode 'black'"),
        (Geometry, dict(hflip=1.2), r"hflip 1\.2"),
        (Geometry, dict(vflip=-0.1), r"vflip -0\.1"),
        (Erasing, dict(prob=-0.1), r"reprob -0\.1"),
        (Erasing, dict(recount=0), "recount 0"),
        (partial(BatchTransform, MEAN, STD), dict(aa="rand-x"), "aa 'rand-x'"),
    ],
)
def test_wrong_options_name_themselves(build, options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_channel_mismatch_is_an_error():
    with pytest.raises(ValueError, match="1 channels, mean has 3"):
        BatchTransform(MEAN, STD)(noise_images(C=1), None, 0, False)


# ---- random erasing


def naive_erase(u: list[float], height: int, width: int, prob, recount, area, aspect) -> list[list[int]]:
    boxes = [[0, 0, 0, 0] for _ in range(recount)]
    if u[0] >= prob:
        return boxes
    count = 1 + int(u[1] * recount)
    for k in range(count):
        v = u[2 + 22 * k : 24 + 22 * k]
        for attempt in range(10):
            target = (area[0] + (area[1] - area[0]) * v[attempt]) * height * width / count
            ratio = math.exp(math.log(aspect[0]) + (math.log(aspect[1]) - math.log(aspect[0])) * v[10 + attempt])
            h, w = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
            if w < width and h < height:
                boxes[k] = [int(v[20] * (height - h + 1)), int(v[21] * (width - w + 1)), h, w]
                break
    return boxes


@pytest.mark.parametrize("height,width,recount", [(28, 28, 1), (32, 32, 3), (9, 40, 2)])
def test_erase_boxes_equal_the_naive_loop(height, width, recount):
    u = counted_uniform(0, 0, torch.arange(300), 2 + 22 * recount)
    args = dict(prob=0.6, recount=recount, area=(0.02, 1 / 3), aspect=(0.3, 1 / 0.3))
    boxes = erase_boxes(u, height, width, Erasing(**args))
    expected = [naive_erase(row, height, width, **args) for row in u.double().tolist()]
    for mine, theirs in zip(boxes.tolist(), expected):
        assert [b if b[2] and b[3] else [0] * 4 for b in mine] == [b if b[2] and b[3] else [0] * 4 for b in theirs]


@pytest.mark.parametrize("recount", [1, 3])
def test_erased_area_and_place_have_timms_distribution(recount):
    n = 1500
    random.seed(0)
    theirs = RandomErasing(0.5, max_count=recount, device="cpu")(torch.ones(n, 1, 24, 30))[:, 0] == 0
    erasing = Erasing(0.5, "const", recount)
    ours = random_erase(torch.ones(n, 1, 24, 30), torch.arange(n), erasing, seed=0, epoch=0)[:, 0] == 0
    for statistic in (lambda m: m.sum((1, 2)), lambda m: m.any(2).sum(1), lambda m: m.any(1).sum(1)):
        a, b = statistic(ours), statistic(theirs)
        assert abs((a > 0).float().mean() - (b > 0).float().mean()) < 0.06
        assert stats.ks_2samp(a[a > 0].numpy(), b[b > 0].numpy()).pvalue > 1e-3
    # Each row and column is erased as often as timm erases it.
    assert (ours.float().mean((0, 2)) - theirs.float().mean((0, 2))).abs().max() < 0.03
    assert (ours.float().mean((0, 1)) - theirs.float().mean((0, 1))).abs().max() < 0.03


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
@pytest.mark.parametrize("recount", [1, 2])
def test_fill_of_each_mode_inside_the_boxes_and_nothing_outside(mode, recount):
    B, C, H, W = 200, 3, 20, 24
    x = torch.full((B, C, H, W), 100.0)
    index = torch.arange(B) * 7 + 1000
    erasing = Erasing(0.7, mode, recount)
    y = random_erase(x.clone(), index, erasing, seed=3, epoch=1)
    u = counted_uniform(3, 1, index, 2 + 22 * recount, 1)
    boxes = erase_boxes(u, H, W, erasing)
    erased = []
    for i in range(B):
        inside = torch.zeros(H, W, dtype=torch.bool)
        for k, (top, left, h, w) in enumerate(boxes[i].tolist()):
            inside[top : top + h, left : left + w] = True
            if k == recount - 1 and h and mode == "rand":  # the last box is on top: one colour
                patch = y[i, :, top : top + h, left : left + w].flatten(1)
                assert (patch == patch[:, :1]).all()
                erased.append(patch[:, 0])
        assert (y[i, :, ~inside] == 100).all() and (y[i, :, inside] != 100).all()
        if mode == "rand" and boxes[i, :, 2:].prod(1).sum() == inside.sum():  # no overlap: each box has its own colour
            assert y[i, 0, inside].unique().numel() == (boxes[i, :, 2] > 0).sum()
        if mode != "rand":
            erased.append(y[i, :, inside].flatten())
    values = torch.cat(erased)
    if mode == "const":
        assert (values == 0).all()
    else:
        assert stats.kstest(values.double().numpy(), "norm").pvalue > 1e-4
        assert values.unique().numel() > 0.99 * values.numel()  # fresh numbers for each pixel, or box, and sample


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_erasing_is_in_place_and_depends_on_the_sample_only(mode):
    x, index = torch.randn(40, 2, 16, 16), torch.arange(40) + 5
    erase = partial(random_erase, erasing=Erasing(0.8, mode, recount=2), seed=0, epoch=0)
    whole = x.clone()
    assert erase(whole, index) is whole
    order = torch.randperm(40)
    assert torch.equal(erase(x[order].clone(), index[order]), whole[order])
    last = x.contiguous(memory_format=torch.channels_last).clone()
    assert torch.equal(erase(last, index), whole)
