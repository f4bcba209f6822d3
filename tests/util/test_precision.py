"""The precision of a run: what is chosen for a device and a kind of network, and what stays in fp32."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import main_predict
from bench import precision as bench
from models import create_model
from models.noprop_mae import NoPropMAE
from tests.harness.runs import CONV, NET, PLAIN, VIT, finetune, save_member
from util.dist import Precision, computes_bf16, prepare_net
from util.errors import UserError
from util.precision import is_convolutional, keep_out_of_bf16, meets_only_padding, place

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize("value,name", [("1", "bf16"), ("0", "off")])
def test_the_environment_forces_either_default_on_any_machine(value, name, monkeypatch, capsys):
    monkeypatch.setenv("NOISEVIT_BF16", value)
    assert computes_bf16(CPU) == (name == "bf16")
    assert finetune(*NET, "--epochs", 1, "--output_dir", "") == 0
    assert f"amp {name}" in capsys.readouterr().out.splitlines()[0]


def test_a_wrong_value_in_the_environment_is_one_line(monkeypatch):
    monkeypatch.setenv("NOISEVIT_BF16", "yes")
    with pytest.raises(UserError, match=r"^NOISEVIT_BF16=yes: should be 1 .*, 0 .* or unset$"):
        computes_bf16(CPU)


@pytest.mark.parametrize(
    "avx512_bf16,amx,vendor,faster",
    [
        (False, False, "AuthenticAMD", False),
        (True, False, "AuthenticAMD", True),
        (True, False, "GenuineIntel", False),
        (True, True, "GenuineIntel", True),
    ],
)
def test_a_cpu_computes_bf16_where_its_products_gain_from_it(avx512_bf16, amx, vendor, faster, monkeypatch):
    monkeypatch.delenv("NOISEVIT_BF16", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(
        "util.dist.cpu_description", lambda: f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: 25\n"
    )
    assert computes_bf16(CPU) == faster


@pytest.mark.parametrize(
    "name,convolutional",
    [
        ("vit_tiny_patch16", False),
        ("swin_tiny_patch4_window7_224", False),
        ("eva02_tiny_patch14_224", False),
        ("test_convnext", True),
        ("test_efficientnet", True),
        ("test_resnet", True),
        ("levit_128s", True),
        ("maxvit_rmlp_pico_rw_256", True),
    ],
)
def test_the_default_follows_the_kind_of_network(name, convolutional, monkeypatch):
    net = create_model(name, num_classes=3, img_size=256 if "256" in name else 224)
    for forced, expected in (("1", "off" if convolutional else "bf16"), ("0", "off")):
        monkeypatch.setenv("NOISEVIT_BF16", forced)
        precision = Precision(None, CPU, net)
        assert precision.name == expected and f"amp {expected} (" in str(precision)
        assert Precision("bf16", CPU, net).name == "bf16" and Precision("off", CPU, net).name == "off"
        assert not precision.scaler.is_enabled()


def test_pretraining_is_matrix_products(monkeypatch):
    monkeypatch.setenv("NOISEVIT_BF16", "1")
    net = NoPropMAE(
        img_size=8,
        patch_size=2,
        embed_dim=12,
        depth=1,
        num_heads=2,
        decoder_embed_dim=12,
        decoder_depth=1,
        decoder_num_heads=2,
        T=1,
    )
    assert Precision(None, CPU, net).name == "bf16"


@pytest.mark.parametrize("has_bf16,name", [(True, "bf16"), (False, "fp16")])
def test_a_gpu_without_bf16_gets_fp16_with_loss_scaling(has_bf16, name, monkeypatch):
    """T4 and V100 emulate bf16; by default and for --use_amp alone, whatever the kind of network."""
    monkeypatch.delenv("NOISEVIT_BF16", raising=False)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16 or including_emulation
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # else GradScaler switches itself off
    for amp in (None, "mixed"):
        for net in (None, nn.Sequential(nn.Conv2d(3, 8, 3))):
            precision = Precision(amp, GPU, net)
            assert precision.name == name and precision.scaler.is_enabled() == (name == "fp16")
    assert Precision("bf16", GPU).name == "bf16", "what is asked for by name"


def test_attention_is_plain_in_bf16_on_a_cpu_and_fused_elsewhere():
    for amp, device, fused in (("bf16", CPU, False), ("off", CPU, True), ("bf16", GPU, True)):
        net = create_model("vit_tiny_patch16", num_classes=3, img_size=32)
        x = torch.randn(2, 3, 32, 32)
        before = net.eval()(x)
        prepare_net(net, Precision(amp, device))
        assert {m.fused_attn for m in net.modules() if hasattr(m, "fused_attn")} == {fused}
        assert torch.allclose(net(x), before, atol=1e-5)


def test_members_of_an_ensemble_compute_each_in_its_own_precision(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NOISEVIT_BF16", "1")
    classes = tuple(map(str, range(10)))
    for name, family in (("vit", VIT), ("conv", CONV)):
        save_member(tmp_path / name / "checkpoint-best.pth", family, classes=classes, size=(32, 32), in_chans=1)
    line = [
        "--checkpoints",
        str(tmp_path / "vit"),
        str(tmp_path / "conv"),
        *"--dataset digits --views 1 --device cpu --num_workers 0 --output_dir".split(),
    ]

    def stop(nets, *args, **kwargs):
        raise UserError(" ".join(net.precision.name for net in nets))

    monkeypatch.setattr(main_predict, "predict", stop)
    with pytest.raises(UserError, match=r"^bf16 off$"):
        main_predict.main([*line, str(tmp_path / "a")])
    said = capsys.readouterr().out
    assert "input [32, 32], amp bf16 (" in said and "amp off (fp32: convolutions are slower" in said
    with pytest.raises(UserError, match=r"^off off$"):
        main_predict.main([*line, str(tmp_path / "b"), "--amp", "off"])


# torch's bf16 weight gradients on maps as small as the padding.


def test_taps_that_meet_only_padding_by_convolving_ones():
    """Independently: the weight gradient of a map of ones, each of whose entries counts what its tap meets."""
    for size in (1, 2, 3, 5, 8):
        for kernel in (1, 2, 3, 5, 7):
            for stride in (1, 2, 3, 4):
                for padding in {0, 1, kernel // 2} - {kernel}:
                    for dilation in (1, 2):
                        if size + 2 * padding < dilation * (kernel - 1) + 1:
                            continue
                        w = torch.zeros(1, 1, kernel, requires_grad=True)
                        F.conv1d(torch.ones(1, 1, size), w, None, stride, padding, dilation).sum().backward()
                        expected = bool((w.grad == 0).any()) or (padding > 0 and padding >= size)
                        assert meets_only_padding(size, kernel, stride, padding, dilation) == expected


def fill_freed_memory_with_nan(net: nn.Module) -> None:
    junk = [torch.full(p.shape, float("nan"), dtype=torch.bfloat16) for p in net.parameters() for _ in range(20)]
    del junk


def gradients(net: nn.Module, x: torch.Tensor, precision: Precision) -> dict[str, torch.Tensor]:
    net.zero_grad()
    with precision.autocast():
        loss = F.cross_entropy(net(x).float(), torch.arange(len(x)) % 3)
    loss.backward()
    return {name: p.grad for name, p in net.named_parameters()}


@pytest.mark.parametrize("depthwise", [False, True])
def test_bf16_gradients_on_maps_of_one_pixel_are_those_of_fp32(depthwise):
    """A stem that leaves one pixel, then the 3x3 kernel of stride 2: in bf16 its unwritten gradients would be NaN."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 64, 4, 4),
        nn.Conv2d(64, 64, 3, 2, 1, groups=64 if depthwise else 1),
        nn.GELU(),
        nn.Conv2d(64, 64, 5, 1, 2),
        nn.Flatten(),
        nn.Linear(64, 3),
    )
    exact, precision = copy.deepcopy(net), Precision("bf16", CPU)
    (note,) = prepare_net(net, precision, (3, 4, 4))
    assert note.startswith("in fp32") and note.endswith(": 1, 3")
    assert copy.deepcopy(net).state_dict().keys() == exact.state_dict().keys() and isinstance(net[1], nn.Conv2d)
    for _ in range(20):
        x = torch.randn(8, 3, 4, 4)
        expected = gradients(exact, x, Precision("off", CPU))
        fill_freed_memory_with_nan(net)
        for name, gradient in gradients(net, x, precision).items():
            assert torch.linalg.vector_norm(gradient - expected[name]) <= 0.03 * expected[name].norm() + 1e-6, name


