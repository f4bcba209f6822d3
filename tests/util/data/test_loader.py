"""The order of samples and the loaders: whatever ranks, workers and place to start, the same batches."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from augment.batch import BatchTransform, Erasing
from augment.image import Geometry, build_eval_transform, build_train_transform
from tests.harness.pictures import write_image
from util.cli.settings import Reading
from util.data.datasets import ArrayDataset, read_split
from util.data.loader import EpochOrder, Loader
from util.dist import World
from util.errors import UserError
from util.seed import sample_rng


def order(n, batch, *, rank=0, size=1, epoch=0, step=0, train=True, even=False):
    o = EpochOrder(n, batch, world=World(rank, size), seed=1, train=train, even=even)
    o.start(epoch, step)
    return [[i for _, i in keys] for keys in o], len(o)


def test_two_ranks_see_the_global_batches_of_one():
    one, n = order(37, 8)
    assert n == 4
    halves = [order(37, 4, rank=r, size=2)[0] for r in (0, 1)]
    assert [a + b for a, b in zip(*halves)] == one
    assert order(37, 8, step=2)[0] == one[2:], "a start in mid-epoch goes on with the same samples"
    assert order(37, 8, epoch=1)[0] != one


@pytest.mark.parametrize("size", [1, 2, 3])
def test_evaluation_sees_every_sample_once(size):
    seen = [i for r in range(size) for b in order(31, 4, rank=r, size=size, train=False)[0] for i in b]
    assert sorted(seen) == list(range(31))


def test_small_sets_fill_one_batch_and_mixing_keeps_it_even():
    assert [len(b) for b in order(7, 16)[0]] == [7]
    assert [len(b) for b in order(7, 16, even=True)[0]] == [6]
    with pytest.raises(UserError, match="cannot fill"):
        order(1, 4, size=2)


def file_loader(root, *, workers=0, train=True, on_bad="error", split="train"):
    return Loader(
        read_split("folder", str(root), split),
        transform=build_train_transform((16, 16), "mae", aa="rand-m9") if train else build_eval_transform((16, 16)),
        batch_transform=BatchTransform((0.5,) * 3, (0.5,) * 3, erasing=Erasing(0.5), seed=5),
        batch_size=4,
        train=train,
        world=World(),
        reading=Reading(num_workers=workers, on_bad_image=on_bad),
    )


def test_batches_do_not_depend_on_worker_count_or_start(photo_folder):
    before = torch.get_rng_state()
    plain = list(file_loader(photo_folder).epoch(2))
    workers = list(file_loader(photo_folder, workers=2).epoch(2))
    assert torch.equal(torch.get_rng_state(), before), "a resumed run makes one pass more and must end with the same"
    late = list(file_loader(photo_folder).epoch(2, 5))
    assert len(plain) == 8
    for a, b in zip(plain, workers):
        assert torch.equal(a.images, b.images) and torch.equal(a.targets, b.targets) and torch.equal(a.index, b.index)
    assert torch.equal(plain[5].images, late[0].images)
    assert not torch.equal(plain[0].images, next(iter(file_loader(photo_folder).epoch(3))).images)


def test_copying_a_batch_to_the_device_does_not_wait(photo_folder, monkeypatch):
    """On CUDA, a blocking copy of the sample numbers would wait for the step before."""
    images = torch.arange(32 * 64, dtype=torch.int32).remainder(251).to(torch.uint8).view(32, 1, 8, 8)
    data = ArrayDataset(images, torch.arange(32), [str(i) for i in range(32)])
    transform = BatchTransform(
        (0.5,),
        (0.5,),
        geometry=Geometry("rrc", hflip=0.5, vflip=0.5),
        erasing=Erasing(0.5),
        aa="rand-m9",
        color_jitter=0.3,
    )
    plain = Loader(data, batch_transform=transform, batch_size=8, train=True, world=World())
    files = file_loader(photo_folder)
    next(iter(plain.epoch(0)))  # constants are copied once
    real, blocking = torch.Tensor.to, []

    def to(self, *args, non_blocking=False, **kwargs):
        if any(isinstance(a, torch.device) for a in args) and not non_blocking:
            blocking.append(args)
        return real(self, *args, non_blocking=non_blocking, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", to)
    batches = [*plain.epoch(0), *files.epoch(0)]
    assert len(batches) == 4 + 8 and sorted(torch.cat([b.targets for b in batches[:4]]).tolist()) == list(range(32))
    assert all(torch.equal(b.targets, b.index) for b in batches[:4])
    # (a new loader's transform copies its constants)
    assert len(blocking) <= 2, blocking


def test_unmixed_evaluation_batches_hold_the_right_targets(photo_folder):
    for batch in file_loader(photo_folder, train=False, split="val").epoch():
        redder = batch.images[:, 0].mean((1, 2)) > batch.images[:, 2].mean((1, 2))
        assert torch.equal(redder.long(), batch.targets)


def test_broken_image_ends_the_run_or_is_skipped_by_path(photo_folder, tmp_path, capsys):
    shutil.copytree(photo_folder, tmp_path / "p")
    (tmp_path / "p" / "train" / "red" / "red_03.png").write_bytes(b"no image")
    whole = (tmp_path / "p" / "val" / "blue" / "blue_01.png").read_bytes()
    (tmp_path / "p" / "val" / "blue" / "blue_01.png").write_bytes(whole[: len(whole) // 2])
    for workers in (0, 2):
        with pytest.raises(UserError, match=r"red_03.png: cannot be read.*--on_bad_image skip"):
            list(file_loader(tmp_path / "p", workers=workers).epoch())
    batches = list(file_loader(tmp_path / "p", on_bad="skip").epoch())
    assert [len(b.index) for b in batches] == [4] * 8, "training batches keep their size"
    seen = [
        i
        for b in file_loader(tmp_path / "p", train=False, split="val", on_bad="skip").epoch()
        for i in b.index.tolist()
    ]
    assert sorted(seen) == [i for i in range(12) if i != 1]
    warnings = capsys.readouterr().err
    assert warnings.count("red_03.png") == 1 and warnings.count("blue_01.png") == 1


def test_what_takes_the_place_of_a_broken_image_brings_its_own_class(photo_folder, tmp_path):
    """The last of the blue ones is broken, the first of the red ones follows."""
    shutil.copytree(photo_folder, tmp_path / "p")
    (tmp_path / "p" / "train" / "blue" / "blue_15.png").write_bytes(b"no image")
    loader = file_loader(tmp_path / "p", on_bad="skip")
    order = [i for keys in loader.order for _, i in keys]
    batches = list(loader.epoch())
    index, targets = (torch.cat([getattr(b, name) for b in batches]) for name in ("index", "targets"))
    assert index.tolist() == [16 if i == 15 else i for i in order] and index.tolist().count(16) == 2
    assert torch.equal(targets, (index >= 16).long())
    # Its pixels are its own, the random numbers those of the place that it fills.
    number, [pixels], bad, _ = loader.files.dataset[3, 15]
    with sample_rng(5, 3, 15):
        expected = loader.files.dataset.transform(Image.open(loader.data.paths[16]))
    assert number == 16 and torch.equal(pixels, expected) and list(bad) == [15]


def test_every_image_mode_loads(tmp_path):
    arrays = {
        "grey.png": Image.new("L", (9, 9), 128),
        "alpha.png": Image.new("RGBA", (9, 9), (128, 128, 128, 255)),
        "palette.png": Image.new("RGB", (9, 9), (128,) * 3).convert("P"),
        "cmyk.jpg": Image.new("RGB", (9, 9), (128,) * 3).convert("CMYK"),
        "deep.png": Image.fromarray(np.full((9, 9), 128 * 257, np.uint16)),
        "bit.png": Image.new("1", (9, 9), 1),
        "one.png": Image.new("RGB", (1, 1), (128,) * 3),
    }
    for name, image in arrays.items():
        path = tmp_path / "train" / "a" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    write_image(tmp_path / "train" / "b" / "x.png", (128,) * 3)
    for batch in file_loader(tmp_path, train=False).epoch():
        level = (batch.images.mean((1, 2, 3)) * 0.5 + 0.5) * 255
        names = [sorted(arrays)[i] if i < len(arrays) else "x.png" for i in batch.index]
        for name, value in zip(names, level.tolist()):
            assert value == pytest.approx(255 if name == "bit.png" else 128, abs=2), name
