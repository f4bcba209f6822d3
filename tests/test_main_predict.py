"""main_predict.py as users run it, against the same numbers computed view by view, image by image."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, log_loss

import main_predict
from augment.batch import BatchTransform, normalize
from augment.image import build_eval_transform
from bench.ranks import Ranks
from tests.harness.checks import undocumented
from tests.harness.prediction import predict, read_csv, reference, values
from tests.harness.runs import CONV, VIT, save_member
from util.cli import script
from util.data.datasets import read_split, read_unlabelled
from util.data.loader import Loader, SampleReader
from util.data.views import ViewReader
from util.dist import World
from util.errors import UserError


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory):
    """Members of two families, sizes, channel counts, statistics and class orders; the third has two folds."""
    root = tmp_path_factory.mktemp("members")
    nets = [save_member(root / "vit" / "checkpoint-best.pth", VIT, seed=1, ema=True)]
    nets.append(save_member(root / "grey.pth", CONV, classes=("red", "blue"), size=(40, 24), in_chans=1, seed=2))
    for fold in (0, 1):
        folder = root / "folds" / f"fold-{fold}"
        nets.append(save_member(folder / "checkpoint-best.pth", CONV, seed=3 + fold, kfold=2))
        (folder / "result.json").write_text(json.dumps({"options": {"kfold": 2}}))
    return [root / "vit", root / "grey.pth", root / "folds"], nets


@pytest.fixture(scope="module")
def predicted(ensemble, photo_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("predictions")
    assert predict("--checkpoints", *ensemble[0], "--data_path", photo_folder / "val", "--output_dir", out) == 0
    return out


@pytest.mark.slow
def test_probabilities_are_the_mean_over_views_folds_and_members(ensemble, photo_folder, predicted):
    header, rows = read_csv(predicted)
    assert header == ["ID", "Predict", "blue", "red"] and len(rows) == 12
    for name in list(rows)[::3]:
        p = [reference(net, meta, photo_folder / "val" / name, range(12)).mean(0) for net, meta in ensemble[1]]
        expected = (p[0] + p[1] + (p[2] + p[3]) / 2) / 3
        np.testing.assert_allclose(values(rows, name), expected, atol=2e-6)
        assert rows[name][0] == ("blue", "red")[int(expected.argmax())]


def test_views_without_the_first_are_averaged_without_it(ensemble, photo_folder, tmp_path):
    """View 1 is computed in any case, to compare with."""
    line = ["--checkpoints", *ensemble[0][:2], "--data_path", photo_folder / "val" / "red", "--views", "2,8"]
    assert predict(*line, "--output_dir", tmp_path) == 0
    rows = read_csv(tmp_path)[1]
    for name in list(rows)[::3]:
        p = [reference(net, meta, photo_folder / "val" / "red" / name, [1, 7]).mean(0) for net, meta in ensemble[1][:2]]
        np.testing.assert_allclose(values(rows, name), (p[0] + p[1]) / 2, atol=2e-6)
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    [one] = [row["confidence"] for row in results if (row["name"], row["views"]) == ("grey.pth", 1)]
    net, meta = ensemble[1][1]
    sure = [reference(net, meta, photo_folder / "val" / "red" / name, [0])[0].max() for name in rows]
    assert one == pytest.approx(100 * np.mean(sure), abs=1e-3)


def test_table_has_every_member_and_ensemble_with_scikit_learns_scores(predicted):
    results = json.loads((predicted / "results.json").read_text())
    names = [(r["name"], r["views"]) for r in results["results"]]
    singles = [(n, v) for n in ("vit", "grey.pth", "folds") for v in (1, 12)]
    assert names == [*singles, ("equal weights", 1), ("equal weights", 12), ("weights by validation", 12)]
    chosen = [r for r in results["results"] if r["chosen"]]
    assert [(r["name"], r["views"]) for r in chosen] == [("equal weights", 12)]
    _, rows = read_csv(predicted)
    true = [name.split("/")[0] for name in rows]
    p = np.array([values(rows, name) for name in rows])
    assert chosen[0]["log_loss"] == pytest.approx(log_loss(true, p / p.sum(1, keepdims=True)), abs=1e-5)
    assert chosen[0]["balanced_accuracy"] == pytest.approx(
        100 * balanced_accuracy_score(true, [rows[n][0] for n in rows])
    )
    assert [m.get("acc1") for m in results["members"]] == [76.0, 77.0, 78.5]


def test_without_data_path_the_data_are_the_checkpoints(whole_run, ensemble, tmp_path):
    assert predict("--checkpoints", whole_run, "--views", 1, "--output_dir", tmp_path / "out") == 0
    header, rows = read_csv(tmp_path / "out")
    data = read_split("digits", ".", "val")
    assert header[2:] == data.classes and len(rows) == len(data) == 360
    right = sum(rows[data.name(i)][0] == str(int(target)) for i, target in enumerate(data.targets))
    [result] = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert result["accuracy"] == pytest.approx(100 * right / 360)
    with pytest.raises(UserError, match="--data_path: give the folder of images to predict"):
        predict("--checkpoints", ensemble[0][0], "--output_dir", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_margin_0_shows_the_whole_image(ensemble, photo_folder, tmp_path):
    line = ["--checkpoints", ensemble[0][0], "--data_path", photo_folder / "val", "--views", 1, "--margin", 0]
    assert predict(*line, "--output_dir", tmp_path) == 0
    net, meta = ensemble[1][0]
    _, rows = read_csv(tmp_path)
    mean, std = (torch.tensor(meta[k]).view(-1, 1, 1) for k in ("mean", "std"))
    whole, transform = [], build_eval_transform((24, 40), crop_pct=1.0)
    for name in rows:
        x = transform(Image.open(photo_folder / "val" / name).convert("RGB")).float() / 255
        with torch.no_grad():
            whole.append(net(((x - mean) / std)[None]).double().softmax(1)[0].numpy())
    predicted = [values(rows, name) for name in rows]
    cut = [reference(net, meta, photo_folder / "val" / name, [0])[0] for name in rows]  # with its margin
    # Pillow's resize and torch's are a level or two apart.
    assert np.abs(np.subtract(predicted, whole)).max() < 0.1 * np.abs(np.subtract(cut, whole)).max()


@pytest.mark.parametrize("size", [(96, 96), (224, 224), (288, 288), (384, 384), (96, 160)])
@pytest.mark.parametrize("crop_pct", [None, 0.9])
def test_view_1_is_what_validation_sees_bit_for_bit(photo_folder, size, crop_pct):
    """Through both readers, from the file; the crop itself against Pillow's resize of the side that has to cover."""
    data = read_split("folder", str(photo_folder), "val")
    transform = build_eval_transform(size, crop_pct)
    validated = SampleReader(data, transform, in_chans=3, seed=0, train=False)[0, 3][1][0]
    _, views, *_ = ViewReader(data, [(*size, 3, crop_pct)], [0, 1])[3]
    assert torch.equal(views[0][0], validated) and torch.equal(views[0][1], validated.flip(-1))
    share = crop_pct or (1.0 if max(size) > 224 else 0.875)
    cover = [int(s / share) for s in size]
    zoom = max(cover[0] / 32, cover[1] / 40)  # the photos are 40 x 32
    if size[0] == size[1]:
        w, h = int(40 * zoom), round(32 * zoom)
        resized = Image.open(data.paths[3]).resize((w, h), Image.BICUBIC)
        left, top = round((w - size[1]) / 2), round((h - size[0]) / 2)
        expected = resized.crop((left, top, left + size[1], top + size[0]))
        assert np.array_equal(np.asarray(expected), validated.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("size", [(8, 8), (16, 24)])
def test_view_1_of_an_image_in_memory_is_what_validation_sees(size):
    data = read_split("digits", ".", "val")
    loader = Loader(
        data, batch_transform=BatchTransform((0.0,), (1.0,), size=size), batch_size=4, train=False, world=World()
    )
    validated = next(loader.epoch()).images[3]
    _, views, *_ = ViewReader(data, [(*size, 1, 1.0)], [0])[3]
    assert torch.equal(normalize(views[0], (0.0,), (1.0,))[0], validated)


@pytest.mark.slow
def test_members_are_seen_as_each_was_validated_and_margin_overrides(photo_folder, tmp_path):
    """One network under two checkpoints that differ in crop_pct, and one from before it was in meta."""
    for name, crop in (("narrow", 0.6), ("whole", 1.0), ("old", None)):
        save_member(tmp_path / name / "checkpoint-best.pth", VIT, seed=1, **({"crop_pct": crop} if crop else {}))
    out, line = {}, ["--data_path", photo_folder / "val", "--views", 1, "--checkpoints"]
    for name in ("narrow", "whole", "old"):
        assert predict(*line, tmp_path / name, "--output_dir", tmp_path / f"out_{name}") == 0
        out[name] = read_csv(tmp_path / f"out_{name}")[1]
    net, meta = save_member(tmp_path / "again.pth", VIT, seed=1)
    for name, crop in (("narrow", 0.6), ("whole", 1.0), ("old", 0.875)):
        expected = reference(net, {**meta, "crop_pct": crop}, photo_folder / "val" / "red" / "red_01.png", [0])[0]
        np.testing.assert_allclose(values(out[name], "red/red_01.png"), expected, atol=2e-6)
    report = (tmp_path / "out_narrow" / "report.md").read_text()
    assert "crop 0.6" in report and "margin" not in report
    assert predict(*line, tmp_path / "narrow", "--margin", 3, "--output_dir", tmp_path / "margin") == 0
    assert "--margin 3" in (tmp_path / "margin" / "report.md").read_text()
    assert read_csv(tmp_path / "margin")[1] != out["narrow"]


def test_run_leaves_its_report_and_pictures(predicted):
    report = (predicted / "report.md").read_text()
    pictures = ["class_distribution.png", "confusion.png", "reliability.png", "least_certain.png"]
    for name in pictures:
        assert name in report and min(Image.open(predicted / name).size) > 200, name
    assert (predicted / "most_confidently_wrong.png").exists() == ("most_confidently_wrong.png" in report)
    assert "not compared: --weights stacked" in report and "**equal weights**" in report
    assert json.loads((predicted / "args.json").read_text())["options"]["views"] == list(range(12))
    assert not undocumented(predicted)


@pytest.mark.slow
def test_two_ranks_write_the_same_bytes(ensemble, photo_folder, tmp_path):
    """5 images a batch and one unreadable among them: three batches on two ranks."""
    images = tmp_path / "images"
    images.mkdir()
    for path in sorted((photo_folder / "val").glob("*/*.png")):
        (images / path.name).write_bytes(path.read_bytes())
    (images / "blue_03.png").write_bytes(b"not an image")
    line = [
        "--checkpoints",
        *ensemble[0],
        "--data_path",
        images,
        "--views",
        "1,3",
        "--batch_size",
        10,
        "--on_bad_image",
        "skip",
    ]
    assert predict(*line, "--output_dir", tmp_path / "one") == 0
    assert Ranks(2, lambda: predict(*line, "--output_dir", tmp_path / "two")).exit_codes() == [0, 0]
    one, two = ((tmp_path / n / "predictions.csv").read_bytes() for n in ("one", "two"))
    assert one == two and one.count(b"\n") == 13 and b"\nblue_03.png,,,\n" in one


def test_each_image_is_decoded_once(ensemble, photo_folder, tmp_path, monkeypatch):
    opened, real = [], Image.open
    monkeypatch.setattr(Image, "open", lambda path, *a, **k: opened.append(path) or real(path, *a, **k))
    data = read_unlabelled(str(photo_folder / "val"))
    _, views, bad, _ = ViewReader(data, [(32, 32, 3), (40, 24, 1)], [0, 5])[3]
    assert not bad and [tuple(v.shape) for v in views] == [(2, 3, 32, 32), (2, 1, 40, 24)] and len(opened) == 1


def test_unreadable_image_is_an_error_that_names_it_or_an_empty_row(ensemble, tmp_path, capsys):
    Image.new("RGB", (50, 40), (200, 0, 0)).save(tmp_path / "good.png")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 nothing")
    line = ["--checkpoints", ensemble[0][0], "--data_path", tmp_path, "--views", 1]
    with pytest.raises(UserError, match=r"broken\.jpg: cannot be read as an image .* --on_bad_image skip"):
        predict(*line, "--output_dir", tmp_path.parent / "strict")
    out = tmp_path.parent / "skip"
    assert predict(*line, "--output_dir", out, "--on_bad_image", "skip") == 0
    _, rows = read_csv(out)
    assert rows["broken.jpg"] == ["", "", ""] and rows["good.png"][0] in ("blue", "red")
    assert "Not readable: 1" in (out / "report.md").read_text() and "broken.jpg" in capsys.readouterr().out
    (tmp_path / "good.png").unlink()
    with pytest.raises(UserError, match="none of its 1 images can be read"):
        predict(*line, "--output_dir", out, "--on_bad_image", "skip")


def test_names_are_literal_or_spreadsheet_safe_and_old_pictures_are_deleted(ensemble, tmp_path):
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    out.mkdir()
    (out / "confusion.png").touch()
    image = Image.new("RGB", (33, 47), (10, 90, 200))
    names = [
        b"=cmd().png",
        b"-1.png",
        b"caf\xc3\xa9, \xe2\x98\x95.png",
        b"latin\xe9.png",
        b"two\nlines.png",
        b"a\r.png",
        b' "b" .png',
    ]
    for name in names:
        image.save(os.path.join(os.fsencode(images), name).decode("utf-8", "surrogateescape"))
    line = ["--checkpoints", ensemble[0][0], "--data_path", images, "--output_dir", out, "--views", 1]
    others = {"café, ☕.png", "latin\\xe9.png", "two\nlines.png", "a\r.png", ' "b" .png'}
    assert predict(*line) == 0 and set(read_csv(out)[1]) == {"=cmd().png", "-1.png"} | others
    assert predict(*line, "--spreadsheet_safe") == 0 and set(read_csv(out)[1]) == {"'=cmd().png", "'-1.png"} | others
    assert not (out / "confusion.png").exists() and (out / "least_certain.png").exists()
    assert "No scores without labels" in (out / "report.md").read_text()


def test_labels_file_scores_the_images_that_it_names(ensemble, photo_folder, tmp_path):
    (tmp_path / "labels.csv").write_text("ID,label\nblue_00,red\nred/red_01.png,red\n")
    line = ["--checkpoints", ensemble[0][1], "--data_path", photo_folder / "val", "--views", "centre,blur"]
    assert predict(*line, "--labels", tmp_path / "labels.csv", "--output_dir", tmp_path / "out") == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    _, rows = read_csv(tmp_path / "out")
    right = sum(rows[name][0] == "red" for name in ("blue/blue_00.png", "red/red_01.png"))
    assert results["labelled"] == 2 and results["views"] == ["centre", "blur"]
    interval = ((0, 65.76), (9.45, 90.55), (34.24, 100))[right]  # Wilson's of 0, 1 and 2 of 2 images
    assert results["accuracy_interval"] == pytest.approx(interval, abs=0.01)
    assert f"95 % interval {interval[0]:.1f} to {interval[1]:.1f} %" in (tmp_path / "out" / "report.md").read_text()
    assert [r["accuracy"] for r in results["results"] if r["chosen"]] == [50.0 * right]


@pytest.mark.slow
def test_an_output_folder_among_the_images_is_not_predicted(ensemble, photo_folder, tmp_path):
    shutil.copytree(photo_folder / "val", tmp_path / "photos")
    names = sorted(f"{p.parent.name}/{p.name}" for p in (photo_folder / "val").glob("*/*.png"))
    for _ in range(2):  # contact sheets lie there the second time
        line = ["--checkpoints", ensemble[0][1], "--data_path", tmp_path / "photos", "--views", 1]
        assert predict(*line, "--output_dir", tmp_path / "photos" / "predictions") == 0
        assert sorted(read_csv(tmp_path / "photos" / "predictions")[1]) == names


@pytest.mark.slow
def test_stacked_and_validation_weights_change_the_file(ensemble, photo_folder, tmp_path):
    """The first run's out-of-fold file is right, the second's always wrong: stacking weighs the second negatively."""
    targets = [i % 2 for i in range(20)]
    for run, sign in (("good", 1), ("bad", -1)):
        for fold in (0, 1):
            folder = tmp_path / run / f"fold-{fold}"
            save_member(folder / "checkpoint-best.pth", VIT, seed=5 + fold + 2 * sign, kfold=2)
            (folder / "result.json").write_text(json.dumps({"options": {"kfold": 2}}))
            rows = [
                (i, t, 0.5 + (0.4 - 0.01 * (i % 7)) * sign * (0.5 - t) * 2)
                for i, t in enumerate(targets)
                if i % 4 // 2 == fold
            ]
            text = "".join(f"{i},{fold},{('blue', 'red')[t]},{p:.6f},{1 - p:.6f}\n" for i, t, p in rows)
            (folder / "oof.csv").write_text("ID,fold,True,blue,red\n" + text)
    line = ["--checkpoints", tmp_path / "good", tmp_path / "bad", "--data_path", photo_folder / "val", "--views", 1]
    for weights in ("val", "stacked"):
        assert predict(*line, "--weights", weights, "--output_dir", tmp_path / weights) == 0
    results = json.loads((tmp_path / "stacked" / "results.json").read_text())
    assert [r["name"] for r in results["results"] if r["chosen"]] == ["stacked"]
    oof = {r["name"]: r["accuracy"] for r in results["out_of_fold"]}
    assert oof["good"] == 100 and oof["bad"] == 0 and oof["stacked, fitted on the other folds"] == 100
    assert read_csv(tmp_path / "stacked")[1] != read_csv(tmp_path / "val")[1]


@pytest.mark.slow
def test_digits_are_predicted_by_name_of_the_data_set(tmp_path):
    classes = [str(i) for i in range(10)]
    save_member(tmp_path / "d.pth", VIT, classes=classes, size=(16, 16), in_chans=3)
    line = ["--checkpoints", tmp_path / "d.pth", "--dataset", "digits", "--views", 1, "--output_dir", tmp_path / "out"]
    assert predict(*line) == 0
    header, rows = read_csv(tmp_path / "out")
    assert header[2:] == classes and len(rows) == 360 and all(name.startswith("digit-") for name in rows)


@pytest.mark.parametrize(
    "argv,words",
    [
        (["--views", "5"], ["--views", "'5'", "1, 12, or a list"]),
        (["--views", "1,13"], ["--views", "1,13"]),
        (["--views", "2,2"], ["--views", "once"]),
        (["--weights", "stacked"], ["--weights stacked", "vit", "--kfold"]),
        (["--data_path", "/nowhere"], ["--data_path /nowhere", "no such folder"]),
        (["--labels", "/nowhere.csv"], ["--labels /nowhere.csv", "no such file"]),
        (["--output_dir", "EMPTY"], ["--output_dir", "contains images of --data_path"]),
        (["--data_path", "EMPTY"], ["has no images"]),
        (["--output_dir", "RUN"], ["--output_dir", "holds a training run"]),
        (["--checkpoints", "A", "A"], ["given twice"]),
    ],
)
def test_wrong_values_are_one_line(ensemble, tmp_path, argv, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint-last.pth").touch()
    for short, path in (("EMPTY", tmp_path / "empty"), ("RUN", tmp_path / "run"), ("A", ensemble[0][0])):
        argv = [a.replace(short, str(path)) for a in argv]
    line = {"--checkpoints": [ensemble[0][0]], "--data_path": [tmp_path / "empty"], "--output_dir": [tmp_path / "out"]}
    line[argv[0]] = argv[1:]
    with pytest.raises(UserError) as caught:
        predict(*[word for flag, given in line.items() for word in (flag, *given)])
    assert all(w in str(caught.value) for w in words), str(caught.value)


def test_missing_member_ends_in_one_line_and_exit_two(ensemble, photo_folder, tmp_path, monkeypatch, capsys):
    argv = [
        "--checkpoints",
        ensemble[0][0],
        tmp_path / "gone.pth",
        "--data_path",
        photo_folder / "val",
        "--output_dir",
        tmp_path / "out",
    ]
    monkeypatch.setattr("sys.argv", ["main_predict.py", *map(str, argv)])
    with pytest.raises(SystemExit) as caught:
        script.run_main(main_predict.main)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and "gone.pth: no such file or folder" in error
    assert not (tmp_path / "out").exists()
