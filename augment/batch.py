"""On-device augmentation of whole uint8 batches: crop, flip, RandAugment, normalise, erase.

Every random number is counted (util/seed.py): an image's augmentation depends on (seed, epoch, index) only.
Random decisions (boxes, flips) are computed on index's device. Keep it on the CPU: then no step waits for the GPU, and
the boxes are the same on every device.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TVF

from augment.image import SCALES, Geometry
from augment.rand_augment import PillowPolicy, RandAugmentPolicy, color_jitter, parse_rand_augment, rand_augment
from augment.transfer import to_device
from util.choices import is_rand_augment
from util.seed import counted_normal, counted_uniform

ERASE_MODES = ("const", "rand", "pixel")
ATTEMPTS = 10  # draws to find a box that fits, as in torchvision's RandomResizedCrop and timm's RandomErasing
_GEOMETRY, _ERASE, _ERASE_NOISE, _VFLIP = 0, 1, 2, 4  # streams of counted numbers; rand_augment.py uses 3 and 16 on


def _check_uint8(x: torch.Tensor) -> None:
    if x.dtype != torch.uint8 or x.ndim != 4:
        raise ValueError(f"images: must be uint8 [B, C, H, W], got {x.dtype} {list(x.shape)}")


def _scale_shift(mean, std, device) -> tuple[torch.Tensor, torch.Tensor]:
    """x * scale + shift = (x / 255 - mean) / std, both [C, 1, 1]."""
    mean, std = torch.as_tensor(mean, dtype=torch.float64), torch.as_tensor(std, dtype=torch.float64)
    scale, shift = 1.0 / (255.0 * std), -mean / std
    return tuple(t.float().view(-1, 1, 1).to(device) for t in (scale, shift))


def normalize(x: torch.Tensor, mean, std) -> torch.Tensor:
    """uint8 [B, C, H, W] -> float32, (x / 255 - mean) / std per channel; mean and std refer to pixels in [0, 1]."""
    _check_uint8(x)
    return _affine(x, *_scale_shift(mean, std, x.device))


def _affine(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    # One conversion and two in-place passes over cached memory: on CPU 2 to 20 times faster than addcmul, batch_norm
    # or mixed-dtype arithmetic, which are not vectorised.
    x = x.to(torch.float32, memory_format=torch.contiguous_format)
    return x.mul_(scale).add_(shift)


def crop_flip(
    x: torch.Tensor, top: torch.Tensor, left: torch.Tensor, flip: torch.Tensor, padding: int = 0
) -> torch.Tensor:
    """Per-sample window of the zero-padded image, mirrored where `flip`: uint8 [B, C, H, W] -> same shape.

    top, left: int64 [B] in 0..2 * padding, as torchvision's RandomCrop(size, padding) draws them; flip: bool [B].
    The result may be a strided view of a fresh buffer.
    """
    B, C, H, W = x.shape
    x = x.contiguous()
    if padding:
        x = F.pad(x, (padding, padding, padding, padding))
    Hp, Wp = H + 2 * padding, W + 2 * padding
    # Both orientations in one buffer. A channel of a window is one span of (H - 1) Wp + W bytes in memory, so
    # index_select copies spans instead of single pixels. The mirror's window starts at 2 padding - left.
    both = torch.cat([x, x.flip(-1)])  # [2B, C, Hp, Wp]
    start = torch.arange(B, device=top.device) + B * flip  # [B]
    start = start * (C * Hp * Wp) + top * Wp + torch.where(flip, 2 * padding - left, left)
    start = start[:, None] + torch.arange(0, C * Hp * Wp, Hp * Wp, device=top.device)  # [B, C]
    span = (H - 1) * Wp + W
    spans = both.as_strided((both.numel() - span + 1, span), (1, 1))
    out = spans.index_select(0, to_device(start.flatten(), x.device))  # [B * C, span]
    return out.as_strided((B, C, H, W), (C * span, span, Wp, 1))


def _first_fit(
    u: torch.Tensor, area: torch.Tensor, ratio: tuple[float, float], fits: Callable
) -> tuple[torch.Tensor, ...]:
    """(sides a, b, whether they fit), each [...]: the first of 10 draws that fits, by torchvision's and timm's rule.

    a b = area [..., 10], log a/b ~ U(log ratio) by uniforms u [..., 10]; fits(a, b) -> bool [..., 10].
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = torch.exp(low + (high - low) * u)
    a, b = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
    fit = fits(a, b)
    first = fit.byte().argmax(-1, keepdim=True)  # argmax returns the first maximum
    return tuple(t.gather(-1, first).squeeze(-1) for t in (a, b, fit))


