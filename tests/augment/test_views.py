"""The 12 saccadic views one by one: which pixels, in which order, against coordinates derived by hand and Pillow."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from augment.views import saccadic_views
from util.choices import VIEW_NAMES

NAMES = list(VIEW_NAMES)


def gradient(width: int, height: int) -> Image.Image:
    """Red counts the columns and green the rows, from 20 at the first to 220 at the last; blue is 255."""
    x = np.tile(np.linspace(20, 220, width), (height, 1))
    y = np.tile(np.linspace(20, 220, height)[:, None], (1, width))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 255)], axis=-1).round().astype(np.uint8))


def picture(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (height // 12, width // 12, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.BICUBIC)


def seen_at(view: str, h: int, w: int, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Source coordinates in pixels (centres at .5) that the view's h x w pixels should show, from the definition."""
    y, x = np.mgrid[0:h, 0:w] + 0.5
    target_h, target_w = (h + 32, w + 32) if view.startswith("centre") else (round(1.15 * h), round(1.15 * w))
    zoom = max(target_h / height, target_w / width)
    wide, tall = zoom * width, zoom * height
    if view.endswith("mirror"):
        x = w - x
    if view.startswith("rotate"):
        # The content turns counter-clockwise by 10 degrees: what is seen right of the middle came from below it.
        angle = math.radians(10 if view == "rotate_left" else -10)
        dx, dy = x - w / 2, y - h / 2
        x = w / 2 + dx * math.cos(angle) - dy * math.sin(angle)
        y = h / 2 + dx * math.sin(angle) + dy * math.cos(angle)
    left, top = (wide - w) / 2, (tall - h) / 2
    if "left" in view.split("_")[1:] and "rotate" not in view:
        left = 0.0
    elif "right" in view.split("_")[1:] and "rotate" not in view:
        left = wide - w
    if view.startswith("top"):
        top = 0.0
    elif view.startswith("bottom"):
        top = tall - h
    return (x + left) / zoom, (y + top) / zoom


@pytest.mark.parametrize("width,height", [(300, 225), (150, 240), (200, 200), (60, 50)])
@pytest.mark.parametrize("size", [(96, 96), (64, 96)])
@pytest.mark.parametrize("view", [n for n in NAMES if n not in ("bright", "blur")])
def test_view_shows_the_coordinates_of_its_definition(view, size, width, height):
    h, w = size
    out = saccadic_views(gradient(width, height), size, [NAMES.index(view)])[0].numpy().astype(float)
    x, y = seen_at(view, h, w, width, height)
    # Half a pixel inside the image; beyond, the border repeats.
    inside = (x > 1.5) & (x < width - 1.5) & (y > 1.5) & (y < height - 1.5)
    assert inside.mean() > 0.9
    zoom = max((h + 32) / height, (w + 32) / width)
    # One output pixel of crop rounding, and the source's and the result's rounding to levels.
    for channel, position, length in ((0, x, width), (1, y, height)):
        expected = 20 + 200 * (position - 0.5) / (length - 1)
        error = np.abs(out[channel] - expected)[inside]
        assert error.max() < 200 / (length - 1) / zoom + 1.5
        assert abs((out[channel] - expected)[inside].mean()) < 200 / (length - 1) / zoom + 0.6
    assert (out[2] == 255).all()  # no black corner or border anywhere


def pillow_view(view: str, image: Image.Image, side: int) -> Image.Image:
    """The slow way: one Pillow and torchvision pass for this view alone."""
    small = transforms.Resize(side + 32, InterpolationMode.BICUBIC)
    large = transforms.Resize(round(1.15 * side), InterpolationMode.BICUBIC)
    centre = transforms.CenterCrop(side)
    corners = {"top_left": 0, "top_right": 1, "bottom_left": 2, "bottom_right": 3}
    if view in corners:
        return TF.five_crop(large(image), [side, side])[corners[view]]
    if view.startswith("rotate"):
        angle = 10 if view == "rotate_left" else -10
        return centre(large(image).rotate(angle, Image.BILINEAR))
    out = centre(large(image)) if view.startswith("large") else centre(small(image))
    if view.endswith("mirror"):
        out = out.transpose(Image.FLIP_LEFT_RIGHT)
    if view == "bright":
        out = ImageEnhance.Contrast(ImageEnhance.Brightness(out).enhance(1.2)).enhance(1.2)
    if view == "blur":
        out = TF.gaussian_blur(out, [3, 3], [0.5, 0.5])
    return out


@pytest.mark.parametrize("view", NAMES)
@pytest.mark.parametrize("width,height,side", [(300, 225, 96), (170, 260, 97)])  # even and odd margins of the crop
def test_view_equals_a_pillow_pass_of_its_own(view, width, height, side):
    image = picture(width, height)
    out = saccadic_views(image, side, [NAMES.index(view)])[0].int()
    expected = TF.pil_to_tensor(pillow_view(view, image, side)).int()
    difference = (out - expected).abs().float()
    if view.startswith("rotate"):  # Pillow leaves the corners black: compare the disc that has no such corners
        y, x = np.mgrid[0:side, 0:side] - (side - 1) / 2
        difference = difference[:, torch.from_numpy(np.hypot(x, y) < side / 2)]
    # torch resizes 8-bit images with 16-bit weights; contrast and brightness multiply that by 1.44. Pillow's
    # rotation cuts fractions of a level off where ours rounds: half a level on average.
    assert difference.max() <= 3 and difference.mean() < (0.55 if view.startswith("rotate") else 0.1)


