"""The kinds of noise: each against its formula, and its ratio of signal to noise in networks of six families."""

import json
import math
import re

import numpy as np
import pytest
import torch
from scipy import stats

import main_finetune
from augment.alpha_blend import AlphaBlend, alphas_cumprod, decibel
from augment.noise import Layout, spectrum
from models import create_model
from models.vit import enable_grad_checkpointing, noise_for_a_while
from tests.harness.checks import assert_same_run
from tests.harness.runs import NET, copy_first_epoch, finetune
from util.checkpoint import peek
from util.choices import COLOURS, NOISE_KINDS
from util.cli.finetune import get_options
from util.errors import UserError
from util.log import read_log

RATIO = [k for k in NOISE_KINDS if k not in ("token_drop", "manifold_mixup")]
FAMILIES = {  # name, image (height, width), keywords
    "mae's vit": ("vit_custom_patch4", (24, 40), dict(embed_dim=48, depth=2, num_heads=3)),
    "deit, two prefix tokens": ("deit_tiny_distilled_patch16_224", (96, 64), dict(depth=1)),
    "swin": ("swinv2_tiny_window8_256", (64, 128), dict(depths=(1, 1, 1, 1))),
    "convnext": ("convnext_atto", (64, 96), {}),
    "efficientnet": ("efficientnet_lite0", (64, 96), {}),
    "eva, rotary positions": ("eva02_tiny_patch14_224", (70, 42), dict(depth=1)),
}


def kind(name: str, **config) -> AlphaBlend:
    own = {"token_drop": 0.3, "manifold_mixup": 2.0}.get(name)
    strength = {"strength": own} if own else {} if "timestep" in config or "snr" in config else {"snr": 10.0}
    return AlphaBlend(kind=name, **{**strength, **config}).train()


