"""Test-time augmentation: every image decoded once, every member on all of its views, probabilities averaged."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.data import DataLoader

from augment.batch import normalize, resize
from augment.decoding import ImageError, open_file
from augment.decoding import to_channels as image_to_channels
from augment.image import build_eval_transform
from augment.views import saccadic_views
from util.datasets import ArrayDataset, FileDataset
from util.datasets import to_channels as array_to_channels
from util.dist import World, gather_objects
from util.ensemble import geometric_mean
from util.errors import UserError
from util.image_files import printable
from util.log import Progress
from util.members import Net
from util.reading import Reading, loader_processes, reason_of, worker_init


@dataclass
class Prediction:
    """Probabilities float64 [M, n, C] of the n readable images: each member's mean over its networks, with view 1 alone and
    over the views, and for stacking the geometric mean over networks and views.

    index: int64 [n], ascending, into the data. bad: image number -> why it cannot be read.
    """

    index: np.ndarray
    one_view: np.ndarray
    all_views: np.ndarray
    geometric: np.ndarray
    bad: dict[int, str] = field(default_factory=dict)


class ViewReader:
    """image number -> (number, its views uint8 [V, C, h, w] for each kind of input, None), or (number, None, reason).

    inputs: (height, width, channels, crop_pct), each kind once; members that take the same share the tensor.
    margin: in place of each crop_pct, the pixels that the centre views cut off.
    """

    def __init__(
        self,
        data: ArrayDataset | FileDataset,
        inputs: list[tuple],
        views: list[int],
        margin: int | None = None,
        workers: int = 0,
    ):
        self.data, self.inputs, self.views, self.margin = data, inputs, views, margin
        self.reading = Reading(getattr(data, "paths", []), workers)

    def __getitem__(self, i: int):
        self.reading.note(i)
        try:  # any other error is not the file's
            images = self.decode(i)
        except ImageError as error:
            return i, None, reason_of(error, self.data.paths[i])
        return i, [self.look(images[c], (h, w), *crop) for h, w, c, *crop in self.inputs], None

    def look(self, image, size: tuple[int, int], crop_pct: float | None = None) -> torch.Tensor:
        """The views uint8 [V, C, h, w]. Without --margin, view 1 is what training's evaluation sees, bit for bit: of a
        file its resize and crop (crop_pct), of an image in memory all of it."""
        if self.margin is not None:
            return saccadic_views(image, size, self.views, margin=self.margin)
        if isinstance(image, torch.Tensor):
            centre = resize(image[None], size)[0]
        else:
            centre = build_eval_transform(size, crop_pct)(image)
        return saccadic_views(image, size, self.views, centre=centre)

    def decode(self, i: int) -> dict:
        """channels -> image, as saccadic_views takes it."""
        wanted = {c for _, _, c, *_ in self.inputs}
        if isinstance(self.data, ArrayDataset):
            one = self.data.subset(torch.tensor([i]))
            return {c: array_to_channels(one, c).images[0] for c in wanted}
        with open_file(self.data.paths[i]) as image:
            return {c: image_to_channels(image, c) for c in wanted}


def collate(samples: list) -> tuple[torch.Tensor, list[torch.Tensor], dict[int, str]]:
    """(numbers [b] of the readable images, per input their views [b, V, C, h, w], {number: reason} of the others)."""
    good = [s for s in samples if s[2] is None]
    views = [torch.stack(per_input) for per_input in zip(*(s[1] for s in good))]
    return (
        torch.tensor([s[0] for s in good], dtype=torch.long),
        views,
        {s[0]: s[2] for s in samples if s[2] is not None},
    )


@torch.inference_mode()
def predict(
    nets: list[Net],
    data: ArrayDataset | FileDataset,
    views: list[int],
    *,
    world: World,
    batch_size: int = 64,
    num_workers: int = 0,
    on_bad_image: str = "error",
    margin: int | None = None,
) -> Prediction:
    """Every member's probabilities for every image; the same arrays on every rank.

    views: numbers 0..11 (augment/views.py); view 0 is computed in any case, to compare with. batch_size: network
    inputs per batch, that is images x views; an image's views stay together. Batches are cut from the whole set and
    then dealt to the ranks, so each is the same whatever the number of ranks, and with it every digit.
    """
    computed = [0] + [v for v in views if v != 0]
    chosen = [computed.index(v) for v in views]
    V, C, M = len(computed), len(data.classes), 1 + max(net.member for net in nets)
    inputs = sorted({net.input for net in nets})
    per_batch = max(1, batch_size // V)
    batches = [list(range(i, min(i + per_batch, len(data)))) for i in range(0, len(data), per_batch)]
    mine = batches[world.rank :: world.size]
    workers = loader_processes(num_workers)
    loader = DataLoader(
        ViewReader(data, inputs, computed, margin, workers), batch_sampler=mine, collate_fn=collate, num_workers=workers,
        pin_memory=world.device.type == "cuda", worker_init_fn=worker_init(),
    )  # fmt: skip
    progress = Progress("Predict:", len(mine), every=max(1, len(mine) // 10), enabled=world.is_main)
    done, bad = [], {}
    for index, images, unreadable in loader:
        for i, reason in unreadable.items():
            if on_bad_image == "error":
                name = printable(data.name(i))
                raise UserError(f"{name}: cannot be read as an image ({reason}); remove it or give --on_bad_image skip")
        bad.update(unreadable)
        if len(index):
            probabilities = forward(nets, inputs, images, world.device)  # [nets, b, V, C]
            require_finite(probabilities, nets, data, index)
            one, mean, geometric = np.zeros((3, M, len(index), C))
            for m in range(M):
                own = probabilities[[net.member == m for net in nets]]  # folds: [F, b, V, C]
                one[m], mean[m] = own[:, :, 0].mean(0), own[:, :, chosen].mean((0, 2))
                geometric[m] = geometric_mean(own[:, :, chosen], (0, 2))
            done.append((index.numpy(), one, mean, geometric))
        progress.step += 1
        progress.update({"images": float(sum(len(d[0]) for d in done))} if progress.due else None)
    progress.close()
    parts = gather_objects((done, bad))
    done, bad = [d for part in parts for d in part[0]], {i: r for part in parts for i, r in part[1].items()}
    if not done:
        raise UserError(f"--data_path: none of its {len(data)} images can be read")
    index = np.concatenate([d[0] for d in done])
    order = np.argsort(index)
    means = (np.concatenate([d[k] for d in done], axis=1)[:, order] for k in (1, 2, 3))
    return Prediction(index[order], *means, dict(sorted(bad.items())))


def forward(nets, inputs, images, device) -> np.ndarray:
    """views uint8 [b, V, C, h, w] per kind of input -> probabilities float64 [nets, b, V, classes]."""
    b, V = images[0].shape[:2]
    ready, logits = {}, []
    pixels = {key: x.flatten(0, 1).to(device, non_blocking=True) for key, x in zip(inputs, images)}
    for net in nets:
        key = net.input
        if (key, net.mean, net.std) not in ready:  # members with the same statistics share the normalised batch
            ready[key, net.mean, net.std] = normalize(pixels[key], net.mean, net.std)  # [b V, C, h, w]
        x = ready[key, net.mean, net.std]
        if net.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        with net.precision.autocast():
            y = net.module(x)
        logits.append(y.float()[:, net.order])
    # In float64 on the CPU: one copy for all members, and devices without float64 work as well.
    return torch.stack(logits).cpu().double().softmax(-1).unflatten(1, (b, V)).numpy()


def require_finite(probabilities: np.ndarray, nets: list[Net], data, index: torch.Tensor) -> None:
    wrong = np.argwhere(~np.isfinite(probabilities).all((2, 3)))
    if len(wrong):
        net, i = wrong[0]
        raise UserError(
            f"--checkpoints: member {nets[net].member + 1} gives NaN or infinity for {printable(data.name(int(index[i])))}; "
            "try --amp off"
        )
