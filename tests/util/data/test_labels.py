"""Labels from files and folders: which image each belongs to, and names that are safe in spreadsheets."""

import csv

import pytest

from tests.harness.prediction import CLASSES
from util.data.labels import class_finder, read_images, spreadsheet_safe, without_apostrophe
from util.errors import UserError


@pytest.fixture
def images(tmp_path):
    for name in ("a/1.jpg", "a/2.jpg", "b/2.jpg", "b/=3.jpg"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "images"


def labels_of(images, text: str, encoding: str = "utf-8") -> tuple[dict, list[str]]:
    path = images.parent / "labels.csv"
    path.write_text(text, encoding=encoding)
    data, ids, notes = read_images("folder", str(images), CLASSES, str(path))
    return dict(zip(ids, data.targets.tolist())), notes


def test_labels_name_images_by_path_or_file_name_with_or_without_extension(images):
    found, notes = labels_of(
        images, "label,ID,more\ndog,1.jpg,x\nowl,b/2,\n,a/2.jpg,\n\ncat,'=3.jpg,\ncat,zebra.jpg,\n", "utf-8-sig"
    )
    assert found == {"a/1.jpg": 1, "a/2.jpg": -1, "b/2.jpg": 2, "b/=3.jpg": 0}
    assert any("1 lines" in n and "zebra.jpg" in n for n in notes)
    assert labels_of(images, "ID,label\n1,cat\n")[0]["a/1.jpg"] == 0


@pytest.mark.parametrize(
    "text,words",
    [
        ("a/1.jpg,cat\n", "first line .* ID,label"),
        ("", "first line"),
        ("ID,label\n1,emu\n", "line 2: class 'emu' is not one of cat, dog, owl"),
        ("ID,label\n2.jpg,cat\n", "2.jpg could be a/2.jpg or b/2.jpg"),
        ("ID,label\n9,cat\n", "has no label for any of the 4 images; it has '9', the data has 'a/1.jpg'"),
        ("ID,label\n1,\n", "has no label for any of the 4 images$"),
        ("ID,label\n1,cat\na/1.jpg,dog\n", "line 3: a/1.jpg already has the label cat"),
    ],
)
def test_wrong_labels_are_one_line(images, text, words):
    with pytest.raises(UserError, match=f"--labels .*labels.csv: .*{words}"):
        labels_of(images, text)


def test_folder_is_labelled_only_if_every_image_is_in_a_class_folder(images):
    data, ids, notes = read_images("folder", str(images), ["b", "a", "c"])
    assert (
        dict(zip(ids, data.targets.tolist())) == {"a/1.jpg": 1, "a/2.jpg": 1, "b/2.jpg": 0, "b/=3.jpg": 0} and not notes
    )
    (images / "b" / "photo.heic").touch()
    data, _, notes = read_images("folder", str(images), ["a", "bee"])
    assert set(data.targets.tolist()) == {-1}
    assert "not scored" in notes[0] and "has b" in notes[0] and "1 .heic" in notes[1]
    (images / "b" / "photo.heic").unlink()
    data, _, notes = read_images("folder", str(images), ["cat", "dog"])
    assert set(data.targets.tolist()) == {-1} and not notes, "folders that are named after no class are no labels"


@pytest.mark.parametrize(
    "label,classes,number",
    [
        ("cats ", ["cats", "cats "], 1),
        ("cats", ["cats", "cats "], 0),
        ("cats", ["cats ", "dogs"], 0),  # an editor of tables cut the space off
        ("cats  ", ["cats ", "dogs"], 0),
        ("'-1", ["-1", "0"], 0),
        ("'-1", ["'-1", "-1"], 0),
        ("-1", ["'-1", "-1"], 1),
        (" '-1 ", ["-1", "0"], 0),
        ("a\rb", ["a\rb", "a"], 0),
        ("cats", [" cats", "cats "], None),  # could be either
        ("'cats", ["cats", "dogs"], None),
        ("", ["cats", "dogs"], None),
    ],
)
def test_a_class_is_found_by_its_exact_name_first(label, classes, number):
    assert class_finder(classes)(label) == number


def test_images_are_found_by_their_exact_names_first(tmp_path):
    names = ["-1.jpg", "'-1.jpg", " x.jpg", "x.jpg", "y .jpg", "z\r.jpg"]
    for name in names:
        (tmp_path / "images" / "a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / "a" / name).touch()
    rows = [("-1.jpg", "a"), ("'-1.jpg", "b"), (" x.jpg", "a"), ("a/x.jpg", "b"), ("y", "a"), ("z\r.jpg", "b")]
    with open(tmp_path / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([("ID", "label"), *rows])
    data, ids, notes = read_images("folder", str(tmp_path / "images"), ["a", "b"], str(tmp_path / "labels.csv"))
    assert dict(zip(ids, data.targets.tolist())) == {f"a/{n}": i % 2 for i, n in enumerate(names)} and not notes


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", "\tx", "\rx"])
def test_safe_fields_never_start_a_formula(text):
    assert spreadsheet_safe(text) == "'" + text and spreadsheet_safe("'" + text) == "'" + text
    assert spreadsheet_safe("a" + text) == "a" + text and without_apostrophe("'a" + text) == "'a" + text
    assert without_apostrophe("'" + text) == text == without_apostrophe(text)


def test_labels_that_are_not_there_and_other_classes_are_one_line(images):
    with pytest.raises(UserError, match=r"--labels .*nowhere\.csv: cannot be read \(No such file"):
        read_images("folder", str(images), CLASSES, str(images / "nowhere.csv"))
    with pytest.raises(
        UserError, match=r"--dataset digits: its classes differ from those of --checkpoints \(e\.g\. 0\)"
    ):
        read_images("digits", ".", CLASSES)
