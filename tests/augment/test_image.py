"""Per-image transforms: what is loaded from a file; MAE's, the photo and the evaluation pipelines against timm's."""

import math
import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from timm.data import create_transform
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from augment.batch import normalize
from augment.image import PRESETS, Geometry, build_eval_transform, build_train_transform, open_image, to_channels
from util.seed import sample_rng

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
POLICY = "rand-m9-mstd0.5-inc1"


def photo(width: int = 75, height: int = 50) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    rgb = np.stack([128 + 100 * np.sin(x / 6), 128 + 100 * np.cos(y / 5), (x * 3 + y * 2) % 256], axis=-1)
    return Image.fromarray(rgb.astype(np.uint8))


# ---- loading


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_every_8_bit_mode_becomes_grey_or_colour(mode):
    source = photo()
    image = source.convert("RGB").convert(mode) if mode != "PA" else source.convert("P").convert("PA")
    for in_chans, target in ((1, "L"), (3, "RGB")):
        out = to_channels(image, in_chans)
        assert out.mode == target and out.size == source.size
    if mode in ("RGB", "RGBA", "CMYK"):
        assert np.array_equal(np.asarray(to_channels(image, 3)), np.asarray(source))
        assert np.array_equal(np.asarray(to_channels(image, 1)), np.asarray(source.convert("L")))


@pytest.mark.parametrize("dtype,mode", [(np.uint16, "I;16"), (np.int32, "I")])
def test_16_bit_grey_is_scaled_not_clipped(dtype, mode, tmp_path):
    levels = np.arange(256).reshape(16, 16)
    image = Image.fromarray((levels * 257).astype(dtype))
    assert image.mode == mode
    assert np.array_equal(np.asarray(to_channels(image, 1)), levels)
    if mode == "I;16":
        image.save(tmp_path / "deep.png")
        assert np.array_equal(np.asarray(open_image(tmp_path / "deep.png", 3))[..., 1], levels)


def test_float_images_count_as_0_to_1_or_0_to_255():
    levels = np.arange(256, dtype=np.float32).reshape(16, 16)
    assert np.array_equal(np.asarray(to_channels(Image.fromarray(levels), 1)), levels)
    assert np.array_equal(np.asarray(to_channels(Image.fromarray(levels / 255), 1)), levels)
    odd = np.array([[np.nan, -3.0], [300.0, 20.0]], dtype=np.float32)
    assert np.asarray(to_channels(Image.fromarray(odd), 1)).tolist() == [[0, 0], [255, 20]]


def test_transparency_is_laid_on_white():
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 0] = 200
    rgba[0, :, 3] = 0, 255, 51  # a fifth
    expected = [[[255, 255, 255], [200, 0, 0], [244, 204, 204]]]
    assert np.asarray(to_channels(Image.fromarray(rgba), 3)).tolist() == expected
    grey = np.stack([np.full((1, 3), 50, np.uint8), rgba[..., 3]], axis=-1)
    assert np.asarray(to_channels(Image.fromarray(grey), 1)).tolist() == [[255, 50, 214]]


def test_transparent_palette_entry_and_colour_key_are_white(tmp_path):
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "palette.png", transparency=0)
    assert np.asarray(open_image(tmp_path / "palette.png", 3)).tolist() == [[[255, 255, 255], [40, 50, 60]]]
    Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)).save(tmp_path / "key.png", transparency=(1, 2, 3))
    assert np.asarray(open_image(tmp_path / "key.png", 3)).tolist() == [[[255, 255, 255], [4, 5, 6]]]


@pytest.mark.parametrize(
    "orientation,turned", [(1, lambda a: a), (3, lambda a: a[::-1, ::-1]), (6, lambda a: np.rot90(a, -1))]
)
def test_exif_orientation_is_applied(orientation, turned, tmp_path):
    source = photo()
    exif = Image.Exif()
    exif[0x0112] = orientation
    source.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(np.asarray(open_image(tmp_path / "turned.png", 3)), turned(np.asarray(source)))


def test_broken_files_and_other_channel_counts_are_errors(tmp_path):
    photo().save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "half.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.jpg").write_text("no image")
    for name in ("half.png", "text.jpg"):
        with pytest.raises(OSError):
            open_image(tmp_path / name, 3)
    with pytest.raises(ValueError, match="in_chans 4"):
        open_image(tmp_path / "whole.png", 4)


