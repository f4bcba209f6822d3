"""Frechet distance between sets of images, by torchmetrics, on Inception's features or the encoder's own."""

import os
from collections.abc import Sequence

import torch
from torch import nn

from augment.batch import normalize
from models.noprop_mae import NoPropMAE
from util.checkpoint import read_file
from util.errors import UserError, reason_of

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"  # torch-fidelity's name for it


class EncoderFeatures(nn.Module):
    """uint8 [B, C, H, W] -> float32 [B, D]: the mean of the encoder's patch tokens, without masking."""

    def __init__(self, net: NoPropMAE, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.net, self.mean, self.std = net, tuple(mean), tuple(std)
        self.num_features = net.pos_embed.shape[-1]

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        ids = torch.arange(self.net.num_patches, device=images.device).expand(len(images), -1)
        features = self.net.encode(normalize(images, self.mean, self.std), ids)[:, 1:].mean(dim=1)
        return features.cpu() if features.device.type == "mps" else features  # torchmetrics sums in float64


class InceptionFeatures(nn.Module):
    """torch-fidelity's pooled Inception-v3 features: uint8 [B, 1 or 3, H, W] -> float32 [B, 2048]."""

    num_features = 2048

    def __init__(self, inception: nn.Module):
        super().__init__()
        self.inception = inception

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.inception(images.expand(-1, 3, -1, -1))
        return features.cpu() if features.device.type == "mps" else features


def find_inception(weights: str | None) -> str | None:
    """The file of --inception_weights; without the flag, an earlier download in torch's cache; else None."""
    if weights and weights != "download":
        if not os.path.isfile(weights):
            raise UserError(f"--inception_weights {weights}: no such file; give torch-fidelity's, or `download`")
        return weights
    cached = os.path.join(torch.hub.get_dir(), "checkpoints", INCEPTION_FILE)
    return cached if os.path.isfile(cached) else None


def load_inception(path: str | None) -> InceptionFeatures:
    """Inception with the weights in `path`; None downloads them to torch's cache. UserError if that fails."""
    from torchmetrics.image.fid import NoTrainInceptionV3

    if path is not None:
        read_file(path)  # refuses pickled code, which torch-fidelity would execute
    try:
        return InceptionFeatures(NoTrainInceptionV3("inception-v3-compat", ["2048"], path))
    except (RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--inception_weights {path}: not torch-fidelity's Inception ({reason_of(error)})") from None
    except OSError as error:
        raise UserError(
            f"--inception_weights download: failed ({error}); fetch {INCEPTION_FILE} from torch-fidelity's releases "
            "and give its path"
        ) from None


def frechet_metric(features: nn.Module, device: torch.device):
    """torchmetrics' |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)), mu and S: mean and covariance of features.

    update(images uint8, real=True) adds to the first set, real=False to the second; reset() clears only the second.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance  # takes seconds, and few runs need it

    metric = FrechetInceptionDistance(features.to(device), reset_real_features=False)
    return metric if device.type == "mps" else metric.to(device)
