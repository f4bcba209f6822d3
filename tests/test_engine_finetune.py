import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, log_loss
from sklearn.utils import compute_class_weight
from timm.data import Mixup
from timm.data.mixup import mixup_target
from timm.layers import BatchNormAct2d
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import nn
from torchmetrics.functional.classification import multiclass_calibration_error as calibration_error

from augment.batch import BatchTransform
from bench.ranks import Ranks
from engine_finetune import Criterion, build_criterion, evaluate, train_one_epoch
from tests.harness.training import new_run, new_training
from util.cli.settings import Loss
from util.data.datasets import ArrayDataset
from util.data.loader import Loader
from util.dist import Precision, World, init_world, wrap_ddp
from util.errors import UserError
from util.lr_sched import lr_at
from util.metrics import scores_from_confusion
from util.optim import build_adamw, build_ema

CPU = torch.device("cpu")


def toy_data(n=22, classes=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 1, 4, 6), dtype=torch.uint8, generator=g)
    return ArrayDataset(images, torch.randint(0, classes, (n,), generator=g), [str(c) for c in range(classes)])


def toy_loader(data, batch_size=4, train=True):
    transform = BatchTransform((0.5,), (0.25,), seed=1)
    return Loader(data, batch_transform=transform, batch_size=batch_size, train=train, world=World())


def toy_net(classes=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(24, 8), nn.GELU(), nn.Linear(8, classes))


def fit(
    net,
    data,
    *,
    epochs=1,
    accum_iter=1,
    criterion=None,
    max_bad_steps=10,
    batch_size=4,
    lr=1e-2,
    amp="off",
    ema=None,
    **kwargs,
):
    loader = toy_loader(data, batch_size)
    groups = [{"params": list(net.parameters()), "names": [n for n, _ in net.named_parameters()], "weight_decay": 0.05}]
    optimizer = build_adamw(groups, lr=1e-2)
    run = new_run(loader, print_freq=100, accum_iter=accum_iter, max_bad_steps=max_bad_steps)
    training = new_training(
        net,
        optimizer,
        precision=Precision(amp, CPU),
        lr_at=lambda e: lr_at(e, lr=lr, min_lr=lr / 100, warmup_epochs=1, epochs=4),
        ema=ema,
    )
    for _ in range(epochs):
        stats = train_one_epoch(training, loader, criterion or Criterion(0.1), run, **kwargs)
        run.position.next_epoch()
    return stats, run, optimizer


