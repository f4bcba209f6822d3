"""MAE's ViT names on top of timm, and the place in any timm model where the embedding lives."""

import re

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from util.choices import parse_mae_name
from util.errors import UserError

# MAE's sizes (He et al., table 8; tiny and small from DeiT): width, depth, heads.
VIT_SIZES = {
    "tiny": dict(embed_dim=192, depth=12, num_heads=3),
    "small": dict(embed_dim=384, depth=12, num_heads=6),
    "base": dict(embed_dim=768, depth=12, num_heads=12),
    "large": dict(embed_dim=1024, depth=24, num_heads=16),
    "huge": dict(embed_dim=1280, depth=32, num_heads=16),
}


def mae_vit(name: str, **kwargs) -> VisionTransformer:
    """MAE's fine-tuning ViT: LayerNorm eps 1e-6, qkv bias, a class token whatever the pooling.

    global_pool=True averages the patch tokens and normalises after (`fc_norm`); False reads the class token.
    """
    size, patch = parse_mae_name(name)
    kwargs = {"patch_size": patch, **VIT_SIZES.get(size, {}), **kwargs}
    if size == "custom" and not {"embed_dim", "depth", "num_heads"} <= set(kwargs):
        raise UserError(f"--model {name}: needs --model_kwargs embed_dim=.. depth=.. num_heads=..")
    if kwargs["embed_dim"] % kwargs["num_heads"]:
        raise UserError(
            f"--model {name}: embed_dim {kwargs['embed_dim']} must be a multiple of num_heads {kwargs['num_heads']}"
        )
    check_patch(kwargs["img_size"], kwargs["patch_size"])
    kwargs["global_pool"] = "avg" if kwargs.pop("global_pool") else "token"
    kwargs["drop_path_rate"] = kwargs.pop("drop_path")
    model = VisionTransformer(qkv_bias=True, norm_layer=_layer_norm, **kwargs)
    # MAE starts a classifier at 2e-5; timm at zero, which gives the first step's backbone no gradient.
    nn.init.trunc_normal_(model.head.weight, std=2e-5)
    return model


def _layer_norm(dim: int, **kwargs) -> nn.LayerNorm:
    return nn.LayerNorm(dim, **{"eps": 1e-6, **kwargs})


def check_patch(img_size, patch_size) -> None:
    """UserError unless the patch divides both sides of the image."""
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    ph, pw = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    if height % ph or width % pw:
        raise UserError(f"--input_size {height} {width}: must be multiples of the patch size {ph}")


