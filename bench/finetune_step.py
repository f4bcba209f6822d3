"""Fine-tuning step: the engine at its defaults against a plain fp32 step like MAE's engine.

    python -m bench.finetune_step --model vit_base_patch16 --img_size 224 --batch_size 16

Both have mixup, cutmix, label smoothing, drop path, DiffNoise at t = 15, layer decay and AdamW. The product starts from
uint8 images, the baseline from floats normalised by its loader. More --variants: see common.start_up.
"""

from bench import common

CLASSES = 100


def add_flags(parser) -> None:
    parser.add_argument("--model", default="vit_base_patch16")
    parser.add_argument("--img_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=1, help="training steps per timed call")
    parser.add_argument("--amp", choices=("off", "bf16"), default=None, help="of the product (default: its own choice)")
    parser.add_argument("--compile", action="store_true", help="the product through torch.compile")
    parser.add_argument("--mixup", type=float, default=0.8)
    parser.add_argument("--cutmix", type=float, default=1.0)


def create(args):
    from augment.alpha_blend import AlphaBlend
    from models import create_model

    noise = AlphaBlend(15)
    return create_model(args.model, num_classes=CLASSES, img_size=args.img_size, drop_path=0.1, alpha_blend=noise)


def mixing(args):
    from timm.data import Mixup

    return Mixup(args.mixup, args.cutmix, label_smoothing=0.1, num_classes=CLASSES)


def build(variant: str, args):
    import torch

    torch.manual_seed(0)
    return build_baseline(args) if variant == "baseline" else build_product(variant, args)


def build_product(variant: str, args):
    import torch

    from augment.batch import BatchTransform
    from engine_finetune import Criterion, train_one_epoch
    from util.cli.finetune import FinetuneOptions
    from util.data.datasets import ArrayDataset
    from util.data.loader import Loader
    from util.data_specs import IMAGENET_MEAN, IMAGENET_STD
    from util.log import RunLog
    from util.optim import build_adamw, param_groups
    from util.precision import place
    from util.train.compiled import compile_net
    from util.train.run import Run, Training

    world = common.start_up(variant, args.device)
    net = place(create(args), world.device)
    precision = common.precision_of(variant, net, world, args.amp)
    if args.compile:
        compile_net(net)
    n = args.batch_size * args.steps
    images = torch.randint(0, 256, (n, 3, args.img_size, args.img_size), dtype=torch.uint8)
    data = ArrayDataset(images, torch.arange(n) % CLASSES, [str(i) for i in range(CLASSES)])
    transform = BatchTransform(IMAGENET_MEAN, IMAGENET_STD, size=args.img_size)
    loader = Loader(data, batch_transform=transform, batch_size=args.batch_size, train=True, world=world)
    optimizer = build_adamw(param_groups(net, weight_decay=0.05, layer_decay=0.75), lr=1e-5)
    log = RunLog(None, None, is_main=False)
    run = Run(FinetuneOptions.of(), world, log, meta={}, loader=loader)
    training, mixup = Training(net, net, optimizer, precision, lr_at=lambda epoch: 1e-5), mixing(args)

    def steps() -> int:
        train_one_epoch(training, loader, Criterion(), run, mixup=mixup)
        run.position.next_epoch()
        return n

    return steps


def build_baseline(args):
    """fp32, plain attention, AdamW tensor by tensor, the loss read at every step."""
    import torch
    from timm.layers import set_fused_attn
    from timm.loss import SoftTargetCrossEntropy

    from util.optim import param_groups

    set_fused_attn(False)
    net = create(args).train()
    groups = param_groups(net, weight_decay=0.05, layer_decay=0.75)
    optimizer = torch.optim.AdamW(groups, lr=1e-5, foreach=False)
    criterion, mixup = SoftTargetCrossEntropy(), mixing(args)
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size)
    targets = torch.arange(args.batch_size) % CLASSES

    def steps() -> int:
        for _ in range(args.steps):
            for group in optimizer.param_groups:
                group["lr"] = 1e-5 * group["lr_scale"]
            mixed, soft = mixup(images.clone(), targets)  # Mixup modifies its input
            loss = criterion(net(mixed), soft)
            if not torch.isfinite(torch.tensor(loss.item())):
                raise SystemExit("baseline: loss is not finite")
            loss.backward()
            torch.norm(torch.stack([p.grad.norm() for p in net.parameters() if p.grad is not None]))
            optimizer.step()
            optimizer.zero_grad()
        return args.batch_size * args.steps

    return steps


if __name__ == "__main__":
    common.main("finetune_step", __doc__, build, add_flags, extra=common.CHOICES)
