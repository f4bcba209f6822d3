"""A small NoProp-MAE for digits."""

import torch

from models.noprop_mae import NoPropMAE

MEAN, STD = (0.3053,), (0.3761,)


def tiny_net(img_size=(8, 12)) -> NoPropMAE:
    torch.manual_seed(0)
    return NoPropMAE(
        img_size=img_size,
        patch_size=2,
        in_chans=1,
        embed_dim=12,
        depth=2,
        num_heads=3,
        decoder_embed_dim=12,
        decoder_depth=1,
        decoder_num_heads=3,
        T=3,
    ).eval()
