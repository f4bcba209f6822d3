"""Frechet distances of known Gaussians, and the features they are taken of."""

import pickle

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from augment.batch import normalize, resize
from tests.harness.noprop import MEAN, STD, tiny_net
from util.data.datasets import read_split
from util.errors import UserError
from util.probe.frechet import EncoderFeatures, InceptionFeatures, find_inception, frechet_metric, load_inception

CPU = torch.device("cpu")


def of_moments(n: int, mean: np.ndarray, covariance: np.ndarray, seed: int) -> torch.Tensor:
    """n points whose sample mean and covariance are exactly these."""
    x = np.random.default_rng(seed).normal(size=(n, len(mean)))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    return torch.from_numpy(x @ np.linalg.cholesky(covariance).T + mean)


def test_frechet_distance_of_gaussians_is_the_closed_form():
    features = nn.Identity()
    features.num_features = 3
    mean, deviation = np.array([[0.0, 1.0, -2.0], [0.5, 1.0, 1.0]]), np.array([[1.0, 2.0, 0.5], [3.0, 0.1, 0.5]])
    metric = frechet_metric(features, CPU)
    metric.update(of_moments(50, mean[0], np.diag(deviation[0] ** 2), 0), real=True)
    metric.update(of_moments(80, mean[1], np.diag(deviation[1] ** 2), 1), real=False)
    # Axis by axis, Gaussians differ by (m1 - m2)^2 + (s1 - s2)^2.
    assert metric.compute().item() == pytest.approx(
        ((mean[0] - mean[1]) ** 2 + (deviation[0] - deviation[1]) ** 2).sum()
    )

    metric.reset()  # keeps the first set
    mixing = np.random.default_rng(2).normal(size=(3, 3))
    covariance = mixing @ mixing.T
    metric.update(of_moments(40, mean[1], covariance, 3), real=False)
    first = np.diag(deviation[0] ** 2)
    root = scipy.linalg.sqrtm(first @ covariance).real
    expected = ((mean[0] - mean[1]) ** 2).sum() + np.trace(first + covariance - 2 * root)
    assert metric.compute().item() == pytest.approx(expected, rel=1e-6)


def test_the_encoders_own_features_are_the_mean_of_its_tokens():
    net, images = tiny_net(), resize(read_split("digits", ".", "val").images[:5], (8, 12))
    features = EncoderFeatures(net, MEAN, STD)
    with torch.no_grad():
        tokens = net.encode(normalize(images, MEAN, STD), torch.arange(24).expand(5, -1))
    assert features.num_features == 12
    torch.testing.assert_close(features(images), tokens[:, 1:].mean(dim=1))


@pytest.mark.slow
def test_inception_weights_are_read_never_executed(monkeypatch, tmp_path):
    from torch_fidelity import feature_extractor_inceptionv3 as fidelity

    with monkeypatch.context() as patch:  # its network with random weights; the constructor insists on a file
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *args: None)
        state = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).state_dict()
    torch.save(state, tmp_path / "inception.pth")
    features = load_inception(find_inception(str(tmp_path / "inception.pth")))
    grey = torch.randint(0, 256, (1, 1, 9, 9), dtype=torch.uint8)
    assert isinstance(features, InceptionFeatures) and features(grey).shape == (1, 2048)
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"x": pytest.main}, protocol=2))
    for name, message in (("other", "not torch-fidelity's Inception"), ("evil", "evil.pth"), ("none", "no such file")):
        with pytest.raises(UserError, match=message):
            load_inception(find_inception(str(tmp_path / f"{name}.pth")))

    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(fidelity, "load_state_dict_from_url", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert find_inception(None) is None  # nothing at hand: the encoder's features serve
    with pytest.raises(UserError, match="download: failed"):
        load_inception(find_inception("download"))
