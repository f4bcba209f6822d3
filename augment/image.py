"""Per-image transforms in loader workers: file -> PIL image -> uint8 tensor [C, H, W].

Normalisation and erasing come later, for the whole batch on its device (augment/batch.py). Random numbers come from the
global generators of random, numpy and torch, which util.seed.sample_rng seeds per sample. Policies are timm's, on
Pillow images; augment/opencv_ops.py and augment/rand_augment.py are faster versions, tested against them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from timm.data import auto_augment, create_transform
from timm.data.transforms import ResizeKeepRatio
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from augment.decoding import open_file, open_image, to_channels  # noqa: F401 (public names of this module)
from util.data_specs import IMAGENET_MEAN

PRESETS = ("mae", "photo", "light", "pretrain", "none")
CROPS = ("none", "pad", "rrc")
# Area fraction of the random resized crop: MAE's fine-tuning and pretraining, and the photo-folder recipe.
SCALES = {"mae": (0.08, 1.0), "light": (0.08, 1.0), "pretrain": (0.2, 1.0), "photo": (0.7, 1.0)}
PHOTO_JITTER = 0.3  # of brightness, contrast and saturation, in the photo-folder recipe


@dataclass(frozen=True)
class Geometry:
    """Crops and flips of training. ValueError for invalid values.

    crop: `none`, `pad` (zero padding, then a window of the stored size) or `rrc` (random resized crop), of images in
        memory; image files get the crop of their preset.
    padding: pixels, for `pad`.
    scale, ratio: area fraction and aspect range of a random resized crop; scale None: the preset's.
    hflip, vflip: probability of a mirror image, of an upside-down image.
    """

    crop: str = "none"
    padding: int = 4
    scale: tuple[float, float] | None = None
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.0
    vflip: float = 0.0

    def __post_init__(self) -> None:
        if self.crop not in CROPS:
            raise ValueError(f"crop {self.crop!r}: must be one of {', '.join(CROPS)}")
        for name, p in (("hflip", self.hflip), ("vflip", self.vflip)):
            if not 0.0 <= p <= 1.0:
                raise ValueError(f"{name} {p}: must be in [0, 1]")


MIRRORED = Geometry(hflip=0.5)


def build_train_transform(
    size: tuple[int, int],
    preset: str = "mae",
    *,
    geometry: Geometry = MIRRORED,
    aa: str | None = None,
    color_jitter: float | None = None,
    interpolation: str = "bicubic",
    mean: Sequence[float] = IMAGENET_MEAN,
) -> transforms.Compose:
    """PIL image -> uint8 [C, h, w] with size = (h, w), randomly augmented.

    Presets:
        mae       random resized crop (8-100 % of the area), flip, then RandAugment `aa` or, without it, colour
                  jitter: timm's create_transform, as MAE fine-tunes.
        photo     crop of 70-100 %, flip, rotation to 15 degrees, shift to 10 %, zoom 0.9-1.1, colour jitter 0.3 (hue
                  0.05): for a folder of photos. Rotation, shift and zoom are one affine map and one resampling.
        light     crop and flip.          pretrain   MAE's pretraining: crop of 20-100 % and flip.
        none      resized as in evaluation, without cutting the border.

    geometry: its scale (None: as above), ratio (the crop's aspect over size's) and flips. aa: timm's policy string,
    `mae` only. color_jitter: strength for `mae` (without aa) and `photo`. mean: pixel mean in [0, 1] per channel;
    geometric operations fill uncovered corners with it.
    """
    if preset not in PRESETS:
        raise ValueError(f"aug {preset!r}: must be one of {', '.join(PRESETS)}")
    if aa and preset != "mae":
        raise ValueError(f"aa {aa!r}: belongs to aug mae, not to {preset}")
    if color_jitter and preset not in ("mae", "photo"):
        raise ValueError(f"color_jitter {color_jitter}: belongs to aug mae or photo, not to {preset}")
    if preset == "none":
        return build_eval_transform(size, crop_pct=1.0, interpolation=interpolation)
    scale = geometry.scale or SCALES[preset]
    # The crop's aspect varies around the input's: a wide input must not stretch square crops.
    low, high = (r * size[1] / size[0] for r in geometry.ratio)
    if preset != "photo":
        transform = create_transform(
            size,
            is_training=True,
            scale=scale,
            ratio=(low, high),
            hflip=geometry.hflip,
            vflip=geometry.vflip,
            color_jitter=color_jitter,  # type: ignore[arg-type] # None is none
            auto_augment=aa,
            interpolation=interpolation,
            mean=tuple(mean),
            normalize=False,
        )
        return transforms.Compose([allow_zero_bits(step) for step in transform.transforms])
    strength = PHOTO_JITTER if color_jitter is None else color_jitter
    fill = [round(255 * m) for m in mean]
    # The method's reference code resizes the whole image before the crop, which would resample twice. The crop's box
    # is a fraction of the image, so it is the same without the resize.
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale, (low, high), InterpolationMode(interpolation)),
            transforms.RandomHorizontalFlip(geometry.hflip),
            transforms.RandomVerticalFlip(geometry.vflip),
            transforms.RandomAffine(15, (0.1, 0.1), (0.9, 1.1), interpolation=InterpolationMode.BILINEAR, fill=fill),
            transforms.ColorJitter(strength, strength, strength, 0.05),
            transforms.PILToTensor(),
        ]
    )


def default_crop_pct(size: tuple[int, int]) -> float:
    """The share of the resized side that evaluation keeps, as in MAE: 224/256 up to 224 pixels, 1 above."""
    return 224 / 256 if max(size) <= 224 else 1.0


def posterize(image: Image.Image, bits_to_keep: int, **_) -> Image.Image:
    """timm's posterize, but black for 0 bits, which policies may draw: Pillow refuses it from version 13."""
    return Image.new(image.mode, image.size) if bits_to_keep < 1 else auto_augment.posterize(image, bits_to_keep)


