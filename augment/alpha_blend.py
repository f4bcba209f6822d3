"""How much noise fine-tuning adds to a tensor, and when: DiffNoise's alpha blend and related kinds.

    z' = sqrt(abar_t) z + sqrt(1 - abar_t) eps,   eps ~ N(0, I)
    beta_i = linspace(1e-4, 0.02, 1000)_i ** power,   abar_t = prod_{i <= t} (1 - beta_i)

This is the forward process of DDPM (Ho et al., NeurIPS 2020, eq. 4) with its linear betas raised to a power. Other
kinds of noise are in augment/noise.py; for most of them the strength is the signal-to-noise ratio abar / (1 - abar).
The module has no parameters and no persistent buffers: it does not change a model's state_dict.
"""

import math
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from augment import noise
from augment.noise import Layout, ManifoldMixup, Strength
from util.choices import ANNEALS, COLOURS, NOISE_KINDS, SCHEDULES, SPACES, TOKENS, UNITS

NUM_TIMESTEPS = 1000
MAX_SNR = 200.0  # dB; float32 resolves 144


def alphas_cumprod(beta_power: float = 1.2) -> torch.Tensor:
    """abar_t for t = 0..999 as float64 [1000]; falls from 1 - 1e-4 ** power towards 0."""
    betas = torch.linspace(1e-4, 0.02, NUM_TIMESTEPS, dtype=torch.float64) ** beta_power
    return torch.cumprod(1.0 - betas, dim=0)


def decibel(ratio: float) -> float:
    """10 log10 of a ratio of powers."""
    return 10.0 * math.log10(ratio) if ratio > 0 else -math.inf


@dataclass(frozen=True)
class NoiseConfig:
    """Kind, strength, place and schedule of the noise. ValueError for values out of range.

    timestep: index t of abar, 0..999; 0 switches the noise off.
    schedule: `fixed` uses t for every sample, `uniform` draws t ~ U{1..timestep} per sample.
    prob: fraction of samples that get noise, 0..1 (of batches, for kinds without a ratio).
    anneal: over training, scale t towards 0: `none`, `linear` (1 - p) or `cosine` (1 + cos(pi p)) / 2.
    tokens: `all`, or `patches` to leave class and register tokens clean (ignored for pixels).
    space: `embedding` or `pixel`: the tensor that gets the noise (see models.vit.attach_noise).
    layer: for `embedding`, the block or blocks whose input gets the noise.
    beta_power: exponent on DDPM's betas.
    noise_eval: keep the noise in evaluation too.
    kind: a name in util/choices.py's NOISE_KINDS.
    units: `absolute` noise has variance 1 - abar; `relative` noise is scaled by the root mean square of its input, per
        sample, so that t is the same signal-to-noise ratio for every network.
    snr: that ratio in dB, in relative units, instead of timestep. The schedule and annealing use the fractional t that
        has this ratio.
    strength: the parameter of neftune (alpha), token_drop (p) or manifold_mixup (alpha), instead of timestep.
    colour: for kind `colour`: red, green or blue.
    """

    timestep: int = 15
    schedule: str = "fixed"
    prob: float = 1.0
    anneal: str = "none"
    tokens: str = "all"
    space: str = "embedding"
    layer: int | tuple[int, ...] = 0
    beta_power: float = 1.2
    noise_eval: bool = False
    kind: str = "alpha_blend"
    units: str = "absolute"
    snr: float | None = None
    strength: float | None = None
    colour: str = "red"

    def __post_init__(self) -> None:
        if not 0 <= self.timestep < NUM_TIMESTEPS:
            raise ValueError(f"alpha_blend timestep {self.timestep}: must be 0 (off) to {NUM_TIMESTEPS - 1}")
        if not 0.0 <= self.prob <= 1.0:
            raise ValueError(f"noise prob {self.prob}: must be in [0, 1]")
        if min(self.layers) < 0:
            raise ValueError(f"noise layer {self.layer}: must be 0 or more")
        if self.snr is not None and not abs(self.snr) <= MAX_SNR:
            raise ValueError(f"noise snr {self.snr}: must be in [-{MAX_SNR:g}, {MAX_SNR:g}] dB")
        choices = {
            "schedule": SCHEDULES,
            "anneal": ANNEALS,
            "tokens": TOKENS,
            "space": SPACES,
            "kind": NOISE_KINDS,
            "units": UNITS,
            "colour": COLOURS,
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"noise {name} {getattr(self, name)!r}: must be one of {', '.join(known)}")

    @property
    def words(self) -> str:
        """Kind and strength, for a run's first line and its report."""
        if self.strength is not None:
            how = f"strength {self.strength:g}"
        elif self.snr is not None:
            how = f"{self.snr:g} dB"
        else:
            how = f"t = {self.timestep} in {self.units} units"
        return f"noise {self.kind} {how}"

    @property
    def layers(self) -> tuple[int, ...]:
        return (self.layer,) if isinstance(self.layer, int) else tuple(self.layer)


