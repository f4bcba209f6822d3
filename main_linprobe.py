"""What a frozen encoder knows: weighted k-NN and a linear probe on features that are computed once, without augmentation.

python main_linprobe.py --checkpoint output/mae_cifar10_noprop/checkpoint-last.pth
python main_linprobe.py --checkpoint output/mae_cifar10_noprop/checkpoint-last.pth --random_init
python main_linprobe.py --finetune mae_pretrain_vit_base.pth --model vit_base_patch16 --cls_token --data_path ImageNet
torchrun --nproc_per_node=8 main_linprobe.py --model convnext_base.fb_in22k --pretrained --data_path ImageNet
"""

import json
import os
import shlex
import sys
import time

from augment.batch import BatchTransform
from augment.image import build_eval_transform
from util import options
from util.data import Loader, load_data
from util.datasets import ArrayDataset, to_channels
from util.dist import Precision, World, init_world, set_attention_backend
from util.errors import UserError
from util.features import accuracy, choose_l2, extract, knn_predict, linear_probe
from util.frozen import load_encoder, read_content, resolve_data
from util.log import RunLog
from util.report import write_text

POOL_NAMES = {"mean": "mean of the patch tokens", "cls": "class token", "head": "what its classifier reads"}


def get_args_parser() -> options.Parser:
    parser = options.Parser(description=__doc__.split("\n")[0])
    group = parser.add_argument_group("encoder")
    group.add_argument("--checkpoint", "--finetune", dest="finetune", default="", metavar="FILE",
                       help="a pretraining or fine-tuning checkpoint, or weights of another origin with their --model")  # fmt: skip
    group.add_argument("--model", default=None, metavar="NAME", help="MAE's name or any timm model")
    group.add_argument("--model_kwargs", type=options.keyword, nargs="*", default=[], metavar="NAME=VALUE")
    group.add_argument("--pretrained", action="store_true", help="timm's own weights (a download)")
    group.add_argument("--random_init", action="store_true", help="the same architecture untrained, to compare with")
    group.add_argument("--global_pool", action="store_const", const="mean", dest="pool",
                       help="features are the mean of the patch tokens (default for encoders without a classifier)")  # fmt: skip
    group.add_argument("--cls_token", action="store_const", const="cls", dest="pool", help="the class token instead")
    group = parser.add_argument_group("k-NN")
    group.add_argument("--knn_k", type=options.positive_int, default=20, help="neighbours")
    group.add_argument(
        "--knn_t", type=options.number(float, 1e-4, 1e4), default=0.07, help="temperature of their votes"
    )
    group = parser.add_argument_group("run")
    group.add_argument("--batch_size", type=options.positive_int, default=256, help="images per process")
    group.add_argument("--output_dir", default="", help="where to put log.txt and report.md; '' saves nothing")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    group.add_argument("--amp", "--use_amp", nargs="?", choices=("off", "bf16", "fp16"), const="bf16", default=None,
                       help="mixed precision of the encoder (default: bf16 where the device computes it)")  # fmt: skip
    group.add_argument("--seed", type=options.number(int, 0, 2**62), default=0)
    group.add_argument("--dist_url", default="env://", help="where torchrun's processes meet")
    options.add_deterministic_option(group)
    options.add_data_options(parser, dataset="folder")
    group = parser.add_argument_group("split")
    group.add_argument("--val_split", type=options.number(float, 0, 1, open_high=True), default=0.0,
                       help="hold out this share of train/ (stratified) where there is no val/")  # fmt: skip
    group.add_argument("--split_seed", type=options.number(int, 0, 2**32 - 1), default=0)
    parser.set_defaults(dataset=None, nb_classes=None)  # the checkpoint's data set, else `folder`
    return parser


def check_options(args) -> None:
    if not args.finetune and not args.model:
        raise UserError("--checkpoint: give one, or --model NAME with --pretrained or --random_init")
    if not (args.finetune or args.pretrained or args.random_init):
        raise UserError(f"--model {args.model}: needs weights; give --finetune FILE, --pretrained or --random_init")
    if args.pretrained and (args.finetune or args.random_init):
        other = f"--finetune {args.finetune}" if args.finetune else "--random_init"
        raise UserError(f"--pretrained: not together with {other}")


