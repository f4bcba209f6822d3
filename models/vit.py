"""MAE's ViT names on top of timm, timm's other classifiers, and where noise enters a model."""

import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import timm
import torch
from huggingface_hub import constants
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from augment.alpha_blend import AlphaBlend
from augment.noise import Layout
from models.tokens import init_transformer, sincos_pos_embed
from util.choices import parse_mae_name
from util.errors import ParameterError, UserError, reason_of

# MAE's sizes (He et al., table 8; tiny and small from DeiT): width, depth, heads.
VIT_SIZES = {
    "tiny": dict(embed_dim=192, depth=12, num_heads=3),
    "small": dict(embed_dim=384, depth=12, num_heads=6),
    "base": dict(embed_dim=768, depth=12, num_heads=12),
    "large": dict(embed_dim=1024, depth=24, num_heads=16),
    "huge": dict(embed_dim=1280, depth=32, num_heads=16),
}


TimmModel = Any  # an nn.Module with timm's methods; timm has no type for it

# Keywords that must be whole numbers of 1 or more, or tuples of them, in every family.
SIZES = ("patch_size", "embed_dim", "embed_dims", "dims", "depth", "depths", "layers", "num_heads", "window_size")


class NoStochasticDepth(ParameterError):
    """drop_path for a family without stochastic depth."""


def mae_vit(name: str, *, global_pool: bool | str, drop_path: float, **kwargs) -> VisionTransformer:
    """MAE's fine-tuning ViT: LayerNorm eps 1e-6, qkv bias, a class token with any pooling.

    It starts as pretraining's encoder does (`init_as_encoder`), so that a network from scratch lacks only the
    pretraining. weight_init="" gives timm's default instead, "jax" and "moco" its others.
    global_pool=True averages the patch tokens and then normalises (`fc_norm`); False uses the class token. A string is
    timm's name of another pooling.
    """
    parsed = parse_mae_name(name)
    assert parsed is not None, name
    size, patch = parsed
    kwargs = {
        "patch_size": patch,
        **VIT_SIZES.get(size, {}),
        "qkv_bias": True,
        "norm_layer": _layer_norm,
        "drop_path_rate": drop_path,
        **kwargs,
    }
    if size == "custom" and not {"embed_dim", "depth", "num_heads"} <= set(kwargs):
        raise ParameterError(f"<model> {name}: needs <model_kwargs> embed_dim=.. depth=.. num_heads=..")
    check_sizes(name, kwargs)
    if kwargs["embed_dim"] % kwargs["num_heads"]:
        raise ParameterError(
            f"<model> {name}: embed_dim {kwargs['embed_dim']} must be a multiple of num_heads {kwargs['num_heads']}"
        )
    check_patch(kwargs["img_size"], kwargs["patch_size"])
    if isinstance(global_pool, bool):
        global_pool = "avg" if global_pool else "token"
    kwargs["global_pool"] = global_pool
    try:
        model = VisionTransformer(**kwargs)
    except Exception as error:  # keywords come from the user, and a family may stumble over them in any way
        raise ParameterError(f"<model> {name} with {_shown(kwargs)}: {reason_of(error)}") from None
    if kwargs.get("weight_init", "skip") == "skip":  # with "skip", timm leaves tokens and positions unset
        init_as_encoder(model)
    if isinstance(model.head, nn.Linear):
        # As in MAE's fine-tuning. Zeros, as in ViT's official code, would give the backbone no gradient at first.
        nn.init.trunc_normal_(model.head.weight, std=2e-5)
    return model


@torch.no_grad()
def init_as_encoder(model: VisionTransformer) -> None:
    """MAE's random weights, and its sine-cosine positions, which fine-tuning trains; in place.

    Tokens before the patches have the position 0. A width that is not a multiple of 4 has no sines and cosines: there,
    positions are N(0, 0.02^2).
    """
    init_transformer(model)
    if model.pos_embed is None:
        return
    if model.embed_dim % 4:
        nn.init.normal_(model.pos_embed, std=0.02)
        return
    positions = sincos_pos_embed(model.embed_dim, model.patch_embed.grid_size)[:, 1:]
    model.pos_embed.zero_()[:, -positions.shape[1] :] = positions


def _layer_norm(dim: int, **kwargs) -> nn.LayerNorm:
    return nn.LayerNorm(dim, **{"eps": 1e-6, **kwargs})


def check_patch(img_size, patch_size) -> None:
    """UserError unless the patch divides both sides of the image."""
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    if not isinstance(patch_size, int) and len(patch_size) != 2:
        raise ParameterError(f"<model_kwargs> patch_size={patch_size}: should be a whole number, or (height,width)")
    ph, pw = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    if height % ph or width % pw:
        raise ParameterError(f"<img_size> {height} {width}: must be multiples of the patch size {ph}")


