"""Folders of images: what is found and what is left out, the same in every script, and said in log and report."""

import csv
import os
import pickle
import shutil
import unicodedata
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

import main_finetune
import main_linprobe
import main_predict
import main_pretrain_noprop
import main_sample
from tests.harness.checks import one_line
from util.cli.settings import Data
from util.data.datasets import read_split, read_unlabelled, read_wnids
from util.data.image_files import Paths, find_images, refuse_output_among_images
from util.data.labels import read_images
from util.data.splits import load_data
from util.dist import World
from util.errors import UserError
from util.folder import OUTPUT_MARK
from util.meta import check_meta

CPU = ["--num_workers", "0", "--device", "cpu"]
NET = [
    *"""
        --model vit_custom_patch8 --model_kwargs embed_dim=12 depth=1 num_heads=2 --input_size 16 --epochs 1
        --batch_size 4 --aug none
    """.split(),
    *CPU,
]
TINY = [
    *"""
        --embed_dim 12 --depth 1 --num_heads 2 --decoder_embed_dim 12 --decoder_depth 1 --T 2 --epochs 1
        --batch_size 4 --input_size 16 --patch_size 8
    """.split(),
    *CPU,
]


def call(main, *argv) -> int:
    return main.main([*map(str, argv)])


def save(path, color=(200, 30, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(str(path)) + sum(color))
    pixels = np.clip(np.array(color) + rng.normal(0, 20, (20, 24, 3)), 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path, {".jpg": "JPEG", ".png": "PNG"}.get(path.suffix, "JPEG"))


@pytest.fixture
def photos(tmp_path):
    """photos/{blue,green,red}/0.jpg .. 5.jpg"""
    for name, color in (("blue", (40, 60, 200)), ("green", (40, 180, 60)), ("red", (200, 40, 40))):
        for i in range(6):
            save(tmp_path / "photos" / name / f"{i}.jpg", color)
    return tmp_path / "photos"


def below(root) -> list[str]:
    return [os.path.relpath(path, root) for path in find_images(str(root)).paths]


# ---- paths


def test_paths_are_those_of_the_list_in_arrays_alone():
    """No Python object per path: a loader process that reads one writes its reference count and so copies its page."""
    names = [f"/d/{'x' * (i % 7)}{i}.jpg" for i in range(1000)] + [os.fsdecode(b"/d/caf\xe9.jpg"), "/d/caf\u00e9", ""]
    paths = Paths(names)
    assert list(paths) == names == paths and len(paths) == len(names) and paths[-2] == names[-2]
    assert all(type(v) is np.ndarray for v in vars(paths).values())
    assert sum(v.nbytes for v in vars(paths).values()) == sum(len(os.fsencode(n)) for n in names) + 16 * len(names)
    index = np.random.default_rng(0).permutation(len(names))[:50]
    assert (
        paths.take(index) == [names[i] for i in index]
        and paths[3:7] == names[3:7]
        and paths[torch.tensor(5)] == names[5]
    )
    part = Paths.joined([paths.take(index), Paths(), paths[:2]])
    assert part == [*(names[i] for i in index), *names[:2]] and pickle.loads(pickle.dumps(part)) == list(part)
    assert not Paths() and Paths.joined([Paths()]) == []


# ---- what is not read


def test_hidden_and_system_folders_are_read_at_no_depth(tmp_path):
    for folder in (".ipynb_checkpoints", ".thumbnails", ".Trash-1000/files", "@eaDir", "__MACOSX", "$RECYCLE.BIN"):
        for place in ("", "red", "red/deep"):
            save(tmp_path / place / folder / "0.jpg")
    for name in ("red/0.jpg", "red/deep/0.jpg", "blue/.hidden.jpg", "blue/0.jpg"):
        save(tmp_path / name)
    data = read_split("folder", str(tmp_path), "train")
    assert data.classes == ["blue", "red"] and below(tmp_path) == ["blue/0.jpg", "red/0.jpg", "red/deep/0.jpg"]
    assert [data.name(i) for i in range(3)] == below(tmp_path)
    [note] = data.notes
    assert "hidden and system folders" in note and "2 @eaDir" in note and "2 .ipynb_checkpoints" in note


def test_thumbnail_folders_beside_photos_are_left_out_but_not_classes(tmp_path):
    for name in ("thumbs/0.jpg", "fists/0.jpg", "fists/Thumbs/0.jpg", "fists/more/thumbnails/0.jpg"):
        save(tmp_path / name)
    assert below(tmp_path) == ["fists/0.jpg", "fists/more/thumbnails/0.jpg", "thumbs/0.jpg"]
    assert read_split("folder", str(tmp_path), "train").classes == ["fists", "thumbs"]


@pytest.mark.slow
def test_what_is_left_out_stands_in_log_and_report_of_every_script(photos, tmp_path, capsys):
    for i, name in enumerate(("a.jfif", "b.jpe", "c", "d.0001")):
        os.rename(photos / "red" / f"{i}.jpg", photos / "red" / name)
    for i in range(5):
        (photos / "red" / f"{i}.xml").write_text("<annotation/>")
    (photos / "blue" / "x.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1")
    (photos / "blue" / ".DS_Store").write_bytes(b"\0" * 9)
    save(photos / "stray.jpg")
    outs = {name: tmp_path / name for name in ("fold", "one", "pre", "probe", "sample", "predict", "images")}
    lines = {
        "one": (main_finetune, "--data_path", photos, "--val_split", 0.34, *NET),
        "fold": (main_finetune, "--data_path", photos, "--kfold", 2, *NET),
        "pre": (main_pretrain_noprop, "--dataset", "folder", "--data_path", photos, *TINY),
        "probe": (
            main_linprobe,
            "--data_path",
            photos,
            "--val_split",
            0.34,
            "--checkpoint",
            outs["one"] / "checkpoint-best.pth",
            *CPU,
        ),
        "sample": (main_sample, outs["pre"] / "checkpoint-last.pth", "--sampler", "euler", *CPU),
        "images": (main_sample, outs["pre"] / "checkpoint-last.pth", "--images", photos, "--sampler", "euler", *CPU),
        "predict": (main_predict, "--checkpoints", outs["one"], "--data_path", photos, "--views", 1, *CPU),
    }
    for name, (main, *line) in lines.items():
        capsys.readouterr()
        assert call(main, *line, "--output_dir", outs[name]) == 0
        said = capsys.readouterr().out
        labelled = name in ("one", "fold", "probe")
        for text in (said, (outs[name] / "report.md").read_text()):
            assert "left out, not images: 5 .xml, 1 .heic" in text and "pip install pillow-heif" in text, (name, text)
            assert "by their first bytes: 1 without extension, 1 .0001" in text, (name, text)
            assert ("left out, 1 images outside the class folders" in text) == labelled, (name, text)
        assert said.index("left out") < 700, "among the first lines"
        number = {"one": "11 train, 7 val", "fold": "9 train, 9 val", "probe": "11 train, 7 val"}.get(name, "19 ")
        assert number in said, (name, said)


@pytest.mark.slow
def test_outputs_of_runs_below_the_photos_are_no_class_and_no_photos(photos, tmp_path, monkeypatch, capsys):
    """In every script, whatever the folder is called, also of an earlier version, which left no mark."""
    monkeypatch.chdir(photos)
    assert call(main_finetune, "--data_path", ".", "--kfold", 2, *NET) == 0  # ./output_dir
    rows = list(csv.reader((photos / "output_dir" / "oof.csv").read_text().splitlines()))
    assert rows[0][3:] == ["blue", "green", "red"] and len(rows) == 1 + 18
    assert (
        call(
            main_finetune, "--data_path", ".", "--val_split", 0.34, *NET, "--output_dir", "runs/b", "--log_dir", "logs"
        )
        == 0
    )
    assert (
        call(
            main_pretrain_noprop,
            "--dataset",
            "folder",
            "--data_path",
            ".",
            *TINY,
            "--output_dir",
            "red/pre",
            "--vis_freq",
            1,
        )
        == 0
    )
    assert (photos / "red" / "pre" / "reconstruction_epoch_0.png").exists()
    probe = ["--checkpoint", "runs/b/checkpoint-best.pth", "--data_path", ".", "--val_split", 0.34, *CPU]
    assert call(main_linprobe, *probe, "--output_dir", "probe") == 0
    assert (
        call(
            main_sample,
            "red/pre/checkpoint-last.pth",
            "--data_path",
            ".",
            *CPU,
            "--sampler",
            "euler",
            "--output_dir",
            "samples",
        )
        == 0
    )
    assert (
        call(
            main_predict, "--checkpoints", "runs/b", "--data_path", "red", "--views", 1, *CPU, "--output_dir", "blue/p"
        )
        == 0
    )
    report = (photos / "samples" / "report.md").read_text()
    assert "left out, the output of runs: " in report and "18 training images" in report
    for _ in range(2):
        train = read_split("folder", ".", "train")
        assert train.classes == ["blue", "green", "red"] and len(train) == 18
        assert len(read_unlabelled(".")) == 18 and len(read_images("folder", ".", ["blue", "green", "red"])[0]) == 18
        [note] = [n for n in train.notes if "output of runs" in n]
        assert "blue/p, logs, output_dir, probe and 3 more" in note  # red/pre, runs/b, samples
        for mark in photos.rglob(OUTPUT_MARK):
            mark.unlink()
    save(photos / "output_dir" / "mine.jpg")
    with pytest.raises(UserError, match="output_dir: contains photos and the output of a run"):
        read_split("folder", ".", "train")
    os.unlink(photos / "output_dir" / "mine.jpg")
    os.makedirs("stopped")
    (photos / "stopped" / OUTPUT_MARK).touch()
    assert read_split("folder", ".", "train").classes == ["blue", "green", "red"], "stopped before it wrote anything"


@pytest.mark.parametrize(
    "layout,name", [("", "val"), ("", "train"), ("", "Testing"), ("train", "val"), ("train", "test")]
)
def test_outputs_that_are_called_like_parts_of_a_set_are_none(photos, tmp_path, layout, name):
    root = tmp_path / "root"
    shutil.copytree(photos, root / layout)
    (root / name).mkdir()
    (root / name / OUTPUT_MARK).touch()
    save(root / name / "confusion.png")
    for labelled in (True, False):
        train = read_split("folder", str(root), "train", labelled)
        assert len(train) == 18 and train.classes == (["blue", "green", "red"] if labelled else [])
        assert read_split("folder", str(root), "val", labelled) is None


@pytest.mark.parametrize("out", [".", "red", "red/deep", "../photos"])
def test_an_output_folder_that_holds_the_photos_is_refused(photos, monkeypatch, out):
    save(photos / "red" / "deep" / "0.jpg")
    monkeypatch.chdir(photos)
    before = sorted(os.walk("."))
    lines = [
        (main_finetune, "--val_split", 0.34, *NET, "--output_dir", out),
        (main_finetune, "--val_split", 0.34, *NET, "--output_dir", "", "--log_dir", out),
        (main_pretrain_noprop, "--dataset", "folder", *TINY, "--output_dir", out),
        (main_linprobe, "--model", "resnet10t", "--random_init", "--output_dir", out, *CPU),
    ]
    for main, *line in lines:
        with pytest.raises(UserError, match=r"(output|log)_dir .*: contains images of --data_path") as caught:
            call(main, "--data_path", ".", *line)
        one_line(caught)
    assert sorted(os.walk(".")) == before
    with pytest.raises(UserError, match=r"--output_dir .*: contains images"):  # as main_sample calls it for --images
        refuse_output_among_images("--output_dir", out, str(photos))


# ---- splits


def test_pretraining_without_train_reads_neither_val_nor_test(tmp_path, capsys):
    for i, folder in enumerate(("cat", "dog", "val/cat", "val/dog", "test/cat")):
        for k in range(4):
            save(tmp_path / "pets" / folder / f"{k}.jpg", (40 * i, 100, 100))
    train = read_split("folder", str(tmp_path / "pets"), "train", labelled=False)
    assert sorted({train.name(i).split("/")[0] for i in range(len(train))}) == ["cat", "dog"] and len(train) == 8
    assert any("validation or test data: test, val" in note for note in train.notes)
    assert len(read_split("folder", str(tmp_path / "pets"), "val", labelled=False)) == 8
    with pytest.raises(UserError, match="has no train/ folder, and test, val"):
        read_split("folder", str(tmp_path / "pets"), "train")


@pytest.mark.parametrize(
    "names",
    [
        ("Training", "Testing"),
        ("train_", "test"),
        ("Train", "Valid"),
        ("VAL", "cat"),
        ("dog", "Validation"),
        ("valid", "testing"),
    ],
)
def test_parts_of_a_set_are_not_taken_for_classes(tmp_path, names):
    for name in names:
        save(tmp_path / name / "cat" / "0.jpg")
    with pytest.raises(UserError, match=r"has no train/ folder, and .*which look like splits") as caught:
        read_split("folder", str(tmp_path), "train")
    one_line(caught)


@pytest.mark.parametrize(
    "names", [("training_set", "test_set"), ("seg_train", "seg_test"), ("Train", "Dev"), ("trainset", "holdout images")]
)
def test_parts_of_a_set_are_known_by_a_word_of_their_names(tmp_path, names):
    for name in names:
        for kind in ("cat", "dog"):
            save(tmp_path / "labelled" / name / kind / "0.jpg")
        save(tmp_path / "flat" / name / "0.jpg")
    with pytest.raises(UserError, match=r"has no train/ folder, and .*which look like splits") as caught:
        read_split("folder", str(tmp_path / "labelled"), "train")
    one_line(caught)
    for root, images in (("labelled", 2), ("flat", 1)):
        train = read_split("folder", str(tmp_path / root), "train", labelled=False)
        assert [train.name(i).split("/")[0] for i in range(len(train))] == [names[0]] * images
        assert any(f"validation or test data: {names[1]}" in note for note in train.notes)


@pytest.mark.parametrize(
    "names", [("valid", "invalid"), ("training", "match"), ("tests", "cats"), ("toy train", "test tube")]
)
def test_classes_that_are_called_like_parts_of_a_set_are_classes(tmp_path, names):
    for name in names:
        save(tmp_path / name / "0.jpg")
    assert read_split("folder", str(tmp_path), "train").classes == sorted(names)
    if "toy train" not in names:  # without classes, that looks the same as parts
        assert len(read_split("folder", str(tmp_path), "train", labelled=False)) == 2


def test_validation_lacks_classes_and_is_scored_on_those_that_it_has(photos, tmp_path, capsys):
    root = tmp_path / "root"
    shutil.copytree(photos, root / "train")
    for name in ("red", "blue"):
        shutil.copytree(photos / name, root / "val" / name)
    (root / "val" / "green").mkdir()
    train, val = load_data(Data(dataset="folder", data_path=str(root)), World())
    assert val.classes == train.classes == ["blue", "green", "red"]
    assert [val.name(i).split("/")[0] for i in range(12)] == [val.classes[t] for t in val.targets]
    assert call(main_finetune, "--data_path", root, *NET, "--output_dir", tmp_path / "out") == 0
    wanted = "has no images of green; scored on the other 2 classes"
    assert wanted in capsys.readouterr().out and wanted in (tmp_path / "out" / "report.md").read_text()
    os.rename(root / "val" / "red", root / "val" / "rot")
    with pytest.raises(UserError, match="val: its class folders differ from the training classes: unknown rot"):
        load_data(Data(dataset="folder", data_path=str(root)), World())
    shutil.rmtree(root / "val" / "rot"), shutil.rmtree(root / "val" / "blue")
    with pytest.raises(UserError, match="val: none of its class folders has images"):
        load_data(Data(dataset="folder", data_path=str(root)), World())


@pytest.mark.parametrize("listed", [True, False])
def test_tiny_imagenet_with_sorted_validation_images_reads_the_folders(tmp_path, listed):
    wnids = ["n01", "n02", "n03"]
    for wnid in wnids:
        save(tmp_path / "train" / wnid / "images" / "0.JPEG")
    for i in range(6):
        save(tmp_path / "val" / wnids[i % 3] / f"val_{i}.JPEG")
    (tmp_path / "val" / "images").mkdir()
    (tmp_path / "wnids.txt").write_text("\n".join(wnids))
    if listed:
        text = "".join(f"val_{i}.JPEG\t{wnids[i % 3]}\t0\t0\t9\t9\n" for i in range(6))
        (tmp_path / "val" / "val_annotations.txt").write_text(text)
    _, val = load_data(Data(dataset="tiny-imagenet", data_path=str(tmp_path)), World())
    assert val.targets.tolist() == [0, 0, 1, 1, 2, 2] and all(os.path.isfile(p) for p in val.paths)
    if listed:  # not sorted, and one is missing
        for path in [*val.paths][1:]:
            shutil.copy(path, tmp_path / "val" / "images")
        with pytest.raises(UserError, match=r"names val_0\.JPEG, which is not in .*images"):
            load_data(Data(dataset="tiny-imagenet", data_path=str(tmp_path)), World())
        shutil.copy(val.paths[0], tmp_path / "val" / "images")
        val = read_split("tiny-imagenet", str(tmp_path), "val", labelled=False)
        assert [(os.path.basename(p), t) for p, t in zip(val.paths, val.targets.tolist())] == [
            (f"val_{i}.JPEG", i % 3) for i in range(6)
        ]


@pytest.mark.parametrize(
    "text",
    [
        "n01440764 tench, Tinca tinca\nn01443537 goldfish\n",
        "n01440764,tench\nn01443537,n/a\n",
        "\ufeff0: n01440764: 'tench'\r\n1\tn01443537\r\n",
        '{"n01440764": "tench", "n01443537": "goldfish"}',
        "n01440764_tench\nn01443537-goldfish",
        "n01440764 n01443537",
    ],
)
def test_lists_of_wnids_may_name_them(tmp_path, text):
    (tmp_path / "imagenet100.txt").write_text(text, "utf-8")
    assert read_wnids(str(tmp_path / "imagenet100.txt")) == {"n01440764", "n01443537"}


def test_imagenet_100_reads_only_what_its_list_names(tmp_path):
    wnids = [f"n{i:08d}" for i in range(102)]
    for split in ("train", "val"):
        for w in wnids:
            save(tmp_path / split / w / "1.jpg")
    (tmp_path / "imagenet100.txt").write_text("".join(f"{w} name of {w[-2:]}, or other\n" for w in wnids[1:101]))
    shutil.rmtree(tmp_path / "train" / wnids[0]), shutil.rmtree(tmp_path / "val" / wnids[101])
    train, val = load_data(Data(dataset="imagenet-100", data_path=str(tmp_path)), World())
    assert train.classes == val.classes == wnids[1:101] and val.targets.tolist() == list(range(100))
    assert [p.split(os.sep)[-2] for p in val.paths] == wnids[1:101]
    shutil.rmtree(tmp_path / "train" / wnids[7])
    with pytest.raises(UserError, match=rf"imagenet100\.txt: .* has no images of its {wnids[7]}"):
        load_data(Data(dataset="imagenet-100", data_path=str(tmp_path)), World())


# ---- Unicode


def test_names_that_differ_in_unicodes_form_only_are_one_class(tmp_path):
    """A Mac's archive beside a Linux one: train/ in one form, val/ and the labels in the other."""
    nfc, nfd = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    assert nfc != nfd
    for k, name in enumerate((f"train/{nfd}", "train/bar", f"val/{nfc}", "val/bar", f"test/{nfd}", "test/bar")):
        save(tmp_path / name / f"{nfc}{k}.jpg")
    save(tmp_path / "train" / nfc / "x.jpg")
    train, val = load_data(Data(dataset="folder", data_path=str(tmp_path)), World())
    assert train.classes == val.classes == ["bar", nfc] and val.targets.tolist() == [0, 1]
    assert Counter(train.targets.tolist()) == {0: 1, 1: 2}
    data, ids, notes = read_images("folder", str(tmp_path / "test"), train.classes)
    assert data.targets.tolist() == [0, 1] and notes == []
    (tmp_path / "labels.csv").write_text(f"ID,label\n{nfd}4.jpg,{nfd}\n{nfc}5,bar\n", "utf-8")
    data, ids, notes = read_images("folder", str(tmp_path / "test"), train.classes, str(tmp_path / "labels.csv"))
    assert dict(zip(ids, data.targets.tolist())) == {f"{nfd}/{nfc}4.jpg": 1, f"bar/{nfc}5.jpg": 0} and notes == []
    meta = {"classes": ["bar", nfd]}  # of an earlier version
    check_meta(meta, "x.pth")
    assert meta["classes"] == ["bar", nfc]


# ---- nothing to read


@pytest.mark.slow
def test_a_set_of_unreadable_images_ends_every_script_in_one_line(photos, tmp_path):
    assert call(main_finetune, "--data_path", photos, "--val_split", 0.34, *NET, "--output_dir", tmp_path / "one") == 0
    assert (
        call(
            main_pretrain_noprop, "--dataset", "folder", "--data_path", photos, *TINY, "--output_dir", tmp_path / "pre"
        )
        == 0
    )
    bad = tmp_path / "bad"
    for split in ("train", "val"):
        for name in ("blue", "green", "red"):
            (bad / split / name).mkdir(parents=True)
            for i in range(2):
                (bad / split / name / f"{i}.jpg").write_bytes(b"\xff\xd8\xff no image")
    skip = ["--data_path", bad, "--on_bad_image", "skip", *CPU]
    best, last = tmp_path / "one" / "checkpoint-best.pth", tmp_path / "pre" / "checkpoint-last.pth"
    lines = [
        (main_linprobe, "--checkpoint", best),
        (main_linprobe, "--checkpoint", last),
        (main_finetune, "--eval", "--resume", best, *NET),
        (main_pretrain_noprop, "--dataset", "folder", *TINY, "--output_dir", tmp_path / "x"),
        (main_predict, "--checkpoints", best, "--output_dir", tmp_path / "p"),
        *(
            (main_sample, last, "--mode", mode, "--output_dir", tmp_path / "s")
            for mode in ("reconstruct", "attention", "frechet")
        ),
    ]
    for main, *line in lines:
        with pytest.raises(UserError, match=r"none of (the|its) \d+ images|cannot be read") as caught:
            call(main, *line, *skip)
        one_line(caught)
