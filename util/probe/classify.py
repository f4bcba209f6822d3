"""k-NN and the linear probe on precomputed features."""

import torch
import torch.nn.functional as F
from torch import nn

from util.probe.features import ELEMENTS

L2 = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)  # penalties that the linear probe tries, strong to weak


def knn_predict(
    bank: torch.Tensor,
    labels: torch.Tensor,
    queries: torch.Tensor,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
) -> torch.Tensor:
    """Weighted k-nearest-neighbour classes of `queries` [Q, D] among `bank` [N, D] with `labels` [N]: int64 [Q].

    Cosine similarity; each of the k nearest votes with exp(similarity / temperature) (Wu et al., Unsupervised Feature
    Learning via Non-Parametric Instance Discrimination, CVPR 2018, section 3.4). All on bank's device; 1 <= k <= N.
    """
    bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    predicted = []
    for chunk in queries.split(max(1, ELEMENTS // len(bank))):
        similarity, index = (chunk @ bank.T).topk(k, dim=1)  # [q, k]
        # softmax equals the votes up to a factor per query, and does not overflow at low temperatures.
        votes = torch.zeros(len(chunk), num_classes, device=bank.device)
        votes.scatter_add_(1, labels[index], (similarity / temperature).softmax(dim=1))
        predicted.append(votes.argmax(dim=1))
    return torch.cat(predicted)


def linear_probe(
    features: torch.Tensor, targets: torch.Tensor, num_classes: int, l2: float, max_iter: int = 60
) -> nn.Sequential:
    """MAE's probe, BatchNorm1d without affine and a linear layer, fitted to features [N, D], targets [N]; in eval mode.

    MAE uses 90 epochs of LARS on augmented images (appendix A.1). With fixed features, the BatchNorm's statistics are
    those of the features and the rest is convex: L-BFGS solves it without a learning rate:

        minimise mean cross entropy + l2 / 2 |W|^2

    The variance of the features differs by orders of magnitude between directions. L-BFGS therefore optimises the
    weights of decorrelated features, where the curvature is similar in all directions; the solution is the same.
    """
    N, D = features.shape
    norm, linear = nn.BatchNorm1d(D, affine=False, eps=1e-6), nn.Linear(D, num_classes)
    norm.running_mean, norm.running_var = features.mean(0), features.var(0, correction=0)
    head = nn.Sequential(norm, linear).to(features.device).eval()
    x = norm(features)  # [N, D]
    variance, basis = torch.linalg.eigh((x.T @ x / N).double().cpu())
    # The curvature of softmax regression is at most p (1 - p), about 0.1, times the variance, plus l2.
    to_weights = (basis * (variance.clamp(min=0.0) + 10.0 * l2 + 1e-9).rsqrt()).to(x)  # [D, D]
    z = x @ to_weights  # [N, D]
    v = torch.zeros(D, num_classes, device=x.device, requires_grad=True)
    bias = torch.zeros(num_classes, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [v, bias], max_iter=max_iter, history_size=10, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )
    rows = max(1, ELEMENTS // num_classes)

    def objective() -> torch.Tensor:
        optimizer.zero_grad()
        total = 0.5 * l2 * (to_weights @ v).square().sum()
        total.backward()
        for z_part, targets_part in zip(z.split(rows), targets.split(rows)):
            loss = F.cross_entropy(z_part @ v + bias, targets_part, reduction="sum") / N
            loss.backward()
            total = total + loss
        return total.detach()

    optimizer.step(objective)
    with torch.no_grad():
        linear.weight.copy_((to_weights @ v).T)
        linear.bias.copy_(bias)
    return head


def choose_l2(features: torch.Tensor, targets: torch.Tensor, num_classes: int, seed: int = 0) -> float:
    """The penalty of L2 with the lowest cross entropy on a random tenth of the features, fitted to the rest."""
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed)).to(features.device)
    held_out, rest = order[: max(1, len(order) // 10)], order[max(1, len(order) // 10) :]
    losses = []
    for l2 in L2:
        head = linear_probe(features[rest], targets[rest], num_classes, l2)
        with torch.no_grad():
            losses.append(F.cross_entropy(head(features[held_out]), targets[held_out]).item())
    return L2[losses.index(min(losses))]


@torch.no_grad()
def accuracy(predicted: torch.Tensor, targets: torch.Tensor) -> float:
    """Percent."""
    return 100.0 * (predicted == targets).double().mean().item()
