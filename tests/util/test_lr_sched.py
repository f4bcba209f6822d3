import math

import pytest
import torch

from util.lr_sched import lr_at, set_lr

CURVE = dict(lr=1e-3, min_lr=1e-6, warmup_epochs=5, epochs=50)


def test_lr_follows_hand_derived_points_of_mae_curve():
    assert lr_at(0, **CURVE) == 0
    assert lr_at(2.5, **CURVE) == pytest.approx(5e-4)
    assert lr_at(5, **CURVE) == pytest.approx(1e-3)
    assert lr_at(27.5, **CURVE) == pytest.approx((1e-3 + 1e-6) / 2)  # half-way through the cosine
    assert lr_at(50, **CURVE) == pytest.approx(1e-6)
    third = 1e-6 + (1e-3 - 1e-6) * 0.5 * (1 + math.cos(math.pi / 3))
    assert lr_at(20, **CURVE) == pytest.approx(third)


def test_lr_is_continuous_at_the_end_of_warm_up():
    assert lr_at(5 - 1e-9, **CURVE) == pytest.approx(lr_at(5, **CURVE))


def test_run_that_is_all_warm_up_has_no_division_by_zero():
    assert lr_at(5, lr=1.0, min_lr=0.0, warmup_epochs=5, epochs=5) == 1.0


def test_every_parameter_group_follows_the_schedule():
    a, b = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.AdamW([{"params": [a], "lr_scale": 0.25}, {"params": [b]}], lr=1.0)
    set_lr(optimizer, 0.1)
    assert [g["lr"] for g in optimizer.param_groups] == [0.025, 0.1]