def test_brightness_and_contrast_are_pillows_on_the_centre_view():
    for image in (picture(200, 150), picture(200, 150).convert("L")):
        centre, bright = saccadic_views(image, 64, [0, NAMES.index("bright")])
        centre = Image.fromarray(centre.permute(1, 2, 0).squeeze(-1).contiguous().numpy())
        expected = ImageEnhance.Contrast(ImageEnhance.Brightness(centre).enhance(1.2)).enhance(1.2)
        assert torch.equal(bright, TF.pil_to_tensor(expected))


def test_blur_is_torchvisions_on_the_centre_view():
    centre, blurred = saccadic_views(picture(200, 150), 64, [0, NAMES.index("blur")])
    expected = TF.gaussian_blur(centre, [3, 3], [0.5, 0.5])
    assert (blurred.int() - expected.int()).abs().max() <= 1
    assert (blurred != expected).float().mean() < 0.001 and not torch.equal(blurred, centre)


def test_mirrors_are_exact_and_all_views_differ():
    views = saccadic_views(picture(300, 225), 64)
    assert views.shape == (12, 3, 64, 64) and views.dtype == torch.uint8 and views.is_contiguous()
    assert torch.equal(views[1], views[0].flip(-1)) and torch.equal(views[3], views[2].flip(-1))
    assert len({v.numpy().tobytes() for v in views}) == 12


def test_corners_come_in_reading_order():
    quadrants = np.zeros((200, 200, 3), np.uint8)
    quadrants[:100, :100, 0] = quadrants[:100, 100:, 1] = quadrants[100:, :100, 2] = 200
    quadrants[100:, 100:] = 200
    views = saccadic_views(Image.fromarray(quadrants), 100, [7, 8, 9, 10])
    outer = [views[0, :, 0, 0], views[1, :, 0, -1], views[2, :, -1, 0], views[3, :, -1, -1]]
    assert [c.tolist() for c in outer] == [[200, 0, 0], [0, 200, 0], [0, 0, 200], [200, 200, 200]]
    # Each corner view reaches L/2 = 57.5 pixels into its own quadrant of L, so that one fills most of it.
    share = [(views[i].permute(1, 2, 0) == outer[i]).all(-1).float().mean() for i in range(4)]
    assert all(s == pytest.approx(0.575**2, abs=0.02) for s in share)


def test_subset_and_order_follow_the_list():
    image = picture(150, 200)
    everything = saccadic_views(image, 48)
    for views in ([0], [11, 0, 4], [4, 4], range(7, 11), (2,)):
        assert torch.equal(saccadic_views(image, 48, views), everything[list(views)])


def test_pil_and_tensor_input_are_the_same_and_stay_as_they_are():
    image = picture(150, 200)
    tensor = TF.pil_to_tensor(image)
    before = tensor.clone()
    assert torch.equal(saccadic_views(tensor, 48), saccadic_views(image, 48))
    assert torch.equal(tensor, before) and torch.equal(saccadic_views(tensor, 48), saccadic_views(tensor, 48))
    single = saccadic_views(image.convert("L"), (40, 56))
    assert single.shape == (12, 1, 40, 56)


def test_a_given_centre_is_used_for_its_views():
    image, centre = picture(150, 200), saccadic_views(picture(120, 90), 48, [0])[0]
    views, own = saccadic_views(image, 48, centre=centre), saccadic_views(image, 48)
    pil = TF.to_pil_image(centre)
    bright = ImageEnhance.Contrast(ImageEnhance.Brightness(pil).enhance(1.2)).enhance(1.2)
    assert torch.equal(views[0], centre) and torch.equal(views[1], centre.flip(-1))
    assert torch.equal(views[6], TF.pil_to_tensor(bright))
    assert (views[11].int() - TF.gaussian_blur(centre, [3, 3], [0.5, 0.5]).int()).abs().max() <= 1
    from_large = [2, 3, 4, 5, 7, 8, 9, 10]
    assert torch.equal(views[from_large], own[from_large]) and not torch.equal(views[0], own[0])


def test_wrong_arguments_are_errors():
    image = picture(150, 200)
    for views in ([], [12], [-1], ["centre"]):
        with pytest.raises(ValueError, match="views"):
            saccadic_views(image, 48, views)
    with pytest.raises(ValueError, match="mode RGBA"):
        saccadic_views(image.convert("RGBA"), 48)
    with pytest.raises(ValueError, match="must be uint8"):
        saccadic_views(torch.rand(3, 60, 60), 48)
