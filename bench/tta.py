"""Test-time augmentation with 12 views and an ensemble: engine_predict against one data pass per view and model.

    python -m bench.tta --models convnext_atto tf_efficientnet_lite0 --img_size 384 --images 8

The baseline decodes, resizes and normalises every image again for each view of each model, in fp32 with contiguous
tensors. One timed call predicts all images. Weights are random, photographs synthetic (bench/photos.py).
"""

import tempfile

from bench import common

CLASSES = 10


def add_flags(parser) -> None:
    parser.add_argument("--models", nargs="+", default=["convnext_atto", "tf_efficientnet_lite0"])
    parser.add_argument("--img_size", type=int, default=384)
    parser.add_argument("--photo", type=int, nargs=2, default=[500, 375], metavar=("W", "H"))
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=64, help="network inputs per batch (main_predict's default)")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--amp", choices=("off", "bf16"), default=None, help="of the product (default: its own choice)")


def build(variant: str, args):
    import torch

    from bench.photos import make_photos
    from models import create_model

    torch.manual_seed(0)
    folder = tempfile.TemporaryDirectory(prefix="bench_tta_")
    paths = make_photos(folder.name, args.images, *args.photo)
    modules = [create_model(m, num_classes=CLASSES, img_size=args.img_size).eval() for m in args.models]
    predict = baseline(paths, modules, args) if variant == "baseline" else product(variant, paths, modules, args)

    def run(keep=folder) -> int:  # the folder lives as long as the function
        predict()
        return len(paths)

    return run


def product(variant: str, paths: list[str], modules, args):
    import torch

    from engine_predict import predict
    from util.cli.settings import Prediction, Reading
    from util.data.datasets import FileDataset
    from util.data_specs import IMAGENET_MEAN, IMAGENET_STD
    from util.precision import place
    from util.predict.members import Net

    world = common.start_up(variant, args.device)
    data = FileDataset(paths, torch.full((len(paths),), -1), [str(i) for i in range(CLASSES)])
    nets, meta = [], {"img_size": [args.img_size] * 2, "in_chans": 3, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    for m, module in enumerate(modules):  # prepared as in util.predict.members.load_nets
        place(module, world.device)
        precision = common.precision_of(variant, module, world, args.amp)
        order = torch.arange(CLASSES, device=world.device)
        nets.append(Net(module, m, meta, order, precision))
    asked, reading = Prediction(batch_size=args.batch_size), Reading(num_workers=args.workers)
    return lambda: predict(nets, data, asked, reading, world)


def view_pipelines(S: int) -> list:
    """The 12 views as torchvision transforms of a PIL image, without the conversion to a tensor."""
    from torchvision import transforms as T
    from torchvision.transforms import functional as F

    bicubic, bilinear = T.InterpolationMode.BICUBIC, T.InterpolationMode.BILINEAR
    small, large = T.Resize(S + 32, bicubic), T.Resize(round(1.15 * S), bicubic)
    crop = T.CenterCrop(S)

    def turn(degrees: float):
        return T.Lambda(lambda im: F.rotate(im, degrees, bilinear))

    def corner(k: int):
        return T.Lambda(lambda im: F.five_crop(im, S)[k])

    bright = T.Lambda(lambda im: F.adjust_contrast(F.adjust_brightness(im, 1.2), 1.2))
    return [
        [small, crop],
        [small, crop, F.hflip],
        [large, crop],
        [large, crop, F.hflip],
        [large, turn(10), crop],
        [large, turn(-10), crop],
        [small, crop, bright],
        *([large, corner(k)] for k in range(4)),
        [small, crop, T.GaussianBlur(3, 0.5)],
    ]


def baseline(paths: list[str], modules, args):
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader
    from torchvision import transforms

    from util.data_specs import IMAGENET_MEAN, IMAGENET_STD

    class View(torch.utils.data.Dataset):
        def __init__(self, steps: list):
            to_tensor = [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
            self.pipeline = transforms.Compose([*steps, *to_tensor])

        def __len__(self):
            return len(paths)

        def __getitem__(self, i: int):
            with Image.open(paths[i]) as image:
                return self.pipeline(image.convert("RGB"))

    pipelines = view_pipelines(args.img_size)

    @torch.no_grad()
    def run():
        mean = 0.0
        for module in modules:
            for steps in pipelines:
                loader = DataLoader(View(steps), args.batch_size, num_workers=args.workers)
                mean = mean + torch.cat([module(x).softmax(1) for x in loader])
        return mean / (len(modules) * len(pipelines))

    return run


if __name__ == "__main__":
    common.main("tta", __doc__, build, add_flags)
