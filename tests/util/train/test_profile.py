"""--profile and --compile: what is counted, what is written, and that compiled nets save and load as others do."""

import json

import pytest
import torch
from torch import nn

import util.train.compiled
from augment.alpha_blend import AlphaBlend
from models import create_model
from tests.harness.checks import comparable, one_line
from tests.harness.runs import NET
from util.errors import UserError
from util.log import read_log
from util.optim import build_ema
from util.train.compiled import compile_net, compile_noprop, require_compiler
from util.train.profile import WARMUP, StepProfiler, matmul_rate


class Log:
    """RunLog's two methods that StepProfiler calls."""

    def __init__(self, folder):
        self.folder, self.lines = folder, []

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def say(self, text: str) -> None:
        self.lines.append(text)


def follow(profiler: StepProfiler, steps: int, work) -> None:
    for _ in range(steps):
        profiler.begin()
        profiler.got()
        work()
        profiler.done(8)
    profiler.begin()  # for a batch that does not come: the epoch is over


def test_operations_are_counted_by_hand_and_trace_and_table_are_written(tmp_path):
    net = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 4))
    q = torch.randn(1, 2, 5, 8, requires_grad=True)

    def work():
        net(torch.ones(8, 6)).sum().backward()
        nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()

    log = Log(tmp_path)
    profiler = StepProfiler(2, log, torch.device("cpu"), torch.float32)
    follow(profiler, WARMUP + 1, work)  # an epoch ends in the middle
    follow(profiler, 3, work)
    # A product of [a, b] and [b, c] is 2abc. Layer 1: forward and weight gradient (its input needs none); layer 2: three
    # products. Attention: q k^T and its product with v forward; in the backward pass the scores once more, and four gradients.
    linear = 2 * (2 * 8 * 6 * 10) + 3 * (2 * 8 * 10 * 4)
    product = 2 * 2 * 5 * 5 * 8
    assert profiler.flops == linear + 7 * product
    assert profiler.images == 16 and profiler.seconds > 0
    assert len(log.lines) == 1 and "images/s" in log.lines[0] and "waiting for data" in log.lines[0]
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert sum(e.get("name") == "aten::addmm" for e in events) == 2 * 2, "two layers in each of the N steps"
    text = (tmp_path / "profile.txt").read_text()
    assert text.startswith(log.lines[0]) and "aten::addmm" in text
    profiler.close()
    assert len(log.lines) == 1


def test_a_run_too_short_to_profile_says_so(tmp_path):
    log = Log(tmp_path)
    profiler = StepProfiler(5, log, torch.device("cpu"), torch.float32)
    follow(profiler, 4, lambda: None)
    profiler.close()
    assert "4 micro-steps, it takes 13" in log.lines[0] and not list(tmp_path.iterdir())
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    assert _get_current_dispatch_mode() is None


def test_matmul_rate_is_what_a_product_takes():
    import time

    a = torch.randn(1024, 1024)
    seconds = []
    for _ in range(4):
        tic = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - tic)
    rate = matmul_rate(torch.device("cpu"), torch.float32)
    assert 0.2 < rate * min(seconds) / (2 * 1024**3) < 5


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


def test_compiled_and_profiled_run_ends_as_a_plain_one(traced, tmp_path, whole_run):
    import main_finetune

    out = tmp_path / "out"
    assert main_finetune.main([*NET, "--compile", "--profile", "2", "--output_dir", str(out)]) == 0
    ours, plain = comparable(out / "checkpoint-last.pth"), comparable(whole_run / "checkpoint-last.pth")
    assert traced and ours["model"].keys() == plain["model"].keys()
    for name, value in plain["model"].items():  # the same noise and the same batches; rounding apart
        assert torch.allclose(ours["model"][name], value, atol=1e-3), name
    assert {"trace.json", "profile.txt"} <= {p.name for p in out.iterdir()}
    for line in read_log(str(out / "log.txt")):
        assert line["images_per_second"] > 0 and 0 <= line["data_wait_percent"] <= 100
    with pytest.raises(UserError) as caught:
        main_finetune.main([*NET, "--profile", "2", "--output_dir", ""])
    assert "--profile 2" in one_line(caught) and "--output_dir" in one_line(caught)
