"""Predict images with one or many fine-tuned networks: 12 views of each, probabilities averaged over views and members.

python main_predict.py --checkpoints out/swin out/convnext --data_path photos/test --output_dir predictions
torchrun --nproc_per_node=8 main_predict.py --checkpoints out/*/checkpoint-best.pth --data_path test --labels labels.csv
python main_predict.py --checkpoints out/swin out/convnext --data_path photos/train --out_of_fold --output_dir oof
"""

from util.cli.predict import check_data, get_args_parser, get_options  # noqa: F401 (a public name)
from util.cli.script import check_command_line, run_main, says_flags

if __name__ == "__main__":  # report a mistyped flag before importing torch, which takes seconds
    check_command_line(get_options)

import os
import time

import torch

from augment.decoding import limit_pixels
from engine_predict import predict, predict_out_of_fold
from util.cli.resolve import resolve_data
from util.data.datasets import notes_of
from util.data.labels import read_images
from util.dist import init_world
from util.log import claim
from util.predict.ensemble import build_combiners
from util.predict.members import find_members, load_nets, short_names
from util.predict.out_of_fold import fold_of_images, fold_of_nets
from util.report.prediction import write_all


@says_flags
def main(argv: list[str] | None = None) -> int:
    options, started = get_options(argv), time.time()
    asked, data, machine, output_dir = options.prediction, options.data, options.machine, options.run.output_dir
    limit_pixels(options.reading.max_pixels)
    world = init_world(machine.device, machine.dist_url)
    # cuDNN's benchmark chooses algorithms by timing, so the last digits could differ between ranks and runs.
    torch.backends.cudnn.benchmark = False

    members, classes = find_members(asked.checkpoints)
    if data.data_path is None:
        options = check_data(resolve_data(options, members[0].heads[0]), of_checkpoint=True)
        data = options.data
    log = claim(output_dir, "predict", world)
    combiners = build_combiners(members, classes, asked.weights)
    images, ids, notes = read_images(data.dataset, data.data_path, classes, asked.labels, trained_on=asked.out_of_fold)
    log.notes(notes_of(images))
    if asked.margin is not None:
        notes.append(
            f"--margin {asked.margin}: sets the crop of the centre views, instead of the checkpoints' evaluation crop"
        )
    if asked.out_of_fold:
        net_folds = fold_of_nets(members)  # refuses a single network before its weights are read
        image_folds = fold_of_images(members, classes, images, ids)
        notes.append("out of fold: each image is predicted by the networks that have not seen it")
    log.write_args(options.flat())
    nets = load_nets(members, classes, world.device, machine.amp)
    for m, (name, member) in enumerate(zip(short_names(members), members)):
        precision = next(net.precision for net in nets if net.member == m)
        size = member.metas[0]["img_size"]
        log.say(f"member {name}: {len(member.paths)} x {member.model}, input {size}, {precision}")
    log.say(
        f"{len(ids)} images, {int((images.targets >= 0).sum())} with labels, {len(classes)} classes, "
        f"{len(asked.views)} view(s); {world.size} x {world.device}"
    )

    if asked.out_of_fold:
        prediction = predict_out_of_fold(nets, net_folds, images, image_folds, asked, options.reading, world)
        read = prediction.index
        combiners.cross_fit([ids[i] for i in read], image_folds[read], prediction.geometric)
    else:
        prediction = predict(nets, images, asked, options.reading, world)
    if not world.is_main:
        return 0
    notes += combiners.notes
    for i, reason in prediction.bad.items():
        notes.append(f"not readable, its row is empty: {ids[i]} ({reason})")
    text = write_all(
        options,
        data=images,
        ids=ids,
        combiners=combiners,
        prediction=prediction,
        notes=notes,
        seconds=time.time() - started,
    )
    log.say(f"{text}\n")
    log.notes([note for note in notes if note not in notes_of(images)])
    table, report = (os.path.join(output_dir, name) for name in ("predictions.csv", "report.html"))
    log.say(f"predictions: {table}, report: {report}")
    return 0


if __name__ == "__main__":
    run_main(main)
