"""RandAugment and colour jitter on whole uint8 batches, for in-memory data sets, on any device.

128 images of 32 pixels take 6 ms of CPU here, 16 ms one by one with OpenCV (augment/opencv_ops.py) and 21 ms with timm
on Pillow; at 224 pixels one by one is faster (bench/rand_augment.py). Other policies of timm use Pillow.

timm's policies and magnitudes (Cubuk et al., RandAugment, CVPR Workshops 2020), with counted random numbers.
Geometric operations interpolate bilinearly (timm's default draws bilinear or bicubic), one resampling per layer.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from timm.data.auto_augment import rand_augment_transform
from torchvision.transforms.v2 import functional as TVF

from augment import pixel_ops as ops
from augment.image import timm_policy
from augment.transfer import to_device
from util.choices import is_policy, is_rand_augment
from util.seed import counted_normal, counted_uniform, sample_rng

# Table lookups, then affine maps, then the rest: batches are sorted by operation, so each kind is one slice.
GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
OPS = (*ops.TABLES, *GEOMETRIC, "Color", "Sharpness")
_STREAM = 16  # layer i draws uniforms from stream 16 + 2 i and normals from 17 + 2 i
_JITTER_STREAM = 3


@dataclass(frozen=True)
class RandAugmentPolicy:
    """`layers` operations per image, drawn with replacement, each applied with probability `prob`.

    Magnitude ~ N(magnitude, std), or U(0, magnitude) if std is infinite, clipped to 0..maximum.
    `increasing`: posterize, solarize and the enhancing operations grow stronger with the magnitude.
    """

    magnitude: float
    layers: int
    prob: float
    std: float
    maximum: float
    increasing: bool


def parse_rand_augment(config: str) -> RandAugmentPolicy:
    """Parse timm's string, such as rand-m9-mstd0.5-inc1, with timm. ValueError for another policy."""
    if not is_rand_augment(config):
        raise ValueError(
            f"aa {config!r}: should be as rand-m9-mstd0.5-inc1, of m, n, p, mstd, mmax and inc with numbers"
        )
    policy = rand_augment_transform(config.replace("-inc0", ""), {})  # timm 1.0.15 reads any inc as 1
    op = policy.ops[0]
    increasing = any(o.name.endswith("Increasing") for o in policy.ops)
    return RandAugmentPolicy(
        op.magnitude, policy.num_layers, op.prob, op.magnitude_std, op.magnitude_max or 10.0, increasing
    )


def rand_augment(
    x: torch.Tensor, policy: str | RandAugmentPolicy, *, seed: int, epoch: int, index: torch.Tensor, fill: list[int]
) -> torch.Tensor:
    """RandAugment of uint8 [B, C, H, W], C = 1 or 3, into a new tensor.

    fill: level per channel, 0..255, for uncovered pixels. Random decisions are computed on index's device.
    """
    if isinstance(policy, str):
        policy = parse_rand_augment(policy)
    if x.shape[1] not in (1, 3):
        raise ValueError(f"RandAugment: images have {x.shape[1]} channels; needs 1 or 3")
    for layer in range(policy.layers):
        op, level, sign = draw_layer(policy, seed, epoch, index, layer)
        x = apply_layer(x, op, level, sign, policy.increasing, fill)
    return x


class PillowPolicy:
    """Any policy of timm on uint8 [B, C, H, W], image by image with Pillow: slower, for all but RandAugment.

    An image's draws depend on (seed, epoch, index) only. mean: per channel in [0, 1], fills uncovered pixels.
    """

    def __init__(self, aa: str, mean: tuple[float, ...]):
        if not is_policy(aa):
            raise ValueError(f"aa {aa!r}: should be one of timm's policies")
        self.aa, self.mean = aa, mean
        self.policies: dict[tuple[int, int], Callable] = {}

    def __call__(self, x: torch.Tensor, *, seed: int, epoch: int, index: torch.Tensor) -> torch.Tensor:
        size = (x.shape[-2], x.shape[-1])
        if size not in self.policies:
            self.policies[size] = timm_policy(self.aa, size, self.mean)
        out = []
        for image, number in zip(x.cpu(), index.tolist()):
            with sample_rng(seed, epoch, number):
                out.append(TVF.pil_to_tensor(self.policies[size](TVF.to_pil_image(image))))
        return to_device(torch.stack(out), x.device)


def draw_layer(policy: RandAugmentPolicy, seed: int, epoch: int, index: torch.Tensor, layer: int):
    """One layer's decisions: (op int64 [B] into OPS or -1 for none, magnitude float32 [B], sign -1 or 1 [B])."""
    u = counted_uniform(seed, epoch, index, 4, _STREAM + 2 * layer)
    op = torch.where(u[:, 0] < policy.prob, (u[:, 1] * len(OPS)).long(), -1)
    if policy.std == math.inf:
        level = policy.magnitude * u[:, 2]
    else:
        level = torch.full_like(u[:, 2], policy.magnitude)
        if policy.std > 0:
            level += policy.std * counted_normal(seed, epoch, index, 1, _STREAM + 2 * layer + 1)[:, 0]
    return op, level.clamp(0.0, policy.maximum), torch.where(u[:, 3] < 0.5, -1.0, 1.0)