def plain_fit(net, data, *, accum_iter, epochs=1, batch_size=4):
    """The same training written out with torch.optim and no engine: mean gradients over each group of micro-batches."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.05)
    for epoch in range(epochs):
        batches = list(toy_loader(data, batch_size).epoch(epoch))
        for first in range(0, len(batches), accum_iter):
            group = batches[first : first + accum_iter]
            e = epoch + first / len(batches)
            optimizer.param_groups[0]["lr"] = (
                1e-2 * e if e < 1 else 1e-4 + (1e-2 - 1e-4) * 0.5 * (1 + np.cos(np.pi * (e - 1) / 3))
            )
            loss = sum(F.cross_entropy(net(b.images), b.targets, label_smoothing=0.1) for b in group) / len(group)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@pytest.mark.parametrize("accum_iter", [1, 2, 3, 16])
def test_training_equals_torch_optim_with_accumulation_and_its_tail(accum_iter):
    data = toy_data()  # 5 micro-batches: groups of 2 + 2 + 1, 3 + 2, and one of all 5
    ours, plain = toy_net(), toy_net()
    _, run, _ = fit(ours, data, accum_iter=accum_iter, epochs=2)
    plain_fit(plain, data, accum_iter=accum_iter, epochs=2)
    for a, b in zip(ours.parameters(), plain.parameters()):
        assert torch.allclose(a, b, atol=2e-6)
    assert run.position.updates == 2 * -(-5 // accum_iter)


def test_reported_train_loss_is_the_mean_over_micro_batches():
    data, net = toy_data(), toy_net()
    batches = list(toy_loader(data).epoch(0))
    with torch.no_grad():
        expected = np.mean([F.cross_entropy(net(b.images), b.targets, label_smoothing=0.1).item() for b in batches])
    stats, *_ = fit(net, data, accum_iter=16)
    assert stats["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_criterion_equals_timms_losses(smoothing):
    torch.manual_seed(0)
    logits, hard = torch.randn(6, 5), torch.randint(0, 5, (6,))
    soft = torch.rand(6, 5).softmax(1)
    reference = LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()
    assert Criterion(smoothing)(logits, hard).item() == pytest.approx(reference(logits, hard).item(), rel=1e-6)
    assert Criterion(smoothing)(logits, soft).item() == pytest.approx(
        SoftTargetCrossEntropy()(logits, soft).item(), rel=1e-6
    )


WEIGHT = torch.tensor([0.52, 13.0, 3.0, 0.0])  # of a frequent, a rare and a middling class, and of one without images


def test_class_weights_without_smoothing_equal_torchs_cross_entropy():
    logits, targets = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 0, 1])
    mixed = 0.3 * F.one_hot(targets, 4).float() + 0.7 * F.one_hot(targets.flip(0), 4).float()
    # torch divides by the sum of weights for class numbers, and by the number of samples for probabilities.
    hard = F.cross_entropy(logits, targets, WEIGHT, reduction="sum") / 6
    assert Criterion(0.0, WEIGHT)(logits, targets).item() == pytest.approx(hard.item(), rel=1e-6)
    per_class = F.cross_entropy(logits, targets, reduction="none") * 0.3
    per_class = per_class + F.cross_entropy(logits, targets.flip(0), reduction="none") * 0.7
    weight = 0.3 * WEIGHT[targets] + 0.7 * WEIGHT[targets.flip(0)]
    assert Criterion(0.0, WEIGHT)(logits, mixed).item() == pytest.approx((weight * per_class).mean().item(), rel=1e-6)


@pytest.mark.parametrize("lam", [1.0, 0.3])
@pytest.mark.parametrize("smoothing", [0.1, 0.6])
def test_class_weights_are_those_of_the_targets_before_smoothing(smoothing, lam):
    """Against the definition in Python floats; mixed targets are timm's, which partners samples from both ends."""
    logits, targets = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 0, 1])
    log_p = logits.double().log_softmax(1).tolist()
    loss = 0.0
    for b in range(6):
        first, second = int(targets[b]), int(targets[5 - b])
        share = [lam * (c == first) + (1 - lam) * (c == second) for c in range(4)]
        weight = sum(w * m for w, m in zip(WEIGHT.tolist(), share))
        loss -= weight * sum(((1 - smoothing) * m + smoothing / 4) * q for m, q in zip(share, log_p[b])) / 6
    criterion = Criterion(smoothing, WEIGHT)
    mixed = mixup_target(targets, 4, lam, smoothing)
    with torch.autocast("cpu", torch.bfloat16):  # as in training: the weights are not rounded to it
        assert criterion(logits, mixed).item() == pytest.approx(loss, rel=1e-5)
        if lam == 1.0:
            assert criterion(logits, targets).item() == pytest.approx(loss, rel=1e-5)


def test_balanced_weights_equal_scikit_learns_and_are_zero_for_classes_without_images():
    data = toy_data(n=57, classes=5)
    data.targets[data.targets == 1] = 4
    weight = build_criterion(Loss(class_weights="balanced"), data, 7).weight
    present = np.unique(data.targets)
    expected = dict(zip(present, compute_class_weight("balanced", classes=present, y=data.targets.numpy())))
    assert weight.tolist() == pytest.approx([expected.get(c, 0.0) for c in range(7)])
    assert weight[data.targets].mean().item() == pytest.approx(1.0)


@pytest.mark.parametrize("mixing", [False, True])
def test_a_rare_class_is_learned_under_balanced_weights_and_smoothing(mixing):
    """Two classes that one threshold on the brightness separates, 25 to 1: all right. The weighted sum over smoothed
    targets has its minimum, for images of the frequent class, at 0.05 * 13 / (0.95 * 0.52 + 0.05 * 13) = 57 % rare."""
    images, targets = torch.full((208, 1, 4, 6), 90, dtype=torch.uint8), torch.zeros(208, dtype=torch.long)
    images[::26], targets[::26] = 165, 1
    data = ArrayDataset(images, targets, ["common", "rare"])
    criterion = build_criterion(Loss(class_weights="balanced"), data, 2)
    mixup = Mixup(mixup_alpha=0.2, label_smoothing=0.1, num_classes=2) if mixing else None
    net = toy_net(2)
    fit(net, data, epochs=4, batch_size=16, criterion=criterion, mixup=mixup)
    with torch.no_grad():
        predicted = net(BatchTransform((0.5,), (0.25,))(images, None, 0, False)).argmax(1)
    assert torch.equal(predicted, targets)