def test_a_resnet_on_small_photos_has_finite_bf16_gradients(monkeypatch, tmp_path, capsys):
    line = [
        *PLAIN,
        "--model",
        "test_resnet",
        "--model_kwargs",
        "--input_size",
        8,
        "--amp",
        "bf16",
        "--epochs",
        1,
        "--batch_size",
        256,
        "--output_dir",
        tmp_path,
    ]
    real = nn.Linear.forward

    def forward(self, x):
        fill_freed_memory_with_nan(self.__dict__.setdefault("like_convs", nn.Conv2d(64, 64, 3)))
        return real(self, x)

    monkeypatch.setattr(nn.Linear, "forward", forward)
    assert finetune(*line) == 0
    said = capsys.readouterr().out
    assert "amp bf16 (--amp)" in said.splitlines()[0] and "note: in fp32, because torch's bf16 gradients" in said
    assert "non-finite" not in said


def test_only_convolutions_at_risk_stay_in_fp32():
    """At 64 px, resnet10t's last stage gets 4 x 4 and works on 2 x 2; at 32 px it is 2 x 2, where the first kernel of
    stride 2 has its first row on the border, and 1 x 1."""
    net = create_model("resnet10t", num_classes=3, img_size=64)
    net.bn1.eval()
    before, state = torch.get_rng_state(), {k: v.clone() for k, v in net.state_dict().items()}
    assert keep_out_of_bf16(net, (3, 64, 64)) == []
    assert torch.equal(before, torch.get_rng_state()) and net.training and not net.bn1.training
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert keep_out_of_bf16(net, (3, 32, 32)) == ["layer4.0.conv1", "layer4.0.conv2"]
    assert not is_convolutional(nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 1)))


