"""Parameter groups (layer-wise lr decay, weight-decay exemptions) and the optimizer."""

from dataclasses import dataclass

import torch
from timm.models import group_parameters
from timm.models.vision_transformer import VisionTransformer
from timm.utils import ModelEmaV3
from torch import nn

from util.errors import UserError

# Exempt in every model: MAE exempts the first two, DeiT and timm the rest; Swin-V2's logit_scale, which timm 1.0.15
# leaves out by mistake.
NO_WEIGHT_DECAY = {"cls_token", "pos_embed", "dist_token", "reg_token", "logit_scale"}


def layer_ids(model: nn.Module) -> tuple[dict[str, int], int]:
    """Layer number of every parameter, and the number of the last layer.

    ViT, as MAE and BEiT count: embedding = 0, block i = i + 1, the rest = depth + 1. Other families: timm's
    `group_matcher`, renumbered without gaps; a model without one counts as a single layer.
    """
    names = [n for n, _ in model.named_parameters()]
    if isinstance(model, VisionTransformer):
        last = len(model.blocks) + 1

        def vit_layer(name: str) -> int:
            if name in NO_WEIGHT_DECAY or name.startswith("patch_embed"):
                return 0
            return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else last

        return {n: vit_layer(n) for n in names}, last
    matcher = getattr(model, "group_matcher", None)
    if matcher is None:
        return dict.fromkeys(names, 0), 0
    ids = group_parameters(model, matcher(coarse=False), reverse=True)
    ids = {n: ids[n] for n in names}
    order = {old: new for new, old in enumerate(sorted(set(ids.values())))}
    return {n: order[i] for n, i in ids.items()}, len(order) - 1


def param_groups(model: nn.Module, *, weight_decay: float, layer_decay: float = 1.0) -> list[dict]:
    """AdamW parameter groups: dicts with params, names, lr_scale and weight_decay; every parameter exactly once.

    lr_scale = layer_decay ** (last - layer). No weight decay for 1-D parameters, class and position embeddings
    and those that the model's `no_weight_decay()` names. Frozen parameters are left out.
    Source: MAE util/lr_decay.py's numbers for ViTs; timm's layer map elsewhere.
    """
    layers, last = layer_ids(model)
    exempt = NO_WEIGHT_DECAY | set(getattr(model, "no_weight_decay", set)())
    groups: dict[tuple[int, bool], dict] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        decays = p.ndim > 1 and name not in exempt and name.split(".")[-1] not in exempt
        key = (layers[name], decays)
        if key not in groups:
            groups[key] = {
                "params": [],
                "names": [],
                "lr_scale": layer_decay ** (last - layers[name]),
                "weight_decay": weight_decay if decays else 0.0,
            }
        groups[key]["params"].append(p)
        groups[key]["names"].append(name)
    result = [groups[k] for k in sorted(groups)]
    covered = [id(p) for g in result for p in g["params"]]
    wanted = {id(p) for p in model.parameters() if p.requires_grad}
    assert len(covered) == len(set(covered)) and set(covered) == wanted, (
        "parameter groups must cover every parameter once"
    )
    return result


def build_adamw(groups: list[dict], *, lr: float, betas: tuple[float, float] = (0.9, 0.999)) -> torch.optim.AdamW:
    """Fused AdamW: one kernel per dtype and device, and it skips bad steps without a sync (see `optimizer_step`)."""
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def allocate_gradients(parameters: list[nn.Parameter]) -> None:
    """Allocate zero gradients before training, next to each other, for `optimizer_step(keep_gradients=True)`.

    A gradient allocated in the middle of a backward pass outlives the activations around it and leaves a hole in the
    C heap. With several backward passes in a row (engine_pretrain.py) each leaves its own: 784 MB instead of 503 for
    NoProp's CIFAR defaults with T = 10, batch 64 (bench/notes.md).
    """
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)


@dataclass(frozen=True)
class Update:
    """An update, made or skipped: gradient norm before clipping and loss scale; 0-d tensors on the device."""

    norm: torch.Tensor
    skipped: torch.Tensor  # bool: the norm is not finite
    loss_scale: torch.Tensor  # 1 unless fp16


def optimizer_step(
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    parameters: list[nn.Parameter],
    clip_grad: float | None = None,
    *,
    keep_gradients: bool = False,
) -> Update:
    """Unscale, clip to the norm clip_grad, update unless the norm is not finite, zero the gradients.

    A skipped step leaves weights and moments unchanged, without a sync: fused AdamW reads `found_inf`, the hook that
    GradScaler uses. Under DDP the reduced gradients are equal, so all ranks skip together.
    keep_gradients: zero them in place instead of freeing them (see `allocate_gradients`).
    """
    loss_scale = scaler.scale(torch.ones((), device=parameters[0].device))  # before this update changes it
    scaler.unscale_(optimizer)  # does nothing unless fp16
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if clip_grad is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_grad, norm)
    skipped = ~torch.isfinite(norm)
    if not scaler.is_enabled():
        optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
        optimizer.grad_scale = None  # type: ignore[attr-defined]
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=not keep_gradients)
    return Update(norm, skipped, loss_scale)


class Ema(ModelEmaV3):
    @torch.no_grad()
    def update(self, model: nn.Module, step: int | None = None, skipped: torch.Tensor | None = None) -> None:
        """Average in `model` after update number `step`. skipped: bool, 0-d; if True, the average does not change.

        ModelEmaV3's update with its weight as a tensor on the device, which avoids a sync.
        """
        pairs = list(zip(self.module.state_dict().values(), model.state_dict().values()))
        averages, values = zip(*[(a, v) for a, v in pairs if a.is_floating_point()])
        weight = averages[0].new_full((), 1.0 - self.get_decay(step))
        weight = weight if skipped is None else torch.where(skipped, 0.0, weight)
        torch._foreach_lerp_(averages, values, [weight] * len(averages))
        for average, value in pairs:
            if not average.is_floating_point():
                average.copy_(value)


def build_ema(model: nn.Module, decay: float) -> Ema | None:
    """None for decay 0. Warm-up: after n updates the decay is at most 1 - (1 + n) ** (-2 / 3)."""
    if not decay:
        return None
    return Ema(model, decay=decay, use_warmup=True, warmup_power=2 / 3)


def restore_optimizer(optimizer, state: dict) -> None:
    """Moments from the checkpoint; lr_scale, weight_decay and the rest from this run's flags, matched by name."""
    fresh = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    by_name, order = {}, []
    for group in state["param_groups"]:
        for name, i in zip(group["names"], group["params"]):
            by_name[name] = i
    for group in optimizer.param_groups:
        order += group["names"]
    if set(order) != set(by_name):
        raise UserError("--resume: the checkpoint's optimizer has other parameters; was it another model or phase?")
    # Another --layer_decay groups the parameters differently: renumber the moments to this run's order.
    moments = {new: state["state"][by_name[name]] for new, name in enumerate(order) if by_name[name] in state["state"]}
    parameters = [p for g in optimizer.param_groups for p in g["params"]]
    for i, moment in moments.items():
        for value in moment.values():
            if isinstance(value, torch.Tensor) and value.ndim and value.shape != parameters[i].shape:
                raise UserError(
                    f"--resume: the checkpoint's optimizer has {list(value.shape)} for {order[i]}, "
                    f"which is {list(parameters[i].shape)}"
                )
    groups, start = [], 0
    for group in fresh:
        n = len(group["names"])
        groups.append({**group, "params": list(range(start, start + n))})
        start += n
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
