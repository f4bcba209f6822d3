"""Broken and hostile images, folders and names: one clear line each, or left out and reported."""

import csv
import io
import os
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main_finetune
from augment.batch import BatchTransform
from augment.image import build_eval_transform, open_image, to_channels
from tests.harness.checks import one_line, peak_memory_below
from util.checkpoint import BEST, read_checkpoint
from util.cli.settings import Data, Reading
from util.data.datasets import FileDataset, read_class_folder
from util.data.image_files import find_images
from util.data.loader import Loader
from util.data.splits import load_data
from util.data.views import ViewReader
from util.dist import World
from util.errors import UserError
from util.log import RunLog
from util.predict.ensemble import read_oof
from util.predict.members import Member
from util.train.folds import write_oof


def save_image(path, size=(20, 16), **kwargs):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(path, **kwargs)
    return str(path)


def png_bomb(path, width: int, height: int) -> str:
    """A PNG of a few bytes whose header claims width x height pixels."""
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )
    return str(path)


def broken_images(folder) -> dict[str, str]:
    """kind -> path of a file named as an image that is none."""
    folder.mkdir(exist_ok=True)
    (folder / "text.jpg").write_text("not an image\n")
    (folder / "empty.png").write_bytes(b"")
    (folder / "zeros.jpg").write_bytes(bytes(4096))
    (folder / "postscript.jpg").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    )
    whole = Path(save_image(folder / "whole.jpg", (200, 160))).read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    os.mkfifo(folder / "pipe.jpg")
    os.symlink("/dev/zero", folder / "device.jpg")
    os.symlink(folder / "loop.jpg", folder / "loop.jpg")
    os.symlink(folder / "nothing", folder / "broken_link.jpg")
    (folder / "folder.jpg").mkdir()
    png_bomb(folder / "bomb.png", 60000, 60000)
    return {n.split(".")[0]: str(folder / n) for n in os.listdir(folder) if n != "whole.jpg"}


def test_files_that_are_no_images_are_refused_quickly_and_without_memory(tmp_path):
    """A pipe would be waited for, a device read for ever, PostScript handed to Ghostscript, a bomb unpacked."""
    for kind, path in broken_images(tmp_path / "x").items():
        start = time.monotonic()
        with peak_memory_below(300), pytest.raises((OSError, SyntaxError, ValueError, Image.DecompressionBombError)):
            open_image(path, 3)
        assert time.monotonic() - start < 5, kind


@pytest.mark.parametrize("size", [(20000, 10), (10, 20000), (1, 1), (1, 5000), (16385, 1)])
def test_long_and_tiny_images_become_inputs_in_little_memory(tmp_path, size):
    path = save_image(tmp_path / "x.png", size)
    with peak_memory_below(200):
        image = open_image(path, 3)
        assert build_eval_transform((224, 224))(image).shape == (3, 224, 224)
        assert build_eval_transform((64, 32))(image).shape == (3, 64, 32)
        _, views, bad, _ = ViewReader(FileDataset([path], torch.tensor([-1])), [(64, 64, 3)], list(range(12)))[0]
    assert not bad and views[0].shape == (12, 3, 64, 64)


def test_only_images_longer_than_16_to_1_are_cropped():
    """The centre crop of the whole resize, computed the expensive way, is what comes out of the cut image."""
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 640, 3), dtype=np.uint8))
    assert to_channels(photo, 3).size == (640, 40)
    x = np.linspace(0, 255, 2000)[None, :, None] * np.ones((20, 1, 3))
    long = Image.fromarray(x.astype(np.uint8))
    cut = to_channels(long, 3)
    assert cut.size == (320, 20)
    expensive, cheap = (build_eval_transform((32, 32))(im).float() for im in (long, cut))
    assert torch.equal(expensive, cheap)


