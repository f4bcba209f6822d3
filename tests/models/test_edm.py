"""Noise levels, preconditioning and samplers against closed forms and against EDM's algorithm written out anew."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from models.edm import karras_sigmas, loss_weight, precondition, sample_euler, sample_heun, sample_stochastic

SAMPLERS = {"euler": sample_euler, "heun": sample_heun, "stochastic": sample_stochastic}
SIGMA_DATA = 0.5


def gaussian_denoiser(sigmas, sigma_data=SIGMA_DATA):
    """The exact D for data ~ N(0, sigma_data^2): the posterior mean."""
    return lambda x, i: x * sigma_data**2 / (sigma_data**2 + float(sigmas[i]) ** 2)


def ode_solution(x, sigma_from, sigma_data=SIGMA_DATA):
    """dx/dsigma = x sigma / (sigma^2 + sigma_data^2) from sigma_from to 0."""
    return x * sigma_data / math.hypot(sigma_from, sigma_data)


def test_four_karras_levels_are_the_method_s_numbers():
    sigmas = karras_sigmas(4)
    assert sigmas.dtype == torch.float32
    assert sigmas.tolist() == pytest.approx([80.0, 9.7232, 0.46998, 0.002, 0.0], rel=1e-5)


def test_karras_levels_are_equally_spaced_in_the_root():
    sigmas = karras_sigmas(18, 0.01, 50.0, rho=5.0, dtype=torch.float64)
    assert len(sigmas) == 19 and sigmas[-1] == 0.0
    assert sigmas[0].item() == pytest.approx(50.0, rel=1e-12) and sigmas[-2].item() == pytest.approx(0.01, rel=1e-12)
    roots = sigmas[:-1] ** (1 / 5)
    torch.testing.assert_close(roots.diff(), roots.diff().mean().expand(17), rtol=1e-9, atol=0)


def test_one_level_is_sigma_max():
    assert karras_sigmas(1).tolist() == [80.0, 0.0]


@pytest.mark.parametrize(
    "bad",
    [
        dict(n=0),
        dict(n=4, sigma_min=0.0),
        dict(n=4, sigma_min=2.0, sigma_max=2.0),
        dict(n=4, sigma_max=float("inf")),
        dict(n=4, sigma_min=float("nan")),
        dict(n=4, rho=0.0),
    ],
)
def test_bad_levels_are_refused_in_one_line(bad):
    with pytest.raises(ValueError) as error:
        karras_sigmas(**bad)
    assert "\n" not in str(error.value) and any(str(v) in str(error.value) for v in bad.values())


@pytest.mark.parametrize("sampler", SAMPLERS.values())
@pytest.mark.parametrize("sigmas", [[1.0], [1.0, 0.5], [0.5, 1.0, 0.0], [1.0, 1.0, 0.0], [1.0, float("nan"), 0.0]])
def test_samplers_refuse_levels_that_do_not_fall_to_zero(sampler, sigmas):
    with pytest.raises(ValueError, match="must decrease"):
        sampler(lambda x, i: x, torch.zeros(1), sigmas)


@pytest.mark.parametrize("sigma", [80.0, 9.7232, 0.46998, 0.002])
def test_preconditioning_gives_unit_input_and_unit_target_and_least_amplified_error(sigma):
    """EDM's three requirements (appendix B.6), checked as variances of independent data and noise."""
    sd = SIGMA_DATA
    c_skip, c_out, c_in = precondition(sigma, sd)
    assert c_in**2 * (sd**2 + sigma**2) == pytest.approx(1.0)  # Var[c_in (x + n)]
    target = (1 - c_skip) ** 2 * sd**2 + c_skip**2 * sigma**2  # Var[x - c_skip (x + n)]
    assert target == pytest.approx(c_out**2)
    for other in (c_skip - 1e-3, c_skip + 1e-3):  # no other c_skip leaves F less to do
        assert (1 - other) ** 2 * sd**2 + other**2 * sigma**2 > target
    assert loss_weight(sigma, sd) * c_out**2 == pytest.approx(1.0)


