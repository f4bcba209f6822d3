"""What fine-tuning is compared with: logistic regression on the frozen net's features, in the same folds.

    python results/solar-cells/logistic_regression.py solar-cells/train tf_efficientnet_lite0.safetensors

Folds, labels and the fine-tuned net's probabilities come from lite0/oof.csv beside this file. One line per penalty C.
"""

import csv
import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from augment.image import build_eval_transform, open_image  # noqa: E402
from models import create_model, load_pretrained  # noqa: E402

SIZE, BATCH = 300, 16


def features(folder: Path, names: list[str], weights: str) -> np.ndarray:
    """What the net's classifier would read, float32 [N, 1280]."""
    net = create_model("tf_efficientnet_lite0", num_classes=2)
    load_pretrained(net, weights)
    net.eval()
    transform, parts = build_eval_transform((SIZE, SIZE), 1.0), []
    with torch.inference_mode():
        for i in range(0, len(names), BATCH):
            x = torch.stack([transform(open_image(str(folder / name), 3)) for name in names[i : i + BATCH]])
            x = x.float() / 127.5 - 1  # the weights' own normalisation: mean and standard deviation 0.5
            parts.append(net.forward_head(net.forward_features(x), pre_logits=True))
    return torch.cat(parts).numpy()


def main(folder: str, weights: str) -> None:
    with open(HERE / "lite0" / "oof.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    x = features(Path(folder), [r["ID"] for r in rows], weights)
    y, fold = np.array([r["True"] == "ok" for r in rows]), np.array([int(r["fold"]) for r in rows])
    tuned = np.array([float(r["ok"]) > 0.5 for r in rows])

    def score(predicted, where=slice(None)) -> float:
        return 100 * balanced_accuracy_score(y[where], predicted[where])

    print(f"fine-tuned: accuracy {100 * (tuned == y).mean():.2f} balanced {score(tuned):.2f}")
    for C in (0.001, 0.003, 0.01, 0.1, 1.0):
        predicted = np.zeros(len(y), bool)
        for f in range(5):
            net = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=3000, class_weight="balanced"))
            predicted[fold == f] = net.fit(x[fold != f], y[fold != f]).predict(x[fold == f])
        difference = np.array([score(tuned, fold == f) - score(predicted, fold == f) for f in range(5)])
        error = difference.std(ddof=1) / 5**0.5
        print(
            f"C {C:g}: accuracy {100 * (predicted == y).mean():.2f} balanced {score(predicted):.2f}; "
            f"fine-tuned minus this, paired by fold: {difference.mean():+.2f}, standard error {error:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main(*sys.argv[1:3])