def loader_of(paths, on_bad_image, workers=0, train=False):
    data = FileDataset(paths, torch.zeros(len(paths), dtype=torch.long), ["a"])
    transform = BatchTransform((0.5,) * 3, (0.5,) * 3, size=(16, 16))
    return Loader(
        data,
        transform=build_eval_transform((16, 16)),
        batch_transform=transform,
        batch_size=4,
        train=train,
        world=World(),
        reading=Reading(num_workers=workers, on_bad_image=on_bad_image),
    )


def test_bad_images_are_left_out_and_named_once_or_end_the_run(tmp_path, capsys):
    bad = broken_images(tmp_path / "x")
    good = [save_image(tmp_path / f"{i}.png") for i in range(3)]
    name = os.fsencode(str(tmp_path)) + b"/caf\xe9.jpg"
    open(name, "wb").close()
    loader = loader_of([*bad.values(), os.fsdecode(name), *good], "skip")
    for _ in range(2):
        assert sum(len(b.targets) for b in loader.epoch()) == 3
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(bad) + 1 and all("skipped" in line for line in said)
    assert any("caf\\xe9.jpg" in line for line in said)
    with pytest.raises(UserError, match=r"text\.jpg.*--on_bad_image skip") as caught:
        list(loader_of([bad["text"]], "error").epoch())
    one_line(caught)


def test_unreadable_files_and_folders_are_named(tmp_path, monkeypatch):
    """The tests may run as root, whom no mode stops: the refusal is simulated where the system would make it."""
    for c in ("a", "b"):
        (tmp_path / c / "deep").mkdir(parents=True)
        save_image(tmp_path / c / "1.png"), save_image(tmp_path / c / "deep" / "2.png")
    real_open, real_scan = open, os.scandir

    def refuse(real, word):
        def call(path, *args, **kwargs):
            if isinstance(path, str) and word in path:
                raise PermissionError(13, "Permission denied", path)
            return real(path, *args, **kwargs)

        return call

    monkeypatch.setattr("builtins.open", refuse(real_open, "1.png"))
    with pytest.raises(UserError, match=r"1\.png: cannot be read as an image.*Permission denied"):
        list(loader_of([str(tmp_path / "a" / "1.png")], "error").epoch())
    monkeypatch.setattr("os.scandir", refuse(real_scan, "deep"))
    with pytest.raises(UserError, match=r"a/deep: cannot be read \(Permission denied\)"):
        read_class_folder(str(tmp_path))


@pytest.mark.slow
def test_links_in_circles_and_many_files_are_scanned_once_and_fast(tmp_path):
    os.symlink(tmp_path, tmp_path / "again")
    os.symlink(tmp_path / "x", tmp_path / "x")
    (tmp_path / "many").mkdir()
    for i in range(100_000):
        os.close(os.open(tmp_path / "many" / f"{i}.jpg", os.O_CREAT | os.O_WRONLY))
    start = time.process_time()
    found = find_images(str(tmp_path)).paths
    assert len(found) == 100_000 and time.process_time() - start < 3


@pytest.mark.parametrize("classes,words", [(0, "no class folders"), (1, "at least two"), (2, "without images")])
def test_folders_with_too_few_classes(tmp_path, classes, words):
    (tmp_path / "train").mkdir(), (tmp_path / "val").mkdir()
    for i in range(classes):
        for split in ("train", "val"):
            (tmp_path / split / f"c{i}").mkdir()
            if i == 0:
                save_image(tmp_path / split / "c0" / "x.png")
    with pytest.raises(UserError, match=words) as caught:
        load_data(Data(dataset="folder", data_path=str(tmp_path)), World())
    one_line(caught)


