"""Grids of pictures: pixels where they belong, in the right colours, with the right numbers below."""

import numpy as np
import pytest
import torch
from PIL import Image

from augment.batch import normalize
from models.noprop_mae import NoPropMAE
from util.report import pictures
from util.report.pictures import (
    denormalize,
    draw_grid,
    heat_overlay,
    image_grid,
    pixel_mask,
    psnr,
    reconstruction_grid,
    to_pixels,
)

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def uint8_images(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def find_tile(canvas: np.ndarray, tile: np.ndarray) -> tuple[int, int]:
    """(top, left) of the only place where `tile` stands in `canvas`."""
    h, w = tile.shape[:2]
    ys, xs = np.nonzero((canvas[: len(canvas) - h + 1, : canvas.shape[1] - w + 1] == tile[0, 0]).all(-1))
    places = [(y, x) for y, x in zip(ys, xs) if (canvas[y : y + h, x : x + w] == tile).all()]
    assert len(places) == 1
    return places[0]


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_survive_normalisation_and_back(channels):
    images = uint8_images(4, channels, 6, 10)
    mean, std = MEAN[:channels], STD[:channels]
    pixels = to_pixels(normalize(images, mean, std), mean, std)
    assert pixels.shape == (4, 6, 10, 3)
    assert np.array_equal(pixels, images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy())


def test_values_beyond_black_and_white_are_clipped():
    x = torch.tensor([-50.0, 0.0, 50.0]).view(1, 1, 1, 3)
    assert torch.equal(denormalize(x, (0.5,), (0.25,)).flatten(), torch.tensor([0.0, 0.5, 1.0]))
    with pytest.raises(ValueError, match="1 channels, mean has 3"):
        denormalize(x, MEAN, STD)


def test_psnr_by_hand():
    a = torch.zeros(3, 1, 4, 4)
    b = a.clone()
    b[0] += 0.1  # 20 dB everywhere
    b[1, :, :, :2] = 1.0  # half of the pixels wrong by the whole range: 10 log10(2) dB
    assert psnr(a, b).tolist() == pytest.approx([20.0, 10 * np.log10(2), np.inf])
    assert psnr(a * 255, b * 255, 255.0).tolist() == pytest.approx(psnr(a, b).tolist())
    left = torch.zeros(3, 1, 4, 4, dtype=torch.bool)
    left[..., :2] = True
    assert psnr(a, b, 1.0, left).tolist() == pytest.approx([20.0, 0.0, np.inf])
    assert psnr(a, b, 1.0, ~left).tolist() == pytest.approx([20.0, np.inf, np.inf])


def test_pixel_mask_covers_the_patches_that_the_model_hides():
    net = NoPropMAE(
        img_size=(8, 20),
        patch_size=4,
        in_chans=3,
        embed_dim=12,
        depth=1,
        num_heads=1,
        decoder_embed_dim=4,
        decoder_depth=1,
        decoder_num_heads=1,
        T=1,
    )
    mask = torch.rand(5, 10, generator=torch.Generator().manual_seed(0)).round()
    by_model = net.unpatchify(mask[..., None].expand(-1, -1, 48))
    assert torch.equal(pixel_mask(mask, 8, 20).expand(-1, 3, -1, -1).float(), by_model)
    with pytest.raises(ValueError, match="do not tile"):
        pixel_mask(mask, 9, 20)


def test_every_image_stands_in_its_row_and_column_with_square_pixels(tmp_path):
    columns = [normalize(uint8_images(2, 3, 8, 16).roll(k, 0) // (k + 1), MEAN, STD) for k in range(4)]
    path = tmp_path / "grid.png"
    out = {"masked": columns[1], "steps": [columns[2]], "final": columns[3]}
    grid = reconstruction_grid(columns[0], out, MEAN, STD, str(path), [80.0])
    assert grid.dtype == np.uint8 and np.array_equal(np.asarray(Image.open(path)), grid)
    places = [
        [find_tile(grid, to_pixels(c, MEAN, STD)[row].repeat(6, axis=0).repeat(6, axis=1)) for c in columns]
        for row in range(2)
    ]
    for row in range(2):
        assert len({y for y, _ in places[row]}) == 1
        assert [x for _, x in places[row]] == sorted(x for _, x in places[row])
        assert [x for _, x in places[row]] == [x for _, x in places[0]]
    assert places[1][0][0] >= places[0][0][0] + 48


def test_titles_name_the_sigmas_and_captions_the_psnr_of_hidden_patches(monkeypatch):
    drawn = {}
    monkeypatch.setattr(pictures, "draw_grid", lambda rows, path, **text: drawn.update(text))
    mean, std = (0.25,), (0.5,)
    originals = torch.zeros(1, 1, 8, 8)  # pixels of 0.25
    step, final = originals + 100.0, originals + 0.2  # clipped to 1: off by 0.75; off by 0.1
    step[..., :4], final[..., :4] = 0.0, 0.0
    mask = torch.tensor([[0.0, 1.0, 0.0, 1.0]])
    out = {"masked": originals, "steps": [step, final], "final": final, "mask": mask}
    reconstruction_grid(originals, out, mean, std, None, [80.0, 0.002])
    assert drawn["titles"] == ["original", "masked", "σ = 80", "σ = 0.002", "final"]
    assert drawn["captions"] == [["", "PSNR of masked:", "2.5 dB", "20.0 dB", "20.0 dB"]]
    with pytest.raises(ValueError, match="1 for 2 steps"):
        reconstruction_grid(originals, out, mean, std, None, ["one"])


def test_large_images_keep_their_size_and_long_titles_widen_the_columns():
    image = uint8_images(120, 100, 3).numpy()
    plain, titled = draw_grid([[image]], None), draw_grid([[image]], None, titles=["a title of many words, too many"])
    find_tile(plain, image)
    find_tile(titled, image)
    assert titled.shape[1] > plain.shape[1]


def test_image_grid_breaks_rows_and_leaves_the_rest_white():
    images = normalize(uint8_images(5, 3, 96, 96), MEAN, STD)
    grid = image_grid(images, MEAN, STD, None, columns=3)
    tops = [find_tile(grid, tile)[0] for tile in to_pixels(images, MEAN, STD)]
    assert tops[0] == tops[1] == tops[2] < tops[3] == tops[4]
    assert (grid[tops[3] :, -96:] == 255).all()


def test_heat_is_brightest_where_attention_is_and_survives_a_flat_map():
    pixels = np.full((2, 8, 8, 3), 128, dtype=np.uint8)
    maps = torch.rand(2, 2, 2, generator=torch.Generator().manual_seed(0)) * 1e-3
    maps[1] = 0.25  # the same everywhere
    overlay = heat_overlay(pixels, maps)
    brightness = overlay[0].astype(int).sum(-1)[::4, ::4]
    assert np.array_equal(brightness.flatten().argsort(), maps[0].flatten().argsort().numpy())
    assert (overlay[0, :4, :4] == overlay[0, 0, 0]).all()  # a patch is one colour
    assert (overlay[1] == overlay[1, 0, 0]).all()
