"""Kinds of noise; augment/alpha_blend.py sets the strength, models/vit.py the place.

A kind is called with x float32 [B, ...], the tokens, maps or pixels that get noise, and a Strength. It returns signal
and noise, whose sum is the output. So the ratio of their powers,

    10 log10(E|signal|^2 / E|noise|^2)   in dB,

is known for each kind, and kinds can be compared at the same ratio. In relative units the noise has `scale` = rms(x),
the sample's root mean square over tokens and channels, so that a strength is the same ratio for any x; in absolute
units scale = 1.

A new kind is a class here and an entry of NOISE_KINDS in util/choices.py.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from einops import rearrange


@dataclass(frozen=True)
class Strength:
    """How much noise each sample gets. signal, noise: sqrt(abar) and sqrt(1 - abar), float32 [B, 1, ...]; the ratio is
    abar / (1 - abar). scale: of the noise, 1 or [B, 1, ...]. own: the kind's parameter, if it has one."""

    signal: torch.Tensor
    noise: torch.Tensor
    scale: torch.Tensor | float = 1.0
    own: float | None = None

    @property
    def sigma(self) -> torch.Tensor:
        """Standard deviation of noise added to the unscaled signal: sqrt((1 - abar) / abar) scale."""
        return self.noise / self.signal * self.scale


@dataclass(frozen=True)
class Layout:
    """The axes of a network's tensor: [B, N, D], with `prefix` tokens before a `grid` of rows x columns (None if
    unknown); [B, C, H, W]; or, with channels_last, [B, H, W, C]."""

    prefix: int = 0
    grid: tuple[int, int] | None = None
    channels_last: bool = False
    tokens: bool = False  # a plain sequence of patches, so that some can be left out


Parts = tuple[torch.Tensor, torch.Tensor]


class Kind(ABC):
    """A kind. has_ratio: the strength is a ratio of powers, else a parameter. on_patches: not on prefixes."""

    has_ratio = True
    on_patches = False

    def __init__(self, layout: Layout, colour: str = "red"):
        self.layout, self.colour = layout, colour

    @abstractmethod
    def __call__(self, x: torch.Tensor, s: Strength, generator: torch.Generator | None = None) -> Parts:
        """(signal, noise), float32; see the top of this file."""


def normal(x: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """eps ~ N(0, I) of x's shape, float32."""
    return torch.randn(x.shape, generator=generator, device=x.device, dtype=torch.float32)


class AlphaBlended(Kind):
    """sqrt(abar) x + sqrt(1 - abar) eps: the forward process of DDPM (Ho et al., NeurIPS 2020, eq. 4)."""

    def __call__(self, x, s, generator=None):
        return s.signal * x, s.noise * s.scale * normal(x, generator)


class Additive(Kind):
    """x + sigma eps."""

    def __call__(self, x, s, generator=None):
        return x, s.sigma * normal(x, generator)


class Multiplicative(Kind):
    """x (1 + sigma eps): Gaussian dropout (Srivastava et al., JMLR 2014, section 10). It scales with x in any units."""

    def __call__(self, x, s, generator=None):
        return x, x * (s.noise / s.signal) * normal(x, generator)


class Uniform(Kind):
    """x + a u, u ~ U(-1, 1): with a = sigma sqrt(3), Additive's power."""

    def __call__(self, x, s, generator=None):
        u = torch.rand(x.shape, generator=generator, device=x.device, dtype=torch.float32)
        return x, math.sqrt(3.0) * s.sigma * (2.0 * u - 1.0)


class Neftune(Kind):
    """x + alpha / sqrt(L d) u, u ~ U(-1, 1), for L tokens of d values (Jain et al., NEFTune, ICLR 2024).

    The parameter is alpha, 5 to 15 in the paper. At a given ratio it equals Uniform: alpha = sqrt(3 L d) sigma.
    """

    def __call__(self, x, s, generator=None):
        if s.own is None:
            return Uniform.__call__(self, x, s, generator)  # type: ignore[arg-type]
        u = torch.rand(x.shape, generator=generator, device=x.device, dtype=torch.float32)
        return x, s.own / math.sqrt(x[0].numel()) * (2.0 * u - 1.0)


class TokenDrop(Kind):
    """Leaves out a share p (the parameter) of patch tokens, equally many of each sample (timm's PatchDropout)."""

    has_ratio, on_patches = False, True

    def __call__(self, x, s, generator=None):
        B, N, D = x.shape
        keep = max(1, round(N * (1.0 - s.own)))
        order = torch.rand(B, N, generator=generator, device=x.device).argsort(1)[:, :keep].sort(1).values
        kept = x.gather(1, order[..., None].expand(-1, -1, D))
        return kept, torch.zeros_like(kept)


class ManifoldMixup(Kind):
    """lambda x_b + (1 - lambda) x_pi(b), and targets likewise (Verma et al., ICML 2019); lambda ~ Beta(alpha, alpha).

    The parameter is alpha. AlphaBlend.mix_targets draws lambda and the partners before the forward pass.
    """

    has_ratio = False
    lam, layer = 1.0, 0
    partners: torch.Tensor | None = None

    def __call__(self, x, s, generator=None):
        if self.partners is None:
            return x, torch.zeros_like(x)
        return self.lam * x, (1.0 - self.lam) * x[self.partners]


class Coloured(Kind):
    """x + sigma eps, the power of eps over the patch grid following f^k: red k = -1, blue k = 1, green a band of f.

    f: distance from frequency 0 in cycles per grid; each channel has independent noise of unit variance.
    """

    on_patches = True

    def __call__(self, x, s, generator=None):
        eps = normal(x, generator)
        if x.ndim == 3:
            assert self.layout.grid is not None  # checked by models.vit.attach_noise
            rows, columns = self.layout.grid
            eps = rearrange(eps, "b (r c) d -> b d r c", r=rows, c=columns)
        elif self.layout.channels_last:
            eps = rearrange(eps, "b r c d -> b d r c")
        weight = spectrum(eps.shape[-2], eps.shape[-1], self.colour, x.device)
        eps = torch.fft.ifft2(torch.fft.fft2(eps) * weight).real
        if x.ndim == 3:
            eps = rearrange(eps, "b d r c -> b (r c) d")
        elif self.layout.channels_last:
            eps = rearrange(eps, "b d r c -> b r c d")
        return x, s.sigma * eps


def spectrum(rows: int, columns: int, colour: str, device) -> torch.Tensor:
    """Factors [rows, columns] for the Fourier transform of white noise; the variance stays 1."""
    fy, fx = (torch.fft.fftfreq(n, device=device)[shape] for n, shape in ((rows, (..., None)), (columns, (None, ...))))
    f = (fy.square() + fx.square()).sqrt()
    # Frequency 0 counts as the next higher one, so that red noise has finite power there.
    f = f.clamp_min(1.0 / max(rows, columns))
    if colour == "green":
        power = ((f > f.max() / 4) & (f <= f.max() / 2)).float()
    else:
        power = f ** {"red": -1.0, "blue": 1.0}[colour]
    if not power.any():  # a grid too small for the band
        power = torch.ones_like(power)
    return (power / power.mean()).sqrt()