class Explodes(nn.Module):
    """Cross entropy that is NaN on chosen calls."""

    def __init__(self, bad_calls):
        super().__init__()
        self.bad_calls, self.calls = bad_calls, 0

    def forward(self, logits, targets):
        self.calls += 1
        return F.cross_entropy(logits, targets) * (float("nan") if self.calls in self.bad_calls else 1.0)


@pytest.mark.parametrize("batch_size", [4, 9])
def test_non_finite_step_is_skipped_counted_and_named(capsys, batch_size):
    net, data = toy_net(), toy_data(5 * batch_size - 2)
    _, run, _ = fit(net, data, criterion=Explodes({2}), batch_size=batch_size)
    assert run.position.bad_total == 1 and run.position.bad_in_a_row == 0
    assert all(torch.isfinite(p).all() for p in net.parameters())
    batch = list(toy_loader(data, batch_size).epoch(0))[1]
    said = capsys.readouterr().out
    assert "non-finite" in said and ", ".join(str(int(i)) for i in batch.index[:8]) in said
    assert (", ..." in said) == (len(batch.index) > 8)


class Poison(nn.Module):
    """Infinite activations on chosen calls in training."""

    def __init__(self, bad_calls):
        super().__init__()
        self.bad_calls, self.calls = bad_calls, 0

    def forward(self, x):
        self.calls += self.training
        return x * math.inf if self.training and self.calls in self.bad_calls else x


class Centred(nn.Module):
    """Statistics of a module that is no BatchNorm, replaced by another tensor at each step."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean()
        return x - self.mean


def norm_net(bad_calls=()):
    torch.manual_seed(0)
    return nn.Sequential(
        Poison(bad_calls),
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        Centred(),
        nn.Conv2d(4, 4, 1),
        BatchNormAct2d(4),
        nn.Flatten(),
        nn.Linear(32, 3),
    )


@pytest.mark.parametrize("accum_iter", [1, 2])
def test_skipped_step_leaves_statistics_and_average_as_they_were(accum_iter):
    """The third of 5 micro-steps overflows. Expected: torch.optim's and timm's steps, without that update's."""
    data, ours, plain = toy_data(), norm_net({3}), norm_net()
    averages = build_ema(ours, 0.9), ModelEmaV3(plain, decay=0.9, use_warmup=True, warmup_power=2 / 3)
    _, run, _ = fit(ours, data, accum_iter=accum_iter, criterion=Criterion(), ema=averages[0])
    assert run.position.bad_total == 1
    optimizer = torch.optim.AdamW(plain.parameters(), weight_decay=0.05)
    batches = list(toy_loader(data).epoch(0))
    for update, first in enumerate(range(0, 5, accum_iter)):
        group = batches[first : first + accum_iter]
        if 2 in range(first, first + accum_iter):
            continue
        optimizer.param_groups[0]["lr"] = 1e-2 * first / 5  # fit's warm-up
        sum(F.cross_entropy(plain(b.images), b.targets) / len(group) for b in group).backward()
        optimizer.step()
        optimizer.zero_grad()
        averages[1].update(plain, step=update + 1)
    for a, b in ((ours, plain), (averages[0].module, averages[1].module)):
        for (name, value), expected in zip(a.state_dict().items(), b.state_dict().values()):
            assert torch.allclose(value, expected, atol=1e-5), name


def test_ranks_agree_on_a_skipped_step_and_keep_their_own_statistics(tmp_path):
    """Rank 1 overflows in the second of 2 steps: both end where a net is that made the first one alone."""

    def rank():
        world = init_world("cpu")
        net, data = norm_net({2} if world.rank else ()), toy_data(n=16)
        transform = BatchTransform((0.5,), (0.25,), seed=1)
        loader = Loader(data, batch_transform=transform, batch_size=4, train=True, world=world)
        groups = [{"params": list(net.parameters()), "names": [n for n, _ in net.named_parameters()]}]
        optimizer = build_adamw(groups, lr=1e-2)
        run = new_run(loader, world=world)
        train_one_epoch(new_training(net, optimizer, model=wrap_ddp(net, world)), loader, Criterion(), run)
        assert run.position.bad_total == 1 and run.position.updates == 2
        net[0].bad_calls = ()
        once = norm_net().train()
        once(next(iter(loader.epoch(0))).images)
        for (name, value), expected in zip(net.named_buffers(), once.buffers()):
            assert torch.allclose(value, expected), name

    log = tmp_path / "said.txt"
    assert Ranks(2, rank, log).exit_codes() == [0, 0], log.read_text()


