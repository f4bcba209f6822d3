"""What an engine's epoch works on, without a main: a Run, a Training, an order of samples."""

import torch

from util.cli.finetune import FinetuneOptions
from util.cli.parser import Parser
from util.cli.pretrain import PretrainOptions
from util.cli.resolve import resolve_meta
from util.dist import Precision, World
from util.log import RunLog
from util.optim import build_adamw, param_groups
from util.train.run import Run, Training


class Order:
    """Of a Loader, what a Run reads: images in all, images and number of an epoch's micro-steps."""

    def __init__(self, batch_size: int = 64, steps: int = 22, n: int = 1437):
        self.batch_size, self.steps, self.n, self.order = batch_size, steps, n, self

    def __len__(self) -> int:
        return self.steps


def new_run(loader=None, *, kind="finetune", world=None, log=None, meta=None, **flags) -> Run:
    """A run at its beginning; flags: those that are not at their defaults."""
    options = {"finetune": FinetuneOptions, "pretrain": PretrainOptions}[kind].of(**flags)
    log = RunLog(None, kind=kind) if log is None else log
    return Run(options, world or World(), log, meta=meta or {}, loader=loader or Order())


def resolve(line: list[str], classes: list[str], source: dict | None = None) -> tuple[dict, str]:
    """resolve_meta of main_finetune.py's command line."""
    o = Parser(FinetuneOptions).options(line)
    weights, evaluating = o.weights, o.selection.eval
    meta, origin = resolve_meta(
        o.model, o.input, o.data.dataset or "folder", classes, source, weights=weights, evaluating=evaluating
    )
    return meta, origin.words(meta)


def new_training(net, optimizer=None, *, precision=None, lr_at=lambda epoch: 1e-2, **kwargs) -> Training:
    """AdamW and fp32 on the CPU, where nothing else is given; kwargs: model, ema."""
    optimizer = optimizer or build_adamw(param_groups(net, weight_decay=0.05), lr=1e-2)
    precision = precision or Precision("off", torch.device("cpu"))
    return Training(net, kwargs.pop("model", net), optimizer, precision, lr_at=lr_at, **kwargs)
