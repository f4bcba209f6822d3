"""Test-time augmentation: every image decoded once, every member on all of its views, probabilities averaged."""

import numpy as np
import torch

from augment.batch import normalize
from util.cli.settings import Prediction as Settings
from util.cli.settings import Reading
from util.data.datasets import Dataset
from util.data.loader import accept_bad_image, read_in_processes
from util.data.views import ViewReader
from util.dist import World, gather_objects
from util.errors import UserError
from util.files import printable
from util.predict.ensemble import geometric_mean
from util.predict.members import Net
from util.predict.result import Prediction
from util.progress import Progress


@torch.inference_mode()
def predict(nets: list[Net], data: Dataset, asked: Settings, reading: Reading, world: World) -> Prediction:
    """Every member's probabilities for every image; the same arrays on every rank.

    asked: the views (0..11, augment/views.py; view 0 is always computed, for comparison), and network inputs (images x
    views) per batch. An image's views are in one batch. The whole set is cut into batches, which are then distributed,
    so results are identical for any number of ranks.
    """
    views = asked.views
    computed = [0] + [v for v in views if v != 0]
    chosen = [computed.index(v) for v in views]
    V, C, M = len(computed), len(data.classes), 1 + max(net.member for net in nets)
    inputs = sorted({net.input for net in nets})
    per_batch = max(1, asked.batch_size // V)
    batches = [list(range(i, min(i + per_batch, len(data)))) for i in range(0, len(data), per_batch)]
    mine = batches[world.rank :: world.size]
    reader = ViewReader(data, inputs, computed, asked.margin)
    loader = read_in_processes(reader, mine, reading, world.device, ahead=2)
    progress = Progress("Predict:", len(mine), every=max(1, len(mine) // 10), enabled=world.is_main)
    done, bad = list[tuple[np.ndarray, ...]](), dict[int, str]()
    for index, images, unreadable, _ in loader:
        for i, reason in unreadable.items():
            accept_bad_image(reader.path(i), reason, reading)
        bad |= unreadable
        if len(index):
            probabilities = forward(nets, inputs, images, world.device)  # [nets, b, V, C]
            require_finite(probabilities, nets, data, index)
            one, mean, geometric = np.zeros((3, M, len(index), C))
            for m in range(M):
                own = probabilities[[net.member == m for net in nets]]  # folds: [F, b, V, C]
                one[m], mean[m] = own[:, :, 0].mean(0), own[:, :, chosen].mean((0, 2))
                geometric[m] = geometric_mean(own[:, :, chosen], (0, 2))
            done.append((index.numpy(), one, mean, geometric))
        progress.update({"images": float(sum(len(d[0]) for d in done))} if progress.due else None)
    progress.close()
    parts = gather_objects((done, bad))
    done, bad = [d for part in parts for d in part[0]], {i: r for part in parts for i, r in part[1].items()}
    if not done:
        raise UserError(f"--data_path: none of its {len(data)} images can be read")
    return Prediction.joined(views, done, bad)


def forward(nets: list[Net], inputs: list[tuple], images: list[torch.Tensor], device: torch.device) -> np.ndarray:
    """views uint8 [b, V, C, h, w] per kind of input -> probabilities float64 [nets, b, V, classes]."""
    b, V = images[0].shape[:2]
    ready, logits = {}, []
    pixels = {key: x.flatten(0, 1).to(device, non_blocking=True) for key, x in zip(inputs, images)}
    for net in nets:
        key = net.input, net.statistics
        if key not in ready:  # members with equal statistics share the normalised batch
            ready[key] = normalize(pixels[net.input], *net.statistics)  # [b V, C, h, w]
        with net.precision.autocast():
            y = net.module(ready[key])
        logits.append(y.float()[:, net.order])
    # float64 on the CPU: one copy for all members, and some devices lack float64.
    return torch.stack(logits).cpu().double().softmax(-1).unflatten(1, (b, V)).numpy()


def require_finite(probabilities: np.ndarray, nets: list[Net], data, index: torch.Tensor) -> None:
    wrong = np.argwhere(~np.isfinite(probabilities).all((2, 3)))
    if len(wrong):
        net, i = wrong[0]
        raise UserError(
            f"--checkpoints: member {nets[net].member + 1} gives NaN or infinity for "
            f"{printable(data.name(int(index[i])))}; try --amp off"
        )


def predict_out_of_fold(
    nets: list[Net],
    net_folds: list[int],
    data: Dataset,
    image_folds: np.ndarray,
    asked: Settings,
    reading: Reading,
    world: World,
) -> Prediction:
    """`predict` for each fold: its networks on its images.

    Images of fold -1 are unreadable; they are added to a fold, where `predict` raises an error or leaves them out.
    """
    parts, bad = list[tuple[np.ndarray, ...]](), dict[int, str]()
    image_folds = np.where(image_folds < 0, image_folds.max(), image_folds)
    for fold in sorted(set(image_folds.tolist())):
        rows = np.flatnonzero(image_folds == fold)
        own = [net for net, f in zip(nets, net_folds) if f == fold]
        part = predict(own, data.subset(torch.from_numpy(rows)), asked, reading, world)
        parts.append((rows[part.index], part.one_view, part.all_views, part.geometric))
        bad.update({int(rows[i]): reason for i, reason in part.bad.items()})
    return Prediction.joined(asked.views, parts, bad)
