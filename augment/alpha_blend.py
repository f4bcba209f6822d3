"""DiffNoise: alpha-blended diffusion noise on a model's embeddings (or pixels) during fine-tuning.

    z' = sqrt(abar_t) z + sqrt(1 - abar_t) eps,   eps ~ N(0, I)
    beta_i = linspace(1e-4, 0.02, 1000)_i ** power,   abar_t = prod_{i <= t} (1 - beta_i)

The forward process of DDPM (Ho et al., NeurIPS 2020, eq. 4) with its linear betas raised to a power.
The module has no parameters and no persistent buffers: attaching it leaves a model's state_dict as it was.
"""

import math
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn

from util.choices import ANNEALS, SCHEDULES, SPACES, TOKENS

NUM_TIMESTEPS = 1000


def alphas_cumprod(beta_power: float = 1.2) -> torch.Tensor:
    """abar_t for t = 0..999 as float64 [1000]; falls from 1 - 1e-4 ** power towards 0."""
    betas = torch.linspace(1e-4, 0.02, NUM_TIMESTEPS, dtype=torch.float64) ** beta_power
    return torch.cumprod(1.0 - betas, dim=0)


@dataclass(frozen=True)
class NoiseConfig:
    """How much noise, on what and when. ValueError, one line, for values out of range.

    timestep: index t of abar, 0..999; 0 switches the noise off.
    schedule: `fixed` uses t for every sample, `uniform` draws t ~ U{1..timestep} per sample.
    prob: fraction of samples that get noise, 0..1.
    anneal: over training, scale t towards 0: `none`, `linear` (1 - p) or `cosine` (1 + cos(pi p)) / 2.
    tokens: `all`, or `patches` to leave class and register tokens clean (where a model has them; pixels have none).
    space: `embedding` or `pixel`: which tensor `models.vit.attach_noise` hands to the module.
    layer: `embedding` noise goes to the input of this block.
    beta_power: exponent on DDPM's betas.
    noise_eval: keep the noise in evaluation too.
    """

    timestep: int = 15
    schedule: str = "fixed"
    prob: float = 1.0
    anneal: str = "none"
    tokens: str = "all"
    space: str = "embedding"
    layer: int = 0
    beta_power: float = 1.2
    noise_eval: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.timestep < NUM_TIMESTEPS:
            raise ValueError(f"alpha_blend timestep {self.timestep}: must be 0 (off) to {NUM_TIMESTEPS - 1}")
        if not 0.0 <= self.prob <= 1.0:
            raise ValueError(f"noise prob {self.prob}: must be in [0, 1]")
        if self.layer < 0:
            raise ValueError(f"noise layer {self.layer}: must be 0 or more")
        choices = {"schedule": SCHEDULES, "anneal": ANNEALS, "tokens": TOKENS, "space": SPACES}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"noise {name} {getattr(self, name)!r}: must be one of {', '.join(known)}")


class AlphaBlend(nn.Module):
    """Blend noise into a tensor [B, ...] in training; the identity in evaluation unless `noise_eval`.

    The keywords are NoiseConfig's: AlphaBlend(15), AlphaBlend(15, prob=0.5), AlphaBlend(config).
    """

    signal_scale: torch.Tensor
    noise_scale: torch.Tensor

    def __init__(self, config: NoiseConfig | int = 15, **keywords):
        super().__init__()
        self.config = replace(NoiseConfig(config) if isinstance(config, int) else config, **keywords)
        self.num_prefix_tokens = 0  # set by models.vit.attach_noise
        self.current_timestep = self.config.timestep  # after annealing
        # Factors in float64, stored in float32: in bf16, 1 - abar_15 = 7.7e-4 would still be there but
        # abar_15 itself rounds to 1, and the difference to 0.
        abar = alphas_cumprod(self.config.beta_power)
        self.register_buffer("signal_scale", abar.sqrt().float(), persistent=False)
        self.register_buffer("noise_scale", (1.0 - abar).sqrt().float(), persistent=False)

    def set_progress(self, progress: float) -> None:
        """Anneal: `progress` is the fraction of training done, 0..1."""
        scales = {"none": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
        self.current_timestep = round(self.config.timestep * scales[self.config.anneal])

    @property
    def active(self) -> bool:
        return (self.training or self.config.noise_eval) and self.current_timestep > 0 and self.config.prob > 0

    def draw(self, z: torch.Tensor) -> torch.Tensor:
        """eps: float32, of z's shape, mean 0 and variance 1."""
        return torch.randn(z.shape, device=z.device, dtype=torch.float32)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """z [B, ...] -> noised z, same shape and dtype. Draws from the global generator of z's device."""
        if not self.active:
            return z
        c, B = self.config, z.shape[0]
        per_sample = (B,) + (1,) * (z.ndim - 1)
        if c.schedule == "fixed":
            t = torch.full((B,), self.current_timestep, device=z.device)
        else:
            t = torch.randint(1, self.current_timestep + 1, (B,), device=z.device)
        signal, noise = self.signal_scale[t].view(per_sample), self.noise_scale[t].view(per_sample)
        if c.prob < 1.0:
            keep = torch.rand(B, device=z.device).view(per_sample) < c.prob
            signal, noise = torch.where(keep, signal, 1.0), torch.where(keep, noise, 0.0)
        # Outside autocast: the blend is float32 whatever the model computes in.
        blended = signal * z.float() + noise * self.draw(z)
        if c.tokens == "patches" and c.space == "embedding" and self.num_prefix_tokens:
            blended[:, : self.num_prefix_tokens] = z[:, : self.num_prefix_tokens].float()
        return blended.to(z.dtype)

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in asdict(self.config).items())
