"""A main run in this process on very little data, and what its parts were built with."""

import inspect
import io
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.models._builder
import torch
from PIL import Image
from torch import nn

import main_finetune
import main_linprobe
import main_predict
import main_pretrain_noprop
import main_sample
import util.report.pictures
import util.report.prediction
import util.report.training
import util.train.run
from models.noprop_mae import NoPropMAE
from util.data import datasets
from util.data.datasets import ArrayDataset
from util.errors import UserError
from util.metrics import Evaluation

MAINS = {
    "finetune": main_finetune,
    "pretrain": main_pretrain_noprop,
    "linprobe": main_linprobe,
    "predict": main_predict,
    "sample": main_sample,
}
# Images that are not square, in batches that are odd, of classes that are unequal.
BASE = {
    "finetune": """
        --dataset digits --model vit_custom_patch4 --model_kwargs embed_dim=12 depth=2 num_heads=2 --input_size 8 12
        --aug none --epochs 1 --batch_size 25 --warmup_epochs 0 --device cpu --num_workers 0 --output_dir=
    """.split(),
    "pretrain": """
        --dataset digits --input_size 8 12 --patch_size 2 --embed_dim 12 --depth 1 --num_heads 3 --decoder_embed_dim 12
        --decoder_depth 1 --decoder_num_heads 3 --T 2 --epochs 1 --batch_size 25 --warmup_epochs 0 --device cpu
        --num_workers 0 --output_dir=
    """.split(),
    "linprobe": "--device cpu --num_workers 0".split(),
    "predict": "--device cpu --num_workers 0 --views 1 --output_dir {out}".split(),
    "sample": "--device cpu --num_workers 0 --num_samples 9 --num 2 --sampler euler --output_dir {out}".split(),
}


@dataclass
class Seen:
    """What a run built and did. calls: of each function that is watched, the arguments of each call, by name."""

    out: Path
    calls: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))
    paths: dict[str, str] = field(default_factory=dict)  # what the line named
    said: str = ""
    error: str = ""
    # Of each epoch of training: its number, the weights before it, the names of those that it trains.
    epochs: list[int] = field(default_factory=list)
    starts: list[dict[str, torch.Tensor]] = field(default_factory=list)
    trains: list[set[str]] = field(default_factory=list)
    inputs: list[tuple] = field(default_factory=list)  # of each micro-step, what the network was called with
    norms_in_training: set[bool] = field(default_factory=set)  # BatchNorm's modes in these calls
    validated: list[nn.Module] = field(default_factory=list)

    def one(self, name: str) -> dict[str, Any]:
        """The arguments of the last call."""
        return self.calls[name][-1]

    @property
    def training(self):
        return self.one("train_one_epoch")["training"]

    @property
    def run(self):
        return self.one("train_one_epoch")["run"]

    @property
    def loader(self):
        """Of the images that are trained on."""
        return self.one("train_one_epoch")["loader"]

    @property
    def net(self):
        return self.training.net

    @property
    def noise(self):
        return self.net.alpha_blend

    @property
    def meta(self):
        return self.run.meta

    @property
    def images(self) -> torch.Tensor:
        """All that were trained on, in the order of the data set."""
        return torch.cat([images for images, *_ in self.inputs])

    @property
    def groups(self) -> list[dict]:
        return self.training.optimizer.param_groups

    def lr(self, epoch: float) -> float:
        return self.training.lr_at(epoch)

    def names(self, pattern: str = "*") -> set[str]:
        """Of the files in the output folder."""
        return {path.name for path in self.out.glob(pattern)}


def few(read: Callable, split: str) -> ArrayDataset:
    """The first digits: 57 to train on, 23 to validate on; the third digit in every second image only."""
    data = read(".", split)
    kept = (data.targets != 3) | (torch.arange(len(data)) % 2 == 0)
    return data.subset(kept.nonzero()[: 57 if split == "train" else 23, 0])