def build_loader(args, meta: dict, data, world: World) -> Loader:
    """Evaluation's view of the images: resize, centre crop, normalise."""
    size = tuple(meta["img_size"])
    if isinstance(data, ArrayDataset):
        data = to_channels(data, meta["in_chans"])
    return Loader(
        data, transform=build_eval_transform(size), batch_transform=BatchTransform(meta["mean"], meta["std"], size=size),
        batch_size=args.batch_size, train=False, world=world, in_chans=meta["in_chans"], num_workers=args.num_workers,
        pin_memory=args.pin_mem, on_bad_image=args.on_bad_image,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    args = get_args_parser().parse_args(argv)
    check_options(args)
    world = init_world(args.device, args.dist_url, deterministic=args.deterministic)
    content = read_content(args.finetune)
    resolve_data(args, content)
    log = RunLog(args.output_dir or None, is_main=world.is_main)
    train, val = load_data(args.dataset, args.data_path, world, val_split=args.val_split, seed=args.split_seed)

    precision = Precision(args.amp, world.device)
    set_attention_backend(world.device, precision.dtype)
    model, meta, pool = load_encoder(args, train.classes, content)
    model.to(world.device)
    weights = "untrained" if args.random_init else args.finetune or "timm's weights"
    log.say(f"{meta['model']} ({weights}) on {args.dataset}: {len(train)} train, {len(val)} val, {len(train.classes)} "
            f"classes; features: {POOL_NAMES[pool]}; {world.size} x {world.device}, amp {precision.name}")  # fmt: skip

    started = time.time()
    features, targets = extract(model, build_loader(args, meta, train, world), precision, world, pool, "train")
    val_features, val_targets = extract(model, build_loader(args, meta, val, world), precision, world, pool, "val")
    if not world.is_main:
        return 0
    features, targets, val_features, val_targets = (
        t.to(world.device) for t in (features, targets, val_features, val_targets)
    )
    C, k = len(train.classes), min(args.knn_k, len(features))
    extracted = time.time()
    knn = accuracy(knn_predict(features, targets, val_features, C, k, args.knn_t), val_targets)
    l2 = choose_l2(features, targets, C, args.seed)
    probe = linear_probe(features, targets, C, l2)
    linear, linear_train = (
        accuracy(probe(x).argmax(1), y) for x, y in ((val_features, val_targets), (features, targets))
    )
    line = {
        "epoch": content.get("epoch", 0), "knn_acc1": knn, "linear_acc1": linear, "linear_train_acc1": linear_train,
        "linear_l2": l2, "knn_k": k, "knn_t": args.knn_t, "pool": pool, "feature_dim": features.shape[1],
        "n_train": len(features), "n_val": len(val_features), "dataset": args.dataset, "model": meta["model"],
        "weights": weights, "seconds": round(extracted - started, 2), "scoring_seconds": round(time.time() - extracted, 2),
    }  # fmt: skip
    log.say(f"k-NN accuracy (k {k}, temperature {args.knn_t:g}): {knn:.2f}%")
    log.say(f"linear probe accuracy: {linear:.2f}% (on its training images {linear_train:.2f}%, l2 {l2:g})")
    if log.output_dir:
        log.epoch(line)
        write_report(log.output_dir, line)
    return 0


def write_report(output_dir: str, line: dict) -> None:
    text = [
        f"# Frozen features of {line['model']} on {line['dataset']}",
        "",
        f"    {shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]])}",
        "",
        f"Weights: {line['weights']}. Features: {POOL_NAMES[line['pool']]}, {line['feature_dim']} values, of "
        f"{line['n_train']} training and {line['n_val']} validation images without augmentation.",
        "",
        "| top-1 accuracy | |",
        "|---|---|",
        f"| weighted k-NN, k {line['knn_k']}, temperature {line['knn_t']:g} | {line['knn_acc1']:.2f}% |",
        f"| linear probe | {line['linear_acc1']:.2f}% |",
        "",
        "The probe is a BatchNorm without affine and a linear layer, fitted by L-BFGS to its optimum on the cached features; "
        f"the penalty {line['linear_l2']:g} was chosen on a tenth of the training images.",
        "",
        "    " + json.dumps(line),
        "",
    ]
    write_text(os.path.join(output_dir, "report.md"), "\n".join(text))


if __name__ == "__main__":
    options.run_main(main)
