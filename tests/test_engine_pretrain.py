"""The pretraining engine against the plain summed loss: gradients, accumulation, two ranks, memory, resuming."""

import copy
import math
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import kstest, uniform
from torch.nn.parallel import DistributedDataParallel

from bench.ranks import Ranks
from engine_pretrain import EncoderFirst, draw_mask_ratio, local_backward, train_one_epoch
from models.noprop_mae import NoPropMAE
from tests.harness.training import Order, new_run, new_training
from util.data.loader import Batch
from util.dist import init_world
from util.optim import build_adamw, param_groups
from util.seed import seed_all
from util.train.run import Found

SMALL = dict(
    img_size=(8, 12),
    patch_size=2,
    in_chans=3,
    embed_dim=16,
    depth=2,
    num_heads=2,
    decoder_embed_dim=8,
    decoder_depth=2,
    decoder_num_heads=2,
    mlp_ratio=2.0,
    T=3,
)


def build(**kwargs):
    torch.manual_seed(0)
    return NoPropMAE(**{**SMALL, **kwargs})


def images(n=7, seed=1):
    return torch.randn(n, 3, 8, 12, generator=torch.Generator().manual_seed(seed))


def trained(net):
    return [p for p in net.parameters() if p.requires_grad]


# local_backward


@pytest.mark.parametrize("propagate", ["latent", "none"])
@pytest.mark.parametrize("use_checkpoint", [False, True])
@pytest.mark.parametrize("ratio", [0.75, 1.0])
def test_decoder_by_decoder_gradients_equal_those_of_the_summed_loss(propagate, use_checkpoint, ratio):
    net = build(propagate=propagate, use_checkpoint=use_checkpoint).double()
    imgs = images().double()
    total, levels = net(imgs, ratio, torch.Generator().manual_seed(3))
    want = torch.autograd.grad(total, trained(net))
    generator = torch.Generator().manual_seed(3)
    ids = net.random_masking(len(imgs), ratio, generator)
    losses = local_backward(net, net.encode, imgs, *ids, generator=generator)
    torch.testing.assert_close(losses[:3], levels.detach())
    torch.testing.assert_close(losses.sum(), total.detach())
    for p, g in zip(trained(net), want):
        torch.testing.assert_close(p.grad, g, rtol=1e-8, atol=1e-12)


def test_gradients_accumulate_over_calls_and_follow_the_scale():
    net = build().double()
    grads = []
    for calls in ([1.0], [0.25, 0.75]):
        net.zero_grad()
        for factor in calls:
            generator = torch.Generator().manual_seed(0)
            ids = net.random_masking(7, 0.75, generator)
            local_backward(
                net, net.encode, images().double(), *ids, generator=generator, scale=lambda x, f=factor: x * f
            )
        grads.append([p.grad.clone() for p in trained(net)])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def peak_saved_bytes(step) -> int:
    """Most bytes that autograd held at one time for backward passes; each storage counted once."""
    live, peak = {}, 0

    class Held:
        def __init__(self, tensor):
            self.tensor = tensor

    def pack(tensor):
        nonlocal peak
        storage = tensor.untyped_storage()
        held, key = Held(tensor), storage.data_ptr()
        count, size = live.get(key, (0, storage.nbytes()))
        live[key] = (count + 1, size)
        weakref.finalize(held, release, key)
        peak = max(peak, sum(size for _, size in live.values()))
        return held

    def release(key):
        count, size = live.pop(key)
        if count > 1:
            live[key] = (count - 1, size)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        step()
    return peak


def test_activations_held_do_not_grow_with_the_number_of_levels():
    imgs = images(32)

    def local(T):
        net = build(T=T)
        ids = net.random_masking(32, 0.75)
        return peak_saved_bytes(lambda: local_backward(net, net.encode, imgs, *ids))

    def summed(T):
        return peak_saved_bytes(lambda: build(T=T)(imgs)[0].backward())

    assert local(8) < 1.02 * local(1)
    assert summed(8) > 3 * summed(1)  # what the measurement sees without it


# two ranks


def backward_on(net, encode, step, rank, scale):
    # Ratio 1 in one step: a rank without visible patches must not leave the others waiting.
    generator = torch.Generator().manual_seed(100 * step + rank)
    imgs = torch.randn(3, 3, 8, 12, generator=generator, dtype=torch.float64)
    ids = net.random_masking(3, 1.0 if (step, rank) == (1, 0) else 0.75, generator)
    local_backward(net, encode, imgs, *ids, generator=generator, scale=lambda loss: loss * scale)


