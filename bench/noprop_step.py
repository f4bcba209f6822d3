"""NoProp-MAE training step: the engine at its defaults against a plain fp32 step on full grids.

    python -m bench.noprop_step --T 4 --batch_size 128

The baseline works like usual masked autoencoders: every decoder gets the whole grid, with the noised patches blended in
by the mask and the encoder's tokens reordered by a gather, predicts all patches and takes a masked mean; one backward
pass for the sum of all T losses. Sizes are those of main_pretrain_noprop.py for 32 px images.
More --variants: see common.start_up. With torchrun's variables (set by bench.scaling) the product runs in DDP.
"""

from functools import partial

from bench import common


def add_flags(parser) -> None:
    parser.add_argument("--T", type=int, default=4)
    parser.add_argument("--img_size", type=int, default=32)
    parser.add_argument("--patch_size", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--mask_ratio", type=float, default=0.75)
    parser.add_argument("--steps", type=int, default=1, help="training steps per timed call")
    parser.add_argument("--amp", choices=("off", "bf16"), default=None, help="of the product (default: its own choice)")
    parser.add_argument("--compile", action="store_true", help="the product through torch.compile")
    parser.add_argument("--use_checkpoint", action="store_true", help="the product with gradient checkpointing")


def build(variant: str, args):
    import torch

    torch.manual_seed(0)
    return build_baseline(args) if variant == "baseline" else build_product(variant, args)


def build_product(variant: str, args):
    import torch

    from augment.batch import BatchTransform
    from augment.image import Geometry
    from engine_pretrain import EncoderFirst, train_one_epoch
    from models.noprop_mae import NoPropMAE
    from util.cli.pretrain import PretrainOptions
    from util.data.datasets import ArrayDataset
    from util.data.loader import Loader
    from util.data_specs import DATASETS
    from util.dist import wrap_ddp
    from util.log import RunLog
    from util.optim import build_adamw, param_groups
    from util.train.compiled import compile_noprop
    from util.train.run import Run, Training

    world = common.start_up(variant, args.device)
    net = NoPropMAE(T=args.T, img_size=args.img_size, patch_size=args.patch_size, use_checkpoint=args.use_checkpoint)
    net.to(world.device)
    precision = common.precision_of(variant, net, world, args.amp)
    if args.compile:
        compile_noprop(net)
    n = args.batch_size * args.steps * world.size
    images = torch.randint(0, 256, (n, 3, args.img_size, args.img_size), dtype=torch.uint8)
    spec = DATASETS["cifar10"]
    transform = BatchTransform(spec.mean, spec.std, size=args.img_size, geometry=Geometry(hflip=spec.hflip))
    data = ArrayDataset(images, torch.zeros(n, dtype=torch.long), [""])
    loader = Loader(data, batch_transform=transform, batch_size=args.batch_size, train=True, world=world)
    optimizer = build_adamw(param_groups(net, weight_decay=0.05), lr=1.5e-4, betas=(0.9, 0.95))
    model = wrap_ddp(EncoderFirst(net), world)
    log = RunLog(None, None, is_main=False)
    run = Run(PretrainOptions.of(), world, log, meta={}, loader=loader)
    training = Training(net, model, optimizer, precision, lr_at=lambda epoch: 1.5e-4)

    def steps() -> int:
        train_one_epoch(training, loader, run, mask_ratio=args.mask_ratio)
        run.position.next_epoch()
        return n

    return steps


def build_baseline(args):
    import torch
    from timm.layers import set_fused_attn
    from timm.models.vision_transformer import Block
    from torch import nn

    from models.edm import karras_sigmas, precondition
    from models.tokens import sincos_pos_embed
    from util.optim import param_groups

    set_fused_attn(False)
    norm = partial(nn.LayerNorm, eps=1e-6)
    D, d, p, grid = 192, 96, args.patch_size, args.img_size // args.patch_size
    P, N = 3 * p * p, grid * grid

    def blocks(dim: int, depth: int) -> nn.Sequential:
        return nn.Sequential(*[Block(dim, 3, 4.0, qkv_bias=True, norm_layer=norm) for _ in range(depth)])

    class Denoiser(nn.Module):
        """noised [B, N, P], latent [B, 1+V, D], ids_restore [B, N] -> prediction [B, N, P] of the whole grid."""

        def __init__(self):
            super().__init__()
            self.latent_embed, self.patch_embed = nn.Linear(D, d), nn.Linear(P, d)
            self.mask_token = nn.Parameter(torch.zeros(1, 1, d))
            self.blocks, self.norm, self.pred = blocks(d, 4), norm(d), nn.Linear(d, P)
            self.register_buffer("pos_embed", sincos_pos_embed(d, (grid, grid)))

        def forward(self, noised, latent, ids_restore, mask):
            B, L, _ = latent.shape
            x = self.latent_embed(latent)
            fill = self.mask_token.expand(B, N + 1 - L, -1)
            tokens = torch.cat([x[:, 1:], fill], dim=1)
            tokens = torch.gather(tokens, 1, ids_restore[..., None].expand(-1, -1, d))  # [B, N, d]
            tokens = tokens + mask[..., None] * self.patch_embed(noised)
            x = torch.cat([x[:, :1], tokens], dim=1) + self.pos_embed
            return self.pred(self.norm(self.blocks(x)))[:, 1:]

    class Baseline(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch_embed = nn.Conv2d(3, D, p, p)
            self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
            self.register_buffer("pos_embed", sincos_pos_embed(D, (grid, grid)))
            self.blocks, self.norm = blocks(D, 12), norm(D)
            self.decoders = nn.ModuleList([Denoiser() for _ in range(args.T)])
            self.sigmas = karras_sigmas(args.T).tolist()

        def forward(self, imgs):
            B = len(imgs)
            x = self.patch_embed(imgs).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]
            ids = torch.rand(B, N).argsort(dim=1)
            ids_restore, keep = ids.argsort(dim=1), int(N * (1 - args.mask_ratio))
            mask = torch.ones(B, N)
            mask[:, :keep] = 0
            mask = torch.gather(mask, 1, ids_restore)
            x = torch.gather(x, 1, ids[:, :keep, None].expand(-1, -1, D))
            x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(B, -1, -1), x], dim=1)
            latent = self.norm(self.blocks(x))
            patches = imgs.reshape(B, 3, grid, p, grid, p).permute(0, 2, 4, 3, 5, 1).reshape(B, N, P)
            total = 0.0
            for sigma, decoder in zip(self.sigmas, self.decoders):
                c_skip, c_out, c_in = precondition(sigma, 1.0)
                y = patches + sigma * torch.randn_like(patches)
                D_i = c_skip * y + c_out * decoder(c_in * y, latent, ids_restore, mask)
                total = total + (((D_i - patches) ** 2).mean(-1) * mask).sum() / mask.sum()
            return total

    net = Baseline()
    optimizer = torch.optim.AdamW(param_groups(net, weight_decay=0.05), lr=1.5e-4, betas=(0.9, 0.95), foreach=False)
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size)

    def steps() -> int:
        for _ in range(args.steps):
            loss = net(images)
            if not torch.isfinite(torch.tensor(loss.item())):
                raise SystemExit("baseline: loss is not finite")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return args.batch_size * args.steps

    return steps


if __name__ == "__main__":
    common.main("noprop_step", __doc__, build, add_flags, extra=common.CHOICES)
