"""`create_model` builds a classifier by name."""

from numbers import Integral
from typing import Any

import timm
from torch import nn

import models.families  # noqa: F401 (registers them with timm)
from augment.alpha_blend import AlphaBlend
from models.vit import attach_noise, mae_vit, timm_classifier
from util.choices import MAE_NAMES, is_mae_name
from util.errors import ParameterError


def create_model(
    name: str,
    *,
    num_classes: int,
    img_size: int | tuple[int, int] = 224,
    in_chans: int = 3,
    global_pool: bool | str = True,
    drop_path: float = 0.0,
    alpha_blend: AlphaBlend | None = None,
    pretrained: bool = False,
    **kwargs,
) -> nn.Module:
    """A classifier: images [B, in_chans, H, W], normalised -> logits [B, num_classes].

    name: MAE's vit_{tiny,small,base,large}_patch16 and vit_huge_patch14 (any other patch size: vit_tiny_patch4),
        or any timm model name. MAE's names take precedence over timm's without size suffix.
    global_pool: average pooling (True) or class token (False), for MAE's names; timm names keep their own head. A
        string, for both, is timm's name of a pooling: `avg`, `token`, `map`, ...
    alpha_blend: an AlphaBlend, applied to the embedding (or its own layer or space); keys do not change.
    pretrained: timm's own weights (a download).
    kwargs: passed to the model, e.g. patch_size, embed_dim, drop_rate.

    UserError if no such model can be built.
    """
    img_size = _checked_size(img_size)
    for parameter, value, least in (("num_classes", num_classes, 0), ("in_chans", in_chans, 1)):
        if not _is_whole(value, least):
            raise ParameterError(f"<{parameter}> {value}: should be a whole number of {least} or more")
    if not 0 <= drop_path <= 1:
        raise ParameterError(f"<drop_path> {drop_path}: should be a number in [0, 1]")
    common = dict(
        num_classes=num_classes,
        in_chans=in_chans,
        img_size=img_size,
        global_pool=global_pool,
        drop_path=drop_path,
        **{k: v for k, v in kwargs.items() if v is not None},
    )
    model: Any  # a net with the added attribute `built_for`
    if is_mae_name(name):
        if pretrained:
            raise ParameterError(
                f"<pretrained> with <model> {name}: MAE's names have no timm weights; give <finetune> FILE"
            )
        model = mae_vit(name, **common)
    else:
        model = timm_classifier(name, pretrained=pretrained, **common)
    model.built_for = (img_size, img_size) if isinstance(img_size, int) else img_size  # few of timm's models store it
    if alpha_blend is not None:
        attach_noise(model, alpha_blend)
    return model


def _checked_size(img_size) -> int | tuple[int, int]:
    """A number stands for a square. timm would build networks for invalid sizes, such as 0 or three numbers."""
    sides = tuple(img_size) if isinstance(img_size, (tuple, list)) else (img_size, img_size)
    if len(sides) != 2 or not all(_is_whole(s, 1) for s in sides):
        raise ParameterError(f"<img_size> {img_size}: should be one or two whole numbers of 1 or more")
    return int(sides[0]) if sides[0] == sides[1] else (int(sides[0]), int(sides[1]))


def _is_whole(value, least: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def list_models(pattern: str = "") -> list[str]:
    """MAE's names, then timm's; `pattern` filters with wildcards as timm.list_models does."""
    import fnmatch

    mae = [n for n in MAE_NAMES if not pattern or fnmatch.fnmatch(n, pattern)]
    return mae + [n for n in timm.list_models(pattern) if n not in mae]