def check_sizes(name: str, kwargs: dict) -> None:
    """UserError for sizes below 1: with depth=-1, for example, timm silently builds a network without blocks."""
    for key in [k for k in SIZES if k in kwargs]:
        values = kwargs[key] if isinstance(kwargs[key], (tuple, list)) else (kwargs[key],)
        values = [v for value in values for v in (value if isinstance(value, (tuple, list)) else (value,))]
        if not all(isinstance(v, int) and not isinstance(v, bool) and v >= 1 for v in values):
            raise ParameterError(f"<model> {name}: {key} {kwargs[key]}: should be a whole number of 1 or more")


def timm_classifier(name: str, *, img_size, drop_path: float, global_pool: bool | str, **kwargs) -> nn.Module:
    """Any timm classifier. Families that take img_size and drop_path get them; others work at any size.

    NoStochasticDepth if drop_path is above 0 and the family has none. global_pool: timm's name of a pooling, or a bool
    for the family's own.
    """
    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:3])
        raise ParameterError(f"<model> {name}: not one of MAE's names or timm's{'; near: ' + close if close else ''}")
    check_sizes(name, kwargs)
    if not isinstance(global_pool, bool):
        kwargs["global_pool"] = global_pool
    if kwargs.get("pretrained"):
        do_not_retry_offline()
    optional = {"img_size": img_size, **({"drop_path_rate": drop_path} if drop_path else {})}
    # timm does not list which families take img_size: those without a position grid raise TypeError.
    while True:
        try:
            return timm.create_model(name, **{**optional, **kwargs})
        except Exception as error:  # keywords come from the user, and a family may stumble over them in any way
            refused = [k for k in optional if f"'{k}'" in str(error)] if isinstance(error, TypeError) else []
            if "drop_path_rate" in refused:
                raise NoStochasticDepth(
                    f"<drop_path> {drop_path}: {name} has no stochastic depth; use <drop_path> 0"
                ) from None
            if refused:
                del optional[refused[0]]
                continue
            if kwargs.pop("pretrained", False) and _can_be_built(name, {**optional, **kwargs}):
                where = "huggingface.co cannot be reached" if constants.HF_HUB_OFFLINE else reason_of(error)
                raise ParameterError(
                    f"<pretrained>: the weights of {name} are not on this machine, and {where}; give a file of them "
                    "with <finetune>"
                ) from None
            raise ParameterError(f"<model> {name} with {_shown({**optional, **kwargs})}: {reason_of(error)}") from None


def do_not_retry_offline() -> None:
    """Without a network, the hub's library retries five times in a minute; make it use only files on disk."""
    host = urlsplit(constants.ENDPOINT).hostname
    try:
        if not getproxies():  # with a proxy there is no direct connection to test
            socket.create_connection((host, 443), timeout=10).close()
    except OSError:
        constants.HF_HUB_OFFLINE = True


def _can_be_built(name: str, kwargs: dict) -> bool:
    try:
        without_weights(lambda: timm.create_model(name, **kwargs))
    except Exception:
        return False
    return True


def without_weights(build: Callable[[], nn.Module]) -> nn.Module:
    """build() on the meta device, where weights take no memory; random states stay as they are."""
    try:
        with torch.device("meta"):
            return build()
    except Exception:  # timm 1.0.15 reads values of tensors while building
        with torch.random.fork_rng(devices=[]):
            return build()


def _shown(kwargs: dict) -> str:
    return " ".join(f"{k}={v}" for k, v in kwargs.items() if not callable(v))[:300]


def classifier_prefixes(model: nn.Module) -> list[str]:
    """Module names of the final classifiers by timm's `default_cfg`: ['head.fc'], or ['head', 'head_dist']."""
    names = getattr(model, "default_cfg", {}).get("classifier") or "head"
    return [names] if isinstance(names, str) else list(names)


def classifiers(model: TimmModel) -> list[nn.Module]:
    """The final classifiers; several for some families (DeiT distilled, CrossViT, VOLO)."""
    own = model.get_classifier()
    found = list(own) if isinstance(own, (tuple, list, nn.ModuleList)) else [own]
    modules = dict(model.named_modules())
    found += [modules[n] for n in classifier_prefixes(model) if n in modules]
    return list(dict.fromkeys(found))


def enable_grad_checkpointing(model: TimmModel, name: str) -> None:
    """UserError for families without gradient checkpointing."""
    try:
        model.set_grad_checkpointing()
    except (AssertionError, AttributeError, NotImplementedError):
        raise ParameterError(f"<grad_checkpointing>: {name} does not support it; omit the flag") from None