def test_skipped_steps_do_not_lower_the_reported_loss():
    data, net = toy_data(), toy_net()
    batches = list(toy_loader(data).epoch(0))
    losses = [F.cross_entropy(net(b.images), b.targets).item() for b in batches]
    stats, *_ = fit(net, data, criterion=Explodes({2, 4}), lr=0.0)
    assert stats["loss"] == pytest.approx(np.mean([losses[i] for i in (0, 2, 4)]), rel=1e-5)


class Overflow(torch.autograd.Function):
    """The identity; a gradient above `limit` comes back as infinity, as from a layer computed in fp16."""

    @staticmethod
    def forward(ctx, x, limit):
        ctx.limit = limit
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return torch.where(gradient.abs() > ctx.limit, math.inf, gradient), None


class Overflowing(nn.Module):
    def __init__(self, limit):
        super().__init__()
        self.limit = limit

    def forward(self, logits, targets):
        return Overflow.apply(F.cross_entropy(logits, targets), self.limit)


@pytest.mark.parametrize("updates_skipped", [16, 20])
def test_fp16_has_patience_while_the_loss_scale_comes_down(updates_skipped, capsys):
    """The loss's gradient is its scale, 65536 at first, and fits after so many halvings."""
    net, data = toy_net(), toy_data(n=99)  # 24 updates
    before = [p.detach().clone() for p in net.parameters()]
    criterion = Overflowing(1.5 * 2.0 ** (16 - updates_skipped))
    _, run, optimizer = fit(net, data, criterion=criterion, amp="fp16")
    assert {int(s["step"]) for s in optimizer.state.values()} == {24 - updates_skipped}
    assert not torch.equal(before[0], next(net.parameters()))
    assert run.position.bad_total == max(0, updates_skipped - 17), "those that overflow at a scale below 1"
    assert "none of" not in capsys.readouterr().out


def test_fp16_whose_gradients_are_never_finite_ends_the_run(capsys):
    """17 updates at scales of 65536 to 1 are the scaler's search, the next ones count."""
    criterion = Overflowing(0.0)
    with pytest.raises(UserError, match=r"--max_bad_steps 10: \d+ non-finite steps in a row"):
        fit(toy_net(), toy_data(n=27 * 4), criterion=criterion, amp="fp16")
    _, run, _ = fit(toy_net(), toy_data(n=26 * 4), criterion=criterion, amp="fp16")
    assert run.position.bad_total == run.position.bad_in_a_row == 9
    assert "all 26 updates were skipped" in capsys.readouterr().out


def test_too_many_bad_steps_in_a_row_end_the_run():
    with pytest.raises(UserError, match="--max_bad_steps 3"):
        fit(toy_net(), toy_data(), criterion=Explodes(set(range(2, 99))), max_bad_steps=3)


def test_evaluation_equals_scikit_learn():
    data, net = toy_data(n=57, classes=7), toy_net(7)
    result = evaluate(net, toy_loader(data, 8, train=False), Precision("off", CPU), 7, collect=True)
    with torch.no_grad():
        p = net(BatchTransform((0.5,), (0.25,))(data.images, None, 0, False)).double().softmax(1).numpy()
    y = data.targets.numpy()
    assert result.acc1 == pytest.approx(100 * accuracy_score(y, p.argmax(1)))
    assert result.acc5 == pytest.approx(100 * np.mean([t in np.argsort(-q)[:5] for t, q in zip(y, p)]))
    assert result.balanced_acc == pytest.approx(100 * balanced_accuracy_score(y, p.argmax(1)))
    assert result.macro_f1 == pytest.approx(100 * f1_score(y, p.argmax(1), average="macro"))
    assert result.loss == pytest.approx(log_loss(y, p, labels=range(7)), rel=1e-5)
    assert result.ece == pytest.approx(100 * float(calibration_error(torch.tensor(p), data.targets, 7)), rel=1e-4)
    assert result.index.tolist() == list(range(57)) and np.allclose(result.probabilities, p, atol=1e-6)