def rrc_boxes(u: torch.Tensor, height: int, width: int, scale, ratio) -> tuple[torch.Tensor, ...]:
    """torchvision RandomResizedCrop's boxes from uniforms [B, 22]: (top, left, h, w), each int64 [B].

    Area ~ U(scale) of the image, log aspect w/h ~ U(log ratio), the first of 10 draws that fits; else the largest
    centred box within `ratio`.
    """
    u = u.double()
    area = (scale[0] + (scale[1] - scale[0]) * u[:, :ATTEMPTS]) * (height * width)  # [B, 10]
    w, h, fits = _first_fit(
        u[:, ATTEMPTS : 2 * ATTEMPTS], area, ratio, lambda w, h: (w > 0) & (w <= width) & (h > 0) & (h <= height)
    )
    whole_w, whole_h = width, height
    if width / height < min(ratio):
        whole_h = round(width / min(ratio))
    elif width / height > max(ratio):
        whole_w = round(height * max(ratio))
    h, w = torch.where(fits, h, whole_h), torch.where(fits, w, whole_w)
    top = torch.where(fits, (u[:, -2] * (height - h + 1)).long(), (height - h) // 2)
    left = torch.where(fits, (u[:, -1] * (width - w + 1)).long(), (width - w) // 2)
    return top, left, h, w


def resample_matrix(start: torch.Tensor, length: torch.Tensor, size: int, out_size: int) -> torch.Tensor:
    """Antialiased bicubic resampling of pixels start .. start + length - 1 to out_size: float32 [B, out_size, size].

    Pillow's filter: cubic convolution with a = -0.5 (Keys 1981), stretched by the scale when shrinking, cut at the
    box's border and normalised to sum 1.
    """
    start, length = start.float()[:, None, None], length.float()[:, None, None]
    scale = length / out_size
    centre = start + (torch.arange(out_size, device=start.device)[:, None] + 0.5) * scale - 0.5  # [B, out_size, 1]
    pixel = torch.arange(size, device=start.device, dtype=torch.float32)  # [size]
    d = (pixel - centre).div_(scale.clamp(min=1.0)).abs_().clamp_(max=2.0)  # the kernel is 0 at 2
    near, far = (1.5 * d - 2.5).mul_(d).mul_(d).add_(1.0), (-0.5 * d + 2.5).mul_(d).sub_(4.0).mul_(d).add_(2.0)
    weight = torch.where(d < 1.0, near, far)
    weight *= (pixel >= start) & (pixel < start + length)
    return weight.div_(weight.sum(-1, keepdim=True))


def resized_crop(
    x: torch.Tensor, box: tuple[torch.Tensor, ...], flip: torch.Tensor, size: tuple[int, int]
) -> torch.Tensor:
    """Per-sample boxes (top, left, h, w) of uint8 [B, C, H, W], resized to `size` (h, w), mirrored where `flip`.

    Two batched matrix products, so that every sample has its own box and filter. Columns first, and rounded to 8 bits
    in between, as in Pillow: the result differs from Pillow's by at most one level.
    """
    H, W = x.shape[-2:]
    top, left, h, w = box
    columns = resample_matrix(left, w, W, size[1])
    columns = to_device(torch.where(flip[:, None, None], columns.flip(1), columns), x.device)
    rows = to_device(resample_matrix(top, h, H, size[0]), x.device)
    y = torch.bmm(rearrange(x, "b c h w -> b (c h) w").float(), columns.transpose(1, 2))  # [B, C H, size_w]
    y = rearrange(y.round_().clamp_(0, 255), "b (c h) w -> b c h w", h=H)
    y = torch.matmul(rows[:, None], y)  # [B, C, size_h, size_w]
    return y.round_().clamp_(0, 255).to(torch.uint8)


def resize(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Whole images uint8 [B, C, H, W] to `size` (h, w), bicubic with antialias."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return TVF.resize(x.contiguous(), list(size), InterpolationMode.BICUBIC, antialias=True)


@dataclass(frozen=True)
class Erasing:
    """timm's RandomErasing (Zhong et al., Random Erasing Data Augmentation, AAAI 2020). ValueError for invalid values.

    A sample is erased with probability `prob`, in 1..recount boxes; each box has area ~ U(area) / count of the image,
    log aspect h/w ~ U(log aspect), and is the first of 10 draws that is smaller than the image, or none.
    mode: `const` fills with 0 (the mean colour), `rand` with one normal colour per box, `pixel` with normal noise.
    """

    prob: float = 0.0
    mode: str = "pixel"
    recount: int = 1
    area: tuple[float, float] = (0.02, 1 / 3)
    aspect: tuple[float, float] = (0.3, 1 / 0.3)

    def __post_init__(self) -> None:
        if self.mode not in ERASE_MODES:
            raise ValueError(f"remode {self.mode!r}: must be one of {', '.join(ERASE_MODES)}")
        if not 0.0 <= self.prob <= 1.0:
            raise ValueError(f"reprob {self.prob}: must be in [0, 1]")
        if self.recount < 1:
            raise ValueError(f"recount {self.recount}: must be 1 or more")


def erase_boxes(u: torch.Tensor, height: int, width: int, erasing: Erasing) -> torch.Tensor:
    """Boxes from uniforms [B, 2 + 22 recount]: int64 [B, recount, 4] (top, left, h, w), h = 0: none."""
    prob, recount, area, aspect = erasing.prob, erasing.recount, erasing.area, erasing.aspect
    B, u = len(u), u.double()
    count = 1 + (u[:, 1] * recount).long()  # [B]
    wanted = (u[:, :1] < prob) & (torch.arange(recount, device=u.device) < count[:, None])  # [B, recount]
    u = u[:, 2:].view(B, recount, 2 * ATTEMPTS + 2)
    target = (area[0] + (area[1] - area[0]) * u[..., :ATTEMPTS]) * (height * width) / count[:, None, None]
    h, w, fits = _first_fit(u[..., ATTEMPTS : 2 * ATTEMPTS], target, aspect, lambda h, w: (w < width) & (h < height))
    top, left = (u[..., -2] * (height - h + 1)).long(), (u[..., -1] * (width - w + 1)).long()
    return torch.stack([top, left, h, w], dim=-1) * (fits & wanted)[..., None]


def random_erase(x: torch.Tensor, index: torch.Tensor, erasing: Erasing, *, seed: int, epoch: int) -> torch.Tensor:
    """Erase boxes of normalised float images [B, C, H, W] in place, by counted numbers."""
    _, C, H, W = x.shape
    mode, recount = erasing.mode, erasing.recount
    u = counted_uniform(seed, epoch, index, 2 + (2 * ATTEMPTS + 2) * recount, _ERASE)
    boxes = erase_boxes(u, H, W, erasing).tolist()
    numbers = index.tolist()
    # In order of k: where boxes overlap, the later one is on top.
    hits = [(i, k, *boxes[i][k]) for k in range(recount) for i in range(len(boxes)) if all(boxes[i][k][2:])]
    if not hits:
        return x
    fills: Sequence[float | torch.Tensor]
    if mode == "const":
        fills = [0.0] * len(hits)
    elif mode == "rand":
        boxes_numbers = torch.tensor([numbers[i] * recount + k for i, k, *_ in hits])
        normal = to_device(counted_normal(seed, epoch, boxes_numbers, C, _ERASE_NOISE), x.device)
        fills = normal[:, :, None, None].unbind()  # each [C, 1, 1]
    else:
        counters = []  # a number per pixel of each sample; only erased pixels are computed
        for i, _, top, left, h, w in hits:
            row = torch.arange(top, top + h, device=x.device)[:, None] * W + numbers[i] * (H * W)
            counters.append((row + torch.arange(left, left + w, device=x.device)).flatten())
        normal = counted_normal(seed, epoch, torch.cat(counters), C, _ERASE_NOISE)
        patches = normal.split([len(c) for c in counters])
        fills = [rearrange(p, "(h w) c -> c h w", h=hit[-2]) for p, hit in zip(patches, hits)]
    for (i, _, top, left, h, w), fill in zip(hits, fills):
        x[i, :, top : top + h, left : left + w] = fill
    return x


class BatchTransform:
    """uint8 batches to normalised float32 on their device: the last step before the model, in training and evaluation.

    Training: crop and flip, RandAugment or colour jitter, resize to `size`, normalise, erase. Evaluation: resize and
    normalise.
    Images from files arrive cropped and flipped by augment/image.py; they are only normalised and erased here.

    mean, std: per channel, of pixels in [0, 1].
    size: output (h, w) or side; None keeps the stored size.
    aa: a policy in timm's notation, e.g. rand-m9-mstd0.5-inc1, or None. RandAugment with its usual operations works on
        the batch, any other policy image by image.
    color_jitter: strength of brightness, contrast and saturation changes; None for none.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        size: int | tuple[int, int] | None = None,
        geometry: Geometry = Geometry(),  # noqa: B008 (frozen)
        aa: str | None = None,
        color_jitter: float | None = None,
        erasing: Erasing = Erasing(),
        seed: int = 0,
    ):
        self.mean, self.std = tuple(mean), tuple(std)
        self.size = (size, size) if isinstance(size, int) else size
        self.geometry, self.color_jitter, self.erasing, self.seed = geometry, color_jitter, erasing, seed
        self.aa: RandAugmentPolicy | PillowPolicy | None = None
        if aa:
            self.aa = parse_rand_augment(aa) if is_rand_augment(aa) else PillowPolicy(aa, self.mean)
        self._constants: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, x: torch.Tensor, index: torch.Tensor | None, epoch: int, train: bool) -> torch.Tensor:
        """x: uint8 [B, C, H, W], not modified; index: int64 [B], sample numbers, unused in evaluation."""
        _check_uint8(x)
        if x.shape[1] != len(self.mean):
            raise ValueError(f"images have {x.shape[1]} channels, mean has {len(self.mean)}")
        if train:
            assert index is not None, "training needs the sample numbers"
            x = self._augment(x, index, epoch)
        if self.size is not None:
            x = resize(x, self.size)
        if x.device not in self._constants:
            self._constants[x.device] = _scale_shift(self.mean, self.std, x.device)
        x = _affine(x, *self._constants[x.device])
        if train and index is not None and self.erasing.prob > 0:
            x = random_erase(x, index, self.erasing, seed=self.seed, epoch=epoch)
        return x

    def _augment(self, x: torch.Tensor, index: torch.Tensor, epoch: int) -> torch.Tensor:
        x = self._crop_and_mirror(x, index, epoch)
        if self.geometry.vflip > 0:
            flip = counted_uniform(self.seed, epoch, index, 1, _VFLIP)[:, 0] < self.geometry.vflip
            x = torch.where(to_device(flip, x.device)[:, None, None, None], x.flip(-2), x)
        if isinstance(self.aa, PillowPolicy):
            x = self.aa(x, seed=self.seed, epoch=epoch, index=index)
        elif self.aa is not None:
            fill = [min(255, round(255 * m)) for m in self.mean]
            x = rand_augment(x, self.aa, seed=self.seed, epoch=epoch, index=index, fill=fill)
        if self.color_jitter:
            x = color_jitter(x, self.color_jitter, seed=self.seed, epoch=epoch, index=index)
        return x

    def _crop_and_mirror(self, x: torch.Tensor, index: torch.Tensor, epoch: int) -> torch.Tensor:
        g, (H, W) = self.geometry, x.shape[-2:]
        if g.crop == "none" and g.hflip == 0:
            return x
        u = counted_uniform(self.seed, epoch, index, 1 + 2 * ATTEMPTS + 2 if g.crop == "rrc" else 3, _GEOMETRY)
        flip = u[:, 0] < g.hflip
        if g.crop == "rrc":
            box = rrc_boxes(u[:, 1:], H, W, g.scale or SCALES["mae"], g.ratio)
            return resized_crop(x, box, flip, self.size or (H, W))
        padding = g.padding if g.crop == "pad" else 0
        top, left = (u[:, 1:] * (2 * padding + 1)).long().unbind(1)
        return crop_flip(x, top, left, flip, padding)
