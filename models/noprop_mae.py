"""NoProp-MAE: a masked encoder and T decoders, each a denoiser for one noise level.

The encoder is MAE's (He et al., Masked Autoencoders Are Scalable Vision Learners, CVPR 2022); its parameters are named
as in timm's VisionTransformer. No decoder feeds another in training (Li, Teh, Pascanu, NoProp, arXiv 2503.24322): given
the latent, the T losses are independent, with EDM's preconditioning (models/edm.py).

B images, C channels, patches of p x p pixels, N patches of which V are visible and M masked, P = p p C values each.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from timm.layers import PatchEmbed
from torch import nn

from models.edm import karras_sigmas, loss_weight, precondition, sample_euler, sample_heun, sample_stochastic
from models.tokens import (
    Decoder,
    init_transformer,
    lookup,
    patch_statistics,
    run_blocks,
    sincos_pos_embed,
    take,
    transformer,
)
from models.vit import check_patch
from util.choices import LOSS_WEIGHTINGS, PROPAGATE, SAMPLERS, TARGETS
from util.errors import ParameterError, UserError


@dataclass(frozen=True)
class NoPropConfig:
    """Sizes of the network, and its losses. UserError for values out of range.

    img_size: pixels, (H, W) or one number for both; patch_size divides both.
    sigma_data: standard deviation of the target's values, about 1 for normalised data and for norm_pixel.
    target: `pixel`, or `norm_pixel`: patches normalised to zero mean and unit variance (MAE, section 4).
    propagate: `latent`: gradients of the T losses reach the encoder. `none`: they stop at the latent, and the encoder
        learns from its own blind one-block decoder (`encoder_head`).
    loss_weighting: `none`, or `edm`: 1 / c_out^2, without which the low levels hardly learn.
    use_checkpoint: recompute blocks in the backward pass; less memory, about a third more time.
    """

    img_size: int | Sequence[int] = 32
    patch_size: int = 4
    in_chans: int = 3
    embed_dim: int = 192
    depth: int = 12
    num_heads: int = 3
    decoder_embed_dim: int = 96
    decoder_depth: int = 4
    decoder_num_heads: int = 3
    mlp_ratio: float = 4.0
    T: int = 4
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    sigma_data: float = 1.0
    target: str = "pixel"
    propagate: str = "latent"
    loss_weighting: str = "none"
    use_checkpoint: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.type is int and getattr(self, field.name) < 1:
                raise ParameterError(f"<{field.name}> {getattr(self, field.name)}: should be 1 or more")
        check_patch(self.size, self.patch_size)
        for prefix in ("", "decoder_"):
            dim, heads = getattr(self, f"{prefix}embed_dim"), getattr(self, f"{prefix}num_heads")
            if dim % heads:
                raise ParameterError(f"<{prefix}embed_dim> {dim}: should be a multiple of <{prefix}num_heads> {heads}")
            if dim % 4:
                raise ParameterError(
                    f"<{prefix}embed_dim> {dim}: should be a multiple of 4, for the position embeddings"
                )
        if not 0.0 < self.sigma_data < float("inf"):
            raise ParameterError(f"<sigma_data> {self.sigma_data}: should be positive")
        for name, known in (("target", TARGETS), ("propagate", PROPAGATE), ("loss_weighting", LOSS_WEIGHTINGS)):
            if getattr(self, name) not in known:
                raise ParameterError(f"<{name}> {getattr(self, name)}: should be one of {', '.join(known)}")
        self.sigmas()

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        height, width = (self.img_size,) * 2 if isinstance(self.img_size, int) else self.img_size
        return int(height), int(width)

    def sigmas(self) -> list[float]:
        """The T levels, decreasing, then 0. Plain floats: constants, not state of the network."""
        return karras_sigmas(self.T, self.sigma_min, self.sigma_max, self.rho, dtype=torch.float64).tolist()


class NoPropMAE(nn.Module):
    """Masked encoder and decoders for the levels sigma_0 > ... > sigma_{T-1} of `karras_sigmas(T, ...)`.

    Images are float [B, C, H, W], normalised.
    loss_i = weight_i * mean over masked patches of |D_i(x + sigma_i eps) - x|^2
    The keywords are NoPropConfig's: NoPropMAE(config), NoPropMAE(T=10), NoPropMAE(config, use_checkpoint=True).
    """

    def __init__(self, config: NoPropConfig | None = None, **keywords):
        super().__init__()
        self._config = c = replace(config or NoPropConfig(), **keywords)
        self.in_chans, self.patch_size, self.T = c.in_chans, c.patch_size, c.T
        self.target, self.propagate, self.use_checkpoint = c.target, c.propagate, c.use_checkpoint
        self.sigmas, self.sigma_data = c.sigmas(), c.sigma_data
        edm = c.loss_weighting == "edm"
        self.weights = [loss_weight(s, c.sigma_data) if edm else 1.0 for s in self.sigmas[:-1]]

        self.patch_embed = PatchEmbed(c.size, c.patch_size, c.in_chans, c.embed_dim)
        self.grid_size = self.patch_embed.grid_size  # rows, columns
        self.num_patches = self.patch_embed.num_patches
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.embed_dim))
        self.pos_embed = nn.Parameter(sincos_pos_embed(c.embed_dim, self.grid_size), requires_grad=False)
        self.blocks = transformer(c.embed_dim, c.depth, c.num_heads, c.mlp_ratio)
        self.norm = nn.LayerNorm(c.embed_dim, eps=1e-6)

        decoder = partial(
            Decoder,
            c.patch_size**2 * c.in_chans,
            c.embed_dim,
            c.decoder_embed_dim,
            num_heads=c.decoder_num_heads,
            mlp_ratio=c.mlp_ratio,
            use_checkpoint=c.use_checkpoint,
        )
        pos = sincos_pos_embed(c.decoder_embed_dim, self.grid_size)
        self.decoder_pos_embed = nn.Parameter(pos, requires_grad=False)
        self.decoders = nn.ModuleList([decoder(depth=c.decoder_depth) for _ in range(c.T)])
        self.encoder_head = decoder(depth=1, blind=True) if c.propagate == "none" else None
        init_transformer(self)

    def config(self) -> dict:
        """Keywords that rebuild this model, plain values: NoPropMAE(**model.config())."""
        return {**asdict(self._config), "img_size": list(self._config.size)}

    # patches and masks

    def patchify(self, imgs: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, N, P]: patches row by row, values within a patch as (row, column, channel), as in MAE."""
        (H, W), C, p = self._config.size, self.in_chans, self.patch_size
        if imgs.shape[1:] != (C, H, W):
            raise UserError(f"images {list(imgs.shape)}: should be [B, {C}, {H}, {W}]")
        return rearrange(imgs, "b c (rows p) (cols q) -> b (rows cols) (p q c)", p=p, q=p)

    def unpatchify(self, patches: torch.Tensor) -> torch.Tensor:
        """Inverse of `patchify`: [B, N, P] -> [B, C, H, W]."""
        rows, p = self.grid_size[0], self.patch_size
        return rearrange(patches, "b (rows cols) (p q c) -> b c (rows p) (cols q)", rows=rows, p=p, q=p)

    def random_masking(
        self, batch: int, mask_ratio: float, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids_keep [B, V], ids_mask [B, M]): patch numbers, drawn for each sample.

        M = round(N mask_ratio), but at least 1, so that there is a loss; V = 0 at ratio 1. UserError outside (0, 1].
        """
        if not 0.0 < mask_ratio <= 1.0:
            raise ParameterError(f"<mask_ratio> {mask_ratio}: should be in (0, 1]")
        keep = self.num_patches - max(1, round(self.num_patches * mask_ratio))
        noise = torch.rand(batch, self.num_patches, generator=generator, device=self.pos_embed.device)
        ids = noise.argsort(dim=1)
        return ids[:, :keep], ids[:, keep:]

    def targets(self, imgs: torch.Tensor, ids: torch.Tensor | None = None) -> torch.Tensor:
        """The decoders' targets at patches `ids` (default: all): [B, M, P]."""
        patches = self.patchify(imgs)
        patches = patches if ids is None else take(patches, ids)
        if self.target == "norm_pixel":
            mean, std = patch_statistics(patches)
            patches = (patches - mean) / std
        return patches

    # the three calls of a forward pass: encoder, decoders, losses

    def encode(self, imgs: torch.Tensor, ids_keep: torch.Tensor) -> torch.Tensor:
        """Latent of the class token and the visible patches, [B, 1+V, D]; masked patches are not computed."""
        proj = self.patch_embed.proj
        x = take(self.patchify(imgs), ids_keep)  # [B, V, P]
        # The patch convolution as a matrix product over the gathered patches. These, not the weight, are reordered to
        # (channel, row, column), so that the weight's gradient keeps the weight's memory layout for DDP.
        x = rearrange(x, "b v (p q c) -> b v (c p q)", c=self.in_chans, p=self.patch_size)
        x = F.linear(x, proj.weight.flatten(1), proj.bias)  # [B, V, D]
        x = x + lookup(self.pos_embed, 1 + ids_keep)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls, x], dim=1)  # [B, 1+V, D]
        return self.norm(run_blocks(self.blocks, x, self.use_checkpoint))

    def decoder_positions(self, ids_keep: torch.Tensor, ids_mask: torch.Tensor) -> torch.Tensor:
        """Position embeddings [B, 1+V+M, D'] of a decoder's tokens: class, visible, masked."""
        ids = torch.cat([ids_keep.new_zeros(len(ids_keep), 1), 1 + ids_keep, 1 + ids_mask], dim=1)
        return lookup(self.decoder_pos_embed, ids)

    def denoise(self, i: int, y: torch.Tensor, latent: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
        """D_i(y) = c_skip y + c_out F_i(c_in y, latent) on the masked patches, [B, M, P] -> same (EDM eq. 7).

        y is at level sigmas[i] and stays float32, whatever autocast does inside F_i: at sigma 0.002, bf16 would round y
        by more than its noise.
        """
        c_skip, c_out, c_in = precondition(self.sigmas[i], self.sigma_data)
        return c_skip * y + c_out * self.decoders[i](c_in * y, latent, pos).to(y.dtype)

    def decoder_loss(
        self, i: int, x: torch.Tensor, latent: torch.Tensor, pos: torch.Tensor, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Loss of level i (0-d) for the masked targets x [B, M, P], with newly drawn noise."""
        eps = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        D = self.denoise(i, x + self.sigmas[i] * eps, latent, pos)
        return self.weights[i] * F.mse_loss(D, x)

    def encoder_loss(self, x: torch.Tensor, latent: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
        """propagate='none': MAE's loss (0-d), which trains the encoder."""
        assert self.encoder_head is not None
        return F.mse_loss(self.encoder_head(None, latent, pos).to(x.dtype), x)

    @property
    def loss_names(self) -> list[str]:
        """Names of `losses`, in order: loss_0 .. loss_{T-1}, and loss_encoder with propagate='none'."""
        return [f"loss_{i}" for i in range(self.T)] + ["loss_encoder"] * (self.encoder_head is not None)

    def losses(
        self, x: torch.Tensor, latent: torch.Tensor, pos: torch.Tensor, generator: torch.Generator | None = None
    ) -> Iterator[Callable[[], torch.Tensor]]:
        """Functions that compute the losses (0-d). The losses' graphs share only the latent.

        x: the masked targets; pos: `decoder_positions`.
        """
        given = latent if self.propagate == "latent" else latent.detach()
        for i in range(self.T):
            yield partial(self.decoder_loss, i, x, given, pos, generator)
        if self.encoder_head is not None:
            yield partial(self.encoder_loss, x, latent, pos)

    def forward(
        self, imgs: torch.Tensor, mask_ratio: float = 0.75, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(sum of all losses, losses of the levels [T]).

        Keeps the activations of all T decoders until the backward pass. Training uses engine_pretrain.local_backward
        instead: the same gradients with the activations of one decoder.
        """
        ids_keep, ids_mask = self.random_masking(len(imgs), mask_ratio, generator)
        latent = self.encode(imgs, ids_keep)
        x, pos = self.targets(imgs, ids_mask), self.decoder_positions(ids_keep, ids_mask)
        losses = torch.stack([loss() for loss in self.losses(x, latent, pos, generator)])
        return losses.sum(), losses[: self.T]

    # pictures

    @torch.no_grad()
    def reconstruct(
        self,
        imgs: torch.Tensor,
        mask_ratio: float = 0.75,
        *,
        ids: tuple[torch.Tensor, torch.Tensor] | None = None,
        sampler: str = "stochastic",
        generator: torch.Generator | None = None,
    ) -> dict:
        """Mask images and sample the masked patches. ids: (ids_keep, ids_mask), instead of random ones.

        Returns masked [B, C, H, W], with masked patches at 0 (the mean colour); steps, a list of T images
        [B, C, H, W], the estimate D_i of each step; final [B, C, H, W]; mask [B, N], 1 = removed. Only masked patches
        are sampled; visible patches are in every picture.

        target='norm_pixel': the mean and deviation of a masked patch are unknown. They are averaged over the visible
        patches with weights exp(-d^2 / 2), d the distance in patches; 0 and 1 without visible patches.
        """
        if sampler not in SAMPLERS:
            raise ParameterError(f"<sampler> {sampler}: should be one of {', '.join(SAMPLERS)}")
        ids_keep, ids_mask = ids if ids is not None else self.random_masking(len(imgs), mask_ratio, generator)
        latent, pos = self.encode(imgs, ids_keep), self.decoder_positions(ids_keep, ids_mask)
        patches = self.patchify(imgs)
        mean: float | torch.Tensor = 0.0
        std: float | torch.Tensor = 1.0
        if self.target == "norm_pixel" and ids_keep.shape[1]:
            mean, std = self.guess_statistics(take(patches, ids_keep), ids_keep, ids_mask)
        index = repeat(ids_mask, "b m -> b m p", p=patches.shape[-1])

        def picture(x: torch.Tensor) -> torch.Tensor:
            return self.unpatchify(patches.scatter(1, index, x * std + mean))

        steps = []
        samplers: dict[str, Callable[..., torch.Tensor]] = {
            "stochastic": partial(sample_stochastic, generator=generator),
            "heun": sample_heun,
            "euler": sample_euler,
        }
        noise = torch.randn(index.shape, generator=generator, device=imgs.device, dtype=imgs.dtype)
        final = samplers[sampler](
            lambda y, i: self.denoise(i, y, latent, pos),
            self.sigmas[0] * noise,
            self.sigmas,
            callback=lambda i, y, D: steps.append(picture(D)),
        )
        mask = torch.zeros(patches.shape[:2], device=imgs.device).scatter(1, ids_mask, 1.0)
        masked = self.unpatchify(patches * (1.0 - mask)[..., None])
        return {"masked": masked, "steps": steps, "final": picture(final), "mask": mask}

    def generate(self, n: int, *, sampler: str = "stochastic", generator: torch.Generator | None = None) -> dict:
        """Generate n images: `reconstruct` with every patch masked, for models trained up to mask ratio 1."""
        rows, cols = self.grid_size
        shape = (n, self.in_chans, rows * self.patch_size, cols * self.patch_size)
        imgs = torch.zeros(shape, device=self.pos_embed.device)
        return self.reconstruct(imgs, 1.0, sampler=sampler, generator=generator)

    def guess_statistics(
        self, visible: torch.Tensor, ids_keep: torch.Tensor, ids_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Estimated mean and deviation [B, M, 1] of masked patches from visible [B, V, P]; see `reconstruct`."""
        cols = self.grid_size[1]
        masked, kept = (torch.stack([ids // cols, ids % cols], dim=-1).float() for ids in (ids_mask, ids_keep))
        weights = (-0.5 * torch.cdist(masked, kept).square()).softmax(dim=-1)  # [B, M, V]
        mean, std = patch_statistics(visible)
        return weights @ mean, weights @ std

    @torch.no_grad()
    def attention_maps(self, imgs: torch.Tensor) -> torch.Tensor:
        """softmax(q k^T / sqrt(d)) of every encoder block on whole images: [depth, B, heads, 1+N, 1+N].

        Token 0 is the class token.
        """
        maps = []

        def compute(attn: Any, inputs: tuple) -> None:
            q, k, _ = rearrange(attn.qkv(inputs[0]), "b n (qkv h d) -> qkv b h n d", qkv=3, h=attn.num_heads).float()
            maps.append((q * attn.scale @ k.transpose(-2, -1)).softmax(dim=-1))

        hooks = [block.get_submodule("attn").register_forward_pre_hook(compute) for block in self.blocks]
        try:
            self.encode(imgs, torch.arange(self.num_patches, device=imgs.device).expand(len(imgs), -1))
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(maps)