@pytest.mark.slow
def test_two_ranks_with_accumulation_get_the_gradients_of_one_process(tmp_path):
    def call() -> None:
        rank = init_world("cpu", timeout_minutes=1).rank
        for keywords in ({"propagate": "latent"}, {"propagate": "none", "use_checkpoint": True}):
            net, twin = build(**keywords).double(), build(**keywords).double()
            # Buckets of a few parameters: gradients are sent off between the backward passes.
            model = DistributedDataParallel(EncoderFirst(net), bucket_cap_mb=0.005, gradient_as_bucket_view=True)
            for group in range(3):  # buckets are rebuilt after the first
                for micro in range(2):
                    with model.no_sync() if micro == 0 else nullcontext():
                        backward_on(net, model, 2 * group + micro, rank, 0.5)
                    for r in range(2):
                        backward_on(twin, twin.encode, 2 * group + micro, r, 0.25)
                for p, q in zip(trained(net), trained(twin)):
                    torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-12)
                    with torch.no_grad():
                        p -= 0.1 * p.grad
                        q -= 0.1 * q.grad
                net.zero_grad(set_to_none=True)
                twin.zero_grad(set_to_none=True)
        print("equal")

    codes = Ranks(2, call, tmp_path / "said.txt").exit_codes()
    said = (tmp_path / "said.txt").read_text()
    assert codes == [0, 0] and said.count("equal") == 2, said


# train_one_epoch


class Batches(Order):
    """Five batches of seven images; `poison` makes one of them infinite."""

    data = SimpleNamespace(name=str)

    def __init__(self, poison=None):
        super().__init__(batch_size=7, steps=5, n=35)
        self.poison = poison

    def epoch(self, epoch, start_step=0):
        for step in range(start_step, 5):
            imgs = images(7, seed=10 * epoch + step)
            if step == self.poison:
                imgs[0, 0, 0, 0] = float("inf")
            yield Batch(imgs, torch.zeros(7, dtype=torch.long), torch.arange(7))


def start(**flags):
    return new_run(Batches(), kind="pretrain", **{"accum_iter": 2, "seed": 7, **flags})


def train(net, run, batches=None, optimizer=None, lr=1e-3, **kwargs):
    optimizer = optimizer or build_adamw(param_groups(net, weight_decay=0.05), lr=0.0, betas=(0.9, 0.95))
    training = new_training(net, optimizer, model=EncoderFirst(net), lr_at=lambda e: lr * (1 + e))
    stats = train_one_epoch(training, batches or Batches(), run, **{"mask_ratio": 0.75, **kwargs})
    return stats, optimizer


