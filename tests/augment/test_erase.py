"""Random erasing of batches against timm's RandomErasing and a naive loop."""

import math
import random

import pytest
import torch
from scipy import stats
from timm.data.random_erasing import RandomErasing

from augment.batch import erase_boxes, random_erase
from util.seed import counted_uniform


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
    boxes = erase_boxes(u, height, width, **args)
    expected = [naive_erase(row, height, width, **args) for row in u.double().tolist()]
    for mine, theirs in zip(boxes.tolist(), expected):
        assert [b if b[2] and b[3] else [0] * 4 for b in mine] == [b if b[2] and b[3] else [0] * 4 for b in theirs]


@pytest.mark.parametrize("recount", [1, 3])
def test_erased_area_and_place_have_timms_distribution(recount):
    n = 1500
    random.seed(0)
    theirs = RandomErasing(0.5, max_count=recount, device="cpu")(torch.ones(n, 1, 24, 30))[:, 0] == 0
    args = dict(seed=0, epoch=0, prob=0.5, mode="const", recount=recount)
    ours = random_erase(torch.ones(n, 1, 24, 30), torch.arange(n), **args)[:, 0] == 0
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
    args = dict(seed=3, epoch=1, prob=0.7, recount=recount)
    y = random_erase(x.clone(), index, mode=mode, **args)
    u = counted_uniform(3, 1, index, 2 + 22 * recount, 1)
    boxes = erase_boxes(u, H, W, prob=0.7, recount=recount, area=(0.02, 1 / 3), aspect=(0.3, 1 / 0.3))
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
    args = dict(seed=0, epoch=0, prob=0.8, mode=mode, recount=2)
    whole = x.clone()
    assert random_erase(whole, index, **args) is whole
    order = torch.randperm(40)
    assert torch.equal(random_erase(x[order].clone(), index[order], **args), whole[order])
    last = x.contiguous(memory_format=torch.channels_last).clone()
    assert torch.equal(random_erase(last, index, **args), whole)