def watch(
    main: str, line: Sequence[str], out: Path, evaluations: Sequence[Evaluation] = (), paths: dict | None = None
) -> Seen:
    """Run a main. evaluations: the scores of its epochs, in place of those that the network has."""
    seen, module, said = Seen(out, paths=paths or {}), MAINS[main], io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said):
        patch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # what a run sets ends with it
        read = datasets.READERS["digits"]
        patch.setitem(datasets.READERS, "digits", lambda root, split, *_: few(read, split))

        def spy(where, name: str, instead: Callable | None = None) -> None:
            if not hasattr(where, name):
                return
            real = getattr(where, name)
            signature = inspect.signature(real)

            def watched(*args, **kwargs):
                bound = signature.bind(*args, **kwargs)
                bound.apply_defaults()
                seen.calls[name].append(dict(bound.arguments))
                result = (instead or real)(*args, **kwargs)
                seen.calls[name][-1]["returned"] = result
                return result

            patch.setattr(where, name, watched)

        on_cpu = util.train.run.init_world
        for where in (util.train.run, main_linprobe, main_predict, main_sample):
            spy(where, "init_world", lambda *args, **kwargs: on_cpu("cpu"))
        for where in (util.train.run, module):
            spy(where, "limit_pixels")
        for name in ("Mixup", "build_train_transform", "compile_net", "compile_noprop", "extract", "load_encoder"):
            spy(module, name, (lambda net: None) if name.startswith("compile") else None)
        for name in (
            "score",
            "load_nets",
            "predict",
            "predict_out_of_fold",
            "write_all",
            "evaluation_loader",
            "Study",
            "load_inception",
        ):
            spy(module, name)
        spy(main_linprobe, "knn_predict")
        spy(main_linprobe, "choose_l2", lambda *args: 0.01)  # ten fits
        spy(util.train.run, "require_compiler", lambda device: None)
        spy(torch.nn.utils, "clip_grads_with_norm_")
        spy(NoPropMAE, "reconstruct")
        spy(util.report.pictures, "reconstruction_grid")
        spy(timm.models._builder, "load_pretrained", lambda *args, **kwargs: None)
        # Pictures take most of the time, and no flag is about them alone.
        for where, name in (
            (main_finetune, "plot_confusion"),
            (util.report.training, "plot_curves"),
            (util.report.prediction, "draw_pictures"),
        ):
            patch.setattr(where, name, lambda *args, **kwargs: [])
        if main in ("finetune", "pretrain"):
            patch.setattr(module, "train_one_epoch", epoch_that_is_watched(seen, module.train_one_epoch))
        if main == "finetune":
            scores, real = iter(evaluations), module.evaluate

            def evaluate(model, loader, *args, **kwargs):
                seen.validated.append(model)
                seen.calls["evaluate"].append({"loader": loader})
                return next(scores) if evaluations else real(model, loader, *args, **kwargs)

            patch.setattr(module, "evaluate", evaluate)
        try:
            module.main(list(line))
        except UserError as error:
            seen.error = str(error)
    seen.said = said.getvalue()
    return seen


def epoch_that_is_watched(seen: Seen, real: Callable) -> Callable:
    signature = inspect.signature(real)

    def train_one_epoch(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        seen.calls["train_one_epoch"].append(dict(bound.arguments))
        net = seen.net
        seen.epochs.append(seen.run.position.epoch)
        seen.starts.append({k: v.detach().clone() for k, v in net.state_dict().items()})
        seen.trains.append({name for name, p in net.named_parameters() if p.requires_grad})

        def look(model: nn.Module, inputs: tuple) -> None:
            seen.inputs.append(tuple(x.detach().clone() for x in inputs))
            norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
            seen.norms_in_training |= {m.training for m in norms}

        hook = seen.training.model.register_forward_pre_hook(look)
        try:
            return real(*args, **kwargs)
        finally:
            hook.remove()

    return train_one_epoch


def scores(**percent: float) -> Evaluation:
    """An evaluation of ten classes, 50 in every score and a loss of 2 unless said otherwise."""
    values = {"acc1": 50.0, "acc5": None, "loss": 2.0, "balanced_acc": 50.0, "macro_f1": 50.0, "ece": 5.0, **percent}
    return Evaluation(**values, confusion=np.ones((10, 10), dtype=int))
