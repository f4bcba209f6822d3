"""From a data set to batches on the device: splits, the order of samples, loaders.

The order of an epoch is one permutation of the whole set by (seed, epoch); step s of a run on R ranks with batch B
takes entries [s R B, (s + 1) R B) of it. So a run can start in the middle of an epoch, and worker count, world size
and resumes do not change which samples a step sees. Augmentation is counted by (seed, epoch, index) as well.
"""

import os
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image
from torch.utils.data import DataLoader, get_worker_info

from augment.decoding import ImageError, limit_pixels, open_image
from augment.transfer import to_device
from util.data.datasets import ArrayDataset, FileDataset
from util.data_specs import IN_MEMORY
from util.dist import World
from util.errors import UserError, reason_of
from util.files import printable
from util.seed import mix, sample_rng


@dataclass
class Batch:
    """images float32 [B, C, H, W] normalised, targets int64 [B], on the device; index int64 [B] into the data set (CPU)."""

    images: torch.Tensor
    targets: torch.Tensor
    index: torch.Tensor


class EpochOrder:
    """Batches of (epoch, index) for one rank; see the module's docstring. Training drops the incomplete last batch."""

    def __init__(self, n: int, batch_size: int, *, world: World, seed: int = 0, train: bool = True, even: bool = False):
        self.n, self.rank, self.size, self.seed, self.train = n, world.rank, world.size, seed, train
        self.batch_size = batch_size
        if train:
            # A set smaller than one global batch still trains: with all of it as the batch.
            self.batch_size = min(batch_size, n // world.size)
            if even:  # mixup pairs each sample with its mirror in the batch
                self.batch_size -= self.batch_size % 2
            if even and self.batch_size < 1 and n >= world.size:
                raise UserError(
                    f"--batch_size {batch_size}: --mixup and --cutmix mix pairs of images, and a batch has one here ({n} "
                    f"training images, {world.size} processes); give 2 or more, or --mixup 0 --cutmix 0"
                )
            if self.batch_size < 1:
                raise UserError(f"--data_path: {n} training images cannot fill a batch on {world.size} ranks")
        self.epoch = self.start_step = 0

    def start(self, epoch: int, step: int = 0) -> None:
        self.epoch, self.start_step = epoch, step

    def __len__(self) -> int:
        if self.train:
            return self.n // (self.batch_size * self.size)
        # The longest rank's count: ranks agree on it, and short ranks have an empty last batch.
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
    """--loader: `pil`, or `fast`, which needs OpenCV. Not given: fast; pil, with a warning, where OpenCV cannot be imported."""
    if loader == "pil" or (loader is None and dataset in IN_MEMORY):
        return loader or "fast"
    try:
        import cv2

        _ = cv2.IMREAD_COLOR_RGB  # of two wheels at odds an empty package may be left; before 4.11 there was none
        return "fast"
    except Exception as error:  # a broken installation raises anything
        reason = f"OpenCV cannot be imported ({reason_of(error)})"
    mend = "`pip uninstall` every opencv package, then `pip install opencv-python-headless`"
    if loader == "fast":
        raise UserError(f"--loader fast: {reason}; {mend}, or give --loader pil")
    if world.is_main:
        print(f"warning: {reason}: training reads JPEGs more slowly, as with --loader pil; {mend}", file=sys.stderr)
    return "pil"


class SampleReader:
    """Decode and augment one file: (epoch, index) -> (uint8 [C, H, W], target, index, bad, slow), in a loader worker.

    fast: training's JPEGs through augment/fast_image.py where the pipeline allows it; what OpenCV cannot decode goes the
    plain way. bad and slow list (path, reason) of images that could not be read, and of those that only OpenCV could not.
    In training the next readable image takes the place of a bad one, so that batches keep their size on every rank; in
    evaluation the image is None and drops out.
    """

    def __init__(
        self,
        data: FileDataset,
        transform,
        *,
        in_chans: int,
        seed: int,
        train: bool,
        fast: bool = False,
        workers: int = 0,
    ):
        self.data, self.transform, self.in_chans, self.seed, self.train = data, transform, in_chans, seed, train
        self.reading = Reading(data.paths, workers)
        self.fast = None
        if fast and train:
            from augment.fast_image import FastTrainTransform, can_be_fast  # OpenCV

            self.fast = FastTrainTransform(transform, in_chans) if can_be_fast(transform) else None

    def __getitem__(self, key: tuple[int, int]):
        epoch, index = key
        bad, slow = [], []
        for attempt in range(16 if self.train else 1):
            i = (index + attempt) % len(self.data)
            path = self.data.paths[i]
            self.reading.note(i)
            try:  # any other error is not the file's
                return self.read(path, epoch, index, slow), int(self.data.targets[i]), i, bad, slow
            except ImageError as error:
                bad.append((path, image_fault(error, path)))
        return None, -1, index, bad, slow

    def read(self, path: str, epoch: int, index: int, slow: list) -> torch.Tensor:
        """One file's pixels, augmented with the random numbers of (seed, epoch, index)."""
        failure = None
        if self.fast is not None:
            try:
                with sample_rng(self.seed, epoch, index):
                    return self.fast(path)
            except ImageError as error:
                failure = error
        image = open_image(path, self.in_chans)
        if failure is not None:
            slow.append((path, image_fault(failure, path)))
        with sample_rng(self.seed, epoch, index):
            return self.transform(image)


def collate(samples: list) -> tuple:
    good = [s for s in samples if s[0] is not None]
    bad, slow = ([file for s in samples for file in s[k]] for k in (3, 4))
    images = torch.stack([s[0] for s in good]) if good else torch.empty(0)
    return images, torch.tensor([s[1] for s in good]), torch.tensor([s[2] for s in good], dtype=torch.long), bad, slow


class Loader:
    """Batches of one split, on the device. `batch_transform(images uint8, index, epoch, train)` makes them float.

    An ArrayDataset is gathered and augmented as whole batches on the device; files go through `transform` in workers.
    """

    def __init__(
        self,
        data: ArrayDataset | FileDataset,
        *,
        batch_transform,
        transform=None,
        batch_size: int,
        train: bool,
        world: World,
        seed: int = 0,
        in_chans: int = 3,
        even: bool = False,
        num_workers: int = 0,
        pin_memory: bool = True,
        on_bad_image: str = "error",
        fast: bool = False,
    ):
        self.data, self.batch_transform, self.world, self.train = data, batch_transform, world, train
        self.order = EpochOrder(len(data), batch_size, world=world, seed=seed, train=train, even=even)
        self.on_bad_image, self.bad_images = on_bad_image, {}
        self.files = None
        if isinstance(data, ArrayDataset):
            self.images, self.targets = data.images.to(world.device), data.targets.to(world.device)
        else:
            workers = loader_processes(num_workers)
            self.files = DataLoader(
                SampleReader(data, transform, in_chans=in_chans, seed=seed, train=train, fast=fast, workers=workers),
                batch_sampler=self.order,
                collate_fn=collate,
                num_workers=workers,
                pin_memory=pin_memory and world.device.type == "cuda",
                persistent_workers=workers > 0,
                prefetch_factor=4 if workers else None,
                worker_init_fn=worker_init(),
                # Each pass draws a seed for its workers, which nothing here uses: not from the run's own generator, or a
                # resumed run, which makes one pass more, would end with another state of it.
                generator=torch.Generator(),
            )

    def __len__(self) -> int:
        """Batches per epoch, the same on every rank."""
        return len(self.order)

    def epoch(self, epoch: int = 0, start_step: int = 0) -> Iterator[Batch]:
        """Batches of an epoch from step `start_step` on."""
        self.order.start(epoch, start_step)
        device = self.world.device
        if self.files is None:
            for keys in self.order:
                index = torch.tensor([i for _, i in keys])
                where = to_device(index, device)
                images = self.batch_transform(self.images.index_select(0, where), index, epoch, self.train)
                yield Batch(images, self.targets.index_select(0, where), index)
            return
        read, slow = 0, []
        for images, targets, index, bad, slower in self.files:
            self._report(bad)
            slow += slower
            if self.train and len(index) < self.order.batch_size:
                raise UserError(f"{printable(bad[-1][0])}: the last of 16 images in a row that cannot be read")
            if len(index) == 0:
                continue
            read += len(index)
            images = images.to(device, non_blocking=True)
            images = self.batch_transform(images, index, epoch, self.train)
            yield Batch(images, targets.to(device, non_blocking=True), index)
        if slow:
            path, reason = slow[0]
            print(
                f"warning: epoch {epoch}: {len(slow)} of {read} images were decoded by Pillow, as OpenCV could not; "
                f"e.g. {printable(path)} ({reason})",
                file=sys.stderr,
            )
        if not self.train and read == 0 and self.world.size == 1:  # on more ranks, others may have had readable ones
            raise UserError(f"--data_path: none of the {len(self.data)} images{self._below()} can be read")

    def _below(self) -> str:
        return f" in {printable(self.data.root)}" if self.data.root else ""

    def _report(self, bad: list[tuple[str, str]]) -> None:
        for path, reason in bad:
            name = printable(path)
            if self.on_bad_image == "error":
                raise UserError(f"{name}: cannot be read as an image ({reason}); remove it or give --on_bad_image skip")
            if path not in self.bad_images:
                self.bad_images[path] = reason
                print(f"warning: {name}: skipped, cannot be read as an image ({reason})", file=sys.stderr)


_alive: weakref.WeakSet = weakref.WeakSet()


def loader_processes(wanted: int) -> int:
    """`--num_workers`, at most one per core that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(wanted, cores)


def worker_init() -> Callable[[int], None]:
    """A loader process's first call: one thread, and this process's limit of pixels, wherever processes are not forked."""
    return partial(_start, 2 * Image.MAX_IMAGE_PIXELS)


def _start(max_pixels: float, worker: int) -> None:
    torch.set_num_threads(1)
    limit_pixels(max_pixels)


def image_fault(error: ImageError, path: str) -> str:
    """Why a file cannot be decoded, in a line without its name."""
    return reason_of(ImageError(str(error).replace(repr(path), "").strip(": ")))


class Reading:
    """A row for each of `workers` processes in memory that they share with this one: process id, number of its sample."""

    def __init__(self, paths: Sequence[str], workers: int):
        self.paths = paths
        self.table = torch.zeros(max(1, workers), 2, dtype=torch.int64).share_memory_()
        _alive.add(self)

    def note(self, index: int) -> None:
        """Called in a loader process before it opens sample `index`; about 10 microseconds."""
        worker = get_worker_info()
        if worker is not None:
            self.table[worker.id] = torch.tensor([os.getpid(), index])


def file_of_process(pid: int) -> str | None:
    """The path that loader process `pid` began with last; None if it is none of this process's."""
    for reading in _alive:
        for its, index in reading.table.tolist():
            if its == pid:
                return reading.paths[index] if reading.paths else None
    return None
