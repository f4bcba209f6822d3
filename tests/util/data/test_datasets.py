"""Data sets from folders and published files: classes, names, layouts, and what is missing."""

import os
import pickle
import shutil
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets as tv

from tests.harness.pictures import write_image
from util.cli.settings import Data
from util.data.datasets import ArrayDataset, read_class_folder, read_split, read_unlabelled, to_channels
from util.data.splits import load_data
from util.data_specs import DATASETS
from util.dist import World
from util.errors import UserError


def test_folder_reads_both_splits_with_one_class_order(photo_folder):
    train, val = read_split("folder", str(photo_folder), "train"), read_split("folder", str(photo_folder), "val")
    assert train.classes == val.classes == ["blue", "red"]
    assert (len(train), len(val)) == (32, 12)
    assert train.targets.tolist() == [0] * 16 + [1] * 16
    assert train.name(16) == os.path.join("red", "red_00.png")


def test_given_classes_number_a_folders_images(tmp_path):
    for name in ("train/cat/1.png", "train/dog/1.png", "val/dog/1.png"):
        write_image(tmp_path / name)
    val = read_split("folder", str(tmp_path), "val", classes=["emu", "cat", "owl", "dog"])
    assert (val.classes, val.targets.tolist()) == (["emu", "cat", "owl", "dog"], [3])
    assert read_split("folder", str(tmp_path), "val").targets.tolist() == [1]


def test_errors_name_the_folder(tmp_path):
    for name in ("train/cat/1.png", "train/dog/1.png", "val/cat/1.png"):
        write_image(tmp_path / name)
    (tmp_path / "train" / "elk").mkdir()
    with pytest.raises(UserError, match=r"train/elk: class folder without images$"):
        read_split("folder", str(tmp_path), "train")
    (tmp_path / "train" / "elk" / "a.txt").touch()
    with pytest.raises(UserError, match=r"train/elk: class folder without images; its files are 1 .txt"):
        read_split("folder", str(tmp_path), "train")
    shutil.rmtree(tmp_path / "train" / "elk")
    write_image(tmp_path / "val" / "cow" / "1.png")
    with pytest.raises(UserError, match=r"unknown cow"):
        read_split("folder", str(tmp_path), "val")
    with pytest.raises(UserError, match="no such folder"):
        read_split("folder", str(tmp_path / "nowhere"), "train")
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(UserError, match="no class folders"):
        read_split("folder", str(tmp_path / "empty"), "train")
    write_image(tmp_path / "only" / "train" / "a" / "1.png")
    with pytest.raises(UserError, match="one class"):
        load_data(Data(dataset="folder", data_path=str(tmp_path / "only")), World())
    write_image(tmp_path / "only" / "train" / "b" / "1.png")
    with pytest.raises(UserError, match="val_split"):
        load_data(Data(dataset="folder", data_path=str(tmp_path / "only")), World())
    os.rename(tmp_path / "train", tmp_path / "treino")
    with pytest.raises(UserError, match="has no train/ folder"):
        read_split("folder", str(tmp_path), "train")


def test_one_folder_of_classes_without_splits_is_training_data(tmp_path):
    for name in ("a/1.png", "b/1.png", "b/sub/2.jpg"):
        write_image(tmp_path / name)
    train = read_split("folder", str(tmp_path), "train")
    assert train.classes == ["a", "b"] and len(train) == 3
    assert read_split("folder", str(tmp_path), "val") is None


def test_symlink_loops_and_undecodable_names_are_survived(tmp_path):
    write_image(tmp_path / "a" / "1.png")
    write_image(tmp_path / "b" / "1.png")
    os.symlink(tmp_path / "a", tmp_path / "a" / "loop")
    os.rename(tmp_path / "b" / "1.png", os.fsencode(tmp_path / "b") + b"/\xff\xfe.png")
    assert len(read_class_folder(str(tmp_path))) == 2