class AlphaBlend(nn.Module):
    """Add noise to a tensor [B, ...] in training; does nothing in evaluation unless `noise_eval`.

    The keywords are NoiseConfig's: AlphaBlend(15), AlphaBlend(15, prob=0.5), AlphaBlend(config), AlphaBlend(snr=25.0).
    """

    signal_scale: torch.Tensor
    noise_scale: torch.Tensor
    log_ratio: torch.Tensor

    def __init__(self, config: NoiseConfig | int = 15, **keywords):
        super().__init__()
        self.config = c = replace(NoiseConfig(config) if isinstance(config, int) else config, **keywords)
        self.place(Layout())
        # Factors are computed in float64 and stored in float32: in bf16, abar_15 = 1 - 7.7e-4 would round to 1, and its
        # difference from 1 to 0.
        abar = alphas_cumprod(c.beta_power)
        self.register_buffer("signal_scale", abar.sqrt().float(), persistent=False)
        self.register_buffer("noise_scale", (1.0 - abar).sqrt().float(), persistent=False)
        self.register_buffer("log_ratio", (abar.log() - (1.0 - abar).log()).float(), persistent=False)
        self.timestep = float(c.timestep)
        if c.snr is not None:  # the fractional t that has this ratio, clipped to the table's range
            falling = self.log_ratio.double().numpy()
            self.timestep = float(np.interp(-c.snr * math.log(10) / 10, -falling, np.arange(NUM_TIMESTEPS)))
        self.measuring = False
        self.powers: torch.Tensor | None = None  # of signal and noise, float32 [2], as last measured
        self.set_progress(0.0)

    def place(self, layout: Layout) -> None:
        """Set the layout of the input tensors; called by models.vit.attach_noise."""
        self.layout, self.kind = layout, getattr(noise, NOISE_KINDS[self.config.kind])(layout, self.config.colour)

    @property
    def num_prefix_tokens(self) -> int:
        return self.layout.prefix

    @num_prefix_tokens.setter
    def num_prefix_tokens(self, number: int) -> None:
        self.place(replace(self.layout, prefix=number))

    def set_progress(self, progress: float) -> None:
        """Anneal: `progress` is the fraction of training done, 0..1."""
        c = self.config
        scales = {"none": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
        self.scale = scales[c.anneal]
        self.current_timestep = round(c.timestep * self.scale)

    @property
    def active(self) -> bool:
        c = self.config
        there = self.scale > 0 if c.snr is not None or c.strength is not None else self.current_timestep > 0
        return (self.training or c.noise_eval) and there and c.prob > 0

    def forward(self, z: torch.Tensor, layer: int = 0, generator: torch.Generator | None = None) -> torch.Tensor:
        """z [B, ...] -> noised z of the same shape and dtype (fewer tokens with token_drop). layer: block number.

        Draws from `generator`, or the global one of z's device.
        """
        c, kind = self.config, self.kind
        if not self.active or (isinstance(kind, ManifoldMixup) and layer != kind.layer):
            return z
        # Without autocast: the sum is float32, whatever the model's precision.
        x = z.float()
        clean = self.layout.prefix if x.ndim == 3 and (c.tokens == "patches" or kind.on_patches) else 0
        body = x[:, clean:]
        strength = self.strength(body, generator)
        if strength is None:
            return z
        signal, added = kind(body, strength, generator)
        if self.measuring:
            self._measure(signal, added)
        out = signal + added
        return (torch.cat([x[:, :clean], out], 1) if clean else out).to(z.dtype)

    def strength(self, x: torch.Tensor, generator: torch.Generator | None = None) -> Strength | None:
        """Strength of each sample, drawn if the schedule or prob is random; None if the batch gets no noise."""
        c, B = self.config, x.shape[0]
        per_sample = (B,) + (1,) * (x.ndim - 1)
        if c.strength is not None:
            if c.prob < 1.0 and torch.rand(()) >= c.prob:  # on the CPU, so that no step waits for the device
                return None
            one = torch.ones(per_sample, device=x.device)
            return Strength(one, one, own=c.strength * self.scale)
        signal, added = self._levels(B, x.device, generator)
        signal, added = signal.view(per_sample), added.view(per_sample)
        if c.prob < 1.0:
            keep = torch.rand(B, generator=generator, device=x.device).view(per_sample) < c.prob
            signal, added = torch.where(keep, signal, 1.0), torch.where(keep, added, 0.0)
        if c.units == "absolute" and c.snr is None:
            return Strength(signal, added)
        return Strength(signal, added, x.detach().square().flatten(1).mean(1).sqrt().view(per_sample))

    def _levels(self, B: int, device, generator) -> tuple[torch.Tensor, torch.Tensor]:
        """sqrt(abar) and sqrt(1 - abar), float32 [B]."""
        c = self.config
        if c.snr is None:
            if c.schedule == "fixed":
                t = torch.full((B,), self.current_timestep, device=device)
            else:
                t = torch.randint(1, self.current_timestep + 1, (B,), generator=generator, device=device)
            return self.signal_scale[t], self.noise_scale[t]
        if c.schedule == "fixed" and self.scale == 1.0:
            log_ratio = torch.full((B,), c.snr * math.log(10) / 10, device=device)
        else:
            t = torch.full((B,), self.timestep * self.scale, device=device)
            t = t * torch.rand(B, generator=generator, device=device) if c.schedule == "uniform" else t
            low = t.long().clamp_max(NUM_TIMESTEPS - 2)
            log_ratio = torch.lerp(self.log_ratio[low], self.log_ratio[low + 1], t - low)
        return log_ratio.sigmoid().sqrt(), (-log_ratio).sigmoid().sqrt()

    # measurement

    def measure(self) -> None:
        """Start summing the powers of signal and noise, while `measuring`."""
        self.measuring, self.powers = self.kind.has_ratio, None

    def _measure(self, signal: torch.Tensor, added: torch.Tensor) -> None:
        with torch.no_grad():
            powers = torch.stack([signal.square().mean(), added.square().mean()])
            self.powers = powers if self.powers is None else self.powers + powers

    def snr(self) -> float | None:
        """The measured ratio in dB, or None. Waits for the device."""
        self.measuring = False
        if self.powers is None:
            return None
        signal, added = self.powers.double().tolist()
        return decibel(signal / added) if added > 0 else math.inf

    def mix_targets(self, targets: torch.Tensor, num_classes: int, smoothing: float = 0.0) -> torch.Tensor:
        """manifold_mixup: draw the next forward pass's mixture; returns targets (int64 [B] or [B, C]) mixed, [B, C]."""
        kind = self.kind
        assert isinstance(kind, ManifoldMixup) and self.config.strength is not None
        if targets.ndim == 1:
            targets = F.one_hot(targets, num_classes).float() * (1.0 - smoothing) + smoothing / num_classes
        kind.partners, mixes = None, self.active and np.random.rand() < self.config.prob
        if mixes:
            alpha = self.config.strength * self.scale
            kind.lam = float(np.random.beta(alpha, alpha))
            kind.layer = int(np.random.choice(self.config.layers))
            kind.partners = torch.randperm(len(targets)).to(targets.device, non_blocking=True)
            targets = kind.lam * targets + (1.0 - kind.lam) * targets[kind.partners]
        return targets

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in asdict(self.config).items())
