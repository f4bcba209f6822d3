"""Reports of training: settings, results and pictures; result.json: the same for programs."""

import json
import os
from dataclasses import fields

from models.edm import precondition
from util.checkpoint import BEST, LAST
from util.cli.finetune import FinetuneOptions
from util.cli.parser import default_path
from util.cli.pretrain import PretrainOptions
from util.files import write_text
from util.log import read_log
from util.predict.calibration import interval_sentence
from util.report.page import Block, Code, Notes, Picture, Table, Text, command_of, commands, markdown, write_report
from util.report.pictures import sigma_name
from util.report.plots import loss_name, plot_curves, plot_noise_curve
from util.train.folds import RESULT, Summary
from util.train.run import Position

LOWEST = (
    "The loss of {sigma} stays near {loss}, that of a level that predicts nothing: noise this weak cannot be told "
    "from texture."
)
PSNR = (
    "Below the steps: PSNR on masked patches. It can fall while the steps add detail: the first estimate is the mean "
    "of all images that fit, which has the least squared error; later estimates choose one of these images."
)


def write_finetune_report(
    output_dir: str,
    options: FinetuneOptions,
    meta: dict,
    position: Position,
    noise: str,
    notes: list[str],
    images: int,
    curve: list[dict[str, float]] | None = None,
) -> None:
    """noise: in words. images: those that each epoch was validated on. curve: --noise_curve's, of the last epoch."""
    log_path = os.path.join(output_dir, "log.txt")
    plot_curves(log_path, os.path.join(output_dir, "curves.png"))
    lines, has_best = read_log(log_path), position.best is not None
    best = next((line for line in lines if line["epoch"] == position.best_epoch), lines[-1] if lines else {})
    result = {
        "best": best,
        "last": lines[-1] if lines else {},
        "options": options.flat(),
        "model": meta["model"],
        "notes": notes,
        **({"noise_curve": curve} if curve else {}),
    }
    write_text(os.path.join(output_dir, RESULT), json.dumps(result, indent=2, default=str) + "\n")

    snr = best.get("train_noise_snr")
    noise += f", {snr:.1f} dB where it is added" if snr is not None else ""
    scores = {k.removeprefix("val_"): v for k, v in best.items() if k.startswith("val_") and v is not None}
    blocks: list[Block] = [
        Text(
            f"{_epochs(lines)}; {noise}; input {meta['in_chans']} x {meta['img_size'][0]} x {meta['img_size'][1]}, "
            f"{len(meta['classes'])} classes, "
            + (
                f"best epoch {position.best_epoch} by {options.selection.eval_metric}."
                if has_best
                else "no validation loss was finite."
            )
        ),
        Notes(notes),
        Table(
            [f"validation, {'best' if has_best else 'last'} epoch", ""], [[k, f"{v:.4g}"] for k, v in scores.items()]
        ),
    ]
    if images and "acc1" in scores:
        blocks.append(Text(interval_sentence(scores["acc1"], images)))
    blocks += [Picture("curves", "curves.png"), *noise_blocks(curve, output_dir)]
    if has_best:
        blocks += [
            Picture("confusion matrix of the best epoch", "confusion.png"),
            Text("checkpoint-best.pth has these weights. To score them again:"),
            commands(evaluation_command(output_dir, options)),
        ]
    write_report(output_dir, f"Fine-tuning: {meta['model']} on {meta['dataset']}", blocks, options)


def noise_blocks(curve: list[dict[str, float]] | None, output_dir: str) -> list[Block]:
    """The table and picture of --noise_curve; nothing without it."""
    if not curve:
        return []
    plot_noise_curve(curve, os.path.join(output_dir, "noise_curve.png"))
    names = {"snr": "noise, dB", "acc1": "acc1", "agreement": "same class, %", "change": "probability moved"}
    rows = [[f"{point[k]:.4g}" for k in (*names, "distance")] for point in curve]
    return [
        Text("Noise in evaluation, with the last epoch's weights (inf: without):"),
        Table([*names.values(), "distance of the tokens"], rows),
        Picture("accuracy against noise in evaluation", "noise_curve.png"),
    ]


