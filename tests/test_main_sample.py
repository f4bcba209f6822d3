"""main_sample.py: what it measures, what it draws, what it refuses."""

import json
import pickle
from argparse import Namespace

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from torch import nn

import main_sample
from augment.batch import normalize
from models.noprop_mae import NoPropMAE
from util.data.datasets import read_split
from util.errors import UserError
from util.probe.frechet import EncoderFeatures, InceptionFeatures, find_inception, frechet_metric, load_inception
from util.probe.frozen import load_noprop
from util.probe.sampling import Study, mean_visible_patch

MEAN, STD = (0.3053,), (0.3761,)
CPU = torch.device("cpu")


def tiny_net() -> NoPropMAE:
    torch.manual_seed(0)
    return NoPropMAE(
        img_size=8,
        patch_size=2,
        in_chans=1,
        embed_dim=12,
        depth=2,
        num_heads=3,
        decoder_embed_dim=12,
        decoder_depth=1,
        decoder_num_heads=3,
        T=3,
    ).eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A pretraining checkpoint for digits, of an untrained network."""
    path = tmp_path_factory.mktemp("pretrained") / "checkpoint-last.pth"
    net = tiny_net()
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
    # 3 rows of 96 pixels; original, masked, 3 steps, final; and 8 generated images a row
    width, height = Image.open(folder / "reconstruction_heun.png").size
    assert width > 6 * 96 and 3 * 96 < height < 4.5 * 96
    width, height = Image.open(folder / "generated_euler.png").size
    assert 8 * 96 < width < 9 * 96 and 3 * 96 < height < 3.5 * 96
    assert log["epoch"] == 3 and log["mask_ratio"] == 0.5
    assert f"{log['psnr_mean_visible_patch']:9.4g} |" in report
    assert 0 < log["frechet_other_real_images"] < log["frechet_generated_stochastic"]
    assert "on this encoder's own features" in out and "not comparable to published FIDs" in out
    assert "mask ratios up to 0.5; generating (ratio 1) is new to it" in out


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
    args = main_sample.get_args_parser().parse_args([str(checkpoint), "--images", str(one), str(folder)])
    data, others, name = main_sample.read_images(args, 1)
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


class Batches:
    """What a Loader gives: `images` in batches of 4."""

    def __init__(self, images: torch.Tensor):
        self.images = images

    def epoch(self):
        return (Namespace(images=part) for part in self.images.split(4))


def test_psnr_is_that_of_a_plain_loop_over_hidden_pixels(tmp_path):
    images = normalize(read_split("digits", ".", "val").images[:7], MEAN, STD)
    study = Study(tiny_net(), list(MEAN), list(STD), 0.75, ["euler"], seed=3)
    scores = study.reconstruct(Batches(images), 2, str(tmp_path / "{}.png"))
    errors = {"mean colour": [], "mean visible patch": [], "euler": []}

    def patch(picture: torch.Tensor, i: int) -> np.ndarray:
        row, column = 2 * (i // 4), 2 * (i % 4)
        return (picture[0, row : row + 2, column : column + 2].double().numpy() * STD[0] + MEAN[0]).clip(0, 1)

    for step, batch in enumerate(images.split(4)):
        out, (keep, hide) = study.hide_and_sample(batch, step, "euler")
        for image, final, kept, hidden in zip(batch, out["final"], keep.tolist(), hide.tolist()):
            assert (len(kept), len(hidden)) == (4, 12)
            visible = np.mean([patch(image, i) for i in kept], axis=0)
            for i in hidden:
                errors["mean colour"].append((patch(image, i) - MEAN[0]) ** 2)
                errors["mean visible patch"].append((patch(image, i) - visible) ** 2)
                errors["euler"].append((patch(image, i) - patch(final, i)) ** 2)
    for name, squared in errors.items():
        assert scores[name] == pytest.approx(-10 * np.log10(np.mean(squared)), abs=1e-3)


def test_every_sampler_gets_the_same_masks_and_the_baseline_keeps_what_is_visible():
    net, images = tiny_net(), torch.randn(5, 1, 8, 8)
    study = Study(net, list(MEAN), list(STD), 0.75, [], seed=3)
    (a, ids), (b, _) = (study.hide_and_sample(images, 2, sampler) for sampler in ("heun", "stochastic"))
    assert torch.equal(a["mask"], b["mask"]) and not torch.equal(a["final"], b["final"])
    assert not torch.equal(a["mask"], study.hide_and_sample(images, 3, "heun")[0]["mask"])
    assert torch.equal(
        net.patchify(mean_visible_patch(net, images, ids))[a["mask"] == 0], net.patchify(images)[a["mask"] == 0]
    )
    nothing = Study(net, list(MEAN), list(STD), 1.0, []).hide_and_sample(images, 0, "heun")[1]
    assert torch.equal(mean_visible_patch(net, images, nothing), torch.zeros_like(images))


def of_moments(n: int, mean: np.ndarray, covariance: np.ndarray, seed: int) -> torch.Tensor:
    """n points whose sample mean and covariance are exactly these."""
    x = np.random.default_rng(seed).normal(size=(n, len(mean)))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    return torch.from_numpy(x @ np.linalg.cholesky(covariance).T + mean)


def test_frechet_distance_of_gaussians_is_the_closed_form():
    features = nn.Identity()
    features.num_features = 3
    mean, deviation = np.array([[0.0, 1.0, -2.0], [0.5, 1.0, 1.0]]), np.array([[1.0, 2.0, 0.5], [3.0, 0.1, 0.5]])
    metric = frechet_metric(features, CPU)
    metric.update(of_moments(50, mean[0], np.diag(deviation[0] ** 2), 0), real=True)
    metric.update(of_moments(80, mean[1], np.diag(deviation[1] ** 2), 1), real=False)
    # Axis by axis, Gaussians differ by (m1 - m2)^2 + (s1 - s2)^2.
    assert metric.compute().item() == pytest.approx(
        ((mean[0] - mean[1]) ** 2 + (deviation[0] - deviation[1]) ** 2).sum()
    )

    metric.reset()  # keeps the first set
    mixing = np.random.default_rng(2).normal(size=(3, 3))
    covariance = mixing @ mixing.T
    metric.update(of_moments(40, mean[1], covariance, 3), real=False)
    first = np.diag(deviation[0] ** 2)
    root = scipy.linalg.sqrtm(first @ covariance).real
    expected = ((mean[0] - mean[1]) ** 2).sum() + np.trace(first + covariance - 2 * root)
    assert metric.compute().item() == pytest.approx(expected, rel=1e-6)


def test_the_encoders_own_features_are_the_mean_of_its_tokens():
    net, images = tiny_net(), read_split("digits", ".", "val").images[:6]
    features = EncoderFeatures(net, MEAN, STD)
    with torch.no_grad():
        tokens = net.encode(normalize(images, MEAN, STD), torch.arange(16).expand(6, -1))
    assert features.num_features == 12
    torch.testing.assert_close(features(images), tokens[:, 1:].mean(dim=1))


def test_inception_weights_are_read_never_executed(monkeypatch, tmp_path):
    from torch_fidelity import feature_extractor_inceptionv3 as fidelity

    with monkeypatch.context() as patch:  # its network with random weights; the constructor insists on a file
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *args: None)
        state = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).state_dict()
    torch.save(state, tmp_path / "inception.pth")
    features = load_inception(find_inception(str(tmp_path / "inception.pth")))
    grey = torch.randint(0, 256, (1, 1, 9, 9), dtype=torch.uint8)
    assert isinstance(features, InceptionFeatures) and features(grey).shape == (1, 2048)
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"x": pytest.main}, protocol=2))
    for name, message in (("other", "not torch-fidelity's Inception"), ("evil", "evil.pth"), ("none", "no such file")):
        with pytest.raises(UserError, match=message):
            load_inception(find_inception(str(tmp_path / f"{name}.pth")))

    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(fidelity, "load_state_dict_from_url", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert find_inception(None) is None  # nothing at hand: the encoder's features serve
    with pytest.raises(UserError, match="download: failed"):
        load_inception(find_inception("download"))


def test_files_without_decoders_are_refused(checkpoint, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    meta, state = content["meta"], content["model"]
    encoder = {k: v for k, v in state.items() if not k.startswith("decoders.")}
    classifier = {k: v for k, v in meta.items() if k not in ("noprop", "kind")} | {
        "kind": "classifier",
        "classes": ["a"],
        "num_classes": 1,
    }
    torch.save({"model": encoder}, tmp_path / "mae.pth")
    for path, message in (
        (change(checkpoint, tmp_path / "classifier.pth", meta=classifier), "a classifier checkpoint, without decoders"),
        (change(checkpoint, tmp_path / "encoder.pth", model=encoder), "a pretrain checkpoint, without decoders"),
        (str(tmp_path / "mae.pth"), "weights of another origin, without decoders"),
        (str(tmp_path / "nothing.pth"), "no such checkpoint file"),
    ):
        with pytest.raises(UserError, match=message):
            load_noprop(path)
    half = {k: v for k, v in state.items() if not k.startswith("decoders.1.")}
    with pytest.raises(UserError, match="another model"):
        load_noprop(change(checkpoint, tmp_path / "half.pth", model=half))


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
