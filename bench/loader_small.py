"""32 px input pipeline: one uint8 tensor augmented by the batch, against a DataLoader with one image at a time.

    python -m bench.loader_small --images 10000 --workers 2

One timed call is one epoch of normalised float batches. Default: flip, to float, normalise (pretraining); `--crop` adds
the zero-padded random crop of fine-tuning on small images.
"""

from bench import common


def add_flags(parser) -> None:
    parser.add_argument("--img_size", type=int, default=32)
    parser.add_argument("--images", type=int, default=10000)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--workers", type=int, default=2, help="of the baseline; the product has none")
    parser.add_argument("--crop", action="store_true", help="with a random crop of the image padded by 4")


def build(variant: str, args):
    import torch

    from util.data_specs import DATASETS

    torch.manual_seed(0)
    mean, std = DATASETS["cifar10"].mean, DATASETS["cifar10"].std
    images = torch.randint(0, 256, (args.images, 3, args.img_size, args.img_size), dtype=torch.uint8)
    loader = baseline(images, mean, std, args) if variant == "baseline" else product(variant, images, mean, std, args)

    def epoch() -> int:
        return sum(len(batch) for batch in loader())

    return epoch


def product(variant: str, images, mean, std, args):
    import torch

    from augment.batch import BatchTransform
    from augment.image import Geometry
    from util.data.datasets import ArrayDataset
    from util.data.loader import Loader

    world = common.start_up(variant, args.device)
    data = ArrayDataset(images, torch.zeros(len(images), dtype=torch.long), [""])
    geometry = Geometry("pad" if args.crop else "none", hflip=0.5)
    transform = BatchTransform(mean, std, size=args.img_size, geometry=geometry)
    loader = Loader(data, batch_transform=transform, batch_size=args.batch_size, train=True, world=world)
    return lambda: (batch.images for batch in loader.epoch())


def baseline(images, mean, std, args):
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader
    from torchvision import transforms

    pipeline = transforms.Compose(
        ([transforms.RandomCrop(args.img_size, padding=4)] if args.crop else [])
        + [transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(mean, std)]
    )
    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()

    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return len(pixels)

        def __getitem__(self, i: int):
            return pipeline(Image.fromarray(pixels[i])), 0

    loader = DataLoader(
        Images(),
        args.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
    )
    return lambda: (batch for batch, _ in loader)


if __name__ == "__main__":
    common.main("loader_small", __doc__, build, add_flags, extra=("glibc_default",))
