"""Broken and hostile input, one clear line each: images, folders, checkpoints, disks, killed processes."""

import csv
import io
import os
import resource
import signal
import struct
import subprocess
import sys
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests_common import assert_same_state, comparable, log_without_times

import main_finetune
from augment.batch import BatchTransform
from augment.image import build_eval_transform, open_image, to_channels
from engine_predict import ViewReader
from models import create_model, load_pretrained
from models.rebuild import load_classifier
from util.checkpoint import BEST, LAST, find_resume, peek_meta, read_checkpoint, read_file
from util.data import Loader, load_data
from util.datasets import FileDataset, find_images, read_class_folder
from util.dist import World
from util.ensemble import read_oof
from util.errors import UserError
from util.folds import write_oof
from util.log import RunLog, read_log
from util.members import Member
from util.options import known_failure
from util.run import load_exactly

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NET = ["--dataset", "digits", "--model", "vit_custom_patch4", "--model_kwargs", "embed_dim=12", "depth=1", "num_heads=2", "--epochs", "3", "--warmup_epochs", "0", "--batch_size", "64", "--lr", "1e-3", "--ema_decay", "0.9", "--save_freq", "0", "--device", "cpu", "--num_workers", "0"]  # fmt: skip


def one_line(caught) -> str:
    text = str(caught.value)
    assert "\n" not in text and 0 < len(text) < 600, text
    return text


