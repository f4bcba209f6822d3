"""main_predict.py --out_of_fold: every image by the networks that had not seen it, and by no other."""

import csv
import json
import math
import shutil

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from tests.harness.prediction import QUICK, predict, read_csv, reference, values
from tests.harness.runs import CONV, VIT, finetune, save_member
from util.data.labels import read_images
from util.errors import UserError

VIEWS = [0, 1, 6]  # 1,2,7 on the command line


def held_out(name: str) -> int:
    return int(name[-5]) % 2  # blue_03.png -> fold 1


@pytest.fixture(scope="module")
def members(photo_folder, tmp_path_factory):
    """Two runs of two folds on photo_folder's val images, with their oof.csv; nets as {(member, fold): (net, meta)}."""
    root, nets = tmp_path_factory.mktemp("kfold"), {}
    names = sorted(f"{p.parent.name}/{p.name}" for p in (photo_folder / "val").glob("*/*.png"))
    rng = np.random.default_rng(0)
    for m, family in enumerate((VIT, CONV)):
        for fold in (0, 1):
            folder = root / "ab"[m] / f"fold-{fold}"
            nets[m, fold] = save_member(folder / "checkpoint-best.pth", family, seed=1 + 2 * m + fold, kfold=2)
            (folder / "result.json").write_text(json.dumps({"options": {"kfold": 2}}))
            rows = [n for n in names if held_out(n) == fold]
            with open(folder / "oof.csv", "w", newline="") as file:
                table = csv.writer(file)
                table.writerow(["ID", "fold", "True", "blue", "red"])
                for name in rows:
                    p = round(rng.uniform(0.1, 0.9), 6)
                    table.writerow([name, fold, name.split("/")[0], p, round(1 - p, 6)])
    return root, names, nets


@pytest.mark.slow
def test_each_image_is_predicted_by_the_folds_that_had_not_seen_it(members, photo_folder, tmp_path):
    root, names, nets = members
    line = [
        "--checkpoints",
        root / "a",
        root / "b",
        "--data_path",
        photo_folder / "val",
        "--out_of_fold",
        "--views",
        "1,2,7",
    ]
    assert predict(*line, "--weights", "stacked", "--output_dir", tmp_path) == 0
    p = np.array(
        [[reference(*nets[m, held_out(n)], photo_folder / "val" / n, VIEWS).mean(0) for n in names] for m in (0, 1)]
    )
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    accuracy = {(r["name"], r["views"]): r["accuracy"] for r in results}
    true = np.array([n.startswith("red") for n in names])
    for m, name in enumerate("ab"):
        assert accuracy[name, 3] == pytest.approx(100 * (p[m].argmax(1) == true).mean())
    # Stacked, by scikit-learn: the regression that predicts a fold was fitted on what is predicted of the other fold,
    # with the same views. Two classes: log-odds, and a column for the two biases.
    _, rows = read_csv(tmp_path)
    logs = [
        [np.log(reference(*nets[m, held_out(n)], photo_folder / "val" / n, VIEWS).clip(1e-6)).mean(0) for n in names]
        for m in (0, 1)
    ]
    columns = np.column_stack([*(np.diff(one, axis=1) for one in np.array(logs)), np.full(len(names), math.sqrt(2))])
    folds = np.array([held_out(n) for n in names])
    for fold in (0, 1):
        fitted = LogisticRegression(fit_intercept=False, tol=1e-8).fit(columns[folds != fold], true[folds != fold])
        expected = fitted.predict_proba(columns[folds == fold])
        found = np.array([values(rows, n) for n in names if held_out(n) == fold])
        np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.slow
def test_a_head_with_extra_outputs_predicts_as_in_validation(photo_folder, tmp_path):
    line = [
        "--data_path",
        photo_folder / "train",
        "--kfold",
        2,
        "--nb_classes",
        5,
        "--model",
        "vit_custom_patch8",
        "--input_size",
        32,
    ]
    net = ["--model_kwargs", "embed_dim=12", "depth=1", "num_heads=2", "--epochs", 1, "--batch_size", 8, "--lr", 1e-2]
    assert finetune(*line, *net, *QUICK, "--output_dir", tmp_path / "run") == 0
    line = ["--checkpoints", tmp_path / "run", "--data_path", photo_folder / "train", "--out_of_fold", "--views", 1]
    assert predict(*line, "--weights", "equal", "--output_dir", tmp_path / "equal") == 0
    _, rows = read_csv(tmp_path / "equal")
    header, *table = list(csv.reader((tmp_path / "run" / "oof.csv").read_text().splitlines()))
    assert header == ["ID", "fold", "True", "blue", "red"] and len(table) == len(rows) == 32
    for name, _, _, *p in table:
        np.testing.assert_allclose([float(v) for v in p], values(rows, name), atol=1e-6)
        assert sum(map(float, p)) == pytest.approx(1, abs=1e-8)
    assert predict(*line, "--weights", "stacked", "--output_dir", tmp_path / "stacked") == 0


