"""Options of main_predict.py."""

import os
from dataclasses import dataclass

from util.cli.flags import Options
from util.cli.parser import Parser
from util.cli.settings import Data, Machine, Prediction, Reading, Run
from util.data.image_files import refuse_output_among_images
from util.errors import UserError


@dataclass(frozen=True)
class PredictOptions(Options):
    """All options of a prediction."""

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
    """The command line, checked. Without --data_path the data are the first checkpoint's: see `check_data`."""
    options = get_args_parser().options(argv)
    data, asked, output_dir = options.data, options.prediction, options.run.output_dir
    for path in asked.checkpoints:
        if not os.path.exists(path):
            raise UserError(f"--checkpoints {path}: no such file or folder")
    if data.dataset is None and (data.data_path is not None or asked.labels is not None):
        options = options.having(dataset="folder")  # any images, whatever the networks were trained on
    if asked.labels is not None and options.data.dataset != "folder":
        raise UserError(f"--labels {asked.labels}: --dataset {data.dataset} has its own labels")
    if asked.labels is not None and not os.path.isfile(asked.labels):
        raise UserError(f"--labels {asked.labels}: no such file")
    if not output_dir:
        raise UserError("--output_dir: give a folder for predictions.csv")
    return check_data(options) if options.data.dataset else options


def check_data(options: PredictOptions, *, of_checkpoint: bool = False) -> PredictOptions:
    """UserError unless the options name the images to predict and an output folder elsewhere.

    of_checkpoint: the data are the checkpoint's training data; those of a folder can only be predicted out of fold.
    """
    data = options.data
    lacking = data.data_path is None or of_checkpoint
    if data.dataset == "folder" and lacking and not options.prediction.out_of_fold:
        raise UserError("--data_path: give the folder of images to predict")
    if data.dataset == "folder" and data.data_path is not None:
        refuse_output_among_images("--output_dir", options.run.output_dir, data.data_path)
    return options