# The table that the rule follows from.


@pytest.mark.slow
def test_the_precision_table_has_the_defaults_cost_and_keeps_handwritten_text(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NOISEVIT_BF16", "1")
    monkeypatch.setattr(bench, "measure_product", lambda repeats: 0.5)  # as AMD's: then the two columns are one number
    out = tmp_path / "precision.md"
    out.write_text(f"old\n{bench.READING}\n\nwords\n")
    threads = torch.get_num_threads()
    bench.main(["--rows", "noprop:8:2", "test_resnet:32:2", "--repeats", "1", "--output", str(out)])
    assert torch.get_num_threads() == threads == 1
    text = out.read_text()
    assert "old" not in text and text.endswith(f"{bench.READING}\n\nwords\n")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    names, product, noprop, resnet = rows
    assert product[names.index("x (CPU)")] == "0.50" and [noprop[1], resnet[1]] == ["noprop", "test_resnet"]
    for row, default in ((noprop, "bf16"), (resnet, "off")):
        x = float(row[names.index("x (CPU)")].split()[0])
        chosen = x if default == "bf16" else 1.0
        assert row[names.index("default here")] == row[names.index("default there")] == default
        assert float(row[names.index("slower than the better")].rstrip(" %")) == pytest.approx(
            100 * (chosen / min(x, 1.0) - 1), abs=2
        )
        assert float(row[names.index("x by calculation, AMD")]) == pytest.approx(x, abs=0.011)


def test_convolutional_nets_are_placed_in_channels_last_and_vits_are_not():
    for net, last in ((nn.Sequential(nn.Conv2d(3, 8, 3)), True), (nn.Sequential(nn.Conv2d(3, 8, 4, 4)), False)):
        x, before = torch.randn(2, 3, 8, 8), net[0].weight.clone()
        expected = net(x)
        assert place(net, torch.device("cpu")) is net and torch.equal(net[0].weight, before)
        assert net[0].weight.is_contiguous(memory_format=torch.channels_last) == last
        assert net(x).is_contiguous(memory_format=torch.channels_last) == last
        torch.testing.assert_close(net(x), expected)