def allow_zero_bits(step: Callable) -> Callable:
    """Replace timm's posterize by the one above if the step is a policy."""
    if isinstance(step, auto_augment.AutoAugment):
        ops = [op for pair in step.policy for op in pair]
    else:
        ops = step.ops if isinstance(step, (auto_augment.RandAugment, auto_augment.AugMixAugment)) else []
    for op in ops:
        op.aug_fn = posterize if op.aug_fn is auto_augment.posterize else op.aug_fn
    return step


def timm_policy(aa: str, size: tuple[int, int], mean: tuple[float, ...]) -> Callable[[Image.Image], Image.Image]:
    """The policy named by timm's string (rand, original, v0, 3a, augmix, ...), for images of `size` (h, w).

    mean: as in build_train_transform. Interpolates bilinearly.
    """
    policies = (auto_augment.AutoAugment, auto_augment.RandAugment, auto_augment.AugMixAugment)
    steps = build_train_transform(size, "mae", aa=aa, interpolation="bilinear", mean=mean).transforms
    return next(step for step in steps if isinstance(step, policies))


def build_eval_transform(
    size: tuple[int, int], crop_pct: float | None = None, *, interpolation: str = "bicubic"
) -> Callable[[Image.Image], torch.Tensor]:
    """PIL image -> uint8 [C, h, w] with size = (h, w): resize to cover size / crop_pct, aspect ratio kept; centre crop.

    crop_pct: share of the resized side that is kept (default: default_crop_pct).
    """
    crop_pct = default_crop_pct(size) if crop_pct is None else crop_pct
    if not 0.0 < crop_pct <= 1.0:
        raise ValueError(f"crop_pct {crop_pct}: must be in (0, 1]")
    cover = tuple(int(s / crop_pct) for s in size)
    if cover[0] == cover[1]:
        resize = transforms.Resize(cover[0], InterpolationMode(interpolation))  # the shorter side
    else:
        resize = ResizeKeepRatio(cover, interpolation=interpolation)
    return transforms.Compose([resize, transforms.CenterCrop(size), transforms.PILToTensor()])
