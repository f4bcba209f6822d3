"""Frozen features, k-NN and the linear probe."""

import json
import os
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import main_linprobe
from augment.batch import BatchTransform
from bench.ranks import Ranks
from models import create_model
from models.noprop_mae import NoPropMAE
from util.cli.parser import run_main
from util.data.datasets import ArrayDataset, read_split
from util.data.loader import Loader
from util.dist import Precision, World, init_world
from util.errors import UserError
from util.probe import classify, features
from util.probe.classify import choose_l2, knn_predict, linear_probe
from util.probe.features import extract, gather_rows, pooled_features
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


def options(*line: str):
    args = main_linprobe.get_args_parser().parse_args(line)
    main_linprobe.check_linprobe_options(args)
    args.dataset = args.dataset or "digits"
    return args


def encoder(*line: str):
    args = options(*line)
    return load_encoder(args, ["a", "b"], read_content(args.finetune))


def test_knn_equals_a_plain_loop_in_float64(monkeypatch):
    bank, queries, labels = randn(83, 5).numpy(), randn(31, 5, seed=1).numpy(), np.arange(83) % 4
    expected = []
    for q in queries.astype(np.float64):
        similarity = [q @ b / np.linalg.norm(q) / np.linalg.norm(b) for b in bank.astype(np.float64)]
        votes = np.zeros(4)
        for i in np.argsort(similarity)[::-1][:20]:
            votes[labels[i]] += np.exp(similarity[i] / 0.07)
        expected.append(votes.argmax())
    monkeypatch.setattr(features, "ELEMENTS", 83 * 7)  # chunks of 7 queries
    tensors = [torch.from_numpy(x) for x in (bank, labels, queries)]
    assert knn_predict(*tensors, 4).tolist() == expected
    assert len(set(expected)) > 1


def test_knn_at_a_tiny_temperature_is_the_nearest_neighbour():
    bank, queries, labels = randn(50, 6), randn(20, 6, seed=1), torch.arange(50)
    unit = [x / x.norm(dim=1, keepdim=True) for x in (bank, queries)]
    nearest = torch.cdist(unit[1], unit[0]).argmin(dim=1)
    assert torch.equal(knn_predict(bank, labels, queries, 50, k=20, temperature=1e-4), nearest)


def test_linear_probe_reaches_the_optimum_that_scikit_learn_finds(monkeypatch):
    x = (
        randn(300, 12) @ torch.diag(10.0 ** torch.linspace(-3, 2, 12)) @ randn(12, 12, seed=1) + 5.0
    )  # badly conditioned
    y = (x @ randn(12, 3, seed=2) + 20 * randn(300, 3, seed=3)).argmax(dim=1)
    monkeypatch.setattr(features, "ELEMENTS", 3 * 70)  # sums over chunks of 70 rows
    for l2 in (1e-2, 1e-4):
        with torch.no_grad():
            ours = linear_probe(x, y, 3, l2)(x).softmax(dim=1).numpy()
        scaled = StandardScaler().fit_transform(x.double().numpy())
        theirs = LogisticRegression(C=1.0 / (300 * l2), tol=1e-8, max_iter=10000).fit(scaled, y.numpy())
        assert np.abs(ours - theirs.predict_proba(scaled)).max() < 5e-3


def test_linear_probe_separates_what_is_separable_whatever_the_scale():
    y = torch.arange(200) % 4
    x = torch.nn.functional.one_hot(y, 4).float() + 0.1 * randn(200, 4)
    x = torch.cat([x * 1e-3 + 7.0, 1e3 * randn(200, 4, seed=1), torch.ones(200, 1)], dim=1)  # noise, and a constant
    assert torch.equal(linear_probe(x, y, 4, 1e-4)(x).argmax(dim=1), y)


def test_noise_gets_a_stronger_penalty_than_signal():
    y = torch.arange(400) % 2
    signal = torch.where(y == 1, 1.0, -1.0)[:, None] + 0.05 * randn(400, 20)
    assert choose_l2(randn(400, 20, seed=1), y, 2) == max(classify.L2)
    assert choose_l2(signal, y, 2) == min(classify.L2)


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


def test_ranks_share_the_images_and_together_have_all_of_them(pretrained):
    path, _ = pretrained
    model, _, pool = encoder("--checkpoint", path)
    images = torch.randint(0, 256, (7, 1, 8, 16), dtype=torch.uint8)
    data = ArrayDataset(images, torch.arange(7), [str(i) for i in range(7)])

    def of(world):
        loader = Loader(data, batch_transform=BatchTransform((0.3,), (0.4,)), batch_size=2, train=False, world=world)
        return extract(model, loader, Precision("off", world.device), world, pool)

    whole, targets = of(World())
    assert targets.tolist() == list(range(7))
    shares = [of(World(rank, 3)) for rank in range(3)]  # without a process group, a rank keeps to its own
    assert sorted(t for _, targets in shares for t in targets.tolist()) == list(range(7))
    for z, targets in shares:
        torch.testing.assert_close(z, whole[targets])


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


