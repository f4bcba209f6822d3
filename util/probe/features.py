"""Features of a frozen network, computed once for k-NN and the linear probe."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from util.data.loader import Loader
from util.dist import Precision, World, all_reduce, gather_objects
from util.errors import UserError
from util.progress import Progress

POOLS = ("mean", "cls", "head")
ELEMENTS = 2**26  # size limit of temporary matrices: 256 MiB of float32


def pooled_features(model: nn.Module, images: torch.Tensor, pool: str) -> torch.Tensor:
    """One vector per image, [B, D], from a timm model.

    `mean`: average of the final patch tokens; `cls`: the final class token; `head`: the input of the
    model's classifier. UserError if the model has no such tokens.
    """
    net: Any = model  # for the type checker: nn.Module's attributes are tensors and modules
    z = net.forward_features(images)
    if pool == "head":
        return net.forward_head(z, pre_logits=True)
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

    Each rank computes and returns its share. Unreadable images (--on_bad_image skip) are left out. UserError on NaN or
    inf.
    """
    model.eval()
    features, index, done = torch.empty(0, 0), torch.empty(0, dtype=torch.long), 0
    progress = Progress(f"features {name}".strip(), len(loader), every=100, enabled=world.is_main)
    for batch in loader.epoch():
        with precision.autocast():
            z = pooled_features(model, batch.images, pool).float().cpu()
        if done == 0:
            n = len(range(world.rank, len(loader.data), world.size))  # at most
            features, index = torch.empty(n, z.shape[1]), torch.empty(n, dtype=torch.long)
        features[done : done + len(z)], index[done : done + len(z)] = z, batch.index
        done += len(z)
        progress.update({"images": done} if progress.due else None)
    progress.close()
    features, index = features[:done], index[:done]
    if not all_reduce(torch.tensor(done)):
        raise UserError(f"--data_path: none of the {len(loader.data)} images {name} can be read".replace("  ", " "))
    finite = all_reduce(torch.tensor(int(torch.isfinite(features).all())), "min")  # all ranks stop together
    if not finite:
        raise UserError("the encoder's features contain NaN or infinite values; check its weights")
    features, index = gather_rows(features, index)
    return features, loader.data.targets[index]


def gather_rows(rows: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rank 0: the rows [n, D] of all ranks and their index [n], sorted by index. Other ranks: their own rows.

    index ascends. Ranks send in turn, in pieces, so that rank 0 needs memory for the result and one piece.
    """
    shapes = gather_objects(tuple(rows.shape))
    if len(shapes) == 1:
        return rows, index
    rank, D = dist.get_rank(), max(d for _, d in shapes)  # with a tiny set, a rank may have no image and thus no D
    step = max(1, ELEMENTS // max(1, D))
    pieces = [(r, at, min(at + step, n)) for r, (n, _) in enumerate(shapes) for at in range(0, n, step)]
    if rank:
        for part in (index, rows):
            for r, start, stop in pieces:
                if r == rank:
                    dist.send(part[start:stop].contiguous(), 0)
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
