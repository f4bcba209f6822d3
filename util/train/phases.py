"""The two phases of fine-tuning: the head on a frozen backbone, then all weights except --freeze_layers."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from models.vit import classifiers
from util.cli.finetune import FinetuneOptions
from util.cli.settings import Phases
from util.dist import Precision, World, wrap_ddp
from util.errors import UserError
from util.lr_sched import lr_at
from util.optim import Ema, build_adamw, layer_ids, param_groups
from util.train.run import Training


def freeze_backbone(model) -> None:
    """Head phase: the backbone's BatchNorm and dropout work as in evaluation; the noise and the dropout before the
    classifier stay on."""
    model.eval()
    model.training = True  # not of its children: EfficientNet, ResNet and others use F.dropout(..., self.training)
    for name, module in model.named_modules():
        if name.startswith("head") and isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.train()  # next to the classifier: timm's `head_drop` (ViT) or `head.drop` (Swin, ConvNeXt)
    for classifier in classifiers(model):
        classifier.train()
    if hasattr(model, "alpha_blend"):
        model.alpha_blend.train()


def freeze_batchnorm(model, everywhere: bool) -> None:
    """Freeze the BatchNorm statistics of frozen layers, or of all layers if `everywhere` (--freeze_bn).

    Statistics of small batches or small data sets shift every feature.
    """
    for module in model.modules():
        if not isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            continue
        if everywhere or (module.affine and not module.weight.requires_grad):
            module.eval()


def enter_phase(
    options: FinetuneOptions,
    net: nn.Module,
    in_head_phase: bool,
    lr: float,
    world: World,
    precision: Precision,
    ema: Ema | None,
) -> Training:
    """Set up a phase: first the head on a frozen backbone, then everything but --freeze_layers, with layer decay.

    lr: peak of the second phase, which follows MAE's schedule from its start; the head's lr is constant, --head_lr.
    """
    phases, optimizer = options.phases, options.optimizer
    head = {id(p) for classifier in classifiers(net) for p in classifier.parameters()}
    layers, last = layer_ids(net)
    if phases.freeze_layers > last:
        raise UserError(
            f"--freeze_layers {phases.freeze_layers}: this model has {last + 1} layers; should be 0 to {last}"
        )
    for name, p in net.named_parameters():
        p.requires_grad_(id(p) in head if in_head_phase else layers[name] >= phases.freeze_layers)

    def head_lr(epoch: float) -> float:
        return phases.head_lr

    def curve(epoch: float) -> float:
        return lr_at(
            epoch - phases.head_epochs,
            lr=lr,
            min_lr=optimizer.min_lr,
            warmup_epochs=optimizer.warmup_epochs,
            epochs=optimizer.epochs,
        )

    layer_decay = 1.0 if in_head_phase else optimizer.layer_decay
    groups = param_groups(net, weight_decay=optimizer.weight_decay, layer_decay=layer_decay)
    return Training(
        net,
        wrap_ddp(net, world),
        build_adamw(groups, lr=lr),
        precision,
        lr_at=head_lr if in_head_phase else curve,
        ema=ema,
        freeze=freezing(phases, in_head_phase),
    )


def freezing(phases: Phases, in_head_phase: bool) -> Callable[[nn.Module], None]:
    """A function to call after net.train(), so that frozen parts work as in evaluation."""
    return freeze_backbone if in_head_phase else partial(freeze_batchnorm, everywhere=phases.freeze_bn)
