"""Noise levels, preconditioning and samplers of EDM, as pure functions.

Equation and algorithm numbers: Karras, Aittala, Aila, Laine, Elucidating the Design Space of Diffusion-Based
Generative Models, NeurIPS 2022. A denoiser is `denoise(x, i)` = D(x; sigmas[i]), an estimate of the clean x. It
takes the number of the level, because each level may have its own network, trained for that sigma only.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

from util.errors import UserError

Denoise = Callable[[torch.Tensor, int], torch.Tensor]
Callback = Callable[[int, torch.Tensor, torch.Tensor], None]  # (i, x at sigmas[i + 1], D(x; sigmas[i])) after step i


def karras_sigmas(
    n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0, *, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """n levels from sigma_max down to sigma_min, then 0: [n + 1] (eq. 5), computed in float64.

    A larger rho puts more levels near sigma_min (1 is linear). A single level (n = 1) is sigma_max.
    Raises UserError unless n >= 1, 0 < sigma_min < sigma_max < inf and rho > 0.
    """
    if n < 1:
        raise UserError(f"n {n}: noise levels must be 1 or more")
    if not 0.0 < sigma_min < sigma_max < float("inf"):
        raise UserError(f"sigma_min {sigma_min}, sigma_max {sigma_max}: must be 0 < sigma_min < sigma_max, finite")
    if not rho > 0.0:
        raise UserError(f"rho {rho}: must be positive")
    ramp = torch.linspace(0.0, 1.0, n, dtype=torch.float64)
    first, last = sigma_max ** (1.0 / rho), sigma_min ** (1.0 / rho)
    sigmas = (first + ramp * (last - first)) ** rho
    return torch.cat([sigmas, sigmas.new_zeros(1)]).to(dtype)


def precondition(sigma, sigma_data):
    """(c_skip, c_out, c_in) of D(x; sigma) = c_skip x + c_out F(c_in x) (eq. 7, table 1), for floats or tensors.

    With data of standard deviation sigma_data, F's input and its ideal output have unit variance.
    """
    total = sigma**2 + sigma_data**2
    return sigma_data**2 / total, sigma * sigma_data / total**0.5, 1.0 / total**0.5


def loss_weight(sigma, sigma_data):
    """lambda(sigma) = 1 / c_out^2: makes the expected loss of an untrained F equal at all levels (section 5)."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def sample_euler(
    denoise: Denoise, x: torch.Tensor, sigmas: torch.Tensor | Sequence[float], *, callback: Callback | None = None
) -> torch.Tensor:
    """Euler steps of the probability flow ODE dx/dsigma = (x - D(x; sigma)) / sigma (eq. 3) down to sigma = 0.

    x: at noise level sigmas[0], e.g. pure noise sigmas[0] * eps. sigmas: [n + 1], decreasing, the last 0. One denoiser
    call per step.
    """
    sigmas = _checked(sigmas)
    for i in range(len(sigmas) - 1):
        D = denoise(x, i)
        d = (x - D) / sigmas[i]
        x = x + (sigmas[i + 1] - sigmas[i]) * d
        if callback is not None:
            callback(i, x, D)
    return x


def sample_heun(
    denoise: Denoise, x: torch.Tensor, sigmas: torch.Tensor | Sequence[float], *, callback: Callback | None = None
) -> torch.Tensor:
    """Heun's second-order steps of the same ODE (algorithm 1): two denoiser calls per step, one in the last.

    The correction at sigmas[i + 1] uses denoiser i + 1, so that each is evaluated at its own level only.
    Levels must be close together: with karras_sigmas(4) and the exact denoiser of N(0, 1), x ends 3.9 times too large;
    1.18 times with 10 levels, 1.05 with 18. For fewer than about 10, use another sampler.
    """
    sigmas = _checked(sigmas)
    for i in range(len(sigmas) - 1):
        D = denoise(x, i)
        d = (x - D) / sigmas[i]
        h = sigmas[i + 1] - sigmas[i]
        x_next = x + h * d
        if sigmas[i + 1] > 0.0:  # the slope is undefined at sigma = 0, so the last step is an Euler step
            d_next = (x_next - denoise(x_next, i + 1)) / sigmas[i + 1]
            x_next = x + h * 0.5 * (d + d_next)
        x = x_next
        if callback is not None:
            callback(i, x, D)
    return x


def sample_stochastic(
    denoise: Denoise,
    x: torch.Tensor,
    sigmas: torch.Tensor | Sequence[float],
    *,
    generator: torch.Generator | None = None,
    callback: Callback | None = None,
) -> torch.Tensor:
    """Denoise fully, then add new noise of the next level; the last step returns its estimate.

    x <- D(x; sigma_i) + sqrt(sigma_{i+1}^2 - sigma_min^2) eps, where sigma_min = sigmas[-2] is the smallest level: the
    multistep sampling of Song et al., Consistency Models, ICML 2023, algorithm 1.
    """
    sigmas = _checked(sigmas)
    sigma_min = sigmas[-2]
    for i in range(len(sigmas) - 1):
        D = denoise(x, i)
        x = D
        std = max(sigmas[i + 1] ** 2 - sigma_min**2, 0.0) ** 0.5
        if std > 0.0:
            x = D + std * torch.randn(D.shape, generator=generator, device=D.device, dtype=D.dtype)
        if callback is not None:
            callback(i, x, D)
    return x


def _checked(sigmas: torch.Tensor | Sequence[float]) -> list[float]:
    """Python floats, which work with any dtype and device without promotion or synchronisation."""
    sigmas = sigmas.tolist() if isinstance(sigmas, torch.Tensor) else [float(s) for s in sigmas]
    if len(sigmas) < 2 or sigmas[-1] != 0.0 or any(not a > b for a, b in pairwise(sigmas)):
        raise UserError(f"sigmas {sigmas}: must decrease and end in 0")
    return sigmas
