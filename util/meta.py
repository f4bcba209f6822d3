"""Checks a checkpoint's description of itself (`meta`) before a model is built from it.

A checkpoint can come from anywhere. Its meta names a model and sizes, so it could request a download, a file or more
memory than there is.
"""

import math
from numbers import Real

from util.choices import LEAST_CROP_PCT
from util.errors import UserError
from util.files import composed

LARGEST = 2**16  # upper bound of any whole number in meta: pixels, widths, depths, classes
# timm.create_model's arguments that download or open something, or return something other than a classifier.
FORBIDDEN = {
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "checkpoint_path",
    "cache_dir",
    "features_only",
    "scriptable",
    "exportable",
    "no_jit",
}

# create_model's own arguments that have flags.
OWN_FLAGS = {
    "name": "--model",
    "num_classes": "--nb_classes",
    "img_size": "--input_size",
    "in_chans": "--in_chans",
    "drop_path": "--drop_path",
    "alpha_blend": "--alpha_blend",
}


def check_model_kwargs(pairs: list[tuple[str, object]]) -> None:
    """UserError for keywords that --model_kwargs cannot set, and values that would make the checkpoint unreadable."""
    for name, value in pairs:
        given = f"--model_kwargs {name}={str(value)[:40]}"
        if flag := {**OWN_FLAGS, "drop_path_rate": "--drop_path", "pretrained": "--pretrained"}.get(name):
            raise UserError(f"{given}: has its own flag; give {flag}")
        if name == "global_pool" and isinstance(value, bool):
            raise UserError(f"{given}: give --global_pool or --cls_token, or timm's name of a pooling: avg, token, max")
        if name in FORBIDDEN:
            raise UserError(f"{given}: should be left out; it builds no classifier, or opens a file")
        if not _is_plain(value):
            raise UserError(f"{given}: should be text, True, False, None, a number up to {LARGEST} or a list of them")


def check_meta(meta: dict, path: str, *, whole: bool = False) -> None:
    """UserError naming the file and the first invalid entry. Unknown entries are accepted.

    whole: also require every entry that building the model needs. Converts what earlier versions wrote differently:
    `kind`, and class names, which they took from folders in either of Unicode's forms.
    """
    if meta.get("kind") == "classifier":
        meta["kind"] = "finetune"

    def refuse(key: str, wanted: str):
        raise UserError(f"{path}: its meta is not usable: {key} is {str(meta.get(key))[:60]!r}, should be {wanted}")

    def check(key: str, good, wanted: str) -> None:
        if key in meta and not good(meta[key]):
            refuse(key, wanted)

    check("model", _is_model_name, "the name of a model")
    check(
        "model_kwargs", _are_model_keywords, f"keywords with plain values up to {LARGEST}, none that fetches anything"
    )
    check("global_pool", lambda v: isinstance(v, bool), "True or False")
    check("img_size", lambda v: _is_list(v) and len(v) == 2 and all(_is_size(x) for x in v), "[height, width]")
    check("in_chans", _is_size, f"1 to {LARGEST}")
    check("num_classes", lambda v: v == 0 or _is_size(v), f"0 to {LARGEST}")
    check(
        "classes",
        lambda v: _is_list(v) and all(isinstance(c, str) for c in v) and len(set(v)) == len(v),
        "names, each once",
    )
    names = [composed(name) for name in meta.get("classes", ())]
    if "classes" in meta and len(set(names)) == len(names):
        meta["classes"] = names
    check("mean", lambda v: _are_numbers(v), "numbers")
    check("std", lambda v: _are_numbers(v) and min(v, default=1) > 0, "numbers above 0")
    check("crop_pct", lambda v: _are_numbers([v]) and LEAST_CROP_PCT <= v <= 1, f"{LEAST_CROP_PCT} to 1")
    check("sigmas", lambda v: _are_numbers(v), "numbers")
    check("noprop", _is_plain_keywords, f"keywords with plain values up to {LARGEST}")
    needed = {"finetune": ("classes", "num_classes"), "pretrain": ("noprop",)}.get(str(meta.get("kind")))
    if needed is None or not whole:
        return  # a kind that no script rebuilds; the scripts report it
    for key in ("model", "img_size", "in_chans", "mean", "std", *needed):
        if key not in meta:
            raise UserError(f"{path}: its meta lacks {key}; not a whole checkpoint of this project")
    if len(meta["mean"]) != meta["in_chans"] or len(meta["std"]) != meta["in_chans"]:
        raise UserError(f"{path}: its meta has {len(meta['mean'])} means for {meta['in_chans']} channels")
    if meta["kind"] == "finetune" and len(meta["classes"]) > meta["num_classes"]:
        raise UserError(f"{path}: its meta names {len(meta['classes'])} classes but counts {meta['num_classes']}")


def _is_list(v) -> bool:
    return isinstance(v, (list, tuple))


def _is_int(v) -> bool:
    return isinstance(v, int) and not isinstance(v, bool)


def _is_size(v) -> bool:
    return _is_int(v) and 1 <= v <= LARGEST


def _are_numbers(v) -> bool:
    return _is_list(v) and all(isinstance(x, Real) and not isinstance(x, bool) and math.isfinite(x) for x in v)


def _is_model_name(v) -> bool:
    # A colon or a slash would make timm look on a hub or the disk.
    return isinstance(v, str) and 0 < len(v) < 200 and not set(v) & set(":/\\\n")


def _is_plain(v) -> bool:
    if _is_list(v):
        return len(v) < 1000 and all(_is_plain(x) for x in v)
    if _is_int(v):
        return abs(v) <= LARGEST
    return v is None or isinstance(v, (bool, float, str))


def _is_plain_keywords(v) -> bool:
    return isinstance(v, dict) and all(isinstance(k, str) and k not in FORBIDDEN and _is_plain(x) for k, x in v.items())


def _are_model_keywords(v) -> bool:
    return _is_plain_keywords(v) and not set(v) & set(OWN_FLAGS)


def refuse_other_classes(given: str, old: list[str] | None, new: list[str] | None) -> None:
    """UserError if a checkpoint's classes, or their order, differ from this run's.

    given: the checkpoint's flag and path, as on the command line.
    """
    if not old or not new or list(old) == list(new):
        return
    i = next((i for i, (a, b) in enumerate(zip(old, new)) if a != b), min(len(old), len(new)))
    was, now = (repr(names[i]) if i < len(names) else "missing" for names in (old, new))
    raise UserError(
        f"{given}: its class {i} is {was}, in the data it is {now}; rename the classes as they were, or start "
        "a new run from it with --finetune, which matches the classifier's rows by name"
    )