@contextmanager
def peak_memory_below(megabytes: int):
    """A cap on this process's address space, relative to now: what asks for more gets MemoryError."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + megabytes * 2**20, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


# --- images


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
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b""))  # fmt: skip
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
        _, views, reason = ViewReader(FileDataset([path], torch.tensor([-1])), [(64, 64, 3)], list(range(12)))[0]
    assert reason is None and views[0].shape == (12, 3, 64, 64)


def test_only_images_longer_than_16_to_1_are_cut_and_the_crop_is_the_same():
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
    return Loader(data, transform=build_eval_transform((16, 16)), batch_transform=transform, batch_size=4, train=train,
                  world=World(), num_workers=workers, on_bad_image=on_bad_image)  # fmt: skip


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


def test_links_in_circles_and_many_files_are_scanned_once_and_fast(tmp_path):
    os.symlink(tmp_path, tmp_path / "again")
    os.symlink(tmp_path / "x", tmp_path / "x")
    (tmp_path / "many").mkdir()
    for i in range(100_000):
        os.close(os.open(tmp_path / "many" / f"{i}.jpg", os.O_CREAT | os.O_WRONLY))
    start = time.process_time()
    found = find_images(str(tmp_path))
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
        load_data("folder", str(tmp_path), World())
    one_line(caught)


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
    argv = ["--data_path", os.fsdecode(root), "--model", "vit_custom_patch8", "--model_kwargs", "embed_dim=12", "depth=1", "num_heads=2", "--input_size", "16", "--epochs", "1", "--batch_size", "4", "--num_workers", "0", "--device", "cpu", "--kfold", "2", "--output_dir", str(out), "--lr", "1e30", "--max_bad_steps", "99"]  # fmt: skip
    assert main_finetune.main([*argv[:-4], "--aug", "none"]) == 0
    header, *rows = list(csv.reader(io.StringIO((out / "oof.csv").read_text("utf-8"))))
    assert header == ["ID", "fold", "True", "'=1+1", "caf\\xe9"] and len(rows) == 8
    assert all(field[:1] not in "=+-@" for row in rows for field in row)
    folds = [out / "fold-0" / BEST, out / "fold-1" / BEST]
    metas = [read_checkpoint(str(p)) for p in folds]
    assert metas[0]["meta"]["classes"] == ["=1+1", "caf\\xe9"]
    table = read_oof([Member("x", [str(p) for p in folds], metas)], ["=1+1", "caf\\xe9"])
    assert sorted(table.targets.tolist()) == [0] * 4 + [1] * 4
    RunLog(None).say("bad step: " + os.fsdecode(b"caf\xe9.jpg"))  # a pipe in UTF-8 refuses lone surrogates
    assert "caf\\xe9.jpg" in capsys.readouterr().out


def test_out_of_fold_names_are_not_formulas(tmp_path):
    data = FileDataset(["/d/-a.png"], torch.tensor([0]), ["+x", "y"], "/d")

    class Evaluated:
        index, probabilities = np.array([0]), np.array([[0.25, 0.75]])

    write_oof(str(tmp_path), 0, data, Evaluated)
    assert (tmp_path / "oof.csv").read_text() == "ID,fold,True,'+x,y\n'-a.png,0,'+x,0.250000,0.750000\n"


# --- checkpoints


def classifier_meta(**changes) -> dict:
    meta = {"kind": "classifier", "model": "vit_custom_patch4", "model_kwargs": {"embed_dim": 12, "depth": 1, "num_heads": 2},
            "global_pool": True, "img_size": [8, 8], "in_chans": 1, "num_classes": 2, "classes": ["a", "b"],
            "mean": [0.5], "std": [0.5], "dataset": "digits"}  # fmt: skip
    return {k: v for k, v in {**meta, **changes}.items() if v is not ...}


@pytest.fixture(scope="module")
def small_model():
    torch.manual_seed(0)
    return create_model("vit_custom_patch4", num_classes=2, img_size=8, in_chans=1, embed_dim=12, depth=1, num_heads=2)


def write(path, model, **changes) -> str:
    torch.save(
        {"format": 1, "kind": "finetune", "meta": classifier_meta(), "model": model.state_dict(), **changes}, path
    )
    return str(path)


@pytest.mark.parametrize(
    "changes,word",
    [
        ({"model": ...}, "lacks model"),
        ({"model": 7}, "model is '7'"),
        ({"model": "hf-hub:someone/something"}, "name of a model"),
        ({"model": "../../etc/passwd"}, "name of a model"),
        ({"model_kwargs": [1]}, "model_kwargs"),
        ({"model_kwargs": {"checkpoint_path": "/etc/passwd"}}, "fetches"),
        ({"model_kwargs": {"pretrained": True}}, "fetches"),
        ({"model_kwargs": {"depth": 10**9}}, "65536"),
        ({"model_kwargs": {"embed_dim": torch.zeros(2)}}, "model_kwargs"),
        ({"img_size": "abc"}, "img_size is 'abc'"),
        ({"img_size": [8, -1]}, "img_size"),
        ({"img_size": [10**12, 8]}, "img_size"),
        ({"in_chans": "3"}, "in_chans"),
        ({"in_chans": True}, "in_chans"),
        ({"classes": "ab"}, "classes"),
        ({"classes": ["a", "a"]}, "each once"),
        ({"classes": ["a", "b", "c"]}, "3 classes"),
        ({"num_classes": -1}, "num_classes"),
        ({"mean": [float("nan")]}, "mean"),
        ({"std": [0.0]}, "std"),
        ({"std": [0.5, 0.5]}, "channels"),
        ({"img_size": ...}, "lacks img_size"),
        ({"model": "vit_custom_patch3"}, "patch size 3"),
    ],
)
def test_a_checkpoint_that_lies_about_itself_is_refused(tmp_path, small_model, changes, word):
    path = write(tmp_path / "x.pth", small_model, meta=classifier_meta(**changes))
    with pytest.raises(UserError) as caught:
        load_classifier(path)
    assert word in one_line(caught)


@pytest.mark.parametrize("change", [{"format": 999}, {"format": "x" * 10**6}, {"meta": [1]}])
def test_other_formats_are_refused(tmp_path, small_model, change):
    path = write(tmp_path / "x.pth", small_model, **change)
    assert peek_meta(path) is None
    for read in (load_classifier, read_checkpoint):
        with pytest.raises(UserError, match="not a checkpoint of this project") as caught:
            read(path)
        one_line(caught)


def test_weights_that_cannot_be_are_refused(tmp_path, small_model):
    state, key = small_model.state_dict(), "blocks.0.attn.qkv.weight"
    wrong = {
        "is [3, 3]": torch.zeros(3, 3),
        "NaN": torch.full_like(state[key], float("nan")),
        "NaN or infinite": torch.full_like(state[key], float("inf")),
        "int64": torch.zeros(state[key].shape, dtype=torch.long),
        "dense and real": torch.zeros(state[key].shape, dtype=torch.complex64),
        "dense and real ": torch.zeros(state[key].shape).to_sparse(),
        "less data": torch.zeros(1).expand(state[key].shape),
        "claims the shape": torch.zeros(1).expand(10**7, 10**7),
    }
    for word, value in wrong.items():
        path = tmp_path / "x.pth"
        torch.save({"model": {**state, key: value}}, path)
        with peak_memory_below(300), pytest.raises(UserError) as caught:
            load_pretrained(small_model, path)
        assert word.strip() in one_line(caught) and key in str(caught.value)
    for content, word in [
        ({"model": {**state, "pos_embed": torch.zeros(1, 0, 12)}}, "positions"),
        ({"model": {**state, "pos_embed": torch.zeros(5, 5, 12)}}, "positions"),
        ({"model": {"other": torch.zeros(2)}}, "shares no parameter"),
        ({1: torch.zeros(2)}, "shares no parameter"),
        ({"model": {}}, "no tensors"),
        (["x"], "holds a list"),
        (torch.zeros(2), "holds a Tensor"),
    ]:
        torch.save(content, path)
        with pytest.raises(UserError, match=word) as caught:
            load_pretrained(small_model, path)
        one_line(caught)


class Evil:
    def __reduce__(self):
        return (os.system, ("touch /tmp/noisevit_was_executed",))


def broken_files(tmp_path, small_model) -> dict[str, str]:
    good = Path(write(tmp_path / "good.pth", small_model)).read_bytes()
    torch.save({"x": torch.zeros(50_000_000)}, tmp_path / "large.pth")
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as out, zipfile.ZipFile(tmp_path / "large.pth") as source:  # fmt: skip
        for record in source.infolist():
            out.writestr(record.filename, source.read(record))
    os.unlink(tmp_path / "large.pth")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "half.pth").write_bytes(good[: len(good) // 2])
    (tmp_path / "noise.pth").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "text.pth").write_text("404: Not Found\n")
    (tmp_path / "folder.pth").mkdir()
    torch.save({"format": 1, "meta": classifier_meta(), "model": Evil()}, tmp_path / "code.pth")
    torch.save({"model": Evil()}, tmp_path / "old_code.pth", _use_new_zipfile_serialization=False)
    lying = b'{"a":{"dtype":"F32","shape":[1000000000],"data_offsets":[0,4000000000]}}'
    (tmp_path / "lying.safetensors").write_bytes(len(lying).to_bytes(8, "little") + lying + b"1234")
    (tmp_path / "long.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    return {n.split(".")[0]: str(tmp_path / n) for n in os.listdir(tmp_path) if n != "good.pth"}


def test_broken_and_hostile_checkpoint_files(tmp_path, small_model):
    """Every door through which a file comes in: none executes it, unpacks it, or raises anything but one line."""
    files = broken_files(tmp_path, small_model)
    assert len(files) == 10
    for kind, path in files.items():
        with peak_memory_below(150):
            assert peek_meta(path) is None or kind == "code"
            for read in (read_file, read_checkpoint, load_classifier, lambda p: load_pretrained(small_model, p)):
                with pytest.raises(UserError) as caught:
                    read(path)
                assert path in one_line(caught), kind
    assert not os.path.exists("/tmp/noisevit_was_executed")
    assert "compressed" in _message(read_checkpoint, files["bomb"])
    assert "never executed" in _message(read_file, files["code"])


def _message(call, *args) -> str:
    with pytest.raises(UserError) as caught:
        call(*args)
    return one_line(caught)


def test_overlapping_records_are_refused_before_they_are_read(tmp_path):
    """The other zip bomb: a directory that lists the same bytes many times, stored."""
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", bytes(100_000))
        archive.filelist += [archive.filelist[0]] * 5000
        archive.NameToInfo.update({})
    assert os.path.getsize(path) < 600_000
    assert "overlap" in _message(read_file, str(path)) and "overlap" in _message(read_checkpoint, str(path))


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    assert main_finetune.main([*NET, "--output_dir", str(out)]) == 0
    return out


@pytest.mark.parametrize(
    "change,word",
    [
        (lambda c: c.pop("optimizer"), "weights only"),
        (lambda c: c.update(optimizer=None), "weights only"),
        (lambda c: c.update(optimizer={"state": {}}), "param_groups"),
        (lambda c: c["optimizer"]["state"][0].update(exp_avg=torch.zeros(3, 3)), "[3, 3]"),
        (lambda c: c.pop("rng"), "lacks rng"),
        (lambda c: c.update(rng=[{"torch": 5}]), "not whole"),
        (lambda c: c.update(epoch="later"), "epoch or step"),
        (lambda c: c.update(epoch=-1), "epoch or step"),
        (lambda c: c.update(progress={"nonsense": 1}), "nonsense"),
        (lambda c: c.update(sums=None), "not whole"),
        (lambda c: c["model"].pop("cls_token"), "another model"),
        (lambda c: c["model"].update(cls_token=torch.full((1, 1, 12), float("nan"))), "NaN"),
        (lambda c: c["meta"].update(img_size="abc"), "img_size is 'abc'"),
        (lambda c: c.update(format=999), "format 999"),
    ],
)
def test_resume_from_a_checkpoint_that_is_not_whole_is_one_line(whole_run, tmp_path, change, word):
    content = read_checkpoint(str(whole_run / LAST))
    change(content)
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(UserError) as caught:
        main_finetune.main([*NET, "--output_dir", str(tmp_path / "out"), "--resume", str(tmp_path / "x.pth")])
    assert word in one_line(caught) and ("--resume" in str(caught.value) or "x.pth" in str(caught.value))


def test_resume_auto_passes_over_what_is_no_checkpoint(whole_run, tmp_path):
    (tmp_path / "checkpoint-9.pth").write_bytes((whole_run / LAST).read_bytes())
    (tmp_path / LAST).write_text("disk error")
    os.mkfifo(tmp_path / "checkpoint-11.pth")
    torch.save({"format": 1, "optimizer": {}, "meta": {}, "epoch": "x", "step": 0}, tmp_path / "checkpoint-10.pth")
    said = []
    assert find_resume(str(tmp_path), said.append).endswith("checkpoint-9.pth") and len(said) == 2
    with pytest.raises(UserError, match="NaN"):
        model = torch.nn.Linear(1, 1)
        load_exactly(model, {"weight": torch.tensor([[float("nan")]]), "bias": torch.zeros(1)}, "--resume")


# --- disks


@contextmanager
def largest_file(size: int):
    """As a full disk: no file of this process grows beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_disk_that_is_full_for_an_epoch_costs_nothing_in_the_end(whole_run, tmp_path, capsys, monkeypatch):
    """Epoch 1 cannot write its checkpoints and its picture; epoch 2 can, and all ends as if nothing had been."""
    from util import log

    real, limit = log.RunLog.epoch, largest_file(5000)
    seen = {}

    def epoch(self, line):
        real(self, line)
        if line["epoch"] == 1:
            limit.__enter__()
        if line["epoch"] == 2:
            seen.update(read_checkpoint(str(tmp_path / LAST)))
            limit.__exit__(None, None, None)

    monkeypatch.setattr(log.RunLog, "epoch", epoch)
    assert main_finetune.main([*NET, "--output_dir", str(tmp_path)]) == 0
    said = capsys.readouterr().err
    assert "checkpoint-next.pth: not written" in said and "try again" in said
    assert seen["epoch"] == 1, "the checkpoint of epoch 0 was kept"
    for name in (LAST, BEST):
        assert_same_state(comparable(tmp_path / name), comparable(whole_run / name))
    assert log_without_times(tmp_path) == log_without_times(whole_run)


