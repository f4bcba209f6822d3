"""Files to upright images: names that say nothing, odd EXIF, float pixels, too many pixels, whose fault an error is."""

import gc
import importlib
import io
import os
import random
import struct
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, features

from augment import fast_image
from augment.batch import BatchTransform
from augment.decoding import MAX_PIXELS, ImageError, is_image, limit_pixels, open_file, open_image, to_channels
from augment.image import build_eval_transform, build_train_transform
from tests.harness import ROOT
from tests.harness.checks import one_line
from tests.harness.runs import finetune
from util.cli.script import known_failure
from util.cli.settings import Reading
from util.data.datasets import FileDataset, read_split
from util.data.loader import Loader, SampleReader, choose_loader
from util.data.views import ViewReader
from util.dist import World
from util.errors import UserError

PHOTOS = [
    *"""
        --model vit_custom_patch8 --model_kwargs embed_dim=12 depth=1 num_heads=2 --input_size 16 --epochs 1
        --batch_size 8 --num_workers 0 --device cpu
    """.split(),
    "--output_dir",
    "",
]


def picture(width: int = 40, height: int = 30) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([6 * x, 8 * y, 3 * (x + y)], -1).astype(np.uint8))


@pytest.mark.parametrize(
    "kind,option",
    [
        ("JPEG", {}),
        ("PNG", {}),
        ("GIF", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("PPM", {}),
        ("TGA", {}),
        ("PCX", {}),
        ("ICO", {}),
        ("SGI", {}),
        ("WEBP", {"lossless": True}),
        ("JPEG2000", {}),
        ("AVIF", {"quality": 95}),
    ],
)
def test_what_pillow_decodes_is_an_image_under_its_names_and_under_none(tmp_path, kind, option):
    if kind in ("WEBP", "AVIF") and not features.check(kind.lower()):
        pytest.skip(f"this Pillow has no {kind}")
    size = (32, 32) if kind == "ICO" else (40, 30)
    file = io.BytesIO()
    picture(*size).save(file, kind, **option)
    own = [e for e, f in Image.registered_extensions().items() if f == kind]
    # Truevision files have no signature: there, the name is all that tells.
    names = [f"x{e}" for e in own] + ([] if kind == "TGA" else ["none", "x.0001", "x.unknown"])
    for name in names:
        (tmp_path / name).write_bytes(file.getvalue())
        assert is_image(str(tmp_path / name)), name
        assert open_image(str(tmp_path / name), 3).size == size, name


def test_what_is_no_image_is_none_by_bytes_and_names(tmp_path, monkeypatch):
    for name, data in {
        "a.txt": b"BMW makes cars\n" * 9,
        "b.csv": b"P5,6\n1,2\n",
        "c.npy": b"\x93NUMPY\x01\0v\0{",
        "d": b"",
        "e.xml": b"<xml>",
        "f.wmf": b"\xd7\xcd\xc6\x9a\0\0",
        "f.emf": b"\x01\0\0\0",
        "f.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n",
        "g.pdf": b"%PDF-1.7",
        "h.h5": b"\x89HDF\r\n\x1a\n",
        "Thumbs.db": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" * 99,
        "i": bytes(range(256)) * 4,
    }.items():
        (tmp_path / name).write_bytes(data)
        assert not is_image(str(tmp_path / name)), name
    os.mkfifo(tmp_path / "pipe")
    assert not is_image(str(tmp_path / "pipe")) and not is_image(str(tmp_path / "nothing"))
    monkeypatch.setattr("builtins.open", lambda *args: pytest.fail("opened a file whose name says what it is"))
    assert is_image("/nowhere/x.JPEG") and is_image("x.jfif") and not is_image("x.pdf")


def test_heic_is_read_where_pillow_heif_is_installed():
    """The package is not one of this project's: a stand-in registers itself with Pillow as it does."""
    code = """
import sys, types
from PIL import BmpImagePlugin, Image
class Heif(BmpImagePlugin.BmpImageFile):
    format = "HEIF"
def register():
    Image.register_open("HEIF", Heif, lambda start: start[4:12] == b"ftypheic")
    Image.register_extensions("HEIF", [".heic"])
sys.modules["pillow_heif"] = types.SimpleNamespace(register_heif_opener=register)
from augment.decoding import is_image
assert is_image("x.heic")
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert not is_image("x.heic"), "without it, .heic is unknown, and there is no such file to look into"


# ---- EXIF


def exif_jpeg(path, orientation: tuple[int, int, bytes], tag: tuple[int, int, bytes] | None = None) -> np.ndarray:
    """A JPEG with an orientation and one more tag, each (number, type, 4 or more bytes); returns its own pixels."""
    file = io.BytesIO()
    picture().save(file, "JPEG", quality=95)
    jpeg, outside = file.getvalue(), b""
    entries = [e for e in (orientation, tag) if e]
    ifd = struct.pack("<H", len(entries))
    for number, kind, data in entries:
        value = data
        if len(data) > 4:
            value, outside = struct.pack("<I", 8 + 2 + 12 * len(entries) + 4 + len(outside)), outside + data
        ifd += struct.pack("<HHI", number, kind, 4 if kind == 2 else 1) + value.ljust(4, b"\0")
    app1 = b"Exif\0\0II*\0" + struct.pack("<I", 8) + ifd + struct.pack("<I", 0) + outside
    path.write_bytes(jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(app1) + 2) + app1 + jpeg[2:])
    return np.asarray(Image.open(io.BytesIO(jpeg)))


ODD = {
    "-1/0": (0x11A, 10, struct.pack("<ii", -1, 0)),
    "0/0": (0x11A, 5, struct.pack("<II", 0, 0)),
    "text": (0x100, 2, b"640\0"),
    "type 99": (0x10F, 99, b"abcd"),
    "outside the file": (0x10F, 2, b"\xff\xff\xff\x7f"),
}
TURNED = {
    1: lambda a: a,
    3: lambda a: a[::-1, ::-1],
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("turn", TURNED)
def test_odd_exif_values_cost_neither_the_photo_nor_its_orientation(tmp_path, odd, turn):
    path = tmp_path / "x.jpg"
    pixels = exif_jpeg(path, (0x112, 3, struct.pack("<HH", turn, 0)), ODD[odd])
    assert np.array_equal(np.asarray(open_image(str(path), 3)), TURNED[turn](pixels))
    data = FileDataset([str(path)], torch.zeros(1), ["a"])
    _, images, bad, _ = SampleReader(data, build_eval_transform((8, 8)), in_chans=3, seed=0, train=False)[0, 0]
    assert images[0].shape == (3, 8, 8) and bad == {}


@pytest.mark.parametrize(
    "value", [(0x112, 3, b"\x09\0\0\0"), (0x112, 2, b"6\0\0\0"), (0x112, 5, bytes(8)), (0x112, 3, bytes(4))]
)
def test_an_orientation_that_is_none_leaves_the_photo_as_it_is(tmp_path, value):
    pixels = exif_jpeg(tmp_path / "x.jpg", value)
    assert np.array_equal(np.asarray(open_image(str(tmp_path / "x.jpg"), 3)), pixels)


# ---- floats


@pytest.mark.parametrize(
    "odd,level", [(1.0, 255), (1.001, 255), (1.2, 255), (np.inf, 255), (np.nan, 0), (-np.inf, 0), (-0.01, 0)]
)
def test_one_odd_float_does_not_change_the_scale_of_the_others(tmp_path, odd, level):
    ramp = np.tile(np.arange(64, dtype=np.float32) / 63, (4, 1))
    expected = np.round(255 * ramp.astype(np.float64)).astype(np.uint8)
    ramp[1, 63], expected[1, 63] = odd, level
    Image.fromarray(ramp).save(tmp_path / "x.tif")
    assert np.array_equal(np.asarray(open_image(str(tmp_path / "x.tif"), 1)), expected)


def test_floats_of_levels_and_of_nothing_finite():
    levels = np.array([[0, 2, 254.6, np.inf, -np.inf, np.nan]], np.float32)
    assert np.asarray(to_channels(Image.fromarray(levels), 1)).tolist() == [[0, 2, 255, 255, 0, 0]]
    assert np.asarray(to_channels(Image.fromarray(levels[:, 3:]), 1)).tolist() == [[255, 0, 0]]


# ---- the limit


def test_max_pixels_is_named_and_raises_or_lowers_the_limit(photo_folder, tmp_path):
    path = str(tmp_path / "x.png")
    picture().save(path)  # 1200 pixels
    try:
        limit_pixels(1199)
        with pytest.raises(ImageError, match="1200 pixels, more than --max_pixels 1199"):
            open_image(path, 3)
        os.rename(path, tmp_path / "x")
        assert is_image(str(tmp_path / "x")), "an image that is refused is not one to leave out"
        limit_pixels(1200)
        assert open_image(str(tmp_path / "x"), 3).size == (40, 30)
        # The photos have 40 x 32 pixels; workers get the limit too, wherever they are not forked.
        with pytest.raises(UserError, match="more than --max_pixels 1279"):
            finetune("--data_path", photo_folder, *PHOTOS, "--max_pixels", 1279)
        assert finetune("--data_path", photo_folder, *PHOTOS, "--max_pixels", 1280) == 0
        assert Image.MAX_IMAGE_PIXELS == 640
    finally:
        limit_pixels(MAX_PIXELS)
    assert MAX_PIXELS == 178956970


# ---- whose fault it is


def fails(*_, kind=ZeroDivisionError, **__):
    raise kind("of the transform")


def test_an_error_of_a_transform_is_not_reported_as_a_bad_image(photo_folder, monkeypatch):
    paths = sorted(str(p) for p in (photo_folder / "train").rglob("*.png"))
    data = FileDataset(paths, torch.zeros(len(paths), dtype=torch.long), ["a"])
    reader = SampleReader(data, fails, in_chans=3, seed=0, train=True)
    with pytest.raises(ZeroDivisionError, match="of the transform"):
        reader[0, 0]
    views = ViewReader(data, [(8, 8, 3)], [0])
    assert views[0][1] and not views[0][2]
    monkeypatch.setattr("util.data.views.saccadic_views", fails)
    with pytest.raises(ZeroDivisionError, match="of the transform"):
        views[0]


def test_a_transforms_error_is_not_reported_as_a_dead_loader_process(photo_folder, monkeypatch):
    # torch waits so long for a process that raised, 5 s by default, when the loader is collected.
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
    data = read_split("folder", str(photo_folder), "val")
    transform, reading = BatchTransform((0.5,) * 3, (0.5,) * 3), Reading(num_workers=1)
    how = dict(batch_transform=transform, batch_size=2, train=False, world=World(), reading=reading)
    with pytest.raises(RuntimeError, match="of the transform") as caught:
        list(Loader(data, transform=partial(fails, kind=RuntimeError), **how).epoch())
    assert known_failure(caught.value) is None
    del caught
    gc.collect()


def test_an_error_of_the_fast_transform_is_not_hidden(tmp_path):
    picture(400, 300).save(tmp_path / "x.jpg")
    data = FileDataset([str(tmp_path / "x.jpg")], torch.zeros(1, dtype=torch.long), ["a"])
    reader = SampleReader(data, build_train_transform((32, 32), "light"), in_chans=3, seed=0, train=True, fast=True)
    reader.fast.flips = [fails]
    with pytest.raises(ZeroDivisionError):
        reader[0, 0]


def test_whatever_a_decoder_raises_is_the_files_fault(tmp_path, monkeypatch):
    path = str(tmp_path / "x.png")
    picture().save(path)
    data = FileDataset([path], torch.zeros(1), ["a"])
    for error in (
        OSError("a"),
        SyntaxError("a"),
        ValueError("a"),
        struct.error("a"),
        KeyError("a"),
        EOFError(),
        MemoryError(),
    ):

        def load(self, error=error):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
            for sample in (
                SampleReader(data, None, in_chans=3, seed=0, train=False)[0, 0],
                ViewReader(data, [(8, 8, 3)], [0])[0],
            ):
                assert sample == (0, [], {0: str(error) or type(error).__name__}, {})


def test_images_that_only_opencv_cannot_decode_are_counted_once_an_epoch(tmp_path, capsys, monkeypatch):
    paths = [str(tmp_path / f"{i}.jpg") for i in range(4)]
    for path in paths:
        picture(200, 150).save(path)
    data = FileDataset(paths, torch.zeros(4, dtype=torch.long), ["a"])
    real = fast_image.decode_jpeg
    picture(200, 150).resize((190, 150)).save(paths[0])
    with open(paths[0], "rb") as file:
        refused = file.read()

    def decode(jpeg, *args, **kwargs):
        if jpeg == refused:
            raise ImageError("OpenCV cannot decode it")
        return real(jpeg, *args, **kwargs)

    monkeypatch.setattr(fast_image, "decode_jpeg", decode)
    how = dict(
        transform=build_train_transform((16, 16), "light"),
        batch_size=2,
        train=True,
        world=World(),
        batch_transform=BatchTransform((0.5,) * 3, (0.5,) * 3),
    )
    fast, plain = (Loader(data, reading=Reading(num_workers=0, loader=name), **how) for name in ("fast", "pil"))
    for epoch in (0, 1):
        for a, b in zip(fast.epoch(epoch), plain.epoch(epoch)):
            for i, x, y in zip(a.index.tolist(), a.images, b.images):
                assert torch.equal(x, y) or i != 0, "what OpenCV cannot decode is Pillow's to the bit"
    said = capsys.readouterr().err.splitlines()
    assert [line.split(";")[0] for line in said] == [
        f"warning: epoch {e}: 1 of 4 images were decoded by Pillow because OpenCV could not" for e in (0, 1)
    ]
    assert "0.jpg (OpenCV cannot decode it)" in said[0]


# ---- without OpenCV

BROKEN = {
    "missing": None,
    "no_libgl": "raise OSError('libGL.so.1: cannot open shared object file')",
    "two_wheels": "",  # an empty module
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_opencv_ends_only_what_asks_for_it(tmp_path, monkeypatch, capsys, kind):
    if BROKEN[kind] is None:
        monkeypatch.setitem(sys.modules, "cv2", None)  # importing it raises ImportError
    else:
        (tmp_path / "cv2.py").write_text(BROKEN[kind])
        monkeypatch.delitem(sys.modules, "cv2", raising=False)
        monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(
        UserError, match=r"--loader fast: OpenCV cannot be imported.*pip install opencv-python-headless"
    ) as caught:
        choose_loader("fast", "folder", World())
    one_line(caught)
    assert choose_loader("pil", "folder", World()) == "pil" and choose_loader(None, "digits", World()) == "fast"
    assert capsys.readouterr().err == "" and choose_loader(None, "folder", World()) == "pil"
    assert capsys.readouterr().err.startswith("warning: OpenCV cannot be imported")
    sys.modules.pop("cv2", None)


def test_training_without_opencv_goes_on_with_a_warning(photo_folder, monkeypatch, capsys):
    """No main imports it at its top: they are imported anew while it is not there."""
    monkeypatch.setitem(sys.modules, "cv2", None)
    for name in (
        "main_finetune",
        "main_pretrain_noprop",
        "util.data.loader",
        "augment.fast_image",
        "augment.opencv_ops",
    ):
        package, _, module = name.rpartition(".")
        if package and name in sys.modules:
            monkeypatch.setattr(sys.modules[package], module, sys.modules[name])  # put back afterwards
        monkeypatch.delitem(sys.modules, name, raising=False)
    importlib.import_module("main_pretrain_noprop")
    assert importlib.import_module("main_finetune").main(["--data_path", str(photo_folder), *PHOTOS]) == 0
    said = capsys.readouterr()
    assert "warning: OpenCV cannot be imported" in said.err and "epoch 0: train loss" in said.out


# ---- posterize with 0 bits


@pytest.mark.parametrize("aa", ["rand-m10-n3-p1-inc1", "rand-m1-n3-p1", "v0", "augmix-m10-mstd0"])
def test_policies_that_draw_0_bits_work_where_pillow_refuses_them(aa, monkeypatch):
    """Pillow 13 refuses what earlier ones made black."""
    image, real = picture(48, 48), ImageOps.posterize

    def lenient(image, bits):
        return real(image, bits) if bits else Image.new(image.mode, image.size)

    transform, refused = build_train_transform((24, 24), "mae", aa=aa), []

    def strict(image, bits):
        refused.extend([bits] if bits < 1 else [])
        assert bits >= 1, "Pillow 13"
        return real(image, bits)

    outputs = {}
    for name, function in (("12", lenient), ("13", strict)):
        monkeypatch.setattr(ImageOps, "posterize", function)
        drawn = []
        for k in range(40):
            random.seed(k), np.random.seed(k), torch.manual_seed(k)
            drawn.append(transform(image))
        outputs[name] = torch.stack(drawn)
    assert torch.equal(outputs["12"], outputs["13"]) and not refused


def test_open_file_is_closed_by_its_with(tmp_path):
    picture().save(tmp_path / "x.png")
    with open_file(str(tmp_path / "x.png")) as image:
        file = image.fp
    assert file.closed
