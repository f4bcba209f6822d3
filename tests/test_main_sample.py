"""main_sample.py: what it measures, what it draws, what it refuses."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import main_sample
from tests.harness.checks import undocumented
from tests.harness.noprop import MEAN, STD, tiny_net
from util.errors import UserError
from util.probe.frozen import load_noprop


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A pretraining checkpoint for digits, of an untrained network."""
    path = tmp_path_factory.mktemp("pretrained") / "checkpoint-last.pth"
    net = tiny_net(img_size=8)
    meta = {
        "kind": "pretrain",
        "model": "vit_custom_patch2",
        "img_size": [8, 8],
        "in_chans": 1,
        "num_classes": 0,
        "model_kwargs": dict(embed_dim=12, depth=2, num_heads=3, mlp_ratio=4.0),
        "global_pool": True,
        "mean": list(MEAN),
        "std": list(STD),
        "dataset": "digits",
        "noprop": net.config(),
    }
    options = {"mask_ratio": 0.5, "mask_ratio_max": None, "data_path": "."}
    state = net.state_dict()
    torch.save({"format": 1, "kind": "pretrain", "meta": meta, "args": options, "epoch": 3, "model": state}, path)
    return path


def change(path, to, **changes) -> str:
    torch.save({**torch.load(path, weights_only=True), **changes}, to)
    return str(to)


def test_every_mode_leaves_its_pictures_and_numbers(checkpoint, capsys):
    modes = ["reconstruct", "generate", "attention", "frechet"]
    line = [str(checkpoint), "--mode", *modes, "--num", "3", "--num_samples", "40", "--device", "cpu"]
    assert main_sample.main(line) == 0
    out, folder = capsys.readouterr().out, checkpoint.parent / "samples"
    report, log = (folder / "report.md").read_text(), json.loads((folder / "log.txt").read_text())
    pictures = [f"{kind}_{s}.png" for kind in ("reconstruction", "generated") for s in ("stochastic", "heun", "euler")]
    for name in [*pictures, "attention_heads.png", "attention_blocks.png"]:
        assert f"({name})" in report and name in out
        assert len(np.unique(np.asarray(Image.open(folder / name)))) > 20
    assert not undocumented(folder)
    # 3 rows of 96 pixels; original, masked, 3 steps, final; and 8 generated images a row
    width, height = Image.open(folder / "reconstruction_heun.png").size
    assert width > 6 * 96 and 3 * 96 < height < 4.5 * 96
    width, height = Image.open(folder / "generated_euler.png").size
    assert 8 * 96 < width < 9 * 96 and 3 * 96 < height < 3.5 * 96
    assert log["epoch"] == 3 and log["mask_ratio"] == 0.5
    assert f"| {log['psnr_mean_visible_patch']:.4g} |" in report
    assert 0 < log["frechet_other_real_images"] < log["frechet_generated_stochastic"]
    assert "on this encoder's own features" in out and "not comparable to published FIDs" in out
    assert "mask ratios up to 0.5; it has not learned to generate (ratio 1)" in out


def test_the_seed_decides_every_pixel(checkpoint, tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        line = [str(checkpoint), "--mode", "reconstruct", "generate", "--num", "2", "--sampler", "stochastic"]
        main_sample.main(
            [*line, "--num_samples", "5", "--seed", seed, "--output_dir", str(tmp_path / name), "--device", "cpu"]
        )
    for picture in ("reconstruction_stochastic.png", "generated_stochastic.png"):
        a, b, c = ((tmp_path / name / picture).read_bytes() for name in "abc")
        assert a == b != c


def test_given_images_are_read_whole_and_in_their_order(checkpoint, photo_folder, tmp_path):
    one, folder = photo_folder / "train" / "blue" / "blue_03.png", photo_folder / "val"
    options = main_sample.get_options([str(checkpoint), "--images", str(one), str(folder)])
    data, others, name = main_sample.read_images(options.sampling, options.data, 0)
    assert data.paths == [str(one), *(str(p) for p in sorted(folder.rglob("*.png")))]
    assert (others, name) == (None, "given images")
    line = [
        str(checkpoint),
        "--images",
        str(one),
        "--sampler",
        "euler",
        "--output_dir",
        str(tmp_path),
        "--num_workers",
        "0",
    ]
    assert main_sample.main([*line, "--device", "cpu"]) == 0
    # 32 x 40 pixels: the centre square, resized, is the leftmost picture, in grey.
    grid = np.asarray(Image.open(tmp_path / "reconstruction_euler.png").convert("RGB")).astype(int)
    photo = Image.open(one).convert("L").resize((10, 8), Image.Resampling.BICUBIC).crop((1, 0, 9, 8))
    found = grid[34 : 34 + 96 : 12, 10 : 10 + 96 : 12][:8, :8]
    assert (found.max(-1) == found.min(-1)).all()
    assert np.abs(found[..., 0] - np.asarray(photo).astype(int)).max() <= 1


def test_files_without_decoders_are_refused(checkpoint, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    meta, state = content["meta"], content["model"]
    encoder = {k: v for k, v in state.items() if not k.startswith("decoders.")}
    classifier = {k: v for k, v in meta.items() if k not in ("noprop", "kind")} | {
        "kind": "finetune",
        "classes": ["a"],
        "num_classes": 1,
    }
    torch.save({"model": encoder}, tmp_path / "mae.pth")
    for path, message in (
        (change(checkpoint, tmp_path / "classifier.pth", meta=classifier), "a finetune checkpoint, without decoders"),
        (change(checkpoint, tmp_path / "encoder.pth", model=encoder), "a pretrain checkpoint, without decoders"),
        (str(tmp_path / "mae.pth"), "weights from elsewhere, without decoders"),
        (str(tmp_path / "nothing.pth"), "no such checkpoint file"),
    ):
        with pytest.raises(UserError, match=message):
            load_noprop(path)
    half = {k: v for k, v in state.items() if not k.startswith("decoders.1.")}
    with pytest.raises(UserError, match="another model"):
        load_noprop(change(checkpoint, tmp_path / "half.pth", model=half))


@pytest.mark.slow
def test_mistakes_end_in_one_line(run, checkpoint, photo_folder, tmp_path, monkeypatch):
    torch.save({"model": {"cls_token": torch.zeros(1, 1, 8)}}, tmp_path / "mae_pretrain_vit_base.pth")
    result = run("main_sample.py", tmp_path / "mae_pretrain_vit_base.pth", "--mode", "generate", check=2)
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr
    assert "main_pretrain_noprop.py" in result.stderr
    image = str(next((photo_folder / "val" / "red").iterdir()))
    for flags, message in (
        (["--images", str(tmp_path / "none.png")], "none.png: no such file or folder"),
        (["--images", image, "--mode", "frechet"], "--mode frechet: needs several images"),
        (["--mask_ratio", "1.5"], "--mask_ratio: '1.5' should be"),
        (["--sampler", "ddim"], "--sampler"),
    ):
        with pytest.raises(UserError, match=message):
            main_sample.main([str(checkpoint), *flags, "--output_dir", str(tmp_path), "--num_workers", "0"])
    with pytest.raises(UserError, match="holds a training run, which would be lost; choose another folder"):
        main_sample.main([str(checkpoint), "--output_dir", str(checkpoint.parent)])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process"):
        main_sample.main([str(checkpoint)])
