"""The members of an ensemble: finds their checkpoints and loads their networks."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from augment.image import default_crop_pct
from models.loading import load_classifier, require_classifier
from util.checkpoint import BEST, read_checkpoint
from util.dist import Precision, prepare_net
from util.errors import UserError, listed
from util.files import printable
from util.precision import place
from util.train.folds import RESULT


@dataclass
class Member:
    """A checkpoint, or all folds of a k-fold run, whose probabilities are averaged and count as one model.

    heads: meta, args and progress of each checkpoint (see util/checkpoint.py).
    """

    name: str  # the argument of --checkpoints
    paths: list[str]
    heads: list[dict]

    @property
    def metas(self) -> list[dict]:
        return [head["meta"] for head in self.heads]

    @property
    def model(self) -> str:
        return " + ".join(dict.fromkeys(meta["model"] for meta in self.metas))


@dataclass
class Net:
    """One checkpoint's network on its device. order: int64 [C], puts its logits in the ensemble's order of classes."""

    module: nn.Module
    member: int
    meta: dict
    order: torch.Tensor
    precision: Precision

    @property
    def input(self) -> tuple:
        """(height, width, channels, crop_pct) of its input."""
        return (*self.meta["img_size"], self.meta["in_chans"], crop_pct_of(self.meta))

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(mean, std) of its normalisation."""
        return tuple(self.meta["mean"]), tuple(self.meta["std"])


def find_members(arguments: list[str]) -> tuple[list[Member], list[str]]:
    """(members, classes in the first member's order) of --checkpoints: files, run folders, k-fold folders.

    UserError if one is missing, damaged, unfinished, given twice, or has other classes.
    """
    members: list[Member] = []
    seen: dict[str, str] = {}
    for argument in arguments:
        paths = checkpoints_in(argument)
        for path in paths:
            if os.path.realpath(path) in seen:
                raise UserError(f"--checkpoints {argument}: given twice (as {seen[os.path.realpath(path)]})")
            seen[os.path.realpath(path)] = argument
        members.append(Member(argument, paths, [read_head(path) for path in paths]))
    classes = members[0].metas[0]["classes"]
    for member in members:
        for path, meta in zip(member.paths, member.metas):
            only_there = sorted(set(meta["classes"]) - set(classes))
            only_here = sorted(set(classes) - set(meta["classes"]))
            if only_there or only_here:
                detail = [f"only the first has {listed(only_here)}"] if only_here else []
                detail += [f"only the second has {listed(only_there)}"] if only_there else []
                raise UserError(
                    f"--checkpoints: {members[0].paths[0]} and {path} have different classes: {'; '.join(detail)}"
                )
    return members, list(classes)


def checkpoints_in(argument: str) -> list[str]:
    """The checkpoint file(s) of an argument; for a k-fold folder, every fold's best."""
    if os.path.isfile(argument):
        return [argument]
    if not os.path.isdir(argument):
        raise UserError(f"--checkpoints {argument}: no such file or folder")
    folds = sorted((n for n in os.listdir(argument) if re.fullmatch(r"fold-\d+", n)), key=lambda n: int(n[5:]))
    folders = [os.path.join(argument, n) for n in folds] or [argument]
    for folder in folders:
        if not os.path.isfile(os.path.join(folder, BEST)):
            raise UserError(
                f"--checkpoints {argument}: no {BEST} in {folder}; give a run's --output_dir or a .pth file"
            )
        if folds and not os.path.isfile(os.path.join(folder, RESULT)):
            raise UserError(
                f"--checkpoints {argument}: {folder} is not finished; run its main_finetune.py command again"
            )
    if folds:
        path = os.path.join(folders[0], RESULT)
        try:
            kfold = int(json.loads(Path(path).read_text("utf-8"))["options"]["kfold"])
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"--checkpoints {argument}: {path} is damaged ({error}); run that fold again with --overwrite"
            ) from None
        missing = sorted(set(range(kfold)) - {int(n[5:]) for n in folds})
        if missing:
            raise UserError(f"--checkpoints {argument}: fold-{missing[0]} of {kfold} folds is missing; train it first")
    return [os.path.join(folder, BEST) for folder in folders]


def read_head(path: str) -> dict:
    """A classifier's meta, args and progress, after verifying all checksums of its file."""
    if path.endswith(".safetensors"):
        raise UserError(
            f"--checkpoints {path}: holds weights only; give a checkpoint of main_finetune.py, which has classes"
        )
    content = read_checkpoint(path)
    require_classifier(content["meta"], path)
    return {"meta": content["meta"], "args": content.get("args") or {}, "progress": content.get("progress") or {}}


def load_nets(members: list[Member], classes: list[str], device: torch.device, amp: str | None) -> list[Net]:
    """All networks in eval mode, with EMA weights if any, in `amp` or the default precision for their kind."""
    nets = []
    for m, member in enumerate(members):
        for path in member.paths:
            module, meta = load_classifier(path)
            if meta["in_chans"] not in (1, 3):
                raise UserError(f"--checkpoints {path}: takes {meta['in_chans']} channels; image files have 1 or 3")
            place(module, device)
            precision = Precision(amp, device, module)
            prepare_net(module, precision)
            order = torch.tensor([meta["classes"].index(c) for c in classes], device=device)
            nets.append(Net(module, m, meta, order, precision))
    return nets


def crop_pct_of(meta: dict) -> float:
    """The share of a resized file that evaluation keeps; earlier checkpoints do not store it and used the default."""
    return float(meta.get("crop_pct") or default_crop_pct(meta["img_size"]))


def short_names(members: list[Member]) -> list[str]:
    """Names for tables: the run's folder, with as much of the path as needed to make the names distinct."""
    paths = [os.path.normpath(m.name).removesuffix(os.sep + BEST) for m in members]
    ends = [os.path.basename(p) for p in paths]
    return [printable(name) for name in (ends if len(set(ends)) == len(ends) else paths)]
