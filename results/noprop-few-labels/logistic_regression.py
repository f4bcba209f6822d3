"""A yardstick for the study: logistic regression on the digits' raw pixels, on the images that the runs' seeds drew.

python results/noprop-few-labels/logistic_regression.py
"""

import sys
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegressionCV

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from util.cli.finetune import get_args_parser
from util.data.splits import load_data
from util.dist import World

for n in (100, None):
    accuracies = []
    for seed in range(5):
        words = ["--dataset", "digits", "--split_seed", str(seed), *(["--train_subset", str(n)] if n else [])]
        train, val = load_data(get_args_parser().options(words).data, World())
        (x, y), (val_x, val_y) = ((d.images.flatten(1).numpy() / 255.0, d.targets.numpy()) for d in (train, val))
        net = LogisticRegressionCV(Cs=np.logspace(-3, 3, 7), cv=5, max_iter=2000).fit(x, y)
        accuracies.append(100 * net.score(val_x, val_y))
    print(f"{n or 'all'} labels: {np.mean(accuracies):.2f} %, by seed {' '.join(f'{a:.2f}' for a in accuracies)}")