def embeddings(B=4, N=50, D=5000, seed=0):
    """About a million numbers, none of them 0, of another size in each sample."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(B, N, D, generator=g)
    return (z + 0.1 * z.sign()) * torch.tensor([0.2, 1.0, 3.0, 7.0]).view(B, 1, 1)


def is_drawn_from(values: torch.Tensor, law) -> None:
    x = values.flatten().double().numpy()
    assert len(x) >= 1_000_000
    assert x.mean() == pytest.approx(law.mean(), abs=5 * law.std() / len(x) ** 0.5)
    assert x.var() == pytest.approx(law.var(), rel=0.01)
    assert stats.kstest(x, law.cdf).pvalue > 1e-3


NORMAL, FLAT = stats.norm(), stats.uniform(-1, 2)


@pytest.mark.parametrize("units", ["absolute", "relative"])
@pytest.mark.parametrize("name", ["alpha_blend", "additive", "multiplicative", "uniform", "neftune"])
def test_a_million_draws_follow_the_formula(name, units):
    z = embeddings().double()
    abar = alphas_cumprod()[400].item()
    s = z.square().mean((1, 2), keepdim=True).sqrt() if units == "relative" else 1.0
    sigma = ((1 - abar) / abar) ** 0.5
    torch.manual_seed(7)
    out = kind(name, timestep=400, units=units)(z.float()).double()
    draws = {
        "alpha_blend": lambda: (out - abar**0.5 * z) / ((1 - abar) ** 0.5 * s),
        "additive": lambda: (out - z) / (sigma * s),
        "multiplicative": lambda: (out / z - 1) / sigma,
        "uniform": lambda: (out - z) / (3**0.5 * sigma * s),
        "neftune": lambda: (out - z) / (3**0.5 * sigma * s),
    }[name]()
    is_drawn_from(draws, FLAT if name in ("uniform", "neftune") else NORMAL)


def test_neftune_by_its_own_alpha_is_the_papers():
    z = embeddings()
    torch.manual_seed(3)
    out = kind("neftune", strength=5.0)(z)
    is_drawn_from((out - z) * math.sqrt(50 * 5000) / 5.0, FLAT)
    torch.manual_seed(3)
    assert torch.equal(kind("neftune", strength=5.0)(z[:1]), out[:1]), "a batch of one"


def test_token_drop_keeps_equally_many_tokens_in_order_and_uniformly():
    noise, z = kind("token_drop"), torch.arange(2000.0 * 11).view(2000, 11, 1)
    noise.place(Layout(prefix=1))
    torch.manual_seed(0)
    out = noise(z)
    assert out.shape == (2000, 1 + 7, 1) and torch.equal(out[:, 0], z[:, 0])  # 10 patches, 30 % left out
    number = out[:, 1:, 0] % 11
    assert (number.diff(dim=1) > 0).all()
    counts = torch.bincount(number.long().flatten(), minlength=11)[1:].numpy()
    assert stats.chisquare(counts).pvalue > 1e-3


def test_manifold_mixup_mixes_tokens_and_targets_alike_by_a_beta():
    noise, z = kind("manifold_mixup"), torch.randn(6, 5, 4)
    assert torch.equal(noise(z), z), "no pass is mixed whose targets were not"
    targets, lams = torch.tensor([0, 1, 2, 0, 1, 2]), []
    np.random.seed(0)
    for _ in range(2000):
        mixed = noise.mix_targets(targets, 3, smoothing=0.1)
        lams.append(noise.kind.lam)
    assert stats.kstest(lams, stats.beta(2.0, 2.0).cdf).pvalue > 1e-3
    lam, partners = lams[-1], noise.kind.partners.tolist()
    out = noise(z)
    for i, j in enumerate(partners):
        assert torch.allclose(out[i], lam * z[i] + (1 - lam) * z[j], atol=1e-6)
        for c in range(3):
            smoothed = [0.9 * (targets[k] == c) + 0.1 / 3 for k in (i, j)]
            assert mixed[i, c].item() == pytest.approx(
                lam * float(smoothed[0]) + (1 - lam) * float(smoothed[1]), abs=1e-6
            )
    noise.eval()
    assert torch.equal(noise(z), z)


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("layout", ["tokens", "maps", "channels last"])
def test_coloured_noise_has_its_spectrum_over_the_grid(colour, layout):
    """The mean periodogram, computed with NumPy, follows f^k; its variance is that of white noise."""
    rows, columns, depth = 12, 20, 600
    z = torch.zeros(4, rows * columns, depth) + 1.0
    noise = kind("colour", timestep=500, colour=colour)
    noise.place(Layout(grid=(rows, columns), channels_last=layout == "channels last"))
    if layout == "maps":
        z = torch.ones(4, depth, rows, columns)
    elif layout == "channels last":
        z = torch.ones(4, rows, columns, depth)
    torch.manual_seed(1)
    abar = alphas_cumprod()[500].item()
    eps = ((noise(z) - z) / ((1 - abar) / abar) ** 0.5).numpy()
    assert eps.var() == pytest.approx(1.0, rel=0.02)
    grids = {
        "tokens": lambda: eps.reshape(4, rows, columns, depth).transpose(0, 3, 1, 2),
        "maps": lambda: eps,
        "channels last": lambda: eps.transpose(0, 3, 1, 2),
    }[layout]()
    power = (np.abs(np.fft.fft2(grids)) ** 2).mean((0, 1)) / (rows * columns)
    f = np.hypot(np.fft.fftfreq(rows)[:, None], np.fft.fftfreq(columns)[None])
    f = np.maximum(f, 1 / columns)
    wanted = {"red": 1 / f, "blue": f, "green": ((f > f.max() / 4) & (f <= f.max() / 2)).astype(float)}[colour]
    assert np.allclose(power, wanted / wanted.mean(), rtol=0.15, atol=1e-6)
    assert torch.allclose(
        spectrum(rows, columns, colour, "cpu").square(), torch.tensor(wanted / wanted.mean()).float(), atol=1e-4
    )


@pytest.mark.parametrize("amp", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_ratio_in_every_family_is_the_one_asked_for(family, amp):
    """Measured by the noise itself, and outside of it from what goes into it and comes out of it."""
    name, size, keywords = FAMILIES[family]
    images = torch.rand(16, 3, *size, generator=torch.Generator().manual_seed(0))
    for k in RATIO:
        if k == "colour" and family.startswith("eva"):
            continue
        noise = kind(k, snr=17.0, tokens="patches")
        torch.manual_seed(0)
        net = create_model(name, num_classes=2, img_size=size, alpha_blend=noise, **keywords).train()
        seen = []
        noise.register_forward_hook(lambda _, inputs, out, seen=seen: seen.append((inputs[0], out)))
        noise.measure()
        with torch.autocast("cpu", amp, enabled=amp != torch.float32):
            net(images)
        assert noise.snr() == pytest.approx(17.0, abs=0.1), k
        prefix = noise.layout.prefix if seen[0][0].ndim == 3 else 0
        before, after = (x[:, prefix:].double() for x in seen[0])
        r = 10**1.7
        signal = (r / (1 + r)) ** 0.5 * before if k == "alpha_blend" else before
        ratio = decibel(float((signal.square().mean() / (after - signal).square().mean()).detach()))
        assert ratio == pytest.approx(17.0, abs=0.1 if amp == torch.float32 else 0.3), k


@pytest.mark.parametrize("name", NOISE_KINDS)
def test_a_kind_is_off_in_evaluation_and_keeps_keys_and_class_token(name):
    model, size, keywords = FAMILIES["mae's vit"]
    images = torch.randn(4, 3, *size)
    nets = []
    for noise in (None, kind(name, tokens="patches")):
        torch.manual_seed(0)
        nets.append(create_model(model, num_classes=2, img_size=size, alpha_blend=noise, **keywords))
    plain, noised = nets
    assert list(plain.state_dict()) == list(noised.state_dict())
    assert torch.equal(plain.eval()(images), noised.eval()(images))
    noise, seen = noised.train().alpha_blend, []
    noise.register_forward_hook(lambda _, inputs, out: seen.append((inputs[0], out)))
    if name == "manifold_mixup":
        noise.mix_targets(torch.zeros(4, dtype=torch.long), 2)
    noised(images)
    before, after = seen[0]
    assert torch.equal(before[:, 0], after[:, 0]) and not torch.equal(before[:, 1:], after[:, 1:])


@pytest.mark.parametrize("name", NOISE_KINDS)
def test_gradients_are_equal_under_gradient_checkpointing(name):
    model, size, keywords = FAMILIES["mae's vit"]
    images, gradients = torch.randn(4, 3, *size), []
    for recompute in (False, True):
        torch.manual_seed(0), np.random.seed(0)
        noise = kind(name, schedule="uniform", prob=0.5, layer=(0, 1))
        net = create_model(model, num_classes=2, img_size=size, alpha_blend=noise, **keywords).train()
        if recompute:
            enable_grad_checkpointing(net, model)
        if name == "manifold_mixup":
            noise.mix_targets(torch.zeros(4, dtype=torch.long), 2)
        torch.manual_seed(5)
        net(images).square().sum().backward()
        gradients.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_a_ratio_is_the_timestep_that_has_it_for_schedule_and_annealing():
    """Half of a cosine is half of t; `uniform` draws t from [0, t], at the interpolated logarithm of the ratio."""
    abar = alphas_cumprod().numpy()
    table = 10 * np.log10(abar / (1 - abar))
    noise = AlphaBlend(snr=float(table[300]), schedule="fixed", anneal="cosine", kind="additive").train()
    assert noise.timestep == pytest.approx(300, abs=1e-3)
    z = embeddings()

    def measured() -> float:
        noise.measure()
        noise(z)
        return noise.snr()

    assert measured() == pytest.approx(table[300], abs=0.05)
    noise.set_progress(0.5)
    assert measured() == pytest.approx(table[150], abs=0.05)
    noise.set_progress(1.0)
    assert not noise.active
    drawn = AlphaBlend(snr=float(table[300]), schedule="uniform", kind="additive").train()
    torch.manual_seed(0)
    s = drawn.strength(torch.ones(100_000, 1))
    ratio = 20 * torch.log10(s.signal / s.noise).flatten().double().numpy()
    t = np.interp(-ratio, -table, np.arange(1000))
    assert stats.kstest(t[ratio < table[1]], stats.uniform(1, 299).cdf).pvalue > 1e-3


def test_a_run_logs_the_noise_ratio_and_warns_if_loud(tmp_path, capsys):
    assert finetune(*NET, "--noise_snr", 12, "--noise_kind", "uniform", "--output_dir", tmp_path) == 0
    said = capsys.readouterr().out
    assert "; noise uniform 12 dB; " in said.splitlines()[0] and re.search(r"\nnoise: (11.9|12.[01]) dB", said)
    assert said.count("warning: the noise is loud") == 1 and "--noise_snr" in said
    logged = [line["train_noise_snr"] for line in read_log(str(tmp_path / "log.txt"))]
    assert logged == pytest.approx([12.0] * 3, abs=0.1)
    noted, meta = json.loads((tmp_path / "args.json").read_text())["options"], peek(f"{tmp_path}/checkpoint-last.pth")
    assert noted["noise_snr_measured"] == logged[0] and noted["resolved"] == meta["meta"]
    assert "noise uniform 12 dB" in (tmp_path / "report.md").read_text()


def test_a_resumed_run_has_the_same_noise(tmp_path):
    line = [*NET, "--epochs", 2, "--save_freq", 1, "--noise_kind", "colour", "--noise_snr", 15]
    line += ["--noise_timestep", "uniform", "--noise_anneal", "linear", "--noise_prob", 0.7]
    assert finetune(*line, "--output_dir", tmp_path / "whole") == 0
    (tmp_path / "part").mkdir()
    copy_first_epoch(tmp_path / "whole", tmp_path / "part")
    assert finetune(*line, "--output_dir", tmp_path / "part", "--resume", "auto") == 0
    assert_same_run(tmp_path / "part", tmp_path / "whole")


def test_default_units_follow_the_family_and_batchnorm_gets_no_noise():
    noise, net = get_options(["--dataset", "digits"]).noise, torch.nn.Linear(1, 1)
    for model, units in (
        ("vit_base_patch16", "absolute"),
        ("vit_base_patch16_224", "relative"),
        ("swinv2_t", "relative"),
    ):
        config = main_finetune.build_noise(noise, model, net).config
        assert (config.units, config.timestep, config.snr) == (units, 15, None)
    assert main_finetune.build_noise(noise, "resnet10t", torch.nn.BatchNorm2d(2)) is None
    for flags in ("--alpha_blend 7", "--noise_snr 30"):
        given = get_options(["--dataset", "digits", *flags.split()]).noise
        assert main_finetune.build_noise(given, "resnet10t", torch.nn.BatchNorm2d(2)).config.units == "relative"
    given = get_options(["--dataset", "digits", "--noise_units", "relative"]).noise
    assert main_finetune.build_noise(given, "vit_base_patch16", net).config.units == "relative"


def test_dry_run_prints_the_ratio_at_timesteps_for_this_model_and_data(tmp_path, capsys):
    assert finetune(*NET, "--dry_run", "--output_dir", tmp_path) == 0
    lines = [text.split() for text in capsys.readouterr().out.splitlines()]
    relative = next(words[1:] for words in lines if words[:1] == ["relative"])
    abar = alphas_cumprod()
    expected = [decibel(float(abar[t] / (1 - abar[t]))) for t in (5, 15, 50, 150, 400)]
    assert [float(x) for x in relative] == pytest.approx(expected, abs=0.06)
    absolute = next(words[1:] for words in lines if words[:1] == ["absolute"])
    shift = [float(a) - float(r) for a, r in zip(absolute, relative)]
    rms = float(next(words for words in lines if words[:4] == ["noise:", "root", "mean", "square"])[4])
    assert shift == pytest.approx([20 * math.log10(rms)] * 5, abs=0.15)


@pytest.mark.parametrize(
    "flags,words",
    [
        ("--noise_snr 20 --alpha_blend 15", "--alpha_blend 15: not together with --noise_snr 20"),
        ("--noise_snr nan", "--noise_snr: 'nan' should be a number"),
        ("--noise_kind token_drop", "--noise_kind token_drop: give its --noise_strength"),
        ("--noise_kind additive --noise_strength 2", "--noise_strength 2: --noise_kind additive takes --noise_snr"),
        ("--noise_kind token_drop --noise_strength 1", "--noise_strength 1: token_drop needs less than 1"),
        ("--noise_kind pink", "--noise_kind: invalid choice: 'pink'"),
        ("--noise_layer 0 7", "--noise_layer 7: .* has blocks 0 to 0"),
        ("--model resnet10t --noise_kind token_drop --noise_strength 0.5", "--noise_kind token_drop: ResNet"),
        ("--noise_kind token_drop --noise_strength 0.5 --noise_space pixel", "--noise_kind token_drop: .*pixels"),
    ],
)
def test_a_noise_that_cannot_be_is_one_line(flags, words, tmp_path):
    line = list(NET)
    if "resnet" in flags:
        at = line.index("--model_kwargs")
        line[at : at + 4] = []
    with pytest.raises(UserError, match=words) as caught:
        finetune(*line, *flags.split(), "--output_dir", tmp_path)
    assert "\n" not in str(caught.value)


def test_the_noise_curve_is_what_evaluation_under_noise_gives(tmp_path, capsys):
    """At 300 dB nothing moves; at -100 dB the network sees noise alone. The distance follows from the ratio."""
    line = [*NET, "--epochs", 2, "--noise_curve", 10, -100, 100, "--output_dir", tmp_path]
    assert finetune(*line) == 0
    points = json.loads((tmp_path / "result.json").read_text())["noise_curve"]
    assert [p["snr"] for p in points] == [math.inf, 100.0, 10.0, -100.0]
    clean, soft, loud, blind = points
    assert clean["acc1"] == pytest.approx(read_log(str(tmp_path / "log.txt"))[-1]["val_acc1"])
    assert soft["acc1"] == clean["acc1"] and soft["agreement"] == 100.0 and soft["change"] < 1e-3
    r = 10.0
    distance = math.sqrt((1 - math.sqrt(r / (1 + r))) ** 2 + 1 / (1 + r))
    assert loud["distance"] == pytest.approx(distance, rel=0.02) and blind["distance"] == pytest.approx(
        2**0.5, rel=0.02
    )
    assert blind["agreement"] < 60
    report = (tmp_path / "report.md").read_text()
    assert "| -100 | " in report and "(noise_curve.png)" in report and (tmp_path / "noise_curve.png").is_file()
    capsys.readouterr()
    best = tmp_path / "checkpoint-best.pth"
    assert finetune("--eval", "--resume", best, "--device", "cpu", "--num_workers", 0, "--noise_curve", 100) == 0
    assert "noise of 100 dB: acc1 " in capsys.readouterr().out


def test_noise_for_a_while_leaves_the_model_as_it_was():
    model, size, keywords = FAMILIES["mae's vit"]
    net = create_model(model, num_classes=2, img_size=size, alpha_blend=AlphaBlend(15), **keywords).eval()
    images, own = torch.randn(2, 3, *size), net.alpha_blend
    before = net(images)
    with noise_for_a_while(net, AlphaBlend(snr=0.0, noise_eval=True)):
        assert not torch.equal(net(images), before)
    assert torch.equal(net(images), before) and net.alpha_blend is own