# ---- training


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
@pytest.mark.parametrize("aa,jitter", [(POLICY, None), (None, 0.4), (None, None)])
def test_mae_preset_and_batch_normalisation_equal_timms_transform(aa, jitter, size):
    aspect = size[1] / size[0]
    theirs = create_transform(
        size,
        is_training=True,
        color_jitter=jitter,
        auto_augment=aa,
        interpolation="bicubic",
        mean=MEAN,
        std=STD,
        ratio=(3 / 4 * aspect, 4 / 3 * aspect),
    )
    ours = build_train_transform(size, "mae", aa=aa, color_jitter=jitter, mean=MEAN)
    image = photo()
    for index in range(20):
        with sample_rng(0, 0, index):
            expected = theirs(image)
        with sample_rng(0, 0, index):
            out = ours(image)
        assert out.dtype == torch.uint8 and out.shape == (3, *size)
        assert torch.allclose(normalize(out[None], MEAN, STD)[0], expected, atol=1e-5)


@pytest.mark.parametrize("preset,area", [("pretrain", (0.2, 1.0)), ("light", (0.08, 1.0))])
def test_crop_and_flip_presets_equal_torchvisions(preset, area):
    """MAE pretrains with torchvision's RandomResizedCrop(scale=(0.2, 1), bicubic) and a flip. timm's crop draws from
    `random` instead of torch, so the pixels are compared through the boxes that it drew."""
    ours = build_train_transform((32, 32), preset)
    image = photo()
    crop, flip = ours.transforms[0], ours.transforms[1]
    for index in range(20):
        with sample_rng(0, 0, index):
            out = ours(image)
        with sample_rng(0, 0, index):
            i, j, h, w = crop.get_params(image, area, (3 / 4, 4 / 3))
            flipped = torch.rand(1) < flip.p
        expected = image.crop((j, i, j + w, i + h)).resize((32, 32), Image.BICUBIC)
        expected = expected.transpose(Image.FLIP_LEFT_RIGHT) if flipped else expected
        assert torch.equal(out, transforms.functional.pil_to_tensor(expected))
    random.seed(0)
    torch.manual_seed(0)
    mine = np.array([crop.get_params(image, crop.scale, crop.ratio) for _ in range(1500)])
    theirs = np.array([transforms.RandomResizedCrop.get_params(image, area, (3 / 4, 4 / 3)) for _ in range(1500)])
    for column in range(4):
        assert stats.ks_2samp(mine[:, column], theirs[:, column]).pvalue > 1e-3


def test_photo_preset_moves_within_its_limits():
    """A white square's centre shows rotation, shift and zoom; without jitter the colours stay."""
    array = np.zeros((100, 100, 3), np.uint8)
    array[45:55, 45:55] = 255
    ours = build_train_transform(
        (100, 100), "photo", color_jitter=0.0, geometry=Geometry(scale=(1.0, 1.0), ratio=(1.0, 1.0)), mean=(0.0,) * 3
    )
    areas, shifts = [], []
    y, x = np.mgrid[0:100, 0:100]
    for index in range(60):
        with sample_rng(0, 0, index):
            out = ours(Image.fromarray(array)).float().mean(0).numpy() / 255
        areas.append(out.sum())
        shifts.append(((out * x).sum() / out.sum() - 49.5, (out * y).sum() / out.sum() - 49.5))
    zoom, shift = np.sqrt(np.array(areas)) / 10, np.abs(shifts)
    assert 0.88 < zoom.min() < 0.95 and 1.05 < zoom.max() < 1.12
    assert 7 < shift.max() <= 10.6


def test_photo_preset_fills_corners_with_the_mean_and_jitters_colours():
    flat = Image.new("RGB", (64, 64), (124, 116, 104))  # MEAN in levels: filled corners cannot be told from it
    plain = build_train_transform((48, 48), "photo", color_jitter=0.0, mean=MEAN)
    jittered = build_train_transform((48, 48), "photo", mean=MEAN)
    colours = []
    for index in range(30):
        with sample_rng(0, 0, index):
            out = plain(flat).int()
        assert (out - torch.tensor([124, 116, 104]).view(3, 1, 1)).abs().max() <= 12  # hue 0.05 alone
        with sample_rng(0, 0, index):
            colours.append(jittered(flat).float().mean((1, 2)))
    spread = torch.stack(colours).std(0)
    assert (spread > 10).all()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("in_chans", [1, 3])
def test_presets_give_uint8_of_the_size_and_repeat_with_the_sample(preset, in_chans):
    image = to_channels(photo(), in_chans)
    aa = POLICY if preset == "mae" else None
    transform = build_train_transform((24, 40), preset, aa=aa, mean=MEAN[:in_chans])
    transform = pickle.loads(pickle.dumps(transform))  # as workers get it where they are spawned
    out = []
    for index in (0, 1, 2, 3, 4, 5, 0):
        with sample_rng(1, 2, index):
            out.append(transform(image))
    assert all(o.shape == (in_chans, 24, 40) and o.dtype == torch.uint8 for o in out)
    assert torch.equal(out[0], out[-1])
    assert (len({o.numpy().tobytes() for o in out}) == 1) == (preset == "none")