@pytest.mark.slow
def test_an_unreadable_image_has_an_empty_row_or_is_one_line(members, photo_folder, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(photo_folder / "val", images)
    (images / "blue" / "broken.png").write_bytes((images / "blue" / "blue_00.png").read_bytes()[:60])
    line = ["--checkpoints", members[0] / "a", "--data_path", images, "--out_of_fold", "--views", 1]
    with pytest.raises(UserError, match=r"blue/broken\.png: cannot be read as an image"):
        predict(*line, "--output_dir", tmp_path / "strict")
    assert predict(*line, "--on_bad_image", "skip", "--output_dir", tmp_path / "skip") == 0
    rows = read_csv(tmp_path / "skip")[1]
    assert len(rows) == 13 and [n for n in rows if not rows[n][0]] == ["blue/broken.png"]
    shutil.copy(images / "blue" / "blue_00.png", images / "blue" / "new.png")  # readable: no run had seen it
    with pytest.raises(UserError, match=r"--out_of_fold: blue/new\.png is in no fold"):
        predict(*line, "--on_bad_image", "skip", "--output_dir", tmp_path / "skip")


@pytest.mark.slow
def test_the_images_are_those_that_training_reads(members, photo_folder, tmp_path):
    """train/ of a folder that has one, and no image beside the class folders; of other sets the training split."""
    shutil.copytree(photo_folder / "val", tmp_path / "photos" / "train")
    shutil.copy(photo_folder / "val" / "blue" / "blue_00.png", tmp_path / "photos" / "train" / "cover.png")
    line = ["--checkpoints", members[0] / "a", "--out_of_fold", "--views", 1]
    for where in ("photos", "photos/train"):
        assert predict(*line, "--data_path", tmp_path / where, "--output_dir", tmp_path / "out") == 0
        assert sorted(read_csv(tmp_path / "out")[1]) == members[1]
        assert "left out, 1 images outside the class folders" in (tmp_path / "out" / "report.md").read_text()
    data, ids, _ = read_images("digits", ".", [str(c) for c in range(10)], trained_on=True)
    assert len(ids) == 1437 and (data.targets >= 0).all()


def test_images_are_found_whatever_unicode_form_a_copy_gave_their_names(members, photo_folder, tmp_path):
    shutil.copytree(photo_folder / "val", tmp_path / "photos")
    shutil.copytree(members[0] / "a", tmp_path / "run")
    (tmp_path / "photos" / "blue" / "blue_00.png").rename(tmp_path / "photos" / "blue" / "bl\u00fce_00.png")
    table = tmp_path / "run" / "fold-0" / "oof.csv"
    table.write_text(table.read_text().replace("blue/blue_00.png", "blue/blu\u0308e_00.png"), "utf-8")
    line = ["--checkpoints", tmp_path / "run", "--data_path", tmp_path / "photos", "--out_of_fold", "--views", 1]
    assert predict(*line, "--weights", "stacked", "--output_dir", tmp_path / "out") == 0
    assert len(read_csv(tmp_path / "out")[1]) == 12
    (tmp_path / "run" / "fold-0" / "result.json").write_text("{")
    with pytest.raises(UserError, match=r"fold-0/result\.json is damaged"):
        predict(*line, "--output_dir", tmp_path / "out")


@pytest.mark.parametrize(
    "checkpoints,data,words",
    [
        (["a/fold-1"], "val", ["--out_of_fold", "blue/blue_00.png", "no fold of a/fold-1"]),
        (["single.pth"], "val", ["--out_of_fold", "single.pth", "single network"]),
        (["a"], "train", ["--out_of_fold", "blue/blue_06.png", "no fold of"]),
        (["a", "shifted"], "val", ["--out_of_fold", "different folds"]),
    ],
)
def test_what_cannot_be_out_of_fold_is_one_line(members, photo_folder, tmp_path, monkeypatch, checkpoints, data, words):
    root = members[0]
    monkeypatch.chdir(root)
    if checkpoints == ["single.pth"] and not (root / "single.pth").exists():
        save_member(root / "single.pth", VIT, seed=1)
    if "shifted" in checkpoints:
        for fold in (0, 1):
            save_member(root / "shifted" / f"fold-{fold}" / "checkpoint-best.pth", VIT, kfold=2)
            (root / "shifted" / f"fold-{fold}" / "result.json").write_text(json.dumps({"options": {"kfold": 2}}))
            lines = (root / "a" / f"fold-{1 - fold}" / "oof.csv").read_text().replace(f",{1 - fold},", f",{fold},")
            (root / "shifted" / f"fold-{fold}" / "oof.csv").write_text(lines)
    with pytest.raises(UserError) as caught:
        predict(
            "--checkpoints", *checkpoints, "--data_path", photo_folder / data, "--out_of_fold", "--output_dir", tmp_path
        )
    assert all(w in str(caught.value) for w in words) and "\n" not in str(caught.value), str(caught.value)