def test_two_ranks_score_as_one(tmp_path, capsys):
    one, two = tmp_path / "one", tmp_path / "two"
    line = [
        "--model",
        "vit_custom_patch2",
        "--random_init",
        "--model_kwargs",
        *[f"{k}={v}" for k, v in KEYWORDS.items()],
        "--dataset",
        "digits",
        "--device",
        "cpu",
        "--amp",
        "off",
    ]
    assert main_linprobe.main([*line, "--output_dir", str(one)]) == 0
    out = capsys.readouterr().out
    result = json.loads((one / "log.txt").read_text())
    assert f"k-NN accuracy (k 20, temperature 0.07): {result['knn_acc1']:.2f}%" in out
    assert f"linear probe accuracy: {result['linear_acc1']:.2f}%" in out
    assert (result["n_train"], result["n_val"], result["feature_dim"]) == (1437, 360, 24)
    assert min(result["linear_acc1"], result["knn_acc1"]) > 20.0  # chance is 10
    assert Ranks(2, lambda: main_linprobe.main([*line, "--output_dir", str(two)])).exit_codes() == [0, 0]
    other = json.loads((two / "log.txt").read_text())
    for key in ("knn_acc1", "linear_acc1", "linear_l2"):
        assert other[key] == pytest.approx(result[key], abs=0.3)
    report, right = (two / "report.md").read_text(), round(3.6 * other["linear_acc1"])
    low, high = (100 * p for p in wilson(right, 360))
    assert "| linear probe |" in report
    assert f"{right} of 360 images are right: 95 % interval {low:.1f} to {high:.1f} % (Wilson)" in report


def test_training_images_of_which_one_class_is_readable_are_one_line(tmp_path):
    for i, name in enumerate(("red", "blue")):
        for split, n in (("train", 3), ("val", 1)):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for j in range(n):
                Image.new("RGB", (9, 9), name).save(folder / f"{j}.png")
                if split == "train" and i:
                    (folder / f"{j}.png").write_bytes(b"")
    line = [
        "--model",
        "vit_custom_patch2",
        "--random_init",
        "--model_kwargs",
        *[f"{k}={v}" for k, v in KEYWORDS.items()],
        "--data_path",
        str(tmp_path),
        "--input_size",
        "8",
        "--device",
        "cpu",
        "--num_workers",
        "0",
    ]
    with pytest.raises(UserError, match="its 3 readable training images are of one class"):
        main_linprobe.main([*line, "--on_bad_image", "skip"])


def wilson(right: int, n: int) -> np.ndarray:
    """Where |p - right / n| is 1.96 standard errors of p: the roots of a quadratic (Wilson 1927)."""
    z2, p = 1.959963984540054**2, right / n
    return np.sort(np.roots([1 + z2 / n, -2 * p - z2 / n, p * p]))


def test_rank_0_alone_gets_the_rows_of_all_ranks_in_order(monkeypatch):
    """Of 11 images on 3 ranks; number 4 could not be read, and rank 2 has seen none."""
    monkeypatch.setattr(features, "ELEMENTS", 10)  # pieces of 2 rows of 5 numbers
    whole = torch.randn(11, 5, generator=torch.Generator().manual_seed(0))
    readable = {0: [0, 3, 6, 9], 1: [1, 7, 10], 2: []}

    def call() -> int:
        world = init_world("cpu", timeout_minutes=1)
        index = torch.tensor(readable[world.rank], dtype=torch.long)
        rows = whole[index] if len(index) else torch.empty(0, 0)
        got, where = gather_rows(rows, index)
        expected = [0, 1, 3, 6, 7, 9, 10] if world.is_main else readable[world.rank]
        assert where.tolist() == expected
        assert torch.equal(got, whole[where]) if expected else len(got) == 0
        return 0

    assert Ranks(3, call).exit_codes() == [0, 0, 0]


def test_a_rank_whose_features_are_not_finite_ends_all_in_one_line(tmp_path, monkeypatch):
    real = features.pooled_features

    def broken_on_rank_1(model, images, pool):
        return real(model, images, pool) * (float("nan") if os.environ.get("RANK") == "1" else 1.0)

    monkeypatch.setattr(features, "pooled_features", broken_on_rank_1)
    line = [
        "--model",
        "vit_custom_patch4",
        "--random_init",
        "--model_kwargs",
        "embed_dim=12",
        "depth=1",
        "num_heads=2",
        "--dataset",
        "digits",
        "--device",
        "cpu",
        "--amp",
        "off",
    ]

    def call() -> None:
        run_main(lambda: main_linprobe.main(line))

    assert Ranks(2, call, tmp_path / "said.txt").exit_codes() == [2, 2]
    said = (tmp_path / "said.txt").read_text()
    assert said.count("NaN or infinite") == 2 and "another rank" not in said, said


def test_the_checkpoint_names_its_data_set():
    from util.probe.frozen import resolve_data

    content = {"meta": {"dataset": "fashion-mnist"}, "args": {"data_path": "/"}}
    for given, expected in (
        (dict(dataset=None, data_path=None), ("fashion-mnist", "/")),
        (dict(dataset="digits", data_path=None), ("digits", ".")),
        (dict(dataset="cifar10", data_path=None), ("cifar10", "data")),
        (dict(dataset=None, data_path="x"), ("fashion-mnist", "x")),
    ):
        args = Namespace(**given)
        resolve_data(args, content)
        assert (args.dataset, args.data_path) == expected
    assert len(read_split("digits", ".", "val")) == 360
