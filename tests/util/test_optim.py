import pytest
import torch
from torch import nn

from models import create_model
from util.optim import allocate_gradients, build_adamw, optimizer_step, param_groups


def mae_layer(name: str, depth: int) -> int:
    """The rule of MAE's appendix (BEiT's): embedding 0, block i is i + 1, everything after is depth + 1."""
    if name.startswith(("cls_token", "pos_embed", "patch_embed")):
        return 0
    if name.startswith("blocks"):
        return int(name.split(".")[1]) + 1
    return depth + 1


@pytest.mark.parametrize("global_pool", [True, False])
def test_vit_groups_have_maes_scales_and_weight_decay(global_pool):
    model = create_model("vit_tiny_patch16", num_classes=10, img_size=32, global_pool=global_pool)
    groups = param_groups(model, weight_decay=0.05, layer_decay=0.75)
    shapes = {n: p.ndim for n, p in model.named_parameters()}
    seen = {}
    for g in groups:
        for name in g["names"]:
            seen[name] = (g["lr_scale"], g["weight_decay"])
    assert set(seen) == set(shapes)
    for name, (scale, decay) in seen.items():
        assert scale == pytest.approx(0.75 ** (13 - mae_layer(name, 12))), name
        exempt = shapes[name] == 1 or name in ("cls_token", "pos_embed")
        assert decay == (0.0 if exempt else 0.05), name
    assert seen["head.weight"] == (1.0, 0.05)
    assert seen["patch_embed.proj.weight"][0] == pytest.approx(0.75**13)


@pytest.mark.parametrize("name", ["convnext_atto", "tf_efficientnet_lite0", "swinv2_tiny_window8_256", "resnet18"])
def test_other_families_are_covered_once_with_growing_scales(name):
    size = 256 if "256" in name else 64
    model = create_model(name, num_classes=3, img_size=size)
    groups = param_groups(model, weight_decay=0.05, layer_decay=0.8)
    names = [n for g in groups for n in g["names"]]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())
    scale = {n: g["lr_scale"] for g in groups for n in g["names"]}
    first, last = names[0], next(n for n in names if n in ("head.fc.weight", "classifier.weight", "fc.weight"))
    assert scale[last] == 1.0 and scale[first] < 0.8
    if name.startswith("swinv2"):
        tables = [n for n in names if "logit_scale" in n or "cpb_mlp" in n]
        decay = {n: g["weight_decay"] for g in groups for n in g["names"]}
        assert tables and all(decay[n] == 0 for n in tables if "logit_scale" in n)


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))


def groups_of(net):
    return [{"params": list(net.parameters()), "names": [n for n, _ in net.named_parameters()], "weight_decay": 0.05}]


@pytest.mark.parametrize("keep", [False, True])
def test_update_with_clipping_equals_torch_optim_step(keep):
    x, scaler = torch.randn(16, 4), torch.amp.GradScaler("cpu", enabled=False)
    ours, plain = small_net(), small_net()
    opt, reference = (
        build_adamw(groups_of(ours), lr=1e-2),
        torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.05),
    )
    if keep:
        allocate_gradients(list(ours.parameters()))
        places = [p.grad.data_ptr() for p in ours.parameters()]
    for _ in range(3):
        ours(x).square().sum().backward()
        update = optimizer_step(opt, scaler, list(ours.parameters()), 0.5, keep_gradients=keep)
        plain(x).square().sum().backward()
        expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        reference.step()
        reference.zero_grad()
        assert update.norm.item() == pytest.approx(expected.item(), rel=1e-6)
    for a, b in zip(ours.parameters(), plain.parameters()):
        assert torch.allclose(a, b, atol=1e-6)
    if keep:
        assert places == [p.grad.data_ptr() for p in ours.parameters()]
    assert all(p.grad is None or (keep and not p.grad.any()) for p in ours.parameters())


@pytest.mark.parametrize("keep", [False, True])
def test_non_finite_gradient_changes_neither_weights_nor_moments(keep):
    net, scaler = small_net(), torch.amp.GradScaler("cpu", enabled=False)
    opt = build_adamw(groups_of(net), lr=1e-2)
    net(torch.randn(4, 4)).sum().backward()
    optimizer_step(opt, scaler, list(net.parameters()), None)
    before = [p.detach().clone() for p in net.parameters()]
    moments = [s["exp_avg"].clone() for s in opt.state.values()]
    steps = [float(s["step"]) for s in opt.state.values()]
    (net(torch.randn(4, 4)).sum() * float("nan")).backward()
    update = optimizer_step(opt, scaler, list(net.parameters()), 1.0, keep_gradients=keep)
    assert update.skipped and not torch.isfinite(update.norm)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters()))
    assert all(torch.equal(m, s["exp_avg"]) for m, s in zip(moments, opt.state.values()))
    assert [float(s["step"]) for s in opt.state.values()] == steps
    net(torch.randn(4, 4)).sum().backward()
    optimizer_step(opt, scaler, list(net.parameters()), None)
    assert not torch.equal(before[0], next(net.parameters())), "a good step after a bad one must train again"
