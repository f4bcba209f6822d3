"""k-NN and the linear probe against a plain loop and scikit-learn."""

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from util.probe import classify, features
from util.probe.classify import choose_l2, knn_predict, linear_probe


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_knn_equals_a_plain_loop_in_float64(monkeypatch):
    bank, queries, labels = randn(83, 5).numpy(), randn(31, 5, seed=1).numpy(), np.arange(83) % 4
    expected = []
    for q in queries.astype(np.float64):
        similarity = [q @ b / np.linalg.norm(q) / np.linalg.norm(b) for b in bank.astype(np.float64)]
        votes = np.zeros(4)
        for i in np.argsort(similarity)[::-1][:20]:
            votes[labels[i]] += np.exp(similarity[i] / 0.07)
        expected.append(votes.argmax())
    monkeypatch.setattr(features, "ELEMENTS", 83 * 7)  # chunks of 7 queries
    tensors = [torch.from_numpy(x) for x in (bank, labels, queries)]
    assert knn_predict(*tensors, 4).tolist() == expected
    assert len(set(expected)) > 1


def test_knn_at_a_tiny_temperature_is_the_nearest_neighbour():
    bank, queries, labels = randn(50, 6), randn(20, 6, seed=1), torch.arange(50)
    unit = [x / x.norm(dim=1, keepdim=True) for x in (bank, queries)]
    nearest = torch.cdist(unit[1], unit[0]).argmin(dim=1)
    assert torch.equal(knn_predict(bank, labels, queries, 50, k=20, temperature=1e-4), nearest)


def test_linear_probe_reaches_the_optimum_that_scikit_learn_finds(monkeypatch):
    x = (
        randn(300, 12) @ torch.diag(10.0 ** torch.linspace(-3, 2, 12)) @ randn(12, 12, seed=1) + 5.0
    )  # badly conditioned
    y = (x @ randn(12, 3, seed=2) + 20 * randn(300, 3, seed=3)).argmax(dim=1)
    monkeypatch.setattr(features, "ELEMENTS", 3 * 70)  # sums over chunks of 70 rows
    for l2 in (1e-2, 1e-4):
        with torch.no_grad():
            ours = linear_probe(x, y, 3, l2)(x).softmax(dim=1).numpy()
        scaled = StandardScaler().fit_transform(x.double().numpy())
        theirs = LogisticRegression(C=1.0 / (300 * l2), tol=1e-8, max_iter=10000).fit(scaled, y.numpy())
        assert np.abs(ours - theirs.predict_proba(scaled)).max() < 5e-3


def test_linear_probe_separates_what_is_separable_whatever_the_scale():
    y = torch.arange(200) % 4
    x = torch.nn.functional.one_hot(y, 4).float() + 0.1 * randn(200, 4)
    x = torch.cat([x * 1e-3 + 7.0, 1e3 * randn(200, 4, seed=1), torch.ones(200, 1)], dim=1)  # noise, and a constant
    assert torch.equal(linear_probe(x, y, 4, 1e-4)(x).argmax(dim=1), y)


def test_noise_gets_a_stronger_penalty_than_signal():
    y = torch.arange(400) % 2
    signal = torch.where(y == 1, 1.0, -1.0)[:, None] + 0.05 * randn(400, 20)
    assert choose_l2(randn(400, 20, seed=1), y, 2) == max(classify.L2)
    assert choose_l2(signal, y, 2) == min(classify.L2)
