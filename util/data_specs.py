"""The table of named data sets: image size, channels, normalisation. It does not import torch.

util/data/datasets.py reads the data sets themselves.
"""

from dataclasses import dataclass

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class DataSpec:
    """Default image size in pixels, channels, mean and std of pixels scaled to [0, 1].

    hflip: probability of a mirror image in training; 0 where mirroring changes the class.
    """

    img_size: int
    in_chans: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    hflip: float = 0.5

    def normalisation(self, in_chans: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and std for images converted to `in_chans` (grey repeated, or colour averaged)."""
        if in_chans == self.in_chans:
            return self.mean, self.std
        if self.in_chans == 1:
            return self.mean * in_chans, self.std * in_chans
        return (sum(self.mean) / 3,), (sum(self.std) / 3,)


# The only table of statistics. Checkpoints carry them in their meta to fine-tuning and prediction.
DATASETS = {
    "folder": DataSpec(224, 3, IMAGENET_MEAN, IMAGENET_STD),
    "cifar10": DataSpec(32, 3, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": DataSpec(32, 3, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "fashion-mnist": DataSpec(28, 1, (0.2860,), (0.3530,)),
    "digits": DataSpec(8, 1, (0.3053,), (0.3761,), hflip=0.0),
    "tiny-imagenet": DataSpec(64, 3, (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)),
    "imagenet-100": DataSpec(224, 3, IMAGENET_MEAN, IMAGENET_STD),
    "imagenet": DataSpec(224, 3, IMAGENET_MEAN, IMAGENET_STD),
}
# The others are files.
IN_MEMORY = ("cifar10", "cifar100", "fashion-mnist", "digits")
