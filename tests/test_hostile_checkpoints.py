"""Broken and hostile checkpoint files: never executed, never unpacked, one clear line each."""

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import main_finetune
from models import create_model, load_pretrained
from models.loading import load_classifier
from tests.harness.checks import one_line, peak_memory_below
from tests.harness.runs import NET, classifier_meta
from util.checkpoint import LAST, find_resume, load_exactly, peek_meta, read_checkpoint, read_file
from util.errors import UserError


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
        ({"model": {**state, "patch_embed.proj.weight": torch.zeros(12, 3, 4, 4)}}, "in_chans"),
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
    with (
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as out,
        zipfile.ZipFile(tmp_path / "large.pth") as source,
    ):
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "change,word",
    [
        (lambda c: c.pop("optimizer"), "weights only"),
        (lambda c: c.update(optimizer=None), "weights only"),
        (lambda c: c.update(optimizer={"state": {}}), "param_groups"),
        (lambda c: c["optimizer"]["state"][0].update(exp_avg=torch.zeros(3, 3)), "[3, 3]"),
        (lambda c: c.pop("rng"), "lacks rng"),
        (lambda c: c.update(rng=[{"torch": 5}]), "incomplete"),
        (lambda c: c.update(epoch="later"), "epoch or step"),
        (lambda c: c.update(epoch=-1), "epoch or step"),
        (lambda c: c.update(progress={"nonsense": 1}), "nonsense"),
        (lambda c: c.update(sums=None), "incomplete"),
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
