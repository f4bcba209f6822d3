"""Checkpoints that are read to be looked at: their data set, their encoder, their denoisers."""

import os

from torch import nn

from models import load_pretrained
from models.containers import find_weights, tensor_names
from models.loading import create_from_meta
from models.noprop_mae import NoPropMAE
from models.vit import classifier_prefixes
from util.checkpoint import peek_meta, read_file
from util.choices import is_mae_name
from util.cli.resolve import resolve_meta
from util.data_specs import DATASETS
from util.errors import UserError, reason_of
from util.seed import seed_all
from util.train.run import load_exactly


def read_content(path: str) -> dict:
    """The checkpoint's dict without what only training needs; {} for no path.

    Its `meta` is that of a checkpoint of this project, checked, or None; `args` the options of its run, or {}; `epoch`
    the epochs it was trained for, or 0.
    """
    if not path:
        return {}
    content = {k: v for k, v in read_file(path).items() if k not in ("optimizer", "scaler", "rng")}
    content["meta"] = peek_meta(path)
    content["args"] = content["args"] if content["meta"] and isinstance(content.get("args"), dict) else {}
    content["epoch"] = content["epoch"] if isinstance(content.get("epoch"), int) else 0
    return content


def resolve_data(args, content: dict) -> None:
    """--dataset and --data_path, where not given: those of the run that wrote the checkpoint `content`."""
    dataset = str((content.get("meta") or {}).get("dataset"))
    if args.dataset is None:
        args.dataset = dataset if dataset in DATASETS else "folder"
    if args.data_path is None:
        known = content["args"].get("data_path") if content and args.dataset == dataset else None
        found = isinstance(known, str) and os.path.isdir(known)
        args.data_path = known if found else "." if args.dataset == "digits" else "data"


def load_noprop(path: str) -> tuple[NoPropMAE, dict]:
    """(NoPropMAE in eval mode, `read_content`) of a pretraining checkpoint. UserError if it has no decoders."""
    content = read_content(path)
    meta, names = content["meta"], tensor_names(content)
    if not meta or "noprop" not in meta or not any(key.startswith("decoders.") for key in names):
        kind = f"a {meta.get('kind')} checkpoint" if meta else "weights of another origin"
        raise UserError(f"{path}: {kind}, without decoders; give a checkpoint of main_pretrain_noprop.py")
    net = _noprop(path, meta)
    load_exactly(net, find_weights(content, path, net.state_dict()).state, path)
    return net.eval(), content


def _noprop(path: str, meta: dict, **changes) -> NoPropMAE:
    try:
        return NoPropMAE(**{**meta["noprop"], "use_checkpoint": False, **changes})
    except (TypeError, RuntimeError) as error:  # keywords of another version, sizes beyond memory
        raise UserError(f"{path}: its meta describes no model ({reason_of(error)})") from None


def load_encoder(args, classes: list[str], content: dict) -> tuple[nn.Module, dict, str]:
    """(model, meta, pooling) that the flags and the checkpoint `content` ({}: none) describe, with all of its weights.

    Pooling, without --global_pool or --cls_token: `mean` of the patch tokens for an encoder from pretraining, which has no
    classifier; for any other model `head`, what its classifier reads.
    """
    source = content.get("meta")
    names = tensor_names(content)
    # MAE's classifiers with average pooling normalise after it; then the tokens themselves are not normalised.
    args.global_pool = "fc_norm.weight" in names
    meta = resolve_meta(args, classes, source)
    has_head = not is_mae_name(meta["model"]) or "head.weight" in names
    pool = args.pool or ("head" if has_head else "mean")

    seed_all(args.seed, 0)
    keywords = {**meta["model_kwargs"], **({"pretrained": True} if args.pretrained else {})}
    model = create_from_meta({**meta, "model_kwargs": keywords}, num_classes=(source or {}).get("num_classes") or None)
    if args.random_init:
        if source and "noprop" in source and not (args.model or args.model_kwargs):
            # Untrained, but as its pretraining started: MAE's initialisation, sines and cosines for positions.
            start = _noprop(args.finetune, source, img_size=meta["img_size"], in_chans=meta["in_chans"]).state_dict()
            model.load_state_dict({k: v for k, v in start.items() if k in model.state_dict()}, strict=False)
    elif content:
        report = load_pretrained(model, args.finetune, pos_grid=args.pos_grid)
        trained = {name for name, _ in model.named_parameters()}
        head = tuple(f"{name}." for name in classifier_prefixes(model))
        missing = [k for k in report.missing if k in trained and not k.startswith(head)]
        if missing:
            raise UserError(f"{args.finetune}: lacks weights of this encoder ({', '.join(missing[:4])})")
    return model.requires_grad_(False).eval(), meta, pool
