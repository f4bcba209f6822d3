"""JPEG files to augmented float batches on one core: the product's loader against timm's per-image pipeline.

    python -m bench.loader_jpeg --photo 500 375 --aug pretrain
    python -m bench.loader_jpeg --photo 500 375 --aug mae
    python -m bench.loader_jpeg --photo 2000 1500 --aug pretrain

--aug pretrain: crop of 20-100 % and flip, as in MAE's pretraining. --aug mae: crop of 8-100 %, flip, RandAugment,
erasing, as in its fine-tuning. The photographs are synthetic (bench/photos.py), in a temporary folder, and in the page
cache after the first round. With --workers 0 the measured process does all work, so images/s are per core.
"""

import tempfile

from bench import common

AA = "rand-m9-mstd0.5-inc1"


def add_flags(parser) -> None:
    parser.add_argument("--photo", type=int, nargs=2, default=[500, 375], metavar=("W", "H"))
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=1, help="times that each image is read in an epoch")
    parser.add_argument("--img_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--aug", choices=("pretrain", "mae"), default="pretrain")


def build(variant: str, args):
    from bench.photos import make_photos

    folder = tempfile.TemporaryDirectory(prefix="bench_jpeg_")
    paths = make_photos(folder.name, args.images, *args.photo) * args.repeat
    loader = baseline(paths, args) if variant == "baseline" else product(variant, paths, args)

    def epoch(keep=folder) -> int:  # the folder lives as long as the function
        return sum(len(batch) for batch in loader())

    return epoch


def product(variant: str, paths: list[str], args):
    import torch

    from augment.batch import BatchTransform, Erasing
    from augment.image import build_train_transform
    from util.cli.settings import Reading
    from util.data.datasets import FileDataset
    from util.data.loader import Loader
    from util.data_specs import IMAGENET_MEAN, IMAGENET_STD

    world = common.start_up(variant, args.device)
    mae = args.aug == "mae"
    loader = Loader(
        FileDataset(paths, torch.zeros(len(paths), dtype=torch.long)),
        transform=build_train_transform((args.img_size, args.img_size), args.aug, aa=AA if mae else None),
        batch_transform=BatchTransform(
            IMAGENET_MEAN, IMAGENET_STD, size=args.img_size, erasing=Erasing(0.25 if mae else 0.0)
        ),
        batch_size=args.batch_size,
        train=True,
        world=world,
        reading=Reading(num_workers=args.workers, loader="fast"),
    )
    return lambda: (batch.images for batch in loader.epoch())


def baseline(paths: list[str], args):
    import torch
    from PIL import Image
    from timm.data import create_transform
    from torch.utils.data import DataLoader
    from torchvision import transforms

    from util.data_specs import IMAGENET_MEAN, IMAGENET_STD

    if args.aug == "mae":
        pipeline = create_transform(
            args.img_size,
            is_training=True,
            auto_augment=AA,
            interpolation="bicubic",
            re_prob=0.25,
            re_mode="pixel",
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
        )
    else:
        bicubic = transforms.InterpolationMode.BICUBIC
        pipeline = transforms.Compose(
            [
                transforms.RandomResizedCrop(args.img_size, (0.2, 1.0), interpolation=bicubic),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    class Photos(torch.utils.data.Dataset):
        def __len__(self):
            return len(paths)

        def __getitem__(self, i: int):
            with Image.open(paths[i]) as image:
                return pipeline(image.convert("RGB")), 0

    loader = DataLoader(
        Photos(),
        args.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
    )
    return lambda: (batch for batch, _ in loader)


if __name__ == "__main__":
    common.main("loader_jpeg", __doc__, build, add_flags)
