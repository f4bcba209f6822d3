"""Options of main_finetune.py."""

import os
from dataclasses import dataclass

from util.cli.flags import Options
from util.cli.parser import Parser, check_training, default_path
from util.cli.settings import (
    Augmentation,
    Data,
    Input,
    Loss,
    Machine,
    Model,
    Noise,
    Optimizer,
    Phases,
    Reading,
    Run,
    Selection,
)
from util.errors import UserError
from util.meta import check_model_kwargs


@dataclass(frozen=True)
class FinetuneOptions(Options):
    """All options of a fine-tuning run."""

    MAIN = "finetune"
    DESCRIPTION = (
        "Fine-tune an image classifier with alpha-blended diffusion noise (DiffNoise), mixup, cutmix and layer-wise lr "
        "decay."
    )

    optimizer: Optimizer
    model: Model
    input: Input
    data: Data
    augmentation: Augmentation
    loss: Loss
    selection: Selection
    run: Run
    reading: Reading
    machine: Machine
    noise: Noise
    phases: Phases

    @property
    def weights(self) -> str:
        """The file of weights; '' for none."""
        return (self.run.resume if self.selection.eval else "") or self.model.finetune


def get_args_parser() -> Parser[FinetuneOptions]:
    return Parser(FinetuneOptions)


def get_options(argv: list[str] | None = None) -> FinetuneOptions:
    """The command line, checked, with the defaults that depend on other flags."""
    return check(get_args_parser().options(argv))


def check(options: FinetuneOptions) -> FinetuneOptions:
    """The options with defaults that depend on other flags. UserError for flags that conflict."""
    evaluating = options.selection.eval
    if not evaluating:  # otherwise the checkpoint's, see resolve_data
        dataset = options.data.dataset or "folder"
        path = default_path(dataset) if options.data.data_path is None else options.data.data_path
        options = options.having(dataset=dataset, data_path=path)
    check_training(options)
    run, data, model, aug = options.run, options.data, options.model, options.augmentation
    check_model_kwargs(model.model_kwargs)
    if data.kfold == 1:
        raise UserError("--kfold 1: needs 2 or more folds")
    if data.fold != "all" and data.fold not in map(str, range(max(1, data.kfold))):
        raise UserError(f"--fold {data.fold}: should be 0 to {max(0, data.kfold - 1)}, or all")
    if data.kfold and data.val_split:
        raise UserError(f"--val_split {data.val_split}: not together with --kfold {data.kfold}")
    if data.kfold and data.fold == "all" and not run.output_dir:
        raise UserError("--output_dir: k-fold needs one, for its out-of-fold files")
    if evaluating and data.kfold and data.fold == "all":
        raise UserError(f"--kfold {data.kfold}: with --eval give the --fold of the checkpoint")
    if data.kfold and run.resume not in ("", "auto") and not evaluating:
        raise UserError(f"--resume {run.resume}: with --kfold give `auto`; each fold has its own checkpoints")
    if model.finetune and not os.path.isfile(model.finetune):
        raise UserError(f"--finetune {model.finetune}: no such file")
    if model.partial_load and not model.finetune:
        raise UserError("--partial_load: is for the file of --finetune; give one")
    if model.pos_grid and not options.weights:
        raise UserError(f"--pos_grid {model.pos_grid[0]} {model.pos_grid[1]}: is for the file of --finetune; give one")
    if evaluating and not (options.weights or model.pretrained):
        raise UserError("--eval: needs weights; give --resume CHECKPOINT")
    if evaluating and run.resume == "auto":
        raise UserError("--resume auto: with --eval name the checkpoint file")
    reprob = {"mae": 0.25, "photo": 0.2}.get(aug.aug, 0.0) if aug.reprob is None else aug.reprob
    return options.having(fold=data.fold if data.kfold else "0", reprob=reprob, aa=aug.aa if aug.aug == "mae" else None)
