"""k-fold runs: one folder per fold, out-of-fold probabilities, mean and standard deviation over the folds."""

import csv
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from util.cli.finetune import FinetuneOptions
from util.cli.flags import differences, refusal
from util.data.labels import image_id
from util.dist import World, barrier, broadcast_object
from util.errors import UserError
from util.files import write_csv, write_text
from util.folder import clear_run
from util.log import claim

RESULT = "result.json"


@dataclass
class Summary:
    """scores: by name, mean, std and folds; images: those with out-of-fold probabilities."""

    scores: dict[str, dict]
    images: int
    notes: list[str]


def folder(output_dir: str, fold: int) -> str:
    return os.path.join(output_dir, f"fold-{fold}")


def of_fold(options: FinetuneOptions, fold: int) -> FinetuneOptions:
    """The options of one fold, with its own output folder and, if --log_dir is given, its own TensorBoard folder."""
    run = options.run
    return options.having(
        fold=str(fold),
        output_dir=folder(run.output_dir, fold) if run.output_dir else run.output_dir,
        log_dir=folder(run.log_dir, fold) if run.log_dir else run.log_dir,
    )


def is_finished(options: FinetuneOptions) -> bool:
    """True if this fold is finished. UserError if it was run with other values of flags that change results.

    Under --resume auto, flags that a resume may change (--epochs) are allowed: the fold continues from its checkpoint.
    """
    path = os.path.join(options.run.output_dir, RESULT)
    if not os.path.isfile(path):
        return False
    try:
        stored = dict(json.loads(Path(path).read_text("utf-8"))["options"])
    except (ValueError, TypeError, KeyError):  # incomplete: the fold's checkpoint says where it stopped
        return False
    found = differences(options.flags(), stored, options.flat())
    for_good = [d for d in found if not d.flag.free_at_resume]
    if refused := for_good if options.run.resume else found:
        advice = ("" if for_good else "--resume auto continues it, ") + "choose another --output_dir, or --overwrite"
        raise UserError(refusal(refused, f"{options.run.output_dir} was finished with", advice))
    return not found


def run_all(
    options: FinetuneOptions,
    world: World,
    run_one: Callable[[FinetuneOptions, World], int],
    report: Callable[[FinetuneOptions, Summary], None],
) -> int:
    """Run every unfinished fold, then write the summary. run_one(options, world) -> exit code."""
    run, kfold = options.run, options.data.kfold
    trains = not (run.dry_run or options.selection.eval)
    log = claim(run.output_dir if trains else None, "kfold", world, overwrite=run.overwrite)
    if log.output_dir:
        if run.overwrite:
            clear_run(run.output_dir, folds=kfold)
        else:
            refuse_other_folds(run.output_dir, kfold)
        log.write_args(options.flat())
    for fold in range(kfold):
        one = of_fold(options, fold)
        finished = trains and not run.overwrite and world.is_main and is_finished(one)
        if broadcast_object(finished):
            log.say(f"fold {fold}: finished before, in {one.run.output_dir}")
            continue
        log.say(f"fold {fold} of {kfold}: {one.run.output_dir}")
        code = run_one(one, world)
        if code or run.dry_run:
            return code
        barrier()
    if world.is_main:
        report(options, summarise(run.output_dir, kfold))
    return 0


def refuse_other_folds(output_dir: str, kfold: int) -> None:
    """UserError if a run with more folds left some, which would be mistaken for this run's."""
    for name in sorted(os.listdir(output_dir)):
        number = re.fullmatch(r"fold-(\d+)", name)
        if number and int(number.group(1)) >= kfold:
            raise UserError(
                f"--kfold {kfold}: {output_dir} contains {name} of another run; choose another --output_dir, or "
                "--overwrite"
            )


def write_oof(output_dir: str, fold: int, data, evaluated) -> None:
    """oof.csv: ID, fold, true class and a probability per class of the data for the fold's validation images."""
    C = len(data.classes)
    p = evaluated.probabilities.astype(np.float64)
    if p.shape[1] > C:  # --nb_classes is larger: renormalise over the data's classes, as main_predict.py does
        p = p[:, :C] / p[:, :C].sum(1, keepdims=True)
    rows = []
    for i, values in zip(evaluated.index.tolist(), p):
        rows.append([image_id(data, i), fold, data.classes[int(data.targets[i])], *map(probability, values)])
    write_csv(os.path.join(output_dir, "oof.csv"), ["ID", "fold", "True", *data.classes], rows)


def probability(p: float) -> str:
    """Nine significant digits: exact for float32, and the logarithm changes by at most 1e-8."""
    return f"{p:.9g}"


def summarise(output_dir: str, kfold: int) -> Summary:
    """oof.csv of all folds, and summary.json with mean and standard deviation."""
    header: list[str] = []
    rows, results = [], []
    for fold in range(kfold):
        where = folder(output_dir, fold)
        path = os.path.join(where, "oof.csv")
        try:
            with open(path, encoding="utf-8", newline="") as file:
                header, *more = list(csv.reader(file))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({error}); run that fold again with --overwrite") from None
        rows += more
        results.append(json.loads(Path(where, RESULT).read_text("utf-8")))
    write_csv(os.path.join(output_dir, "oof.csv"), header, rows, "--output_dir")
    names = [k for k in results[0]["best"] if k.startswith("val_")]
    summary = {}
    for name in names:
        values = np.array([r["best"][name] for r in results], dtype=float)
        summary[name] = {"mean": float(values.mean()), "std": float(values.std(ddof=1)), "folds": values.tolist()}
    write_text(os.path.join(output_dir, "summary.json"), json.dumps(summary, indent=2) + "\n", "--output_dir")
    return Summary(summary, len(rows), results[0].get("notes", []))