def op_argument(name: str, level: torch.Tensor, sign: torch.Tensor, increasing: bool) -> torch.Tensor:
    """The operation's argument from magnitude [B] and sign [B]: degrees, factors, levels, bits, image widths."""
    fraction = level.double() / 10.0
    if name == "Rotate":
        return sign * 30.0 * fraction
    if name in ("ShearX", "ShearY"):
        return sign * 0.3 * fraction
    if name in ("TranslateX", "TranslateY"):
        return sign * 0.45 * fraction
    if name == "Posterize":
        bits = (4.0 * fraction).long()
        return 4 - bits if increasing else bits
    if name == "Solarize":
        threshold = (256.0 * fraction).long().clamp(max=256)
        return 256 - threshold if increasing else threshold
    if name == "SolarizeAdd":
        return (110.0 * fraction).long().clamp(max=128)
    factor = (1.0 + sign * 0.9 * fraction).clamp(min=0.1) if increasing else 0.1 + 1.8 * fraction
    return factor.float()


def affine_matrix(name: str, argument: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Output-to-input matrices of a geometric operation, float64 [B, 2, 3], as Pillow's rotate and transform do."""
    matrix = torch.eye(2, 3, dtype=torch.float64, device=argument.device).repeat(len(argument), 1, 1)
    if name == "Rotate":
        angle = -torch.deg2rad(argument.double())
        cos, sin = angle.cos(), angle.sin()
        x, y = width / 2.0, height / 2.0
        first = torch.stack([cos, sin, x - cos * x - sin * y], dim=1)
        return torch.stack([first, torch.stack([-sin, cos, y + sin * x - cos * y], dim=1)], dim=1)
    row, column, unit = {
        "ShearX": (0, 1, 1.0),
        "ShearY": (1, 0, 1.0),
        "TranslateX": (0, 2, width),
        "TranslateY": (1, 2, height),
    }[name]
    matrix[:, row, column] = argument.double() * unit
    return matrix


def apply_layer(x: torch.Tensor, op, level, sign, increasing: bool, fill: list[int]) -> torch.Tensor:
    """Operation op[b] of OPS (-1: none) on each x[b]; op, level and sign are draw_layer's, with len(x) entries each."""
    height, width = x.shape[-2:]
    # Sorted by operation, so that each works on a slice: two gathers of images instead of many gathers and scatters.
    order = op.argsort()
    counts = torch.bincount(op + 1, minlength=len(OPS) + 1).tolist()
    level, sign = level[order], sign[order]
    x = x.index_select(0, to_device(order, x.device))
    first = stop = counts[0]
    tables, matrices = [], []
    for name, count in zip(OPS, counts[1:]):
        if count == 0:
            continue
        start, stop = stop, stop + count
        argument = op_argument(name, level[start:stop], sign[start:stop], increasing)
        if name in GEOMETRIC:
            matrices.append(affine_matrix(name, argument, height, width))
            continue
        part, argument = x[start:stop], to_device(argument, x.device)
        if name in ops.TABLES:
            tables.append(ops.lookup_table(name, part, argument).expand(-1, x.shape[1], -1))
        else:
            part.copy_(ops.color(part, argument) if name == "Color" else ops.sharpness(part, argument))
    if tables:
        table = torch.cat(tables)
        part = x[first : first + len(table)]
        part.copy_(ops.apply_table(part, table))
        first += len(table)
    if matrices:
        matrix = torch.cat(matrices)
        part = x[first : first + len(matrix)]
        part.copy_(ops.affine(part, matrix, fill))
    return x.index_select(0, to_device(order.argsort(), x.device))


ORDERS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))


def color_jitter(x: torch.Tensor, strength: float, *, seed: int, epoch: int, index: torch.Tensor) -> torch.Tensor:
    """torchvision's ColorJitter(strength, strength, strength) of uint8 [B, C, H, W], C = 1 or 3.

    Brightness, contrast and saturation, each by a factor ~ U(max(0, 1 - strength), 1 + strength), in random order.
    """
    if strength < 0:
        raise ValueError(f"color_jitter {strength}: must be 0 or more")
    u = counted_uniform(seed, epoch, index, 4, _JITTER_STREAM)
    low = max(0.0, 1.0 - strength)
    factor = to_device(low + (1.0 + strength - low) * u[:, :3], x.device)  # [B, 3]
    order = torch.tensor(ORDERS, device=u.device)[(u[:, 3] * len(ORDERS)).long()]  # [B, 3]
    x = x.clone(memory_format=torch.contiguous_format)
    for step in range(3):
        for number in range(3):
            rows = to_device((order[:, step] == number).nonzero().flatten(), x.device)
            part, f = x.index_select(0, rows), factor[rows, number]
            if number == 2:
                part = ops.color(part, f)
            else:
                table = ops.lookup_table("Contrast" if number else "Brightness", part, f)
                part = ops.apply_table(part, table)
            x.index_copy_(0, rows, part)
    return x
