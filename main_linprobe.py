"""Evaluate a frozen encoder: weighted k-NN and a linear probe on features computed once, without augmentation.

python main_linprobe.py --checkpoint output/mae_cifar10_noprop/checkpoint-last.pth
python main_linprobe.py --checkpoint output/mae_cifar10_noprop/checkpoint-last.pth --random_init
python main_linprobe.py --finetune mae_pretrain_vit_base.pth --model vit_base_patch16 --cls_token --data_path ImageNet
torchrun --nproc_per_node=8 main_linprobe.py --model convnext_base.fb_in22k --pretrained --data_path ImageNet
"""

from util.cli.linprobe import LinprobeOptions, get_args_parser, get_options  # noqa: F401 (a public name)
from util.cli.script import check_command_line, run_main, says_flags

if __name__ == "__main__":  # report a mistyped flag before importing torch, which takes seconds
    check_command_line(get_options)

import json
import time

import torch

from augment.decoding import limit_pixels
from models.loading import try_forward
from util.cli.resolve import resolve_data
from util.cli.settings import Probe
from util.data.datasets import notes_of
from util.data.image_files import refuse_output_among_images
from util.data.loader import evaluation_loader
from util.data.splits import load_data
from util.data_specs import IN_MEMORY
from util.dist import Precision, init_world, prepare_net
from util.errors import UserError
from util.log import claim
from util.precision import place
from util.predict.calibration import interval_sentence
from util.probe.classify import accuracy, choose_l2, knn_predict, linear_probe
from util.probe.features import extract
from util.probe.frozen import load_encoder, read_content
from util.report.page import Lines, Notes, Table, Text, write_report

POOL_NAMES = {"mean": "mean of the patch tokens", "cls": "class token", "head": "the classifier's input"}


@says_flags
def main(argv: list[str] | None = None) -> int:
    options = get_options(argv)
    machine, reading, probing, given = options.machine, options.reading, options.probe, options.model
    limit_pixels(reading.max_pixels)
    world = init_world(machine.device, machine.dist_url, deterministic=machine.deterministic)
    content = read_content(given.finetune)
    options = resolve_data(options, content)
    data = options.data
    if data.dataset not in IN_MEMORY:
        refuse_output_among_images("--output_dir", options.run.output_dir, data.data_path)
    log = claim(options.run.output_dir, "linprobe", world)
    train, val = load_data(data, world)

    model, meta, pool, words = load_encoder(options, train.classes, content)
    try_forward(place(model, world.device), {**meta, "num_classes": model.num_classes}, 1)
    precision = Precision(machine.amp, world.device, model)
    prepare_net(model, precision)
    weights = "untrained" if given.random_init else given.finetune or "timm's weights"
    log.say(
        f"{meta['model']} ({weights}) on {data.dataset}: {len(train)} train, {len(val)} val, {len(train.classes)} "
        f"classes; {words}; features: {POOL_NAMES[pool]}; {world.size} x {world.device}, {precision}"
    )
    notes = notes_of(train, val)
    log.notes(notes)

    started = time.time()
    parts = []
    for name, images in (("train", train), ("val", val)):
        loader = evaluation_loader(images, meta, world, batch_size=probing.batch_size, reading=reading)
        parts.append(extract(model, loader, precision, world, pool, name))
    if not world.is_main:
        return 0
    (x, y), (val_x, val_y) = ([t.to(world.device) for t in part] for part in parts)
    if len(y.unique()) < 2:  # images of other classes were unreadable
        raise UserError(
            f"--data_path {data.data_path}: its {len(y)} readable training images have one class; a probe needs two"
        )
    extracted = time.time()
    line = {
        "epoch": content.get("epoch", 0),
        **score(x, y, val_x, val_y, len(train.classes), probing, machine.seed),
        "pool": pool,
        "feature_dim": x.shape[1],
        "n_train": len(x),
        "n_val": len(val_x),
        "dataset": data.dataset,
        "model": meta["model"],
        "weights": weights,
        "seconds": round(extracted - started, 2),
        "scoring_seconds": round(time.time() - extracted, 2),
    }
    log.say(f"k-NN accuracy (k {line['knn_k']}, temperature {line['knn_t']:g}): {line['knn_acc1']:.2f}%")
    log.say(
        f"linear probe accuracy: {line['linear_acc1']:.2f}% (on its training images {line['linear_train_acc1']:.2f}%, "
        f"l2 {line['linear_l2']:g})"
    )
    if log.output_dir:
        log.write_args(options.flat())
        log.epoch(line)
        report(log.output_dir, options, line, notes)
    return 0


def score(
    x: torch.Tensor, y: torch.Tensor, val_x: torch.Tensor, val_y: torch.Tensor, C: int, probing: Probe, seed: int
) -> dict[str, float]:
    """Accuracies in percent on val_x [M, D], val_y [M] from features x [N, D], classes y [N], with their settings."""
    k = min(probing.knn_k, len(x))
    knn = accuracy(knn_predict(x, y, val_x, C, k, probing.knn_t), val_y)
    l2 = choose_l2(x, y, C, seed)
    probe = linear_probe(x, y, C, l2)
    linear, linear_train = accuracy(probe(val_x).argmax(1), val_y), accuracy(probe(x).argmax(1), y)
    scores = {"knn_acc1": knn, "linear_acc1": linear, "linear_train_acc1": linear_train}
    return {**scores, "linear_l2": l2, "knn_k": k, "knn_t": probing.knn_t}


def report(output_dir: str, options: LinprobeOptions, line: dict, notes: list[str]) -> None:
    knn, linear = (f"{line[k]:.2f}%" for k in ("knn_acc1", "linear_acc1"))
    blocks = [
        Text(
            f"Weights: {line['weights']}. Features: {POOL_NAMES[line['pool']]}, {line['feature_dim']} values, of "
            f"{line['n_train']} training and {line['n_val']} validation images without augmentation. "
            f"{line['seconds']:.0f} s for the features, {line['scoring_seconds']:.0f} s for the scores."
        ),
        Notes(notes),
        Table(
            ["top-1 accuracy", ""],
            [[f"weighted k-NN, k {line['knn_k']}, temperature {line['knn_t']:g}", knn], ["linear probe", linear]],
        ),
        Text(f"Linear probe: {interval_sentence(line['linear_acc1'], line['n_val'])}"),
        Text(
            "The probe is a BatchNorm without affine and a linear layer, fitted to its optimum by L-BFGS on the cached "
            f"features; the penalty {line['linear_l2']:g} was chosen on a tenth of the training images."
        ),
        Lines([json.dumps(line)]),
    ]
    write_report(output_dir, f"Frozen features of {line['model']} on {line['dataset']}", blocks, options)


if __name__ == "__main__":
    run_main(main)
