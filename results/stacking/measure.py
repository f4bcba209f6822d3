"""Is stacking calibrated where it is applied? Two small networks by 5 folds, scored on 1,500 images of Fashion-MNIST.

    python results/stacking/measure.py data --images 500 2000 --seeds 4

Per set, and for 1 and 12 views: log loss, expected calibration error (%) and accuracy (%), means over the seeds.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from augment.batch import normalize
from augment.views import saccadic_views
from util.data.datasets import read_split
from util.predict.calibration import scores
from util.predict.ensemble import Stacked, geometric_mean, log_probabilities

TEST, FOLDS, BATCH = 1500, 5, 50


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def cnn() -> nn.Module:
    body = [nn.Conv2d(1, 12, 5, 2, 2), nn.ReLU(), nn.Conv2d(12, 24, 3, 2, 1), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(24 * 49, 64), nn.ReLU(), nn.Linear(64, 10))


def views_of(images: torch.Tensor) -> torch.Tensor:
    """uint8 [N, 1, 28, 28] -> [N, 12, 1, 28, 28]"""
    return torch.stack([saccadic_views(image, 28, margin=0) for image in images])


def train(net: nn.Module, x: torch.Tensor, y: torch.Tensor, *, epochs: int, augment: bool, seed: int) -> nn.Module:
    """augment: flips, shifts by 2 pixels and label smoothing 0.1; without, a net that is too sure of itself."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    steps = len(x) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * steps)
    for _ in range(epochs):
        for index in torch.randperm(len(x), generator=generator)[: steps * BATCH].view(steps, BATCH):
            batch = x[index]
            if augment:
                flip = torch.rand(BATCH, generator=generator) < 0.5
                batch = torch.where(flip[:, None, None, None], batch.flip(-1), batch)
                batch = batch.roll(torch.randint(-2, 3, (2,), generator=generator).tolist(), (2, 3))
            loss = F.cross_entropy(net(batch), y[index], label_smoothing=0.1 * augment)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


@torch.no_grad()
def predict(net: nn.Module, views: torch.Tensor) -> np.ndarray:
    """[N, V, 1, 28, 28] -> probabilities [N, V, 10]"""
    parts = [net(normalize(x, (0.286,), (0.353,))).double().softmax(1) for x in views.flatten(0, 1).split(1000)]
    return torch.cat(parts).unflatten(0, views.shape[:2]).numpy()


def matrix_of_arithmetic_means(oof: np.ndarray, targets: np.ndarray, means: np.ndarray) -> np.ndarray:
    """What stacking was before: a coefficient for each pair of classes and member, applied to mean probabilities."""

    def columns(p):
        return np.concatenate(list(log_probabilities(p)), axis=1)

    return LogisticRegression(max_iter=500).fit(columns(oof), targets).predict_proba(columns(means))


def one_run(train_data, test_views, test_targets, *, images: int, seed: int, augment: bool) -> dict:
    index = torch.from_numpy(np.random.default_rng(seed).permutation(len(train_data))[:images])
    x, y = normalize(train_data.images[index], (0.286,), (0.353,)), train_data.targets[index]
    own_views, targets = views_of(train_data.images[index])[:, :1], y.numpy()
    oof, test = np.empty((2, images, 10)), np.empty((2, FOLDS, TEST, 12, 10))
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(np.zeros(images), targets)
    for fold, (kept, held_out) in enumerate(folds):
        for m, build in enumerate((mlp, cnn)):
            torch.manual_seed(100 * seed + 10 * m + fold)
            net = train(build(), x[kept], y[kept], epochs=30 if images < 1000 else 15, augment=augment, seed=seed)
            oof[m, held_out] = predict(net, own_views[held_out])[:, 0]
            test[m, fold] = predict(net, test_views)
    stacked, found = Stacked(oof, targets, balanced=False), {}
    for V in (1, 12):
        means = test[..., :V, :].mean((1, 3))
        found["equal weights", V] = means.mean(0)
        found["stacked, before", V] = matrix_of_arithmetic_means(oof, targets, means)
        found["a weight per member, of arithmetic means", V] = stacked(means)
        found["stacked, now", V] = stacked(geometric_mean(test[..., :V, :], (1, 3)))
    return {key: scores(p, test_targets) for key, p in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data_path")
    parser.add_argument("--images", type=int, nargs="+", default=[500, 2000])
    parser.add_argument("--seeds", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    train_data, test_data = (read_split("fashion-mnist", args.data_path, split) for split in ("train", "val"))
    chosen = torch.from_numpy(np.random.default_rng(99).permutation(len(test_data))[:TEST])
    test_views, test_targets = views_of(test_data.images[chosen]), test_data.targets[chosen].numpy()
    for images in args.images:
        for augment in (False, True):
            runs = [
                one_run(train_data, test_views, test_targets, images=images, seed=seed, augment=augment)
                for seed in range(args.seeds)
            ]
            print(f"\n{images} images, {'augmented' if augment else 'not augmented'}, {args.seeds} seeds\n")
            print("| | views | log loss | ECE % | accuracy % |\n|---|---|---|---|---|")
            for name, V in runs[0]:
                mean = {k: np.mean([run[name, V][k] for run in runs]) for k in ("log_loss", "ece", "accuracy")}
                print(
                    f"| {name} | {V} | {mean['log_loss']:.4f} | {mean['ece']:.2f} | {mean['accuracy']:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
