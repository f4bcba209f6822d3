"""Patch tokens: position embeddings, gathering, transformer blocks, the decoder of a masked autoencoder."""

from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import nn
from torch.utils.checkpoint import checkpoint


def sincos_pos_embed(dim: int, grid: tuple[int, int]) -> torch.Tensor:
    """MAE's fixed position embeddings for a (rows, columns) grid: [1, 1 + rows * columns, dim]; 0 for the class token.

    The first half of the channels encodes the column, the second the row, each as sines, then cosines, of position *
    10000^(-k / (dim / 4)). dim must be a multiple of 4.
    """
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, col = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [position.flatten()[:, None] * omega for position in (col, row)]
    table = torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)  # [N, dim]
    return torch.cat([table.new_zeros(1, dim), table])[None].float()


def take(patches: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Rows of each sample: patches [B, N, P], ids [B, M] -> [B, M, P]."""
    B, N, P = patches.shape
    rows = ids + torch.arange(0, B * N, N, device=ids.device)[:, None]
    # index_select copies whole rows; gather looks up every value.
    return patches.reshape(B * N, P).index_select(0, rows.flatten()).view(*ids.shape, P)


def lookup(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Rows of one table for all samples: table [1, N, D], ids [B, M] -> [B, M, D]."""
    return table[0].index_select(0, ids.flatten()).view(*ids.shape, table.shape[-1])


def patch_statistics(patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each patch, [B, M, P] -> 2 x [B, M, 1]; 1e-6 keeps flat patches finite."""
    var, mean = torch.var_mean(patches, dim=-1, correction=0, keepdim=True)
    return mean, (var + 1e-6).sqrt()


def transformer(dim: int, depth: int, num_heads: int, mlp_ratio: float) -> nn.ModuleList:
    """timm's ViT blocks as MAE builds them: pre-norm, bias in qkv, LayerNorm eps 1e-6."""
    norm: Any = partial(nn.LayerNorm, eps=1e-6)
    return nn.ModuleList([Block(dim, num_heads, mlp_ratio, qkv_bias=True, norm_layer=norm) for _ in range(depth)])


def init_transformer(net: nn.Module) -> None:
    """MAE's random weights (models_mae.py, after ViT's official code), in place: linear layers and patch convolution
    xavier_uniform, their biases 0; tokens that are not patches N(0, 0.02^2)."""
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear) or name == "patch_embed.proj":
            nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, p in net.named_parameters():
        if name.endswith(("cls_token", "mask_token", "reg_token")):
            nn.init.normal_(p, std=0.02)


def run_blocks(blocks: nn.ModuleList, x: torch.Tensor, use_checkpoint: bool) -> torch.Tensor:
    """x [B, L, D] through all blocks; with use_checkpoint, activations are recomputed in the backward pass."""
    for block in blocks:
        if use_checkpoint and torch.is_grad_enabled():
            # The blocks draw no random numbers, so no generator state is saved.
            x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
        else:
            x = block(x)
    return x


class Decoder(nn.Module):
    """Predicts the masked patches from their noised values and the latent of the visible ones.

    blind: a mask token replaces the noised patches, as in MAE's decoder.
    """

    def __init__(
        self,
        patch_dim: int,
        latent_dim: int,
        dim: int,
        *,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        blind: bool = False,
        use_checkpoint: bool = False,
    ):
        super().__init__()
        self.use_checkpoint = use_checkpoint
        self.latent_embed = nn.Linear(latent_dim, dim)
        if blind:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        else:
            self.patch_embed = nn.Linear(patch_dim, dim)
        self.blocks = transformer(dim, depth, num_heads, mlp_ratio)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pred = nn.Linear(dim, patch_dim)

    def forward(self, patches: torch.Tensor | None, latent: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
        """patches [B, M, P] (None if blind), latent [B, 1+V, D], pos [B, 1+V+M, dim] in that order -> [B, M, P].

        Attention does not depend on the order of tokens, so they are not put back into the grid.
        """
        B, M = len(latent), pos.shape[1] - latent.shape[1]
        masked = self.mask_token.expand(B, M, -1) if patches is None else self.patch_embed(patches)
        x = torch.cat([self.latent_embed(latent), masked], dim=1) + pos  # [B, 1+V+M, dim]
        x = run_blocks(self.blocks, x, self.use_checkpoint)
        return self.pred(self.norm(x[:, -M:]))