def timm_classifier(name: str, *, img_size, **kwargs) -> nn.Module:
    """Any timm classifier. img_size and drop_path reach the families that know them; others adapt to any size."""
    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:3])
        raise UserError(f"--model {name}: not one of MAE's names or timm's{'; near: ' + close if close else ''}")
    drop_path = kwargs.pop("drop_path")
    optional = {"img_size": img_size if isinstance(img_size, int) else tuple(img_size), "drop_path_rate": drop_path}
    if not drop_path:
        del optional["drop_path_rate"]
    # timm has no list of who takes what: families without a position grid refuse img_size by TypeError.
    while True:
        try:
            return timm.create_model(name, **optional, **kwargs)
        except TypeError as error:
            refused = [k for k in optional if f"'{k}'" in str(error)]
            if not refused:
                raise UserError(f"--model {name}: {_one_line(error)}") from None
            if "drop_path_rate" in refused:
                raise UserError(f"--drop_path {drop_path}: {name} has no stochastic depth; use --drop_path 0") from None
            del optional[refused[0]]
        except Exception as error:
            if kwargs.get("pretrained"):
                raise UserError(
                    f"--pretrained: the weights of {name} could not be had ({_one_line(error)[:160]}); "
                    "offline, give a file of them with --finetune"
                ) from None
            if not isinstance(error, (RuntimeError, ValueError, AssertionError)):
                raise
            raise UserError(f"--model {name} with {optional} {kwargs}: {_one_line(error)}") from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def trunk_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks after the embedding, in order; the input of the first is the embedding point.

    The stem is what timm's own `group_matcher` calls one (class and position embeddings, patch embedding,
    convolutional stem with its norm); the trunk starts at the first child with parameters outside it.
    """
    matcher = model.group_matcher(coarse=False) if hasattr(model, "group_matcher") else None
    stem = _patterns(matcher["stem"]) if isinstance(matcher, dict) and "stem" in matcher else ["stem", "patch_embed"]
    is_stem = re.compile("|".join(stem)).match
    head = str(getattr(model, "default_cfg", {}).get("classifier", "head")).split(".")[0]
    blocks: list[nn.Module] = []
    for name, child in model.named_children():
        if name == head:
            break
        params = [f"{name}.{n}" for n, _ in child.named_parameters()]
        if not params or all(is_stem(n) for n in params):
            continue
        found = _flatten(child)
        if found is None and blocks:
            break  # past the trunk: final norm, head
        blocks += [child] if found is None else found
    if not blocks:
        raise UserError(f"{type(model).__name__}: found no block after its embedding to put noise before")
    return blocks


def _patterns(spec) -> list[str]:
    """timm writes a group as a regex, or a list of (regex, order) pairs."""
    if isinstance(spec, str):
        return [spec]
    return [p for item in spec for p in _patterns(item[0] if isinstance(item, tuple) else item)]


def _flatten(module: nn.Module) -> list[nn.Module] | None:
    """Blocks inside a container (a sequence, or a stage that keeps them in `.blocks`), depth first; else None."""
    inside = getattr(module, "blocks", module)
    if not isinstance(inside, (nn.Sequential, nn.ModuleList)):
        return None
    blocks = []
    for child in inside:
        inner = _flatten(child)
        blocks += [child] if inner is None else inner
    return blocks


class _BlendInput:
    """Forward pre-hook that noises a block's first positional argument.

    An object, not a closure: copy.deepcopy of a model (an EMA) then carries its own noise module, which follows the
    copy's train() and eval(). A closure would leave the original's noise on in the copy's evaluation.
    """

    def __init__(self, noise: nn.Module):
        self.noise = noise

    def __call__(self, module: nn.Module, inputs: tuple) -> tuple:
        if not isinstance(inputs[0], torch.Tensor):
            raise UserError(f"{type(module).__name__}: its input is not a single tensor; use --alpha_blend 0")
        return (self.noise(inputs[0]), *inputs[1:])


def attach_noise(model: nn.Module, noise: nn.Module) -> None:
    """Register `noise` (an AlphaBlend) as `model.alpha_blend` and run it at its layer's input; keys do not change."""
    model.alpha_blend = noise
    noise.num_prefix_tokens = getattr(model, "num_prefix_tokens", 0)
    if noise.space == "pixel":
        model.register_forward_pre_hook(_BlendInput(noise))
        return
    blocks = trunk_blocks(model)
    if noise.layer >= len(blocks):
        raise UserError(f"--noise_layer {noise.layer}: {type(model).__name__} has blocks 0 to {len(blocks) - 1}")
    blocks[noise.layer].register_forward_pre_hook(_BlendInput(noise))


def patch_grid(model: nn.Module) -> tuple[int, int] | None:
    """(rows, columns) of a model's patch grid, or None for models without one."""
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    return None if grid is None else (int(grid[0]), int(grid[1]))


def resize_pos_embed(
    pos_embed: torch.Tensor, grid: tuple[int, int], num_prefix: int, target_prefix: int
) -> torch.Tensor:
    """[1, P + N, D] -> [1, P' + H W, D]: bicubic over the patch part, prefix positions kept.

    The old grid is taken as square, or as the factorisation of N nearest to the new aspect ratio.
    """
    prefix, patches = pos_embed[:, :num_prefix], pos_embed[:, num_prefix:]
    N, D = patches.shape[1:]
    aspect = grid[0] / grid[1]
    side = int(N**0.5)
    rows = (
        side
        if side * side == N
        else min((r for r in range(1, N + 1) if N % r == 0), key=lambda r: abs(r * r / N - aspect))
    )
    if (rows, N // rows) != tuple(grid):
        image = patches.reshape(1, rows, N // rows, D).permute(0, 3, 1, 2).float()
        image = torch.nn.functional.interpolate(image, size=grid, mode="bicubic", align_corners=False)
        patches = image.permute(0, 2, 3, 1).flatten(1, 2).to(pos_embed.dtype)
    return torch.cat([prefix[:, :target_prefix], patches], dim=1)
