"""Encoders from the files that a probe may be given."""

import pytest
import torch

from augment.batch import BatchTransform
from models import create_model
from models.noprop_mae import NoPropMAE
from util.cli.linprobe import LinprobeOptions, get_options
from util.cli.resolve import resolve_data
from util.data.datasets import ArrayDataset, read_split
from util.data.loader import Loader
from util.dist import Precision, World
from util.errors import UserError
from util.probe.features import extract, pooled_features
from util.probe.frozen import load_encoder, read_content

KEYWORDS = dict(embed_dim=24, depth=2, num_heads=3, mlp_ratio=2.0)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """(path of a NoProp-MAE checkpoint for 8 x 16 grey images, its network). Every weight is drawn at random."""
    net = NoPropMAE(img_size=(8, 16), patch_size=4, in_chans=1, **KEYWORDS, decoder_embed_dim=12, decoder_depth=1, T=2)
    for i, p in enumerate(net.parameters()):
        p.data = 0.3 * randn(*p.shape, seed=i)
    path = tmp_path_factory.mktemp("pretrained") / "checkpoint-last.pth"
    meta = {
        "kind": "pretrain",
        "model": "vit_custom_patch4",
        "model_kwargs": KEYWORDS,
        "global_pool": True,
        "img_size": [8, 16],
        "in_chans": 1,
        "num_classes": 0,
        "mean": [0.3],
        "std": [0.4],
        "dataset": "digits",
        "noprop": net.config(),
    }
    torch.save({"format": 1, "kind": "pretrain", "meta": meta, "epoch": 3, "args": {}, "model": net.state_dict()}, path)
    return str(path), net.eval()


def encoder(*line: str):
    options = get_options(["--dataset", "digits", *line])
    return load_encoder(options, ["a", "b"], read_content(options.model.finetune))[:3]


def test_features_of_a_pretraining_checkpoint_are_the_encoders_with_nothing_masked(pretrained):
    path, net = pretrained
    images = randn(5, 1, 8, 16)
    with torch.no_grad():
        tokens = net.encode(images, torch.arange(8).expand(5, -1))
    for flags, expected in (((), tokens[:, 1:].mean(dim=1)), (("--cls_token",), tokens[:, 0])):
        model, meta, pool = encoder("--checkpoint", path, *flags)
        torch.testing.assert_close(pooled_features(model, images, pool), expected, rtol=1e-4, atol=1e-5)
    assert (meta["img_size"], meta["in_chans"], meta["mean"], meta["std"]) == ([8, 16], 1, [0.3], [0.4])


def test_the_untrained_encoder_starts_as_pretraining_does(pretrained):
    path, net = pretrained
    model, _, pool = encoder("--checkpoint", path, "--random_init", "--seed", "5")
    again, _, _ = encoder("--checkpoint", path, "--random_init", "--seed", "5")
    assert torch.equal(model.pos_embed, NoPropMAE(**net.config()).pos_embed)  # sines and cosines, not learned noise
    assert pool == "mean" and torch.equal(model.blocks[1].attn.qkv.weight, again.blocks[1].attn.qkv.weight)
    bound = (6 / (24 + 72)) ** 0.5  # xavier_uniform
    assert 0.9 * bound < model.blocks[1].attn.qkv.weight.abs().max() <= bound


@pytest.mark.parametrize("global_pool", [True, False])
def test_features_of_a_classifier_are_what_its_head_reads(tmp_path, global_pool):
    model = create_model(
        "vit_custom_patch4", num_classes=2, img_size=8, in_chans=1, global_pool=global_pool, **KEYWORDS
    )
    for i, p in enumerate(model.parameters()):
        p.data = 0.3 * randn(*p.shape, seed=i)
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    sizes = [f"{k}={v}" for k, v in KEYWORDS.items()]
    line = ("--finetune", str(tmp_path / "weights.pth"), "--model", "vit_custom_patch4", "--model_kwargs", *sizes)
    found, _, pool = encoder(*line, "--in_chans", "1")
    images = randn(3, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(model.head(pooled_features(found, images, pool)), model.eval()(images))


def test_encoders_that_cannot_be_probed_are_refused_in_one_line(pretrained, tmp_path):
    path, net = pretrained
    state = {k: v for k, v in net.state_dict().items() if not k.startswith("blocks.1.")}
    torch.save({"model": state}, tmp_path / "half.pth")
    sizes = [f"{k}={v}" for k, v in KEYWORDS.items()]
    half = ("--finetune", str(tmp_path / "half.pth"), "--model", "vit_custom_patch4", "--model_kwargs", *sizes)
    for line, message in (
        ((), "--checkpoint: give one"),
        (("--model", "vit_tiny_patch4"), "needs weights"),
        (("--checkpoint", path, "--pretrained"), "not together"),
        ((*half, "--input_size", "8", "16", "--in_chans", "1"), r"lacks 12 \(blocks.1.norm1.weight"),
    ):
        with pytest.raises(UserError, match=message):
            encoder(*line)
    model, _, _ = encoder("--model", "resnet18", "--random_init", "--in_chans", "1")
    with pytest.raises(UserError, match="--cls_token: ResNet has no class token"):
        pooled_features(model, randn(1, 1, 32, 32), "cls")
    broken = Loader(
        ArrayDataset(torch.zeros(2, 1, 8, 16, dtype=torch.uint8), torch.arange(2), ["a", "b"]),
        batch_size=2,
        batch_transform=BatchTransform((0.3,), (1e-45,)),
        train=False,
        world=World(),
    )
    with pytest.raises(UserError, match="NaN or infinite"):
        extract(encoder("--checkpoint", path)[0], broken, Precision("off", World().device), World(), "mean")


def test_the_checkpoint_names_its_data_set():
    content = {"meta": {"dataset": "fashion-mnist"}, "args": {"data_path": "/"}}
    for given, expected in (
        (dict(dataset=None, data_path=None), ("fashion-mnist", "/")),
        (dict(dataset="digits", data_path=None), ("digits", ".")),
        (dict(dataset="cifar10", data_path=None), ("cifar10", "data")),
        (dict(dataset=None, data_path="x"), ("fashion-mnist", "x")),
    ):
        data = resolve_data(LinprobeOptions.of(**given), content).data
        assert (data.dataset, data.data_path) == expected
    assert len(read_split("digits", ".", "val")) == 360