def test_preconditioning_of_a_tensor_is_elementwise():
    sigmas = karras_sigmas(5, dtype=torch.float64)[:-1]
    for vector, scalars in zip(precondition(sigmas, 0.7), zip(*(precondition(s.item(), 0.7) for s in sigmas))):
        torch.testing.assert_close(vector, torch.tensor(scalars, dtype=torch.float64))


@pytest.mark.parametrize("name", ["euler", "heun"])
def test_ode_samplers_converge_to_the_closed_form_at_their_order(name):
    x = torch.tensor([80.0, -31.0], dtype=torch.float64)
    exact = ode_solution(x, 80.0)

    def error(n):
        sigmas = karras_sigmas(n, dtype=torch.float64)
        return (SAMPLERS[name](gaussian_denoiser(sigmas), x, sigmas) - exact).abs().max().item()

    order = math.log2(error(128) / error(256))
    assert order == pytest.approx({"euler": 1.0, "heun": 2.0}[name], abs=0.15)
    assert error(256) < {"euler": 2e-2, "heun": 5e-4}[name]


@pytest.mark.parametrize(("n", "factor"), [(4, 3.9), (10, 1.18), (18, 1.05)])
def test_heun_overshoots_on_few_levels_by_the_factor_of_the_linear_ode(n, factor):
    """For N(0, 1) the slope is a x, a = sigma / (sigma^2 + 1): a step multiplies x by 1 + h (a + a' (1 + h a)) / 2."""
    t = karras_sigmas(n, dtype=torch.float64).tolist()
    growth = 1.0
    for s, u in pairwise(t):
        h, a, b = u - s, s / (s * s + 1), u / (u * u + 1)
        growth *= 1 + h * (a + b * (1 + h * a)) / 2 if u else 1 + h * a
    x = torch.tensor([80.0], dtype=torch.float64)
    got = sample_heun(gaussian_denoiser(t, 1.0), x, t)
    assert got.item() == pytest.approx(80.0 * growth, rel=1e-9)
    assert got.item() / ode_solution(80.0, 80.0, 1.0) == pytest.approx(factor, rel=0.01)


