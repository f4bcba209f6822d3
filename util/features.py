"""Frozen features, computed once, and two readings of what they know: a weighted k-NN and a linear probe."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from util.data import Loader
from util.dist import Precision, World, all_reduce, gather_objects
from util.errors import UserError
from util.log import Progress

POOLS = ("mean", "cls", "head")
L2 = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)  # penalties the linear probe tries, strong to weak
ELEMENTS = 2**26  # of the largest temporary matrix: 256 MiB of float32


def pooled_features(model: nn.Module, images: torch.Tensor, pool: str) -> torch.Tensor:
    """One vector per image, [B, D], from a timm model.

    `mean`: average of the final patch tokens; `cls`: the final class token; `head`: what the model's own classifier
    reads. UserError where a model has no such tokens.
    """
    z = model.forward_features(images)
    if pool == "head":
        return model.forward_head(z, pre_logits=True)
    prefix = getattr(model, "num_prefix_tokens", 0)
    if not isinstance(z, torch.Tensor) or z.ndim != 3 or (pool == "cls" and prefix == 0):
        flag, what = ("--cls_token", "class token") if pool == "cls" else ("--global_pool", "patch tokens")
        raise UserError(f"{flag}: {type(model).__name__} has no {what}; leave the flag out for its own pooling")
    return z[:, 0] if pool == "cls" else z[:, prefix:].mean(dim=1)


@torch.no_grad()
def extract(
    model: nn.Module, loader: Loader, precision: Precision, world: World, pool: str, name: str = ""
) -> tuple[torch.Tensor, torch.Tensor]:
    """(features float32 [N, D], targets int64 [N]) of all images of an evaluation loader, on rank 0's CPU.

    Each rank computes its share, keeps only that and returns it. Unreadable images (--on_bad_image skip) are left out.
    UserError on NaN or inf.
    """
    model.eval()
    features, index, done = torch.empty(0, 0), torch.empty(0, dtype=torch.long), 0
    progress = Progress(f"features {name}".strip(), len(loader), every=100, enabled=world.is_main)
    for step, batch in enumerate(loader.epoch()):
        with precision.autocast():
            z = pooled_features(model, batch.images, pool).float().cpu()
        if done == 0:
            n = len(range(world.rank, len(loader.data), world.size))  # at most
            features, index = torch.empty(n, z.shape[1]), torch.empty(n, dtype=torch.long)
        features[done : done + len(z)], index[done : done + len(z)] = z, batch.index
        done += len(z)
        progress.step = step + 1
        progress.update({"images": done} if progress.due else None)
    progress.close()
    features, index = features[:done], index[:done]
    if not all_reduce(torch.tensor(done)):
        raise UserError(f"--data_path: none of the {len(loader.data)} images {name} can be read".replace("  ", " "))
    finite = all_reduce(torch.tensor(int(torch.isfinite(features).all())), "min")  # all ranks stop, or none
    if not finite:
        raise UserError("the encoder's features hold NaN or infinite values; are its weights sound?")
    features, index = gather_rows(features, index)
    return features, loader.data.targets[index]


def gather_rows(rows: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """On rank 0 the rows [n, D] of all ranks with their index [n], in its order; on the others, what they gave.

    index ascends. One rank after the other, in pieces, so that rank 0 holds the result and one piece more.
    """
    shapes = gather_objects(tuple(rows.shape))
    if len(shapes) == 1:
        return rows, index
    rank, D = dist.get_rank(), max(d for _, d in shapes)  # a rank of a tiny set may have seen no image, and so no D
    step = max(1, ELEMENTS // max(1, D))
    pieces = [(r, at, min(at + step, n)) for r, (n, _) in enumerate(shapes) for at in range(0, n, step)]
    if rank:
        for r, start, stop in pieces:
            if r == rank:
                dist.send(index[start:stop].contiguous(), 0)
        for r, start, stop in pieces:
            if r == rank:
                dist.send(rows[start:stop].contiguous(), 0)
        return rows, index
    indices = [index] + [torch.empty(n, dtype=torch.long) for n, _ in shapes[1:]]
    for r, start, stop in pieces:
        if r:
            dist.recv(indices[r][start:stop], r)
    order = torch.cat(indices).sort().values
    out = torch.empty(len(order), D)
    for r, start, stop in pieces:
        piece = rows[start:stop] if r == 0 else torch.empty(stop - start, D)
        if r:
            dist.recv(piece, r)
        out[torch.searchsorted(order, indices[r][start:stop])] = piece
    return out, order


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
        # softmax is the votes up to a factor per query, and has no overflow at low temperatures.
        votes = torch.zeros(len(chunk), num_classes, device=bank.device)
        votes.scatter_add_(1, labels[index], (similarity / temperature).softmax(dim=1))
        predicted.append(votes.argmax(dim=1))
    return torch.cat(predicted)


def linear_probe(
    features: torch.Tensor, targets: torch.Tensor, num_classes: int, l2: float, max_iter: int = 60
) -> nn.Sequential:
    """BatchNorm1d without affine and a linear layer, MAE's probe, fitted to features [N, D], targets [N]; in eval mode.

    MAE takes 90 epochs of LARS over augmented images (appendix A.1). On features that stay the same, the BatchNorm's
    statistics are the features' own, and what is left is convex: it is solved, by L-BFGS, without a learning rate:

        minimise mean cross entropy + l2 / 2 |W|^2

    The features' directions differ in variance by many orders. L-BFGS therefore works on the weights of the decorrelated
    features, where all directions curve alike; the problem and its solution stay the same.
    """
    N, D = features.shape
    norm, linear = nn.BatchNorm1d(D, affine=False, eps=1e-6), nn.Linear(D, num_classes)
    norm.running_mean.copy_(features.mean(0))
    norm.running_var.copy_(features.var(0, correction=0))
    head = nn.Sequential(norm, linear).to(features.device).eval()
    x = norm(features)  # [N, D]
    variance, basis = torch.linalg.eigh((x.T @ x / N).double().cpu())
    # Softmax regression curves by up to p (1 - p), about 0.1, times the variance, and by l2.
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
    """The penalty of L2 with the lowest cross entropy on a random tenth of the training features, fitted to the rest."""
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