def trunk_blocks(model: TimmModel) -> list[nn.Module]:
    """The blocks after the embedding, in order; the first block's input is the embedding.

    The stem is defined by timm's `group_matcher` (class and position embeddings, patch embedding, convolutional stem
    with its norm); the trunk starts at the first child with parameters outside the stem.
    """
    matcher = model.group_matcher(coarse=False) if hasattr(model, "group_matcher") else None
    stem = _patterns(matcher["stem"]) if isinstance(matcher, dict) and "stem" in matcher else ["stem", "patch_embed"]
    is_stem = re.compile("|".join(stem)).match
    heads = {name.split(".")[0] for name in classifier_prefixes(model)}
    blocks: list[nn.Module] = []
    for name, child in model.named_children():
        if name in heads:
            break
        params = [f"{name}.{n}" for n, _ in child.named_parameters()]
        if not params or all(is_stem(n) for n in params):
            continue
        found = _flatten(child)
        if found is None and blocks:
            break  # past the trunk: final norm, head
        blocks += [child] if found is None else found
    if not blocks:
        raise UserError(f"{type(model).__name__}: has no block after its embedding, so noise cannot be added")
    return blocks


def _patterns(spec) -> list[str]:
    """A group of timm's group_matcher is a regex, or a list of (regex, order) pairs."""
    if isinstance(spec, str):
        return [spec]
    return [p for item in spec for p in _patterns(item[0] if isinstance(item, tuple) else item)]


def _flatten(module: nn.Module) -> list[nn.Module] | None:
    """Blocks in a container (a sequence, or a stage with `.blocks`), depth first; else None."""
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

    An object, not a closure: copy.deepcopy of a model (an EMA) then has its own noise module, which follows the copy's
    train() and eval(). With a closure, the copy would use the original's noise, also in evaluation.
    """

    def __init__(self, noise: nn.Module, layer: int):
        self.noise, self.layer = noise, layer

    def __call__(self, module: nn.Module, inputs: tuple) -> tuple:
        if not isinstance(inputs[0], torch.Tensor):
            raise ParameterError(f"{type(module).__name__}: its input is not a single tensor; use <alpha_blend> 0")
        return (self.noise(inputs[0], self.layer), *inputs[1:])


def attach_noise(model: nn.Module, noise: AlphaBlend) -> list:
    """Register `noise` as `model.alpha_blend` and apply it to its layers' inputs; state_dict keys do not change.

    Returns the handles of the hooks.
    """
    c, name = noise.config, type(model).__name__
    model.alpha_blend = noise
    blocks, handles = trunk_blocks(model) if c.space == "embedding" else [model], []
    for layer in c.layers if c.space == "embedding" else (0,):
        if layer >= len(blocks):
            raise ParameterError(f"<noise_layer> {layer}: {name} has blocks 0 to {len(blocks) - 1}")
        handles.append(blocks[layer].register_forward_pre_hook(_BlendInput(noise, layer)))
    if c.space == "pixel":
        if c.kind == "token_drop":
            raise ParameterError("<noise_kind> token_drop: leaves out tokens, and pixels are not tokens")
        return handles
    noise.place(
        Layout(
            prefix=getattr(model, "num_prefix_tokens", 0),
            grid=patch_grid(model),
            channels_last=getattr(model, "output_fmt", "") == "NHWC",
            tokens=isinstance(model, VisionTransformer),
        )
    )
    if c.kind == "colour" and noise.layout.grid is None and noise.layout.prefix:
        raise ParameterError(f"<noise_kind> colour: {name} has no grid of patches; choose another")
    if c.kind == "token_drop" and not noise.layout.tokens:
        raise ParameterError(
            f"<noise_kind> token_drop: {name} is not a plain sequence of patches, so none can be left out"
        )
    return handles


@contextmanager
def noise_for_a_while(model: nn.Module, noise: AlphaBlend) -> Iterator[AlphaBlend]:
    """Replace the model's noise, which must be off, by `noise` inside the block."""
    own = model._modules.pop("alpha_blend", None)
    handles = attach_noise(model, noise.to(next(model.parameters()).device))
    try:
        yield noise
    finally:
        for handle in handles:
            handle.remove()
        del model.alpha_blend
        if own is not None:
            model.alpha_blend = own


def has_batchnorm(model: nn.Module) -> bool:
    """Whether evaluation uses running statistics of training."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


def patch_grid(model: nn.Module) -> tuple[int, int] | None:
    """(rows, columns) of a model's patch grid, or None for models without one."""
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    return None if grid is None else (int(grid[0]), int(grid[1]))
