"""Options of main_predict.py."""

import os
from dataclasses import dataclass

from util.cli.flags import Options
from util.cli.parser import Parser, default_path
from util.cli.settings import Data, Machine, Prediction, Reading, Run
from util.data.image_files import refuse_output_among_images
from util.errors import UserError


@dataclass(frozen=True)
class PredictOptions(Options):
    """What a prediction is told."""

    MAIN = "predict"
    DESCRIPTION = (
        "Predict images with one or many fine-tuned networks: 12 views of each image, probabilities averaged over "
        "views and members."
    )
    NETWORK_FROM = "each of --checkpoints"

    prediction: Prediction
    data: Data
    run: Run
    reading: Reading
    machine: Machine


def get_args_parser() -> Parser[PredictOptions]:
    return Parser(PredictOptions)


def get_options(argv: list[str] | None = None) -> PredictOptions:
    """The command line, checked, with the defaults that depend on other flags."""
    options = get_args_parser().options(argv)
    data, labels, output_dir = options.data, options.prediction.labels, options.run.output_dir
    for path in options.prediction.checkpoints:
        if not os.path.exists(path):
            raise UserError(f"--checkpoints {path}: no such file or folder")
    if data.data_path is None:
        if data.dataset == "folder":
            raise UserError("--data_path: give the folder of images to predict")
        options = options.having(data_path=default_path(data.dataset))
    if labels is not None and data.dataset != "folder":
        raise UserError(f"--labels {labels}: --dataset {data.dataset} has its own labels")
    if labels is not None and not os.path.isfile(labels):
        raise UserError(f"--labels {labels}: no such file")
    if not output_dir:
        raise UserError("--output_dir: give a folder for predictions.csv")
    if data.dataset == "folder":
        refuse_output_among_images("--output_dir", output_dir, data.data_path or "")
    return options
