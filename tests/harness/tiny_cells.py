"""A made-up family, as a file of models/families/ would hold it (see its __init__.py): patches, cells, a head."""

import torch
from timm.layers import DropPath, PatchEmbed
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from torch import nn

default_cfgs = generate_default_cfgs(
    {"tiny_cells": {"input_size": (3, 8, 8), "first_conv": "patch_embed.proj", "classifier": "head"}}
)


class Cell(nn.Module):
    def __init__(self, dim: int, drop_path: float):
        super().__init__()
        self.norm, self.mlp, self.drop_path = nn.LayerNorm(dim), nn.Linear(dim, dim), DropPath(drop_path)
        self.temperature = nn.Parameter(torch.ones(1, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop_path(self.mlp(self.norm(x)).relu() * self.temperature)


class TinyCells(nn.Module):
    def __init__(self, img_size=8, in_chans=3, num_classes=1000, dim=16, depth=3, drop_path_rate=0.0):
        super().__init__()
        self.num_classes, self.num_features, self.grad_checkpointing = num_classes, dim, False
        self.patch_embed = PatchEmbed(img_size, 2, in_chans, dim)
        self.pos_embed = nn.Parameter(torch.randn(1, self.patch_embed.num_patches, dim) * 0.02)
        self.cells = nn.Sequential(*[Cell(dim, drop_path_rate) for _ in range(depth)])
        self.head = nn.Linear(dim, num_classes)

    def group_matcher(self, coarse: bool = False) -> dict:
        return {"stem": r"^pos_embed|patch_embed", "blocks": r"^cells\.(\d+)"}

    def no_weight_decay(self) -> set[str]:
        return {"temperature"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(x) + self.pos_embed
        x = checkpoint_seq(self.cells, x) if self.grad_checkpointing and self.training else self.cells(x)
        return self.head(x.mean(dim=1))


def checkpoint_filter_fn(state: dict, model: nn.Module) -> dict:
    return {k.replace("layers.", "cells."): v for k, v in state.items()}


@register_model
def tiny_cells(pretrained=False, **kwargs) -> TinyCells:
    return build_model_with_cfg(TinyCells, "tiny_cells", pretrained, **kwargs)