def test_disk_that_stays_full_ends_in_one_line_that_says_what_is_lost(tmp_path):
    with largest_file(20_000), pytest.raises(UserError, match="could not be written; make room") as caught:
        main_finetune.main([*NET, "--epochs", "1", "--output_dir", str(tmp_path)])
    one_line(caught)
    assert not os.path.exists(tmp_path / LAST) and os.path.exists(tmp_path / "log.txt")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's writer dies
def test_log_and_tensorboard_faults_do_not_end_a_run(tmp_path, capsys):
    log = RunLog(str(tmp_path))
    log.start()
    with largest_file(0):
        for i in range(30):
            log.scalars({"x": 1.0}, i)
        log.flush()
        log.epoch({"epoch": 0})
        log.scalars({"x": 1.0}, 99), log.flush()
    with largest_file(5):
        log.epoch({"epoch": 1})
    log.epoch({"epoch": 2})
    log.close()
    said = capsys.readouterr().err
    assert "log.txt: not written" in said and "TensorBoard's file is not written any more" in said
    assert read_log(str(tmp_path / "log.txt")) == [{"epoch": 2}]


def test_output_dir_that_is_a_file_or_not_writable(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below", "bad\0name"):
        with pytest.raises(UserError, match="--output_dir") as caught:
            main_finetune.main([*NET, "--output_dir", str(path)])
        one_line(caught)
    with pytest.raises(UserError, match="--log_dir"):
        main_finetune.main([*NET, "--output_dir", str(tmp_path / "a"), "--log_dir", str(tmp_path / "file")])
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=r"--output_dir .*no permission to write"):
        main_finetune.main([*NET, "--output_dir", str(tmp_path / "b")])


# --- processes


def test_killed_loader_process_ends_the_run_in_one_line(photo_folder, tmp_path):
    """torch raises where it notices, in the middle of anything: in the loader or in a step."""
    command = [sys.executable, "main_finetune.py", "--data_path", str(photo_folder), "--model", "vit_custom_patch8", "--model_kwargs", "embed_dim=12", "depth=1", "num_heads=2", "--input_size", "16", "--epochs", "10000", "--batch_size", "4", "--num_workers", "1", "--device", "cpu", "--save_freq", "0", "--output_dir", str(tmp_path)]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    for text in process.stdout:
        if text.startswith("epoch 1:"):
            os.kill(children(process.pid)[0], signal.SIGKILL)
            break
    _, said = process.communicate(timeout=240)
    assert process.returncode == 2 and said.count("\n") == 1 and "--num_workers" in said, said
    assert read_checkpoint(str(tmp_path / LAST))["epoch"] >= 1
    assert known_failure(RuntimeError("something else")) is None


def children(parent: int) -> list[int]:
    """Process ids, oldest first."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if int(Path("/proc", pid, "stat").read_text().rsplit(")", 1)[1].split()[1]) == parent:
                found.append(int(pid))
        except OSError:
            continue
    return sorted(found)
