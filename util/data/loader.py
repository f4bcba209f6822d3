"""From a data set to batches on the device: the order of samples, loader processes, loaders.

An epoch's order is a permutation of the whole set by (seed, epoch); step s on R ranks with batch size B takes its
entries [s R B, (s + 1) R B). So a run can start in the middle of an epoch, and the number of workers and ranks does not
change which samples a step sees. Augmentation is seeded by (seed, epoch, index).
"""

import os
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from PIL import Image
from torch.utils.data import DataLoader, get_worker_info

from augment.batch import BatchTransform
from augment.decoding import ImageError, limit_pixels, open_image
from augment.image import build_eval_transform
from augment.transfer import to_device
from util.cli.settings import Reading
from util.data.datasets import ArrayDataset, Dataset, FileDataset, to_channels
from util.data_specs import IN_MEMORY
from util.dist import World
from util.errors import UserError, reason_of
from util.files import printable, warn
from util.seed import mix, sample_rng


@dataclass
class Batch:
    """images float32 [B, C, H, W] normalised, targets int64 [B], both on the device; index int64 [B] on the CPU."""

    images: torch.Tensor
    targets: torch.Tensor
    index: torch.Tensor


class EpochOrder:
    """Batches of (epoch, index) for one rank, in the order above. Training drops an incomplete last batch."""

    def __init__(self, n: int, batch_size: int, *, world: World, seed: int = 0, train: bool = True, even: bool = False):
        self.n, self.rank, self.size, self.seed, self.train = n, world.rank, world.size, seed, train
        self.batch_size = batch_size
        if train:
            # If the set is smaller than one global batch, the whole set is the batch.
            self.batch_size = min(batch_size, n // world.size)
            if even:  # mixup pairs samples of the batch, first with last
                self.batch_size -= self.batch_size % 2
            if even and self.batch_size < 1 and n >= world.size:
                raise UserError(
                    f"--batch_size {batch_size}: --mixup and --cutmix mix pairs of images, but a batch here has one "
                    f"({n} training images, {world.size} processes); give 2 or more, or --mixup 0 --cutmix 0"
                )
            if self.batch_size < 1:
                raise UserError(f"--data_path: {n} training images cannot fill a batch on {world.size} ranks")
        self.epoch = self.start_step = 0

    def start(self, epoch: int, step: int = 0) -> None:
        self.epoch, self.start_step = epoch, step

    def __len__(self) -> int:
        if self.train:
            return self.n // (self.batch_size * self.size)
        # The longest rank's count, so that ranks agree; shorter ranks get an empty last batch.
        return -(-len(range(0, self.n, self.size)) // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        B = self.batch_size
        if not self.train:
            mine = range(self.rank, self.n, self.size)
            for s in range(self.start_step, -(-len(mine) // B)):
                yield [(self.epoch, i) for i in mine[s * B : (s + 1) * B]]
            return
        generator = torch.Generator().manual_seed(mix(self.seed, self.epoch, 1))
        order = torch.randperm(self.n, generator=generator)
        for s in range(self.start_step, len(self)):
            first = (s * self.size + self.rank) * B
            yield [(self.epoch, i) for i in order[first : first + B].tolist()]


def choose_loader(loader: str | None, dataset: str, world: World) -> str:
    """--loader: `pil`, or `fast`, which needs OpenCV. Default: fast; without OpenCV, pil with a warning."""
    if loader == "pil" or (loader is None and dataset in IN_MEMORY):
        return loader or "fast"
    try:
        import cv2

        _ = cv2.IMREAD_COLOR_RGB  # missing before 4.11, or if two OpenCV packages conflict
        return "fast"
    except Exception as error:  # a broken installation may raise any error
        reason = f"OpenCV cannot be imported ({reason_of(error)})"
    fix = "`pip uninstall` every opencv package, then `pip install opencv-python-headless`"
    if loader == "fast":
        raise UserError(f"--loader fast: {reason}; {fix}, or give --loader pil")
    if world.is_main:
        warn(f"{reason}: training reads JPEGs more slowly, as with --loader pil; {fix}")
    return "pil"


class Reader(torch.utils.data.Dataset):
    """The data set of loader processes: reader[key] -> (number, images, bad, slow).

    images: a list of uint8 tensors, [] if none can be read. bad, slow: number -> why the image cannot be read at all,
    or by OpenCV. Each process records the image that it is reading in shared memory: process id, image number.
    """

    def __init__(self, data: Dataset):
        self.data = data
        self.begun = torch.zeros(loader_processes(), 2, dtype=torch.int64).share_memory_()
        _alive.add(self)

    def note(self, i: int) -> None:
        """Record, in a loader process, that image `i` is read next; about 10 microseconds."""
        worker = get_worker_info()
        if worker is not None:
            self.begun[worker.id] = torch.tensor([os.getpid(), i])

    def path(self, i: int) -> str:
        """Path of image `i`; '' if it is in memory."""
        return self.data.paths[i] if isinstance(self.data, FileDataset) else ""

    def fault(self, error: ImageError, i: int) -> str:
        """Why image `i` cannot be decoded, in one line without its path."""
        return reason_of(ImageError(str(error).replace(repr(self.path(i)), "").strip(": ")))


_alive: weakref.WeakSet[Reader] = weakref.WeakSet()


def file_of_process(pid: int) -> str | None:
    """The path that loader process `pid` was reading; None if it is not a loader process of this process."""
    for reader in _alive:
        for its, i in reader.begun.tolist():
            if its == pid:
                return reader.path(i) or None
    return None


class SampleReader(Reader):
    """Decodes and augments one file: reader[epoch, number].

    fast: read training JPEGs with augment/fast_image.py if the pipeline allows it; Pillow decodes what OpenCV cannot.
    In training the next readable image replaces a bad one, so that batches keep their size on every rank; evaluation
    leaves it out.
    """

    def __init__(self, data: FileDataset, transform, *, in_chans: int, seed: int, train: bool, fast: bool = False):
        super().__init__(data)
        self.transform, self.in_chans, self.seed, self.train = transform, in_chans, seed, train
        self.fast = None
        if fast and train:
            from augment.fast_image import FastTrainTransform, can_be_fast  # OpenCV

            self.fast = FastTrainTransform(transform, in_chans) if can_be_fast(transform) else None

    def __getitem__(self, key: tuple[int, int]):
        epoch, index = key
        bad: dict[int, str] = {}
        slow: dict[int, str] = {}
        for attempt in range(16 if self.train else 1):
            i = (index + attempt) % len(self.data)
            self.note(i)
            try:  # any other error is not the file's fault
                return i, [self.read(i, epoch, index, slow)], bad, slow
            except ImageError as error:
                bad[i] = self.fault(error, i)
        return index, [], bad, slow

    def read(self, i: int, epoch: int, index: int, slow: dict[int, str]) -> torch.Tensor:
        """One file's pixels, augmented with random numbers seeded by (seed, epoch, index)."""
        failure = None
        if self.fast is not None:
            try:
                with sample_rng(self.seed, epoch, index):
                    return self.fast(self.path(i))
            except ImageError as error:
                failure = error
        image = open_image(self.path(i), self.in_chans)
        if failure is not None:
            slow[i] = self.fault(failure, i)
        with sample_rng(self.seed, epoch, index):
            return self.transform(image)


def collate(samples: list) -> tuple[torch.Tensor, list[torch.Tensor], dict[int, str], dict[int, str]]:
    """A batch of a Reader's samples: (numbers [b] of the readable ones, a stack of b per kind of image, bad, slow)."""
    good = [sample for sample in samples if sample[1]]
    images = [torch.stack(kind) for kind in zip(*(images for _, images, *_ in good))]
    bad, slow = ({i: why for sample in samples for i, why in sample[k].items()} for k in (2, 3))
    return torch.tensor([sample[0] for sample in good], dtype=torch.long), images, bad, slow


def read_in_processes(
    reader: Reader, batches: Iterable[list], reading: Reading, device: torch.device, *, ahead: int = 4
) -> DataLoader:
    """Collated batches of a reader. batches: yields lists of keys. ahead: batches that a process reads in advance."""
    workers = loader_processes(reading.num_workers)
    return DataLoader(
        reader,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=reading.pin_mem and device.type == "cuda",
        persistent_workers=workers > 0,
        prefetch_factor=ahead if workers else None,
        # Processes that are not forked do not inherit the pixel limit.
        worker_init_fn=partial(_start, int(2 * cast(float, Image.MAX_IMAGE_PIXELS))),
        # DataLoader draws a seed in each pass. From the run's own generator, a resumed run, which makes one more pass,
        # would end with another state of it.
        generator=torch.Generator(),
    )


def loader_processes(wanted: int = sys.maxsize) -> int:
    """--num_workers, but at most one per core available to this process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(wanted, cores)


def _start(max_pixels: int, worker: int) -> None:
    """Set up a loader process."""
    torch.set_num_threads(1)
    limit_pixels(max_pixels)


def accept_bad_image(path: str, reason: str, reading: Reading) -> None:
    """UserError for an image that cannot be read, unless --on_bad_image skip."""
    if reading.on_bad_image == "error":
        raise UserError(
            f"{printable(path)}: cannot be read as an image ({reason}); remove it or give --on_bad_image skip"
        )


class Loader:
    """Batches of one split, on the device. `batch_transform(images uint8, index, epoch, train)` makes them float.

    An ArrayDataset is indexed and augmented by the batch on the device; files go through `transform` in workers.
    """

    def __init__(
        self,
        data: Dataset,
        *,
        batch_transform: BatchTransform,
        transform: Callable[[Image.Image], torch.Tensor] | None = None,
        batch_size: int,
        train: bool,
        world: World,
        reading: Reading = Reading(),  # noqa: B008 (frozen)
        even: bool = False,
    ):
        self.data, self.batch_transform, self.world, self.train = data, batch_transform, world, train
        seed = batch_transform.seed
        self.order = EpochOrder(len(data), batch_size, world=world, seed=seed, train=train, even=even)
        self.reading = reading
        self.bad_images: dict[str, str] = {}  # path -> why it cannot be read
        self.targets = data.targets.to(world.device)
        self.files: DataLoader | None = None
        if isinstance(data, ArrayDataset):
            self.images = data.images.to(world.device)
        else:
            in_chans, fast = len(batch_transform.mean), reading.loader == "fast"
            reader = SampleReader(data, transform, in_chans=in_chans, seed=seed, train=train, fast=fast)
            self.files = read_in_processes(reader, self.order, reading, world.device)

    def __len__(self) -> int:
        """Batches per epoch, the same on every rank."""
        return len(self.order)

    def epoch(self, epoch: int = 0, start_step: int = 0) -> Iterator[Batch]:
        """Batches of an epoch, starting at step `start_step`."""
        self.order.start(epoch, start_step)
        for index, images in self._numbers() if self.files is None else self._read(self.files, epoch):
            where = to_device(index, self.world.device)
            images = self.images.index_select(0, where) if images is None else images
            images = self.batch_transform(images, index, epoch, self.train)
            yield Batch(images, self.targets.index_select(0, where), index)

    def _numbers(self) -> Iterator[tuple[torch.Tensor, None]]:
        """(numbers, None) of each batch of an in-memory set."""
        for keys in self.order:
            yield torch.tensor([i for _, i in keys]), None

    def _read(self, files: DataLoader, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(numbers, uint8 images on the device) of each batch of files; reports unreadable and slowly read images."""
        read, slow, path = 0, dict[int, str](), files.dataset.path  # type: ignore[attr-defined]
        for index, images, bad, slower in files:
            self._report({path(i): reason for i, reason in bad.items()})
            slow |= slower
            if self.train and len(index) < self.order.batch_size:
                last = printable(path(list(bad)[-1]))
                raise UserError(f"{last}: the last of 16 images in a row that cannot be read")
            if len(index) == 0:
                continue
            read += len(index)
            yield index, images[0].to(self.world.device, non_blocking=True)
        if slow:
            i, reason = next(iter(slow.items()))
            warn(
                f"epoch {epoch}: {len(slow)} of {read} images were decoded by Pillow because OpenCV could not; "
                f"e.g. {printable(path(i))} ({reason})"
            )
        if not self.train and read == 0 and self.world.size == 1:  # other ranks may have readable images
            root = getattr(self.data, "root", "")
            where = f" in {printable(root)}" if root else ""
            raise UserError(f"--data_path: none of the {len(self.data)} images{where} can be read")

    def _report(self, bad: dict[str, str]) -> None:
        for path, reason in bad.items():
            accept_bad_image(path, reason, self.reading)
            if path not in self.bad_images:
                self.bad_images[path] = reason
                warn(f"{printable(path)}: skipped, cannot be read as an image ({reason})")


def evaluation_loader(
    data: Dataset, meta: dict, world: World, *, batch_size: int, reading: Reading, crop_pct: float | None = None
) -> Loader:
    """Images for evaluating the network of `meta`: resized, centre-cropped, normalised.

    crop_pct: the share of a resized file that is kept (default: meta's, else the default for the size).
    """
    height, width = meta["img_size"]
    crop_pct = crop_pct or meta.get("crop_pct")
    return Loader(
        to_channels(data, meta["in_chans"]) if isinstance(data, ArrayDataset) else data,
        transform=build_eval_transform((height, width), crop_pct),
        batch_transform=BatchTransform(meta["mean"], meta["std"], size=(height, width)),
        batch_size=batch_size,
        train=False,
        world=world,
        reading=reading,
    )
