"""Bounded fuzzing of what comes from outside: flags, image files, checkpoints. Each ends in a value or in one line."""

import importlib
import io
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from augment.decoding import ImageError, open_image
from models import create_model, load_pretrained
from models.loading import load_classifier
from tests.harness import ROOT
from tests.harness.runs import classifier_meta
from util.checkpoint import LAST, damage, find_resume, peek_meta, read_checkpoint, read_file
from util.cli.values import keyword, number
from util.errors import UserError
from util.log import read_log
from util.meta import check_meta

FEW = dict(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
MAINS = {
    "main_finetune": [],
    "main_pretrain_noprop": [],
    "main_linprobe": [],
    "main_sample": ["x.pth"],
    "main_predict": ["--checkpoints", "x.pth"],
    "main_sweep": ["--grid", "seed=0"],
}
HOSTILE = [
    "nan",
    "-nan",
    "inf",
    "-inf",
    "Infinity",
    "1e30",
    "-1e30",
    "1e400",
    "-1",
    "0",
    "-0",
    "0.0",
    "1",
    "0.5",
    "1.5",
    "",
    " ",
    "1_000",
    "٣",
    "²",
    "½",
    "1e",
    "0x10",
    "None",
    "True",
    "1,5",
    "--",
    "9" * 20,
    "9" * 400,
    "9" * 5000,
    "-" + "9" * 400,
    "1\n2",
    "1\x002",
    "\ud800",
    "💣",
    "1; rm -rf /",
    "%s%n",
    "{0.__class__}",
]


def parser_of(main: str):
    return importlib.import_module(main).get_args_parser()


def numeric_flags() -> list[tuple[str, str]]:
    """(main, flag) of every flag with a type of its own that takes values."""
    return [
        (main, action.option_strings[0])
        for main in MAINS
        for action in parser_of(main)._actions
        if action.option_strings and action.type is not None and action.type is not str
    ]


def is_plain(value) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    if isinstance(value, (int, float)):
        return math.isfinite(value) and abs(value) < 2**63 if isinstance(value, int) else math.isfinite(value)
    return value is None or isinstance(value, str)


def test_every_script_has_numeric_flags():
    mains = [main for main, _ in numeric_flags()]
    assert set(mains) == set(MAINS) and len(mains) > 80


@pytest.mark.parametrize("main", MAINS)
def test_hostile_values_of_every_numeric_flag_are_refused_or_finite(main):
    parser = parser_of(main)
    for action in parser._actions:
        if not action.option_strings or action.type in (None, str, keyword):
            continue
        flag = action.option_strings[-1]
        for value in HOSTILE:
            words = [f"{flag}={value}"] if action.nargs is None else [flag, *[value] * (2 if action.nargs == 2 else 1)]
            try:
                parsed = getattr(parser.parse_args([*MAINS[main], *words]), action.dest)
            except UserError as error:
                assert len(str(error)) < 1000 and action.option_strings[0] in str(error), (flag, value, str(error))
            else:
                assert is_plain(parsed), (flag, value, parsed)


def test_only_times_and_gradient_norms_may_be_astronomical():
    """1e30 in any other float would overflow float32: NaN hours into a run instead of a line at its start."""
    accepted = set()
    for main, flag in numeric_flags():
        try:
            values = parser_of(main).parse_args([*MAINS[main], flag, "1e30"])
        except UserError:
            continue
        accepted |= {flag} if any(value in (1e30, [1e30]) for value in vars(values).values()) else set()
    assert accepted == {"--clip_grad", "--warmup_epochs", "--save_every_minutes"}


@pytest.mark.slow
@settings(max_examples=150, **FEW)
@given(st.text(max_size=30) | st.integers().map(str) | st.floats().map(repr), st.sampled_from([int, float]))
@example("9" * 400, int)
def test_a_checked_number_is_in_its_range_or_refused(text, kind):
    import argparse

    parse = number(kind, -3, 5, open_high=True)
    try:
        value = parse(text)
    except argparse.ArgumentTypeError as error:
        assert "should be" in str(error)
    else:
        assert isinstance(value, kind) and -3 <= value < 5


@settings(max_examples=150, **FEW)
@given(st.text(max_size=60))
@example("a=" + "(" * 3000)
@example("a={[]: 1}")
@example("a=" + "9" * 5000)
@example("a=__import__('os')")
def test_keywords_are_plain_values_or_refused(text):
    import argparse

    try:
        name, value = keyword(text)
    except argparse.ArgumentTypeError:
        return
    assert name.isidentifier()
    assert isinstance(value, (str, bytes, int, float, complex, bool, list, tuple, dict, set, type(None), type(...)))


@settings(max_examples=60, **FEW)
@given(st.binary(max_size=200))
@example(b"--epochs '3")
@example(b"--epochs 3 \\")
@example(b"\xff\xfe\x00")
@example(b"@self.args")
def test_recipes_of_any_bytes_parse_or_end_in_one_line(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "self.args"
    path.write_bytes(data.replace(b"self.args", bytes(path)))
    try:
        parser_of("main_finetune").parse_args([f"@{path}"])
    except UserError:
        pass
    except SystemExit as error:  # --help inside a recipe
        assert error.code == 0


@pytest.fixture(scope="module")
def pictures() -> dict[str, bytes]:
    pixels = np.random.default_rng(0).integers(0, 255, (24, 30, 3), dtype=np.uint8)
    out = {}
    for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, kind)
        out[kind] = file.getvalue()
    return out


def mutate(data: bytes, edits: list[tuple[float, int]], keep: float) -> bytes:
    """Bytes at relative places replaced, and the end cut off."""
    changed = bytearray(data[: int(len(data) * keep)])
    for where, byte in edits:
        if changed:
            changed[int(where * (len(changed) - 1))] = byte
    return bytes(changed)


edits = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=8)
# Headers are a small part of the bytes and most of the decisions.
early_edits = st.lists(st.tuples(st.floats(0, 0.1), st.integers(0, 255)), max_size=4)
kept = st.just(1.0) | st.floats(0, 1)