@pytest.mark.parametrize("preset", ["mae", "photo", "light", "pretrain"])
@pytest.mark.parametrize("hflip,vflip", [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0)])
def test_flips_turn_a_ramp_exactly_when_they_are_asked_for(preset, hflip, vflip):
    ramp = np.arange(0, 120, 2, dtype=np.uint8)
    ramp = Image.fromarray(ramp[:, None] + ramp)  # rises to the right and downwards
    jitter, geometry = 0.0 if preset == "photo" else None, Geometry(hflip=hflip, vflip=vflip)
    transform = build_train_transform((20, 20), preset, geometry=geometry, color_jitter=jitter, mean=(0.5,))
    for index in range(10):
        with sample_rng(0, 0, index):
            out = transform(ramp).float()[0]
        assert (out[10, 13] > out[10, 6]) == (hflip == 0.0)
        assert (out[13, 10] > out[6, 10]) == (vflip == 0.0)


def test_scale_is_the_area_share_of_the_crop():
    """A crop of exactly a quarter of a ramp spans half of its values; the preset's own may not."""
    ramp = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8), (200, 1)))
    transform = build_train_transform((50, 50), "light", geometry=Geometry(scale=(0.25, 0.25), ratio=(1.0, 1.0)))
    for index in range(5):
        with sample_rng(0, 0, index):
            out = transform(ramp).int()[0]
        assert abs((out[25, 49] - out[25, 0]).item() - 98) <= 2  # centres of the first and last of 50 pixels, 2 wide


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(preset="strong"), "aug 'strong'"),
        (dict(preset="light", aa=POLICY), "belongs to aug mae"),
        (dict(preset="pretrain", color_jitter=0.2), r"color_jitter 0\.2"),
    ],
)
def test_wrong_options_name_themselves(options, message):
    with pytest.raises(ValueError, match=message):
        build_train_transform((32, 32), **options)


# ---- evaluation


@pytest.mark.parametrize("side,resized", [(224, 256), (192, 219), (384, 384)])
def test_evaluation_is_maes(side, resized):
    image = photo(300, 420)
    expected = transforms.Compose(
        [
            transforms.Resize(resized, interpolation=InterpolationMode.BICUBIC),
            transforms.CenterCrop(side),
            transforms.PILToTensor(),
        ]
    )(image)
    assert torch.equal(build_eval_transform((side, side))(image), expected)


@pytest.mark.parametrize("width,height", [(300, 100), (100, 300), (128, 64), (33, 20)])
def test_evaluation_at_other_shapes_covers_and_keeps_the_aspect_ratio(width, height):
    """On a gradient image the level step per pixel gives the zoom along each side, and the middle stays the middle."""
    x = np.tile(np.linspace(0, 200, width), (height, 1))
    y = np.tile(np.linspace(0, 200, height)[:, None], (1, width))
    image = Image.fromarray(np.stack([x, y, np.full_like(x, 255)], axis=-1).round().astype(np.uint8))
    out = build_eval_transform((64, 96), crop_pct=0.8)(image).float()
    assert out.shape == (3, 64, 96) and (out[2] == 255).all()  # no border was added
    zoom_x = 200 / (width - 1) / ((out[0, 32, 80] - out[0, 32, 16]) / 64)
    zoom_y = 200 / (height - 1) / ((out[1, 52, 48] - out[1, 12, 48]) / 40)
    expected = max(80 / height, 120 / width)
    assert zoom_x == pytest.approx(expected, rel=0.06) and zoom_y == pytest.approx(expected, rel=0.06)
    assert out[0, 32, 47:49].mean() == pytest.approx(100, abs=2)
    assert out[1, 31:33, 48].mean() == pytest.approx(100, abs=2)


def test_crop_pct_out_of_range_is_an_error():
    with pytest.raises(ValueError, match=r"crop_pct 1\.5"):
        build_eval_transform((32, 32), crop_pct=1.5)


@pytest.mark.parametrize("preset", ["mae", "light", "pretrain", "photo"])
def test_wide_inputs_are_cropped_wide_not_stretched(preset):
    """A square drawn in the image stays a square on average: its width and height shrink alike."""
    image = Image.new("L", (400, 200))
    image.paste(255, (160, 60, 240, 140))
    transform = build_train_transform((100, 200), preset, mean=(0.0,), geometry=Geometry(scale=(0.7, 1.0)))
    logs = []
    for seed in range(60):
        random.seed(seed), torch.manual_seed(seed), np.random.seed(seed)
        bright = transform(image)[0] > 128
        logs.append(math.log(bright.any(0).sum().item() / bright.any(1).sum().item()))
    assert abs(np.mean(logs)) < 0.1  # square crops would give log 2