def test_probabilities_of_two_ranks_are_in_the_order_of_the_images(tmp_path):
    """57 images: 29 and 28, every other one."""

    def rank():
        world, data, net = init_world("cpu"), toy_data(n=57, classes=7), toy_net(7)
        transform = BatchTransform((0.5,), (0.25,))
        loader = Loader(data, batch_transform=transform, batch_size=8, train=False, world=world)
        result = evaluate(net, loader, Precision("off", CPU), 7, collect=True)
        with torch.no_grad():
            p = net(transform(data.images, None, 0, False)).softmax(1).numpy()
        assert result.index.tolist() == list(range(57)) and np.allclose(result.probabilities, p, atol=1e-6)
        assert result.confusion.sum() == 57

    log = tmp_path / "said.txt"
    assert Ranks(2, rank, log).exit_codes() == [0, 0], log.read_text()


class Unreadable:
    """A split of three images of which none comes through."""

    world, data = World(), range(3)

    def __len__(self):
        return 1

    def epoch(self):
        return iter(())


def test_evaluation_stops_when_told_and_refuses_a_split_without_a_readable_image():
    told = iter([False, True])
    loader = toy_loader(toy_data(), 8, train=False)
    assert evaluate(toy_net(), loader, Precision("off", CPU), 3, poll=lambda: next(told)) is None
    assert list(told) == []
    with pytest.raises(UserError, match=r"none of the 3 images to evaluate can be read"):
        evaluate(toy_net(), Unreadable(), Precision("off", CPU), 3)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_scores_with_absent_and_never_predicted_classes_equal_scikit_learn():
    y, p = [0, 0, 0, 2, 2, 4], [0, 0, 1, 2, 0, 2]
    confusion = np.zeros((5, 5), int)
    np.add.at(confusion, (y, p), 1)
    balanced, f1 = scores_from_confusion(confusion)
    assert balanced == pytest.approx(100 * balanced_accuracy_score(y, p))
    assert f1 == pytest.approx(100 * f1_score(y, p, average="macro"))


def test_fp16_scales_its_loss_and_skips_an_overflow_without_counting_it_bad():
    net, data = toy_net(), toy_data()
    groups = [{"params": list(net.parameters()), "names": [n for n, _ in net.named_parameters()], "weight_decay": 0.0}]
    optimizer, precision = build_adamw(groups, lr=1e-2), Precision("fp16", CPU)
    precision.scaler._init_scale = 2.0**40  # fp16 gradients overflow until the scale has come down
    loader = toy_loader(data)
    run, training = new_run(loader), new_training(net, optimizer, precision=precision)
    before = [p.detach().clone() for p in net.parameters()]
    train_one_epoch(training, loader, Criterion(), run)
    assert precision.scaler.get_scale() < 2.0**40 and run.position.bad_total == 0
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters())), "every step of this epoch overflows"
    precision.scaler.update(1024.0)
    run.position.next_epoch()
    train_one_epoch(training, loader, Criterion(), run)
    assert not torch.equal(before[0], next(net.parameters())) and all(torch.isfinite(p).all() for p in net.parameters())


class Remembers(nn.Linear):
    """As LeViT's attention biases in timm 1.0.15: what evaluation computed of the weights is kept until training."""

    kept = None

    def train(self, mode=True):
        super().train(mode)
        if mode:
            self.kept = None
        return self

    def forward(self, x):
        if self.kept is None or self.training:
            self.kept = 2 * self.weight
        return F.linear(x, self.kept)


def test_an_average_that_is_never_trained_is_evaluated_with_its_present_weights():
    data, net = toy_data(), nn.Sequential(nn.Flatten(), Remembers(24, 3, bias=False))
    loader, images = toy_loader(data, 8, train=False), (data.images.flatten(1).float() / 255 - 0.5) / 0.25
    for seed in range(2):
        torch.manual_seed(seed)
        nn.init.normal_(net[1].weight)
        expected = log_loss(
            data.targets, (2 * images.double() @ net[1].weight.detach().double().T).softmax(1), labels=[0, 1, 2]
        )
        assert evaluate(net, loader, Precision("off", CPU), 3).loss == pytest.approx(expected, rel=1e-5)
