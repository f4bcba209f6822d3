"""--compile: compiled nets compute, save and load as others do."""

import numpy as np
import pytest
import torch

import util.train.compiled
from augment.alpha_blend import AlphaBlend
from models import create_model
from tests.harness.checks import comparable, one_line, undocumented
from tests.harness.runs import NET
from util.choices import NOISE_KINDS
from util.errors import UserError
from util.log import read_log
from util.optim import build_ema
from util.train.compiled import compile_net, compile_noprop, require_compiler


@pytest.fixture
def traced(monkeypatch):
    """Graphs captured and run without a compiler behind them; returns their list."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(util.train.compiled, "BACKEND", backend)
    yield graphs
    torch._dynamo.reset()


def small_vit(noise):
    torch.manual_seed(0)
    return create_model(
        "vit_custom_patch4", num_classes=3, img_size=8, embed_dim=12, depth=1, num_heads=2, alpha_blend=noise
    )


@pytest.mark.slow
def test_compiled_net_keeps_keys_noise_and_ema_and_computes_the_same(traced):
    noise = AlphaBlend(500, anneal="linear")
    net = small_vit(noise)
    keys, ema = list(net.state_dict()), build_ema(net, 0.9)
    x = torch.randn(4, 3, 8, 8)
    plain = net.eval()(x)
    compile_net(net)
    assert torch.equal(net(x), plain) and len(traced) == 1 and list(net.state_dict()) == keys
    net.train()
    for epoch in range(10):  # more values of t than torch recompiles for
        noise.set_progress(epoch / 20)
        torch.manual_seed(1)
        noisy = net(x)
        torch.manual_seed(1)
        assert torch.allclose(net._call_impl(x), noisy, atol=1e-6) and not torch.allclose(noisy, plain)
    if hasattr(torch._dynamo.config, "allow_unspec_int_on_nn_module"):  # not in torch 2.6
        assert len(traced) <= 4, "annealing must not compile anew each epoch"
    noisy.sum().backward()
    ema.update(net, step=1)
    assert torch.allclose(ema.module.eval()(x), plain, atol=1e-5)
    fresh = small_vit(None)
    fresh.load_state_dict(net.state_dict())


@pytest.mark.parametrize("kind", NOISE_KINDS)
def test_each_kind_of_noise_is_the_same_compiled(traced, kind):
    own = {"token_drop": 0.5, "manifold_mixup": 2.0}.get(kind)
    strength = {"strength": own} if own else {"snr": 12.0}
    net, x, outputs = small_vit(AlphaBlend(kind=kind, **strength)).train(), torch.randn(4, 3, 8, 8), []
    np.random.seed(0)
    if kind == "manifold_mixup":
        net.alpha_blend.mix_targets(torch.zeros(4, dtype=torch.long), 3)
    for compiled in (False, True):
        if compiled:
            compile_net(net)
        net.alpha_blend.measure()
        torch.manual_seed(1)
        outputs.append((net(x), net.alpha_blend.snr()))
    assert torch.allclose(outputs[0][0], outputs[1][0], atol=1e-6) and len(traced) >= 1
    assert outputs[0][1] == (pytest.approx(outputs[1][1], abs=1e-4) if own is None else None)


def test_compiled_noprop_computes_the_same_and_its_decoders_share_a_graph(traced):
    from engine_pretrain import local_backward
    from models.noprop_mae import NoPropMAE

    torch.manual_seed(0)
    net = NoPropMAE(
        img_size=8, embed_dim=12, depth=1, num_heads=2, decoder_embed_dim=12, decoder_depth=1, decoder_num_heads=2, T=4
    )
    keys, x = list(net.state_dict()), torch.randn(4, 3, 8, 8)
    ids_keep, ids_mask = net.random_masking(4, 0.75)
    results = []
    for compiled in (False, True):
        if compiled:
            compile_noprop(net)
        net.zero_grad()
        torch.manual_seed(1)
        losses = local_backward(net, net.encode, x, ids_keep, ids_mask)
        results.append([losses, *(p.grad.clone() for p in net.parameters() if p.requires_grad)])
    for a, b in zip(*results):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)
    assert len(traced) == 2, "an encoder's and one for all decoders"
    assert list(net.state_dict()) == keys


def test_without_a_compiler_there_is_one_line(monkeypatch):
    def backend(graph, inputs):
        raise RuntimeError("No working C++ compiler found\nin config")

    monkeypatch.setattr(util.train.compiled, "BACKEND", backend)
    torch._dynamo.reset()
    with pytest.raises(UserError) as caught:
        require_compiler(torch.device("cpu"))
    assert "--compile" in one_line(caught) and "No working C++ compiler" in one_line(caught)
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_and_profiled_run_ends_as_a_plain_one(traced, tmp_path, whole_run):
    import main_finetune

    out = tmp_path / "out"
    assert main_finetune.main([*NET, "--compile", "--profile", "2", "--output_dir", str(out)]) == 0
    ours, plain = comparable(out / "checkpoint-last.pth"), comparable(whole_run / "checkpoint-last.pth")
    assert traced and ours["model"].keys() == plain["model"].keys()
    for name, value in plain["model"].items():  # the same noise and the same batches; rounding apart
        assert torch.allclose(ours["model"][name], value, atol=1e-3), name
    assert {"trace.json", "profile.txt"} <= {p.name for p in out.iterdir()}
    assert not undocumented(out)
    for line in read_log(str(out / "log.txt")):
        assert line["images_per_second"] > 0 and 0 <= line["data_wait_percent"] <= 100
    with pytest.raises(UserError) as caught:
        main_finetune.main([*NET, "--profile", "2", "--output_dir", ""])
    assert "--profile 2" in one_line(caught) and "--output_dir" in one_line(caught)
