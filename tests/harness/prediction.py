"""Ensembles: members as far as prediction reads them, main_predict.py in this process, the table that it writes."""

import csv
import json

import numpy as np
import torch
from PIL import Image

import main_predict
from augment.image import build_eval_transform
from augment.views import saccadic_views

QUICK = ["--device", "cpu", "--num_workers", "0", "--amp", "off"]
CLASSES = ["cat", "dog", "owl"]


def probabilities(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet([0.5] * 3, shape)


def save_head(path, classes=CLASSES, kind="finetune", best=None, best_epoch=-1, **args) -> None:
    """A checkpoint as far as find_members reads it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    progress = {"best": best, "best_epoch": best_epoch}
    torch.save(
        {"format": 1, "meta": {"kind": kind, "model": "m", "classes": classes}, "args": args, "progress": progress},
        path,
    )


def save_folds(root, folds, kfold: int, classes=CLASSES, **args) -> None:
    for i in folds:
        save_head(root / f"fold-{i}" / "checkpoint-best.pth", classes, kfold=kfold, **args)
        (root / f"fold-{i}" / "result.json").write_text(json.dumps({"options": {"kfold": kfold}}))


def reference(net, meta: dict, path, views) -> np.ndarray:
    """Probabilities [V, classes in alphabetical order] of one image file, each view by itself."""
    image = Image.open(path).convert("L" if meta["in_chans"] == 1 else "RGB")
    mean, std = (torch.tensor(meta[k], dtype=torch.float64).view(-1, 1, 1) for k in ("mean", "std"))
    out = []
    centre = build_eval_transform(tuple(meta["img_size"]), meta.get("crop_pct"))(image)
    for v in views:
        x = (saccadic_views(image, tuple(meta["img_size"]), [v], centre=centre)[0].double() / 255 - mean) / std
        with torch.no_grad():
            p = net(x.float()[None]).double().softmax(1)[0].numpy()
        out.append(p[np.argsort(meta["classes"])])
    return np.stack(out)


def read_csv(folder) -> tuple[list[str], dict[str, list[str]]]:
    with open(folder / "predictions.csv", encoding="utf-8", newline="") as file:
        header, *rows = list(csv.reader(file))
    assert [r[0] for r in rows] == sorted(r[0] for r in rows)
    return header, {r[0]: r[1:] for r in rows}


def values(rows: dict, name: str) -> np.ndarray:
    return np.array([float(v) for v in rows[name][1:]])


def predict(*argv) -> int:
    return main_predict.main([*map(str, argv), *QUICK])
