"""What surrounds a micro-step: when ranks exchange gradients, what a group of steps counts."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from tests.harness.training import Order, new_run, new_training
from util.train.loop import Loop


class Exchanging(nn.Module):
    """Of DistributedDataParallel, what tells it to keep a micro-step's gradients to itself."""

    def __init__(self):
        super().__init__()
        self.silent = False

    @contextmanager
    def no_sync(self):
        self.silent = True
        yield
        self.silent = False


@pytest.mark.parametrize(
    "accum_iter,steps,exchanged", [(1, 3, [0, 1, 2]), (2, 5, [1, 3, 4]), (3, 7, [2, 5, 6]), (9, 4, [3])]
)
def test_ranks_exchange_gradients_in_the_last_micro_step_of_each_update_only(accum_iter, steps, exchanged):
    order, model, heard = Order(batch_size=3, steps=steps, n=3 * steps), Exchanging(), []
    loop = Loop(new_run(order, accum_iter=accum_iter), new_training(nn.Linear(1, 1)), order, ["loss"])
    for number in range(steps):
        step = loop._step(number)
        with step.exchange(model):
            if not model.silent:
                heard.append(number)
        assert step.last == (number in exchanged) and step.first == (number == 0 or number - 1 in exchanged)
    assert heard == exchanged
    with loop._step(0).exchange(torch.nn.Identity()):  # one process
        pass
