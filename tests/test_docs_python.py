"""docs/python.md: its blocks run, and give what the scripts give."""

import importlib.util
import json
import re

import pytest
import torch
from PIL import Image

from models.noprop_mae import NoPropMAE
from tests.harness import ROOT
from tests.harness.noprop import tiny_net
from tests.harness.prediction import predict, read_csv, values
from tests.harness.runs import VIT, save_member

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text("utf-8"), re.DOTALL)
CLASSIFIER, ENCODER, LOG = BLOCKS


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(block: str) -> dict:
    names: dict = {}
    exec(compile(block, "docs/python.md", "exec"), names)
    return names


def test_a_loaded_classifier_gives_the_probabilities_of_main_predict(folder, capsys):
    torch.manual_seed(0)
    Image.fromarray(torch.randint(0, 256, (70, 50, 3), dtype=torch.uint8).numpy()).save("photo.jpg")
    save_member(
        folder / "out" / "checkpoint-best.pth", VIT, classes=("blue", "green", "red"), size=(32, 40), crop_pct=0.8
    )
    names = run(CLASSIFIER)
    assert predict("--checkpoints", "out", "--data_path", folder, "--views", 1, "--output_dir", "predictions") == 0
    header, rows = read_csv(folder / "predictions")
    assert header[2:] == list(names["meta"]["classes"]) == ["blue", "green", "red"]
    assert names["p"].tolist() == pytest.approx(list(values(rows, "photo.jpg")), abs=1e-5)
    assert re.findall(r"(?m)^(\w+): [\d.]+%$", capsys.readouterr().out)[:3] == ["blue", "green", "red"]


def test_the_encoder_in_timm_computes_what_was_pretrained(folder):
    net = tiny_net()
    config = net.config()
    keywords = {k: config[k] for k in ("embed_dim", "depth", "num_heads", "mlp_ratio")}
    meta = {"noprop": config, "img_size": config["img_size"], "in_chans": config["in_chans"], "model_kwargs": keywords}
    path = folder / "output" / "mae_cifar10_noprop" / "checkpoint-last.pth"
    path.parent.mkdir(parents=True)
    torch.save({"meta": meta, "model": net.state_dict()}, path)
    encoder = run(ENCODER)["encoder"]
    images = torch.randn(2, config["in_chans"], *config["img_size"])
    with torch.no_grad():
        every_patch = torch.arange(net.num_patches).expand(2, -1)
        expected = NoPropMAE.encode(net.eval(), images, every_patch)
        torch.testing.assert_close(encoder.forward_features(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("pandas") is None, reason="pandas is not installed")
def test_log_txt_is_read_by_pandas(folder):
    (folder / "out").mkdir()
    lines = [{"epoch": e, "train_loss": 2.0 - e, "val_loss": 1.0, "val_acc1": 50.0 + e} for e in range(2)]
    (folder / "out" / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
    log = run(LOG)["log"]
    assert list(log.index) == [0, 1] and list(log["train_loss"]) == [2.0, 1.0] and log["val_acc1"][1] == 51.0
