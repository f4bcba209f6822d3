"""Predict images with one or many fine-tuned networks: 12 views of each image, probabilities averaged over views and members.

python main_predict.py --checkpoints out/swin out/convnext --data_path photos/test --output_dir predictions
torchrun --nproc_per_node=8 main_predict.py --checkpoints out/*/checkpoint-best.pth --data_path test --labels labels.csv
python main_predict.py --checkpoints out/swin out/convnext --data_path photos/train --out_of_fold --output_dir out_of_fold
"""

from util.cli.predict import get_args_parser, get_options  # noqa: F401 (a public name)
from util.cli.script import check_command_line, run_main

if __name__ == "__main__":  # a mistyped flag is answered before torch is imported, which takes seconds
    check_command_line(get_options)

import os
import time
from argparse import Namespace

import torch

from augment.decoding import limit_pixels
from engine_predict import predict, predict_out_of_fold
from util.data.datasets import notes_of
from util.data.labels import read_images
from util.dist import init_world
from util.log import claim
from util.predict.ensemble import build_combiners
from util.predict.members import find_members, load_nets, short_names
from util.predict.out_of_fold import fold_of_images, fold_of_nets
from util.report.prediction import write_all


def main(argv: list[str] | None = None) -> int:
    args, started = Namespace(**get_options(argv).flat()), time.time()
    limit_pixels(args.max_pixels)
    world = init_world(args.device, args.dist_url)
    # The fastest algorithm is chosen by timing, and so may differ between ranks and runs, and with it the last digits.
    torch.backends.cudnn.benchmark = False
    say = print if world.is_main else lambda *text, **kwargs: None

    members, classes = find_members(args.checkpoints)
    log = claim(args.output_dir, "predict", world)
    combiners = build_combiners(members, classes, args.weights)
    data, ids, notes = read_images(args.dataset, args.data_path, classes, args.labels, trained_on=args.out_of_fold)
    if world.is_main:
        for note in notes_of(data):
            say(f"note: {note}")
    if args.margin is not None:
        notes.append(f"--margin {args.margin}: the centre views are cut by it, not as the checkpoints' evaluation cuts")
    if args.out_of_fold:
        fold_of_nets(members)  # a single network is refused before its weights are read
        image_folds = fold_of_images(members, classes, data, ids)
        notes.append("out of fold: each image is predicted by the networks that had not seen it")
    log.write_args(vars(args))
    nets = load_nets(members, classes, world.device, args.amp)
    for m, (name, member) in enumerate(zip(short_names(members), members)):
        precision = next(net.precision for net in nets if net.member == m)
        say(f"member {name}: {len(member.paths)} x {member.model}, input {member.metas[0]['img_size']}, {precision}")
    say(
        f"{len(ids)} images, {int((data.targets >= 0).sum())} with labels, {len(classes)} classes, "
        f"{len(args.views)} view(s); {world.size} x {world.device}",
        flush=True,
    )

    how = dict(
        world=world,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        on_bad_image=args.on_bad_image,
        margin=args.margin,
    )
    if args.out_of_fold:
        prediction = predict_out_of_fold(nets, fold_of_nets(members), data, image_folds, args.views, **how)
        read = prediction.index
        combiners.cross_fit([ids[i] for i in read], image_folds[read], prediction.geometric)
    else:
        prediction = predict(nets, data, args.views, **how)
    if not world.is_main:
        return 0
    notes += combiners.notes
    for i, reason in prediction.bad.items():
        notes.append(f"not readable, its row is empty: {ids[i]} ({reason})")
    text = write_all(
        args.output_dir,
        data=data,
        ids=ids,
        combiners=combiners,
        prediction=prediction,
        notes=notes,
        seconds=time.time() - started,
        spreadsheet_safe=args.spreadsheet_safe,
    )
    say("\n".join([text, "", *(f"note: {note}" for note in notes if note not in notes_of(data))]))
    table, report = (os.path.join(args.output_dir, name) for name in ("predictions.csv", "report.md"))
    say(f"predictions: {table}, report: {report}")
    return 0


if __name__ == "__main__":
    run_main(main)
