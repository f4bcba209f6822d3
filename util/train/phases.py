"""The two phases of fine-tuning: the head on a frozen backbone, then all weights, or all but --freeze_layers."""

from functools import partial

import torch

from models.vit import classifiers
from util.dist import World
from util.errors import UserError
from util.lr_sched import lr_at
from util.optim import build_adamw, layer_ids, param_groups
from util.train.run import wrap_ddp


def freeze_backbone(model) -> None:
    """Head only: the backbone's BatchNorm statistics and dropout stay as in evaluation; the noise stays on, and the
    dropout before the classifier."""
    model.eval()
    model.training = True  # of this module alone: EfficientNet, ResNet and others drop by F.dropout(..., self.training)
    for name, module in model.named_modules():
        if name.startswith("head") and isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.train()  # beside the classifier: timm's `head_drop` (ViT) or `head.drop` (Swin, ConvNeXt)
    for classifier in classifiers(model):
        classifier.train()
    if hasattr(model, "alpha_blend"):
        model.alpha_blend.train()


def freeze_batchnorm(model, everywhere: bool) -> None:
    """Keep the BatchNorm statistics of frozen layers; `everywhere` (--freeze_bn), of all.

    The statistics of a small batch, or of a small folder, shift every feature.
    """
    for module in model.modules():
        if not isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            continue
        if everywhere or (module.affine and not module.weight.requires_grad):
            module.eval()


def enter_phase(args, net, in_head_phase: bool, lr: float, world: World):
    """(model to call, optimizer) of a phase: the head on a frozen backbone, then all but --freeze_layers, with layer decay."""
    head = {id(p) for classifier in classifiers(net) for p in classifier.parameters()}
    layers, last = layer_ids(net)
    if args.freeze_layers > last:
        raise UserError(
            f"--freeze_layers {args.freeze_layers}: this model has {last + 1} layers; should be 0 to {last}"
        )
    for name, p in net.named_parameters():
        wanted = id(p) in head if in_head_phase else layers[name] >= args.freeze_layers
        p.requires_grad_(wanted)
    groups = param_groups(net, weight_decay=args.weight_decay, layer_decay=1.0 if in_head_phase else args.layer_decay)
    return wrap_ddp(net, world), build_adamw(groups, lr=lr)


def freezing(args, in_head_phase: bool):
    """What to call after model.train(), so that frozen parts behave as in evaluation."""
    return freeze_backbone if in_head_phase else partial(freeze_batchnorm, everywhere=args.freeze_bn)


def phase_schedule(args, lr: float, in_head_phase: bool):
    """lr as a function of the fractional epoch: constant --head_lr for the head, then MAE's curve from its own start."""
    if in_head_phase:
        return lambda epoch: args.head_lr
    return lambda epoch: lr_at(
        epoch - args.head_epochs, lr=lr, min_lr=args.min_lr, warmup_epochs=args.warmup_epochs, epochs=args.epochs
    )
