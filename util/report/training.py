"""report.md: what ran, what came out, with the pictures; result.json: the same for programs."""

import json
import os
import shlex
import sys

from util.checkpoint import BEST, LAST
from util.cli.finetune import FinetuneOptions
from util.cli.pretrain import PretrainOptions
from util.cli.settings import Data
from util.files import write_text
from util.log import read_log
from util.predict.calibration import interval_sentence
from util.report.markdown import note_lines, write_report
from util.report.plots import plot_curves
from util.train.folds import RESULT
from util.train.run import Position


def write_finetune_report(
    output_dir: str, options: FinetuneOptions, meta: dict, position: Position, notes: list[str], images: int
) -> None:
    """images: those that each epoch was validated on."""
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
    }
    write_text(os.path.join(output_dir, RESULT), json.dumps(result, indent=2, default=str) + "\n")

    def table(line: dict) -> list[str]:
        return [
            f"| {k.removeprefix('val_')} | {v:.4g} |" for k, v in line.items() if k.startswith("val_") and v is not None
        ]

    snr = best.get("train_noise_snr")
    noise = options.noise.words + (f", {snr:.1f} dB where it goes in" if snr is not None else "")
    text = [
        f"{len(lines)} epochs, {sum(line['seconds'] for line in lines):.0f} s of training; {noise}; "
        f"input {meta['in_chans']} x {meta['img_size'][0]} x {meta['img_size'][1]}, {len(meta['classes'])} classes, "
        + (
            f"best epoch {position.best_epoch} by {options.selection.eval_metric}."
            if has_best
            else "no validation loss was finite."
        ),
        "",
        *note_lines(notes),
        f"| validation, {'best' if has_best else 'last'} epoch | |",
        "|---|---|",
        *table(best),
        "",
        *([interval_sentence(best["val_acc1"], images), ""] if images and best.get("val_acc1") is not None else []),
        "![curves](curves.png)",
        "",
    ]
    if has_best:
        text += [
            "![confusion matrix of the best epoch](confusion.png)",
            "",
            f"checkpoint-best.pth holds these weights; `{evaluation_line(output_dir, options)}` scores it.",
            "",
        ]
    write_report(output_dir, f"Fine-tuning: {meta['model']} on {meta['dataset']}", text)


def evaluation_line(output_dir: str, options: FinetuneOptions) -> str:
    """The command that scores a run's best weights as the run did: the flags that the checkpoint does not hold."""
    data, flat, flags = options.data, options.flat(), ["batch_size"]
    flags += ["val_split", "split_seed"] if data.val_split else []
    flags += ["kfold", "fold", "split_seed"] if data.kfold else []
    flags += [k for k in ("amp", "on_bad_image", "max_pixels") if flat[k] != options.flags()[k].default]
    if options.noise.noise_eval:
        flags += ["seed", "alpha_blend", *(k for k in flat if k.startswith("noise_") and k != "noise_eval")]
    words = ["--eval", "--resume", os.path.abspath(os.path.join(output_dir, BEST)), *_data_flags(data)]
    for flag in flags:
        words += [f"--{flag}", str(flat[flag])]
    return _command("main_finetune.py", *words, *(["--noise_eval"] if options.noise.noise_eval else []))


def _data_flags(data: Data) -> list[str]:
    embedded = data.dataset == "digits"
    return [
        "--dataset",
        data.dataset,
        *([] if embedded else ["--data_path", os.path.abspath(data.data_path or "data")]),
    ]


def _command(script: str, *words: str) -> str:
    """A line for a shell, to be typed where this process was started."""
    started = sys.argv[0] if os.path.basename(sys.argv[0]).startswith("main_") else ""
    return shlex.join(["python", os.path.join(os.path.dirname(started), script), *words])


def write_pretrain_report(output_dir: str, options: PretrainOptions, meta: dict, notes: list[str]) -> None:
    noprop = options.noprop
    lines = read_log(os.path.join(output_dir, "log.txt"))
    plot_curves(os.path.join(output_dir, "log.txt"), os.path.join(output_dir, "curves.png"))
    pictures = sorted((n for n in os.listdir(output_dir) if n.startswith("reconstruction_epoch_")), key=_epoch_of)
    first, last = (lines[0], lines[-1]) if lines else ({}, {})  # a finished run whose log.txt is gone
    last_checkpoint = os.path.abspath(os.path.join(output_dir, LAST))
    levels = [k for k in last if k.startswith("train_loss_")]
    names = [f"sigma {s:.4g}" for s in meta["sigmas"][:-1]] + ["encoder's own"]
    text = [
        f"{len(lines)} epochs, {sum(line['seconds'] for line in lines):.0f} s of training; T = {noprop.T}, ",
        *note_lines(notes),
        f"| loss | epoch {first.get('epoch')} | epoch {last.get('epoch')} |",
        "|---|---|---|",
        *[f"| {name} | {first[k]:.4g} | {last[k]:.4g} |" for name, k in zip(names, levels)],
        "",
        "![curves](curves.png)",
        "",
        *[f"![original, masked, each step, final]({name})\n" for name in pictures[-1:]],
        f"Next: `{_command('main_finetune.py', '--finetune', last_checkpoint, *_data_flags(options.data))}`,",
        f"`{_command('main_linprobe.py', '--checkpoint', last_checkpoint)}`,",
        f"`{_command('main_sample.py', last_checkpoint)}`.",
        "",
    ]
    write_report(output_dir, f"NoProp-MAE pretraining on {meta['dataset']}", text)


def _epoch_of(name: str) -> int:
    return int("".join(c for c in name if c.isdigit()))
