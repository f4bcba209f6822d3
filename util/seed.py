"""Counted randomness: every random number is a hash of counters (seed, epoch, index, ...), not of earlier draws.

So a sample gets the same numbers after a resume, and for any number of workers and ranks.
The hash is splitmix64 (Steele, Lea, Flood, Fast Splittable Pseudorandom Number Generators, OOPSLA 2014).
"""

import math
import random
from contextlib import contextmanager

import numpy as np
import torch
from numpy.random.mtrand import get_bit_generator, set_bit_generator

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: the generator's step
_MUL1, _MUL2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _finalise(z: int) -> int:
    """splitmix64's output function: a bijection of 64-bit integers."""
    z = ((z ^ (z >> 30)) * _MUL1) & _MASK
    z = ((z ^ (z >> 27)) * _MUL2) & _MASK
    return z ^ (z >> 31)


def _chain(*counters: int) -> int:
    h = 0
    for c in counters:
        h = _finalise((h + _GAMMA + c) & _MASK)
    return h


def mix(*counters: int) -> int:
    """Hash integers of any sign into one integer 0 .. 2^63 - 1; order matters, (0,) differs from (0, 0)."""
    return _chain(*counters) >> 1


def _seed_cpu(key: int) -> None:
    random.seed(key)
    # numpy and torch seed a Mersenne twister from 32 bits in the same way: with equal halves they would produce the
    # same stream.
    np.random.seed((key >> 31) & 0xFFFFFFFF)
    # Not torch.manual_seed: before CUDA is initialised it queues a callback per call, which is never freed.
    torch.default_generator.manual_seed(key & 0xFFFFFFFF)


def seed_all(*counters: int) -> None:
    """Seed random, numpy (legacy), torch on the CPU and on the current CUDA or MPS device with mix(*counters)."""
    key = mix(*counters)
    _seed_cpu(key)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.manual_seed(key)
    elif torch.backends.mps.is_available():
        torch.mps.manual_seed(key)


_numpy_spare = np.random.MT19937(0)


@contextmanager
def sample_rng(seed: int, epoch: int, index: int):
    """Seed the CPU generators of random, numpy and torch by the counters, for one sample's augmentation; restore them
    afterwards. About 50 microseconds.

    Not thread-safe: the generators belong to the process.
    """
    # numpy copies its state element by element (100 us): swap np.random's generator instead. This only loses the second
    # normal of a pair that np.random.randn may have kept for its next call.
    numpy_before = get_bit_generator()
    random_before, torch_before = random.getstate(), torch.default_generator.get_state()
    try:
        set_bit_generator(_numpy_spare)
        _seed_cpu(mix(seed, epoch, index))
        yield
    finally:
        set_bit_generator(numpy_before)
        random.setstate(random_before)
        torch.default_generator.set_state(torch_before)


def _signed(z: int) -> int:
    """The int64 with the same bits: torch has no arithmetic for uint64."""
    z &= _MASK
    return z - (1 << 64) if z >> 63 else z


def _shift_right(z: torch.Tensor, k: int) -> torch.Tensor:
    return (z >> k).bitwise_and_((1 << (64 - k)) - 1)  # torch's >> of int64 shifts the sign bit in


def _finalise_tensor(z: torch.Tensor) -> torch.Tensor:
    z = (z ^ _shift_right(z, 30)).mul_(_signed(_MUL1))  # int64 products wrap modulo 2^64
    z = z.bitwise_xor_(_shift_right(z, 27)).mul_(_signed(_MUL2))
    return z.bitwise_xor_(_shift_right(z, 31))


def counted_bits(seed: int, epoch: int, index: torch.Tensor, n: int, stream: int = 0) -> torch.Tensor:
    """Hashes as int64 [B, n]: row b is splitmix64's sequence from the state (seed, epoch, stream, index[b])."""
    if index.dtype != torch.int64 or index.ndim != 1:
        raise ValueError(f"index: must be int64 [B], got {index.dtype} {list(index.shape)}")
    state = _finalise_tensor(index + _signed(_chain(seed, epoch, stream) + _GAMMA))
    steps = torch.arange(1, n + 1, device=index.device) * _signed(_GAMMA)
    return _finalise_tensor(state[:, None] + steps)


def counted_uniform(seed: int, epoch: int, index: torch.Tensor, n: int, stream: int = 0) -> torch.Tensor:
    """float32 [B, n] in [0, 1), multiples of 2^-24, on index's device and bit-equal on every device.

    index: int64 [B], sample numbers in the data set. `stream` separates uses within one epoch.
    """
    return _shift_right(counted_bits(seed, epoch, index, n, stream), 40).float().mul_(2.0**-24)


def counted_normal(seed: int, epoch: int, index: torch.Tensor, n: int, stream: int = 0) -> torch.Tensor:
    """float32 [B, n] from N(0, 1), |value| < 5.9; equal on every device up to its rounding of log and cos.

    Box-Muller: each 64-bit hash gives two 24-bit uniforms, and these give two normals.
    """
    bits = counted_bits(seed, epoch, index, (n + 1) // 2, stream)
    u = _shift_right(bits, 40).float().add_(0.5).mul_(2.0**-24)  # in (0, 1]: the logarithm stays finite
    angle = (bits & 0xFFFFFF).float().mul_(2.0**-24 * 2 * math.pi)
    radius = u.log_().mul_(-2.0).sqrt_()
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :n]