def test_tiny_imagenet_reads_its_own_val_layout(tmp_path):
    base = tmp_path / "tiny-imagenet-200"
    for wnid in ("n02", "n01"):
        write_image(base / "train" / wnid / "images" / f"{wnid}_0.JPEG")
    for i in range(3):
        write_image(base / "val" / "images" / f"val_{i}.JPEG")
    (base / "wnids.txt").write_text("n02\nn01\n")
    (base / "val" / "val_annotations.txt").write_text(
        "".join(f"val_{i}.JPEG\tn0{1 + i % 2}\t0\t0\t9\t9\n" for i in range(3))
    )
    val = read_split("tiny-imagenet", str(tmp_path), "val")
    assert val.classes == ["n01", "n02"] and val.targets.tolist() == [0, 1, 0]
    assert val.paths[1].endswith("val/images/val_1.JPEG")


def test_tiny_imagenet_without_wnids_and_with_another_list(tmp_path):
    for i, wnid in enumerate(("n01", "n02")):
        write_image(tmp_path / "train" / wnid / "images" / f"{wnid}_0.JPEG")
        write_image(tmp_path / "val" / "images" / f"val_{i}.JPEG")
    listing = tmp_path / "val" / "val_annotations.txt"
    with pytest.raises(UserError, match=r"val_annotations\.txt, which lists the classes of .*images, is missing"):
        read_split("tiny-imagenet", str(tmp_path), "val")
    listing.write_text("val_1.JPEG n02 0 0 9 9\r\n")  # tabs that an editor made spaces of, and an image less
    val = read_split("tiny-imagenet", str(tmp_path), "val")
    assert val.targets.tolist() == [1] and val.paths[0].endswith("val_1.JPEG")
    assert val.notes == [f"{listing}: 1 files of {tmp_path}/val/images are not in it and left out, e.g. val_0.JPEG"]
    listing.write_text("val_1.JPEG\n")
    with pytest.raises(UserError, match=r"its line 'val_1\.JPEG' should be a file name and a wnid"):
        read_split("tiny-imagenet", str(tmp_path), "val")


def test_imagenet_100_picks_its_list_out_of_the_whole(tmp_path):
    wnids = [f"n{i:03d}" for i in range(102)]
    for split in ("train", "val"):
        for w in wnids:
            write_image(tmp_path / split / w / "1.png", size=(2, 2))
    with pytest.raises(UserError, match="102 classes"):
        read_split("imagenet-100", str(tmp_path), "train")
    (tmp_path / "imagenet100.txt").write_text("\n".join(reversed(wnids[2:])))
    train = read_split("imagenet-100", str(tmp_path), "train")
    assert train.classes == wnids[2:] and train.targets.tolist() == list(range(100))
    with pytest.raises(UserError, match="put the images at"):
        read_split("imagenet", str(tmp_path / "nowhere"), "train")


