"""Counted randomness against a big-integer splitmix64 and the published distribution tests."""

import math
import random

import numpy as np
import pytest
import torch
from scipy import stats

from util.seed import counted_bits, counted_normal, counted_uniform, mix, sample_rng, seed_all

M64 = 2**64


class SplitMix64:
    """The generator as its paper prints it, on Python's big integers."""

    def __init__(self, state: int):
        self.state = state % M64

    def next(self) -> int:
        self.state = (self.state + 0x9E3779B97F4A7C15) % M64
        z = self.state
        z = (z ^ z // 2**30) * 0xBF58476D1CE4E5B9 % M64
        z = (z ^ z // 2**27) * 0x94D049BB133111EB % M64
        return z ^ z // 2**31


def chained(*counters: int) -> int:
    h = 0
    for c in counters:
        h = SplitMix64(h + c).next()
    return h


def test_oracle_prints_the_published_first_outputs():
    g = SplitMix64(1234567)  # known answers of the reference C code (prng.di.unimi.it, quoted by Rosetta Code)
    assert [g.next() for _ in range(3)] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_mix_is_the_chained_hash_in_63_bits():
    for counters in ((), (0,), (0, 0), (1, 2, 3), (-1, 2**70, 5)):
        assert mix(*counters) == chained(*counters) // 2
    assert len({mix(0), mix(0, 0), mix(1, 2), mix(2, 1), mix(1, 2, 0)}) == 5


@pytest.mark.parametrize("seed,epoch,stream", [(0, 0, 0), (3, 17, 2), (2**40, 1599, 9)])
def test_bits_and_uniforms_equal_the_big_integer_generator(seed, epoch, stream):
    index = torch.tensor([0, 1, 7, 49_999, 2**31, 2**62 + 11])
    bits = counted_bits(seed, epoch, index, 5, stream)
    uniform = counted_uniform(seed, epoch, index, 5, stream)
    assert uniform.dtype == torch.float32 and uniform.shape == (6, 5)
    for row, i in enumerate(index.tolist()):
        g = SplitMix64(chained(seed, epoch, stream, i))
        for j in range(5):
            expected = g.next()
            assert int(bits[row, j]) % M64 == expected
            assert float(uniform[row, j]) == (expected >> 40) / 2**24


def test_normal_is_box_muller_of_the_two_ends_of_each_hash():
    index = torch.tensor([5, 123_456])
    z = counted_normal(1, 2, index, 7)
    bits = counted_bits(1, 2, index, 4).tolist()
    for row in range(2):
        expected = [0.0] * 8
        for j, b in enumerate(bits[row]):
            radius = math.sqrt(-2 * math.log(((b % M64 >> 40) + 0.5) / 2**24))
            angle = 2 * math.pi * (b % 2**24) / 2**24
            expected[j], expected[j + 4] = radius * math.cos(angle), radius * math.sin(angle)
        assert z[row].tolist() == pytest.approx(expected[:7], abs=2e-6)


@pytest.mark.parametrize("draw", [counted_uniform, counted_normal])
def test_a_sample_draws_the_same_whatever_its_batch_and_place(draw):
    index = torch.tensor([10, 3, 999, 42])
    whole = draw(7, 1, index, 6)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(draw(7, 1, index[order], 6), whole[order])
    assert torch.equal(draw(7, 1, index[1:2], 6), whole[1:2])


def test_seed_epoch_and_stream_change_every_number():
    index = torch.arange(100)
    base = counted_uniform(0, 0, index, 4)
    for args in ((1, 0, index, 4), (0, 1, index, 4), (0, 0, index, 4, 1)):
        assert (counted_uniform(*args) == base).float().mean() < 0.01


def test_uniforms_are_uniform_and_uncorrelated():
    u = counted_uniform(0, 5, torch.arange(20_000), 4).double()
    assert u.min() >= 0 and u.max() < 1
    for column in u.T:
        counts = torch.histc(column, 64, 0, 1).numpy()
        assert stats.chisquare(counts).pvalue > 1e-4
    assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > 1e-4
    # Between the numbers of a sample, between neighbours in the data set, and between epochs.
    following = counted_uniform(0, 6, torch.arange(20_000), 4).double()
    pairs = [(u[:, 0], u[:, 1]), (u[:-1, 0], u[1:, 0]), (u[:, 0], following[:, 0])]
    for a, b in pairs:
        assert abs(np.corrcoef(a.numpy(), b.numpy())[0, 1]) < 4 / math.sqrt(len(a))


def test_normals_are_normal_and_pairs_uncorrelated():
    z = counted_normal(0, 5, torch.arange(20_000), 4).double().numpy()
    assert stats.kstest(z.flatten(), "norm").pvalue > 1e-4
    assert np.abs(np.corrcoef(z.T) - np.eye(4)).max() < 4 / math.sqrt(20_000)


def test_index_must_be_int64_vector():
    with pytest.raises(ValueError, match=r"int64 \[B\]"):
        counted_uniform(0, 0, torch.zeros(3), 1)
    with pytest.raises(ValueError, match=r"int64 \[B\]"):
        counted_uniform(0, 0, torch.zeros(3, 1, dtype=torch.int64), 1)


def draw_all() -> tuple:
    return random.random(), float(np.random.rand()), float(torch.rand(1))


def test_seed_all_repeats_and_generators_differ():
    seed_all(1, 2, 3, 0)
    first = draw_all()
    seed_all(1, 2, 3, 0)
    assert draw_all() == first
    seed_all(1, 2, 3, 1)
    assert all(a != b for a, b in zip(draw_all(), first))
    # One Mersenne twister under all three would repeat one stream three times: compare raw words.
    seed_all(4)
    words = np.random.randint(0, 2**24, 50), (torch.rand(50) * 2**24).long().numpy()
    assert len(np.intersect1d(*words)) < 3


def test_sample_rng_depends_on_counters_only_and_leaves_no_trace():
    seed_all(0)
    before_only = draw_all(), draw_all()
    seed_all(0)
    first = draw_all()
    with sample_rng(1, 2, 3):
        inside = draw_all()
    assert (first, draw_all()) == before_only
    seed_all(99)
    with sample_rng(1, 2, 3):
        assert draw_all() == inside
    with sample_rng(1, 2, 4):
        assert all(a != b for a, b in zip(draw_all(), inside))


def test_sample_rng_restores_after_an_error():
    seed_all(0)
    expected = draw_all()
    seed_all(0)
    with pytest.raises(RuntimeError), sample_rng(1, 2, 3):
        raise RuntimeError
    assert draw_all() == expected