@pytest.mark.slow
def test_names_of_any_bytes_go_through_training_tables_and_messages(tmp_path, capsys, monkeypatch):
    """Class and file names that are no UTF-8, or that a spreadsheet would run."""
    root = os.fsencode(str(tmp_path / "photos"))
    for split in (b"train", b"val"):
        for c in (b"caf\xe9", b"=1+1"):
            os.makedirs(os.path.join(root, split, c))
            for i in range(4):
                save_image(tmp_path / "x.png")
                os.rename(tmp_path / "x.png", os.path.join(root, split, c, b"@\xff\n%d.png" % i))
    out = tmp_path / "out"
    argv = [
        "--data_path",
        os.fsdecode(root),
        *"""
            --model vit_custom_patch8 --model_kwargs embed_dim=12 depth=1 num_heads=2 --input_size 16 --epochs 1
            --batch_size 4 --num_workers 0 --device cpu --kfold 2
        """.split(),
        "--output_dir",
        str(out),
        "--aug",
        "none",
    ]
    assert main_finetune.main(argv) == 0
    header, *rows = list(csv.reader(io.StringIO((out / "oof.csv").read_text("utf-8"))))
    assert header == ["ID", "fold", "True", "=1+1", "caf\\xe9"] and len(rows) == 8
    assert sorted(row[0] for row in rows)[:2] == ["=1+1/@\\xff\n0.png", "=1+1/@\\xff\n1.png"]
    folds = [out / "fold-0" / BEST, out / "fold-1" / BEST]
    metas = [read_checkpoint(str(p)) for p in folds]
    assert metas[0]["meta"]["classes"] == ["=1+1", "caf\\xe9"]
    table = read_oof([Member("x", [str(p) for p in folds], metas)], ["=1+1", "caf\\xe9"])
    assert sorted(table.targets.tolist()) == [0] * 4 + [1] * 4
    RunLog(None).say("bad step: " + os.fsdecode(b"caf\xe9.jpg"))  # a pipe in UTF-8 refuses lone surrogates
    assert "caf\\xe9.jpg" in capsys.readouterr().out


def test_out_of_fold_files_have_names_as_they_are_and_every_digit(tmp_path):
    """A network with one more output than there are classes: its share goes to the classes that there are."""
    names, classes = ["-a.png", " b\r.png", "'-c.png", 'd"\n,.png'], ["+x", "y "]
    data = FileDataset([f"/d/{n}" for n in names], torch.tensor([0, 1, 1, 0]), classes, "/d")
    p = np.array([[0.25, 0.75, 0], [1e-9, 0.5, 0.5], [1, 0, 0], [0.1, 0.2, 0.7]], dtype=np.float32)

    class Evaluated:
        index, probabilities = np.arange(4), p

    write_oof(str(tmp_path), 0, data, Evaluated)
    assert (tmp_path / "oof.csv").read_text().startswith("ID,fold,True,+x,y \n-a.png,0,+x,0.25,0.75\n")
    meta = {"classes": classes[::-1], "num_classes": 3}
    table = read_oof([Member("x", [str(tmp_path / "checkpoint-best.pth")], [{"meta": meta}])], classes[::-1])
    assert table.ids == sorted(names) and table.targets.tolist() == [
        [1, 0, 0, 1][names.index(n)] for n in sorted(names)
    ]
    whole = p[:, 1::-1].astype(float) / p[:, :2].sum(1, keepdims=True, dtype=float)
    np.testing.assert_allclose(table.probabilities[0], whole[[names.index(n) for n in sorted(names)]], rtol=1e-8)


def test_out_of_fold_files_of_older_versions_are_read(tmp_path):
    """Six decimals, an apostrophe before what a spreadsheet would run, and a column for each output without a name."""
    (tmp_path / "oof.csv").write_text(
        "ID,fold,True,'+x,y\n'-a.png,0,'+x,0.250000,0.500000,0.250000\nb.png,0,y,0.000000,0.900000,0.100000\n"
    )
    meta = {"classes": ["+x", "y"], "num_classes": 3}
    table = read_oof([Member("x", [str(tmp_path / "checkpoint-best.pth")], [{"meta": meta}])], ["+x", "y"])
    assert table.ids == ["-a.png", "b.png"] and table.targets.tolist() == [0, 1]
    np.testing.assert_allclose(table.probabilities[0], [[1 / 3, 2 / 3], [0, 1]])