@pytest.fixture
def cifar_root(tmp_path, monkeypatch):
    """CIFAR-10's own file format with 4 images a batch; digests of the real files do not apply to these."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for name in names:
        content = {"data": rng.integers(0, 256, (4, 3072), dtype=np.uint8), "labels": [0, 1, 2, 3]}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class{i}" for i in range(10)]}))
    monkeypatch.setattr(tv.CIFAR10, "train_list", [[n, None] for n in names[:5]])
    monkeypatch.setattr(tv.CIFAR10, "test_list", [[names[5], None]])
    monkeypatch.setattr(tv.CIFAR10, "meta", {**tv.CIFAR10.meta, "md5": None})
    return tmp_path


def test_cifar10_files_become_one_uint8_tensor(cifar_root):
    train, val = (read_split("cifar10", str(cifar_root), s) for s in ("train", "val"))
    assert (
        train.images.shape == (20, 3, 32, 32)
        and val.images.shape == (4, 3, 32, 32)
        and train.images.dtype == torch.uint8
    )
    raw = pickle.loads((cifar_root / "cifar-10-batches-py" / "data_batch_2").read_bytes())["data"][1]
    assert torch.equal(train.images[5], torch.from_numpy(raw).view(3, 32, 32))
    assert train.classes[0] == "class0" and train.targets[:5].tolist() == [0, 1, 2, 3, 0]


@pytest.mark.parametrize(
    "inner", ["", "cifar-10-batches-py", "cifar-10-batches-py/", "cifar-10-batches-py/../cifar-10-batches-py"]
)
def test_cifars_own_folder_may_be_given(cifar_root, inner, monkeypatch):
    whole = read_split("cifar10", str(cifar_root), "train")
    assert torch.equal(read_split("cifar10", f"{cifar_root}/{inner}", "train").images, whole.images)
    monkeypatch.chdir(cifar_root / inner)
    assert torch.equal(read_split("cifar10", ".", "val").targets, torch.arange(4))


@pytest.mark.parametrize("inner", ["", "FashionMNIST", "FashionMNIST/raw"])
def test_fashion_mnists_own_folder_may_be_given(tmp_path, inner):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 3), ("t10k", 2)):
        pixels, labels = np.full((n, 28, 28), n, np.uint8), np.arange(n, dtype=np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, n, 28, 28) + pixels.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, n) + labels.tobytes())
    train = read_split("fashion-mnist", str(tmp_path / inner), "train")
    assert train.images.shape == (3, 1, 28, 28) and train.targets.tolist() == [0, 1, 2]


def test_a_folder_beside_cifars_is_not_taken_for_it(cifar_root, monkeypatch):
    (cifar_root / "cifar").mkdir()
    monkeypatch.setattr("util.data.datasets._download", lambda name, fetch, by_hand: pytest.fail(by_hand))
    with pytest.raises(pytest.fail.Exception, match="cifar/cifar-10-batches-py"):
        read_split("cifar10", str(cifar_root / "cifar"), "train")


def test_offline_download_says_what_to_put_where(tmp_path, monkeypatch):
    import urllib.error

    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    for name, where in (
        ("cifar10", "cifar-10-batches-py"),
        ("fashion-mnist", "FashionMNIST/raw"),
        ("tiny-imagenet", "unpack http"),
    ):
        with pytest.raises(UserError) as caught:
            read_split(name, str(tmp_path), "train")
        assert where in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)


def test_a_download_comes_to_data_path_and_is_read_from_there(cifar_root, tmp_path, monkeypatch):
    """torchvision's class is told to fetch: a stand-in for the network copies the files to the root it was given."""
    read, asked = tv.CIFAR10.__init__, []

    def init(self, root, train=True, download=False):
        if download:
            asked.append((root, train))
            shutil.copytree(cifar_root, root, dirs_exist_ok=True)
        read(self, root, train=train, download=False)

    monkeypatch.setattr(tv.CIFAR10, "__init__", init)
    assert len(read_split("cifar10", str(tmp_path / "new"), "val")) == 4
    assert asked == [(str(tmp_path / "new"), True)]


def test_digits_are_scikit_learns_and_its_statistics_are_in_the_table():
    from sklearn.datasets import load_digits

    train, val = read_split("digits", ".", "train"), read_split("digits", ".", "val")
    assert len(train) + len(val) == 1797 and len(val) == 360
    assert torch.equal(
        torch.cat([train.images, val.images]).long().sum(),
        torch.tensor(np.round(load_digits().images * 255 / 16).sum()).long(),
    )
    pixels = train.images.double() / 255
    assert DATASETS["digits"].mean[0] == pytest.approx(pixels.mean().item(), abs=2e-3)
    assert DATASETS["digits"].std[0] == pytest.approx(pixels.std().item(), abs=2e-3)


def test_channel_conversion_equals_pil():
    images = torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8)
    grey = to_channels(ArrayDataset(images, torch.zeros(2), ["a"]), 1).images
    pil = np.asarray(Image.fromarray(images[0].permute(1, 2, 0).numpy()).convert("L"))
    assert (grey[0, 0].numpy().astype(int) - pil.astype(int)).__abs__().max() <= 1
    back = to_channels(ArrayDataset(grey, torch.zeros(2), ["a"]), 3).images
    assert back.shape == (2, 3, 5, 4) and torch.equal(back[:, 0], back[:, 2])


def test_a_folder_without_images_says_what_it_has(tmp_path):
    with pytest.raises(UserError, match=r": has no images$"):
        read_unlabelled(str(tmp_path))
    for name in ("a.heic", "b.heic", "notes.txt"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r": has no images \(but .*2 \.heic.*\)$"):
        read_unlabelled(str(tmp_path))