@pytest.mark.parametrize("propagate", ["latent", "none"])
def test_an_epoch_equals_a_plain_loop_over_the_summed_loss(propagate):
    """Five micro-steps in groups of two: the last group has one, and counts in full."""
    net, plain = build(propagate=propagate), build(propagate=propagate)
    # SGD: Adam would magnify the rounding of gradients that are zero, those of the keys' biases.
    stats, optimizer = train(
        net, start(), optimizer=torch.optim.SGD(param_groups(net, weight_decay=0.05), fused=True), lr=0.1
    )
    other = torch.optim.SGD(param_groups(plain, weight_decay=0.05))
    batches, total, levels = list(Batches().epoch(0)), 0.0, torch.zeros(3)
    for group in ([0, 1], [2, 3], [4]):
        for g in other.param_groups:
            g["lr"] = 0.1 * (1 + group[0] / 5)
        for step in group:
            seed_all(7, 0, step, 0)
            loss, losses = plain(batches[step].images, 0.75)
            (loss / len(group)).backward()
            total, levels = total + loss.item() / 5, levels + losses.detach() / 5
        other.step()
        other.zero_grad()
    for p, q in zip(net.parameters(), plain.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    assert stats["loss"] == pytest.approx(total, rel=1e-5)
    assert [stats[f"loss_{i}"] for i in range(3)] == pytest.approx(levels.tolist(), rel=1e-5)
    assert ("loss_encoder" in stats) == (propagate == "none")
    assert stats["lr"] == pytest.approx(0.18) and {g["lr"] for g in optimizer.param_groups} == {stats["lr"]}


def test_a_loss_that_the_network_adds_is_trained_and_recorded():
    class WithQuietLatent(NoPropMAE):
        @property
        def loss_names(self):
            return [*super().loss_names, "loss_latent"]

        def losses(self, x, latent, pos, generator=None):
            yield from super().losses(x, latent, pos, generator)
            yield lambda: latent.square().mean()

    torch.manual_seed(0)
    net = WithQuietLatent(**SMALL).double()
    imgs, generator = images().double(), torch.Generator().manual_seed(3)
    ids = net.random_masking(len(imgs), 0.5, generator)
    losses = local_backward(net, net.encode, imgs, *ids, generator=generator)
    got = net.norm.weight.grad.clone()
    assert losses[3].item() == pytest.approx(net.encode(imgs, ids[0]).square().mean().item())
    plain = build().double()
    generator = torch.Generator().manual_seed(3)
    ids = plain.random_masking(len(imgs), 0.5, generator)
    local_backward(plain, plain.encode, imgs, *ids, generator=generator)
    plain.encode(imgs, ids[0]).square().mean().backward()
    torch.testing.assert_close(got, plain.norm.weight.grad, rtol=1e-8, atol=1e-12)
    stats, _ = train(WithQuietLatent(**SMALL), start())
    assert stats["loss_latent"] > 0 and len([k for k in stats if k.startswith("loss_")]) == 4


def test_an_epoch_stopped_and_resumed_equals_an_uninterrupted_one():
    whole, halves = build(), build()
    want, _ = train(whole, start())
    run, kept = start(), []
    run.save = lambda training: kept.append(copy.deepcopy(run.state(training)))
    run.interrupts.poll = lambda: (True, False)
    stats, _ = train(halves, run)
    assert stats is None and len(kept) == 1 and kept[0]["step"] == 2
    again = start()
    torch.manual_seed(99)
    fresh = NoPropMAE(**SMALL)  # other weights, all of which come from the checkpoint
    optimizer = build_adamw(param_groups(fresh, weight_decay=0.05), lr=0.0, betas=(0.9, 0.95))
    again.restore(Found(kept[0], "", []), new_training(fresh, optimizer))
    got, _ = train(fresh, again, optimizer=optimizer)
    assert got == pytest.approx(want, rel=1e-6)
    for p, q in zip(fresh.parameters(), whole.parameters()):
        assert torch.equal(p, q)


def test_a_non_finite_step_is_skipped_and_counted():
    net = build()
    before = [p.clone() for p in net.parameters()]
    run = start(accum_iter=5)
    # With groups of five, the bad micro-step spoils the only update.
    stats, _ = train(net, run, batches=Batches(poison=3))
    assert run.position.bad_total == 1 and math.isnan(stats["loss"]), "no micro-step has a loss to report"
    for p, q in zip(net.parameters(), before):
        assert torch.equal(p, q)


def test_non_finite_steps_in_a_row_end_the_run_in_one_line():
    with pytest.raises(ValueError, match="--max_bad_steps 1") as error:
        train(build(), start(max_bad_steps=1), batches=Batches(poison=4))
    assert "\n" not in str(error.value)


def test_mask_ratio_is_uniform_between_its_bounds_and_counted():
    """Drawn from (seed, epoch, step): each of them counts, and no generator does."""
    ratios = [draw_mask_ratio(0.2, 0.9, 0, 3, step) for step in range(4000)]
    assert kstest(ratios, uniform(0.2, 0.7).cdf).pvalue > 0.01
    drawn = {
        draw_mask_ratio(0.2, 0.9, seed, epoch, step) for seed in range(9) for epoch in range(9) for step in range(9)
    }
    assert len(drawn) == 9**3
    seed_all(1)
    assert draw_mask_ratio(0.2, 0.9, 0, 3, 5) == ratios[5]
    assert draw_mask_ratio(0.75, None, 0, 3, 1) == draw_mask_ratio(0.75, 0.75, 0, 3, 1) == 0.75


def test_ratio_one_trains_with_a_drawn_ratio(monkeypatch):
    """mask_ratio_max 1: some steps have no visible patch at all, and every parameter still gets its update."""
    seen = []
    net = build()
    original = net.random_masking
    monkeypatch.setattr(net, "random_masking", lambda n, ratio: seen.append(ratio) or original(n, ratio))
    stats, _ = train(net, start(), mask_ratio=0.9, mask_ratio_max=1.0)
    assert len(set(seen)) == 5 and all(0.9 <= r <= 1.0 for r in seen) and stats["loss"] > 0
