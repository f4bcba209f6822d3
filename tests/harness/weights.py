"""Small ViTs and files of their weights."""

import torch

from models import create_model

SIZES = {"embed_dim": 12, "depth": 1, "num_heads": 2}
NAME, PATCH = "vit_custom_patch4", 4
REGISTERS = {"reg_tokens": 3, "no_embed_class": True}


def vit(size=(32, 32), classes=2, name=NAME, **extra):
    return create_model(name, num_classes=classes, img_size=size, in_chans=1, **{**SIZES, **extra})


def as_file(path, state, size=None, classes=("a", "b"), **extra):
    """A state dict; with `size` this project's checkpoint of a ViT for such images."""
    content = {"model": state, "ema": None}
    if size:
        content |= {
            "format": 1,
            "kind": "finetune",
            "meta": {
                "kind": "finetune",
                "model": NAME,
                "model_kwargs": {**SIZES, **extra},
                "global_pool": True,
                "img_size": list(size),
                "in_chans": 1,
                "num_classes": len(classes),
                "classes": list(classes),
                "mean": [0.5],
                "std": [0.5],
            },
        }
    torch.save(content, path)
    return path
