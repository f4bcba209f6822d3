"""Types of flags for argparse: text -> checked value, or an error that says what is expected."""

import argparse
import difflib
import math
import re

from util.choices import LOGGERS, MAE_NAMES, VIEW_NAMES, is_mae_name, is_policy, timm_names

MAX_COUNT = 2**31 - 1  # default bound of whole numbers: larger ones overflow in arithmetic with floats


def number(kind=float, low=-math.inf, high=math.inf, *, open_low=False, open_high=False):
    """A checked int or float: finite, within [low, high] (ends excluded where open)."""
    word = "whole number" if kind is int else "number"
    left, right = "(" if open_low else "[", ")" if open_high else "]"
    unbounded = high in (math.inf, MAX_COUNT)
    if low == 0 and unbounded:
        wanted = f"a {word} {'above 0' if open_low else 'of 0 or more'}"
    elif unbounded:
        wanted = f"a {word} of {low} or more" if low > -math.inf else f"a {word}"
    else:
        wanted = f"a {word} in {left}{low}, {high}{right}"

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if (
            value != value
            or abs(value) == math.inf
            or value < low
            or value > high
            or (open_low and value == low)
            or (open_high and value == high)
        ):
            most = f", at most {high}" if unbounded and value > high and value != math.inf else ""
            shown = text if len(text) <= 40 else f"{text[:40]}..."
            raise argparse.ArgumentTypeError(f"{shown!r} should be {wanted}{most}")
        return value

    parse.__name__ = word  # shown by --help, see Formatter
    return parse


positive_int = number(int, 1, MAX_COUNT)
count = number(int, 0, MAX_COUNT)


def device_name(text: str) -> str:
    """--device, checked as far as possible without torch."""
    if not re.fullmatch(r"auto|(cpu|cuda|mps)(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a device; use auto, cpu, cuda, cuda:N or mps")
    return text


fraction = number(float, 0.0, 1.0)
non_negative = number(float, 0.0)
positive = number(float, 0.0, open_low=True)
# Bounds far from useful values; beyond them float32 overflows.
rate = number(float, 0.0, 1e3)
sigma = number(float, 1e-6, 1e6)
pixel_mean, pixel_std = number(float, -1e6, 1e6), number(float, 1e-6, 1e6)


def keyword(text: str) -> tuple[str, object]:
    """NAME=VALUE for --model_kwargs; numbers, True/False/None and tuples are parsed."""
    import ast

    name, sep, value = text.partition("=")
    if not sep or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} should be NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return name, value


def model_name(text: str) -> str:
    """--model: one of MAE's names or timm's, with or without a tag of weights."""
    known = timm_names()
    if is_mae_name(text) or text.partition(".")[0] in known or not known:
        return text
    near = difflib.get_close_matches(text.partition(".")[0], [*MAE_NAMES, *sorted(known)], n=3, cutoff=0.5)
    hint = f"; near: {', '.join(near)}" if near else ""
    raise argparse.ArgumentTypeError(f"{text!r} is not one of MAE's names or timm's{hint}")


def logger_list(text: str) -> list[str]:
    """--logger: names with commas between them, or `none` ([])."""
    names = [] if text == "none" else [word.strip() for word in text.split(",")]
    for name in names:
        if name not in LOGGERS:
            near = difflib.get_close_matches(name, LOGGERS, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(LOGGERS)}{hint}")
    return list(dict.fromkeys(names))


def policy_or_none(text: str) -> str | None:
    """--aa: an augmentation policy in timm's notation, or `none` (None)."""
    if text.lower() in ("", "none", "off"):
        return None
    if not is_policy(text):
        raise argparse.ArgumentTypeError(
            f"{text[:40]!r} should be none or timm's rand-m9-mstd0.5-inc1, original, originalr, v0, v0r, 3a, "
            "augmix-m3-w3"
        )
    return text


def sigma_data(text: str) -> float | None:
    """A noise level, or `auto` (None)."""
    return None if text == "auto" else sigma(text)


def view_list(text: str) -> list[int]:
    """--views: 1 is the centre crop, 12 is all; or a list of numbers 1 to 12 or names -> numbers from 0."""
    if text in ("1", "12"):
        return list(range(int(text)))
    views = []
    for word in text.split(","):
        word = word.strip()
        if word in VIEW_NAMES:
            views.append(VIEW_NAMES.index(word))
        elif "," in text and word.isdecimal() and 1 <= int(word) <= len(VIEW_NAMES):
            views.append(int(word) - 1)
        else:
            raise argparse.ArgumentTypeError(
                f"{text!r} should be 1, 12, or a list such as 1,2,5 of {', '.join(VIEW_NAMES)}"
            )
    if len(set(views)) < len(views):
        raise argparse.ArgumentTypeError(f"{text!r} should have each view once")
    return views