@pytest.mark.filterwarnings("ignore")  # Pillow warns of some of it
@settings(max_examples=200, **FEW)
@given(st.sampled_from(["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"]), edits | early_edits, kept)
def test_damaged_images_decode_or_are_the_files_fault(pictures, tmp_path_factory, kind, edits, keep):
    path = tmp_path_factory.getbasetemp() / "x.jpg"
    path.write_bytes(mutate(pictures[kind], edits, keep))
    try:
        image = open_image(str(path), 3)
    except ImageError as error:  # what SampleReader and ViewReader catch
        assert not isinstance(error.__cause__, (MemoryError, RecursionError))
    else:
        assert image.mode == "RGB" and max(image.size) <= 16 * min(image.size)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    model = create_model("vit_custom_patch4", num_classes=2, img_size=8, in_chans=1, embed_dim=4, depth=1, num_heads=2)
    meta = classifier_meta(model_kwargs={"embed_dim": 4, "depth": 1, "num_heads": 2})
    state = {
        "format": 1,
        "kind": "finetune",
        "meta": meta,
        "model": model.state_dict(),
        "optimizer": {},
        "epoch": 1,
        "step": 0,
    }
    files = {}
    for name, kind in (("zip", {}), ("legacy", {"_use_new_zipfile_serialization": False})):
        file = io.BytesIO()
        torch.save(state, file, **kind)
        files[name] = file.getvalue()
    return model, files


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=120, **FEW)
@given(st.sampled_from(["zip", "legacy"]), edits | early_edits, kept)
def test_damaged_checkpoints_load_or_end_in_one_line(checkpoint, tmp_path_factory, kind, edits, keep):
    model, files = checkpoint
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    path = folder / LAST
    path.write_bytes(mutate(files[kind], edits, keep))
    doors = [read_file, peek_meta, read_checkpoint, damage, load_classifier, lambda p: load_pretrained(model, p)]
    for door in doors:
        try:
            door(str(path))
        except UserError as error:
            assert "\n" not in str(error) and LAST in str(error), str(error)
    find_resume(str(folder), lambda text: None)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=8), x, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, **FEW)
@given(
    st.dictionaries(
        st.sampled_from(
            [
                "kind",
                "model",
                "model_kwargs",
                "global_pool",
                "img_size",
                "in_chans",
                "num_classes",
                "classes",
                "mean",
                "std",
                "sigmas",
                "noprop",
            ]
        ),
        plain,
    )
)
@example({"kind": ["classifier"]})
@example({"classes": [[]]})
def test_a_meta_of_any_shape_passes_or_ends_in_one_line(meta):
    try:
        check_meta(meta, "x.pth", whole=True)
    except UserError as error:
        assert str(error).startswith("x.pth") and len(str(error)) < 400
    else:
        size = meta.get("img_size", [1, 1])
        assert len(size) == 2 and all(type(s) is int and 0 < s <= 2**16 for s in size)


@settings(max_examples=60, **FEW)
@given(st.binary(max_size=80) | st.text(max_size=40).map(lambda t: f'{{"epoch": {t}}}'.encode("utf-8", "replace")))
@example(b"[" * 100_000)
@example(b'{"epoch": 1}\n5\nnull\n{"epoch": "x"}\n{"epo')
def test_a_log_of_any_bytes_is_read(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "log.txt"
    path.write_bytes(data)
    assert all(type(line["epoch"]) is int for line in read_log(str(path)))


def test_requirements_name_what_the_tests_import():
    text = (ROOT / "requirements.txt").read_text()
    assert re.search(r"^hypothesis[>=]", text, re.M)
