"""Loads pretrained networks for probing and sampling: an encoder, or a whole NoPropMAE."""

from dataclasses import replace

from torch import nn

from models import load_pretrained
from models.containers import find_weights, tensor_names
from models.loading import create_from_meta
from models.noprop_mae import NoPropMAE
from models.vit import classifier_prefixes
from util.checkpoint import load_exactly, peek, read_file
from util.choices import is_mae_name
from util.cli.linprobe import LinprobeOptions
from util.cli.resolve import resolve_meta
from util.errors import UserError, listed, reason_of
from util.seed import seed_all


def read_content(path: str) -> dict:
    """The checkpoint's dict without what only training needs; {} for no path.

    `meta`: checked if it is a checkpoint of this project, else None. `args`: the options of its run, or {}. `epoch`:
    the epochs it was trained for, or 0.
    """
    if not path:
        return {}
    content = {k: v for k, v in read_file(path).items() if k not in ("optimizer", "scaler", "rng")}
    content |= {"meta": None, "args": {}, **peek(path)}
    content["epoch"] = content["epoch"] if isinstance(content.get("epoch"), int) else 0
    return content


def load_noprop(path: str) -> tuple[NoPropMAE, dict]:
    """(NoPropMAE in eval mode, `read_content`) of a pretraining checkpoint. UserError if it has no decoders."""
    content = read_content(path)
    meta, names = content["meta"], tensor_names(content)
    if not meta or "noprop" not in meta or not any(key.startswith("decoders.") for key in names):
        kind = f"a {meta.get('kind')} checkpoint" if meta else "weights from elsewhere"
        raise UserError(f"{path}: {kind}, without decoders; give a checkpoint of main_pretrain_noprop.py")
    net = _noprop(path, meta)
    load_exactly(net, find_weights(content, path, net.state_dict()).state, path)
    return net.eval(), content


def _noprop(path: str, meta: dict, **changes) -> NoPropMAE:
    try:
        return NoPropMAE(**{**meta["noprop"], "use_checkpoint": False, **changes})
    except (TypeError, RuntimeError) as error:  # keywords of another version, sizes that do not fit in memory
        raise UserError(f"{path}: its meta describes no model ({reason_of(error)})") from None


def load_encoder(options: LinprobeOptions, classes: list[str], content: dict) -> tuple[nn.Module, dict, str, str]:
    """(model, meta, pooling, description of the input) from the options and the checkpoint's `content` ({}: none).

    UserError if some of the model's weights are missing.

    Pooling, without --global_pool or --cls_token: `mean` of the patch tokens for a pretrained encoder, which has no
    classifier; for any other model `head`, the input of its classifier.
    """
    source, given = content.get("meta"), options.model
    names = tensor_names(content)
    # MAE's classifiers with average pooling normalise after pooling, so their tokens are not normalised.
    described = replace(given, global_pool="fc_norm.weight" in names)
    meta, origin = resolve_meta(
        described, options.input, options.data.dataset, classes, source, weights=given.finetune, evaluating=True
    )
    has_head = not is_mae_name(meta["model"]) or "head.weight" in names
    pool = given.pool or ("head" if has_head else "mean")

    seed_all(options.machine.seed, 0)
    keywords = {**meta["model_kwargs"], **({"pretrained": True} if given.pretrained else {})}
    model = create_from_meta({**meta, "model_kwargs": keywords}, num_classes=(source or {}).get("num_classes") or None)
    if given.random_init:
        if source and "noprop" in source and not (given.model or given.model_kwargs):
            # Untrained, initialised as before pretraining: MAE's initialisation, sine-cosine positions.
            start = _noprop(given.finetune, source, img_size=meta["img_size"], in_chans=meta["in_chans"]).state_dict()
            model.load_state_dict({k: v for k, v in start.items() if k in model.state_dict()}, strict=False)
    elif content:
        report = load_pretrained(model, given.finetune, pos_grid=(g[0], g[1]) if (g := given.pos_grid) else None)
        trained = {name for name, _ in model.named_parameters()}
        head = tuple(f"{name}." for name in classifier_prefixes(model))
        missing = [k for k in report.missing if k in trained and not k.startswith(head)]
        if missing:
            raise UserError(f"{given.finetune}: lacks weights of this encoder ({listed(missing, 4)})")
    return model.requires_grad_(False).eval(), meta, pool, origin.words(meta)