def evaluation_command(output_dir: str, options: FinetuneOptions) -> list[str]:
    """The command that scores a run's best weights as the run did, with flags that the checkpoint does not store."""
    flags = ["batch_size", "amp", "on_bad_image", "max_pixels"]
    if options.noise.noise_eval:
        flags += ["seed", *(one.name for one in fields(options.noise))]
    return command_of("main_finetune.py", "--eval", "--resume", os.path.join(output_dir, BEST), *options.words(*flags))


def write_pretrain_report(output_dir: str, options: PretrainOptions, meta: dict, notes: list[str]) -> None:
    log_path = os.path.join(output_dir, "log.txt")
    lines, sigmas = read_log(log_path), meta["sigmas"][:-1]
    plot_curves(log_path, os.path.join(output_dir, "curves.png"), sigmas)
    pictures = sorted((n for n in os.listdir(output_dir) if n.startswith("reconstruction_epoch_")), key=_epoch_of)
    checkpoint, data = os.path.join(output_dir, LAST), options.data
    path = [] if data.data_path == default_path(data.dataset) else options.words("data_path")
    blocks: list[Block] = [
        Text(f"{_epochs(lines)}; T = {len(sigmas)} levels."),
        Notes(notes),
        *_loss_table(lines, meta),  # empty for a finished run whose log.txt is gone
        Picture("curves", "curves.png"),
        *(Picture("original, masked, each step, final", name, PSNR) for name in pictures[-1:]),
        Text("Next: fine-tuning, a probe of the frozen features, samples."),
        commands(
            command_of("main_finetune.py", "--finetune", checkpoint, "--dataset", data.dataset, *path),
            command_of("main_linprobe.py", "--checkpoint", checkpoint),
            command_of("main_sample.py", checkpoint),
        ),
    ]
    write_report(output_dir, f"NoProp-MAE pretraining on {meta['dataset']}", blocks, options)


def _loss_table(lines: list[dict], meta: dict) -> list[Block]:
    """Table of the losses of the first and last epoch, and why the lowest level's hardly falls."""
    if not lines:
        return []
    sigmas, last = meta["sigmas"][:-1], lines[-1]
    shown = [lines[0], last] if len(lines) > 1 else [last]
    names = {k: loss_name(k, sigmas) for k in last if k.startswith("train_loss_")} | {"train_loss": "sum"}
    rows = [[name, *(_number(line.get(k)) for line in shown)] for k, name in names.items()]
    blocks: list[Block] = [Table(["loss", *(f"epoch {line['epoch']}" for line in shown)], rows)]
    lowest, data = sigmas[-1], meta["noprop"]["sigma_data"]
    untrained = 1.0 if meta["noprop"]["loss_weighting"] == "edm" else precondition(lowest, data)[1] ** 2
    reached = last.get(f"train_loss_{len(sigmas) - 1}")
    if lowest < 0.05 * data and reached is not None and abs(reached / untrained - 1) < 0.1:
        blocks.append(Text(LOWEST.format(sigma=sigma_name(lowest), loss=f"{untrained:.3g}")))
    return blocks


def write_kfold_report(options: FinetuneOptions, summary: Summary) -> None:
    """The report of all folds; its table is printed, too."""
    output_dir, kfold = options.run.output_dir, options.data.kfold
    rows = [
        [name.removeprefix("val_"), *(f"{v:.2f}" for v in (s["mean"], s["std"], *s["folds"]))]
        for name, s in summary.scores.items()
    ]
    blocks: list[Block] = [
        Table(["score", "mean", "std", *(f"fold {i}" for i in range(kfold))], rows),
        Text(
            [
                f"Out-of-fold probabilities of {summary.images} images: oof.csv. Each fold's report: ",
                Code("fold-*/report.md"),
                ".",
            ]
        ),
        Notes(summary.notes),
    ]
    write_report(output_dir, f"{kfold}-fold run", blocks, options)
    print(markdown(blocks), end="", flush=True)


def _epochs(lines: list[dict]) -> str:
    seconds = sum(line["seconds"] for line in lines)
    return f"{len(lines)} epoch{'' if len(lines) == 1 else 's'}, {seconds:.0f} s of training"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _epoch_of(name: str) -> int:
    return int("".join(c for c in name if c.isdigit()))