def test_heun_is_closer_than_euler_for_the_same_denoiser_calls():
    x = torch.tensor([80.0], dtype=torch.float64)
    exact = ode_solution(x, 80.0)
    few, many = karras_sigmas(64, dtype=torch.float64), karras_sigmas(127, dtype=torch.float64)
    heun = sample_heun(gaussian_denoiser(few), x, few)  # 64 + 63 calls
    euler = sample_euler(gaussian_denoiser(many), x, many)  # 127 calls
    assert (heun - exact).abs() < 0.25 * (euler - exact).abs()


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("n", [1, 2, 4, 18])
def test_every_sampler_lands_on_the_image_that_an_oracle_knows(name, n):
    image = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigmas = karras_sigmas(n)
    x = 80.0 * torch.randn(image.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(SAMPLERS[name](lambda y, i: image, x, sigmas), image, rtol=0, atol=1e-10)


def edm_algorithm_1(D, x, t):
    """Karras et al., algorithm 1, line by line on float64 numpy arrays. D(x, t) takes the noise level itself."""
    N = len(t) - 1
    for i in range(N):
        d_i = (x - D(x, t[i])) / t[i]
        x_next = x + (t[i + 1] - t[i]) * d_i
        if t[i + 1] != 0:
            d_prime = (x_next - D(x_next, t[i + 1])) / t[i + 1]
            x_next = x + (t[i + 1] - t[i]) * (0.5 * d_i + 0.5 * d_prime)
        x = x_next
    return x


def test_heun_agrees_with_the_published_algorithm_to_rounding():
    """A non-linear denoiser, the posterior mean of data at +-1, and EDM's own steps t_i (eq. 5) written as there."""

    def D(x, sigma):
        return np.tanh(x / sigma**2)

    n, sigma_min, sigma_max, rho = 18, 0.002, 80.0, 7.0
    i = np.arange(n, dtype=np.float64)
    t = (sigma_max ** (1 / rho) + i / (n - 1) * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    t = np.append(t, 0.0)
    x = sigma_max * np.random.default_rng(0).standard_normal(64)
    want = edm_algorithm_1(D, x, t)
    sigmas = karras_sigmas(n, sigma_min, sigma_max, rho, dtype=torch.float64)
    np.testing.assert_allclose(sigmas.numpy(), t, rtol=1e-13)
    got = sample_heun(lambda y, k: torch.tanh(y / sigmas[k] ** 2), torch.from_numpy(x), sigmas)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-10, atol=1e-12)


class Watched:
    """A denoiser that notes (level, x) of its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, i):
        self.calls.append((i, x.clone()))
        return torch.zeros_like(x)


def test_each_denoiser_is_asked_at_its_own_noise_level_only():
    """With D = 0 the ODE is dx/dsigma = x/sigma, solved exactly by every Euler step: x is x_0 sigma / sigma_0, which
    betrays the level a call is made at."""
    sigmas = karras_sigmas(4)
    start = torch.tensor([80.0], dtype=torch.float64)
    for sampler, levels in ((sample_euler, [0, 1, 2, 3]), (sample_heun, [0, 1, 1, 2, 2, 3, 3])):
        watched = Watched()
        sampler(watched, start, sigmas)
        assert [i for i, _ in watched.calls] == levels
        for i, x in watched.calls:
            assert x.item() == pytest.approx(sigmas[i].item(), rel=1e-6)


def test_stochastic_noise_has_the_next_level_s_deviation_over_sigma_min():
    sigmas = karras_sigmas(4)
    watched = Watched()
    start = 80.0 * torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    final = sample_stochastic(watched, start, sigmas, generator=torch.Generator().manual_seed(1))
    assert [i for i, _ in watched.calls] == [0, 1, 2, 3]
    for i, x in watched.calls[1:3]:
        assert x.std().item() == pytest.approx(math.sqrt(sigmas[i] ** 2 - 0.002**2), rel=0.01)
    assert torch.equal(watched.calls[3][1], torch.zeros(200_000))  # at sigma_min the estimate goes on as it is
    assert torch.equal(final, torch.zeros(200_000))


def test_stochastic_draws_in_the_precision_of_its_images():
    """Of two levels and 0, the last estimate of D(x; i) = x is x + the one noise drawn, by NumPy's sum in float64."""
    x = torch.linspace(-1, 1, 5, dtype=torch.float64)
    final = sample_stochastic(lambda x, i: x, x, [3.0, 2.0, 1.0, 0.0], generator=torch.Generator().manual_seed(2))
    drawn = torch.randn(5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert final.dtype == torch.float64
    assert np.allclose(final.numpy(), x.numpy() + math.sqrt(2.0**2 - 1.0**2) * drawn.numpy(), rtol=1e-12, atol=0)


def test_stochastic_draws_from_its_generator_only():
    sigmas = karras_sigmas(3)
    x, denoise = torch.ones(16), gaussian_denoiser(sigmas)
    before = torch.random.get_rng_state()
    first, second, other = (
        sample_stochastic(denoise, x, sigmas, generator=torch.Generator().manual_seed(s)) for s in (5, 5, 6)
    )
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("name", SAMPLERS)
def test_callback_sees_every_step_s_estimate_and_the_final_state(name):
    sigmas = karras_sigmas(4)
    denoise, seen = gaussian_denoiser(sigmas), []
    final = SAMPLERS[name](denoise, torch.full((3,), 80.0), sigmas, callback=lambda *step: seen.append(step))
    assert [i for i, _, _ in seen] == [0, 1, 2, 3]
    assert torch.equal(seen[-1][1], final)
    torch.testing.assert_close(seen[0][2], denoise(torch.full((3,), 80.0), 0))


@pytest.mark.parametrize("name", SAMPLERS)
def test_levels_do_not_change_the_dtype_of_x(name):
    sigmas = karras_sigmas(4, dtype=torch.float64)
    x = torch.ones(4, dtype=torch.float32)
    assert SAMPLERS[name](lambda y, i: 0.5 * y, x, sigmas).dtype == torch.float32
