"""A sweep's grid: axes and their values, arms, and the command line of each arm at each stage."""

import difflib
import importlib
import itertools
import math
import os
import re
from dataclasses import dataclass

from util.cli.flags import Flag, Options
from util.errors import UserError, reason_of

SCRIPTS = {
    f"main_{name}.py": module
    for name, module in {
        "pretrain_noprop": "pretrain",
        "finetune": "finetune",
        "linprobe": "linprobe",
        "predict": "predict",
        "sample": "sample",
    }.items()
}
LEFT_OUT = "-"  # as a value: omit the flag
MOST = 10_000  # most values of an axis
_UNSAFE = re.compile(r"[^\w.+-]")
_FUNCTION = re.compile(r"(lin|log)\(([^,]+),([^,]+),(\d+)\)")


@dataclass(frozen=True)
class Axis:
    """A flag and its values. stage: the stage that gets it, or '' for every stage whose script has the flag."""

    name: str
    values: tuple[str, ...]
    stage: str = ""

    @property
    def key(self) -> str:
        return f"{self.stage}.{self.name}" if self.stage else self.name


@dataclass(frozen=True)
class Stage:
    """A script and its flags. key: its name in placeholders and folders."""

    key: str
    script: str
    words: tuple[str, ...]
    options: type[Options]


def parse_axis(text: str) -> Axis:
    """Parse NAME=VALUES; UserError if it is invalid."""
    name, sep, values = text.partition("=")
    stage, _, flag = name.rpartition(".")
    if not sep or not re.fullmatch(r"\w+", flag):
        raise UserError(f"--grid {text}: should be NAME=VALUES, e.g. seed=0..4")
    found = parse_values(values, text)
    if not found or len(set(found)) < len(found):
        raise UserError(f"--grid {text}: {'has no values' if not found else 'has a value twice'}")
    return Axis(flag, tuple(found), stage)


def parse_values(text: str, whole: str) -> list[str]:
    if text.startswith("@"):
        try:
            with open(text[1:], encoding="utf-8") as file:
                return [line.strip() for line in file if line.strip() and not line.startswith("#")]
        except (OSError, ValueError) as error:
            raise UserError(f"--grid {whole}: {text[1:]} cannot be read ({reason_of(error)})") from None
    if found := _FUNCTION.fullmatch(text):
        try:
            low, high, n = float(found[2]), float(found[3]), int(found[4])
            if found[1] == "log":
                low, high = math.log(low), math.log(high)
            points = [low + (high - low) * i / max(1, n - 1) for i in range(min(n, MOST))]
        except ValueError:
            raise UserError(f"--grid {whole}: should be lin(LOW,HIGH,N), or log of two numbers above 0") from None
        return [f"{math.exp(x) if found[1] == 'log' else x:.6g}" for x in points]
    if text.startswith(("lin(", "log(")):
        raise UserError(f"--grid {whole}: should be {text[:3]}(LOW,HIGH,N), N values; (LOW,HIGH) is for --search")
    if found := re.fullmatch(r"(-?\d+)\.\.(-?\d+)", text):
        first, last = int(found[1]), int(found[2])
        if not 0 <= last - first < MOST:
            raise UserError(f"--grid {whole}: should increase, with at most {MOST} values")
        return [str(i) for i in range(first, last + 1)]
    return [value.strip() for value in text.split(",") if value.strip()]


def parse_stages(lines: list[list[str]]) -> list[Stage]:
    """The scripts to run in order, each with a key: pretrain, finetune, ... (finetune2 for a second one)."""
    stages: list[Stage] = []
    for words in lines:
        words = words[1:] if re.fullmatch(r"python[\d.]*", os.path.basename(words[0])) and len(words) > 1 else words
        script = os.path.basename(words[0])
        if script not in SCRIPTS:
            near = difflib.get_close_matches(script, SCRIPTS, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; should be one of {', '.join(SCRIPTS)}"
            raise UserError(f"{words[0]}: not a script that a sweep can run{hint}")
        if script == "main_finetune.py" and "--eval" in words:
            raise UserError(
                "--eval: leaves no file; evaluate by `-- main_predict.py --checkpoints {finetune} --views 1`"
            )
        module = importlib.import_module(f"util.cli.{SCRIPTS[script]}")
        same = sum(stage.script == script for stage in stages)
        key = SCRIPTS[script] + (str(same + 1) if same else "")
        stages.append(Stage(key, script, tuple(words[1:]), module.get_args_parser().kind))
    return stages


def expand(grids: list[list[str]], stages: list[Stage]) -> list[dict[str, str]]:
    """Arms {axis: value}: all combinations of each grid; the last axis changes fastest.

    UserError for a flag that no script has, and for duplicate arms.
    """
    arms: list[dict[str, str]] = []
    for texts in grids:
        axes = [parse_axis(text) for text in texts if text != "x"]
        for axis in axes:
            check_axis(axis, stages)
        if len({axis.key for axis in axes}) < len(axes):
            raise UserError(f"--grid {' '.join(texts)}: an axis is given twice")
        for values in itertools.product(*(axis.values for axis in axes)):
            arm = dict(zip((axis.key for axis in axes), values))
            if arm in arms:
                raise UserError(f"--grid {' '.join(texts)}: the arm {name_of(arm)} is given twice")
            arms.append(arm)
    return arms


def check_axis(axis: Axis, stages: list[Stage]) -> None:
    if axis.stage and axis.stage not in [stage.key for stage in stages]:
        raise UserError(
            f"--grid {axis.key}: no stage is named {axis.stage}; there are {', '.join(s.key for s in stages)}"
        )
    having = [stage for stage in stages if stage.key == axis.stage or not axis.stage]
    if not any(axis.name in stage.options.flags() for stage in having):
        known = sorted({name for stage in having for name in stage.options.flags()})
        near = difflib.get_close_matches(axis.name, known, n=1, cutoff=0.6)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"--grid {axis.key}: {', '.join(s.script for s in having)} has no flag --{axis.name}{hint}")


def of_stage(arm: dict[str, str], stage: Stage) -> dict[str, str]:
    """The arm's values for this stage, by flag."""
    values = {}
    for key, value in arm.items():
        of, _, name = key.rpartition(".")
        if name in stage.options.flags() and of in ("", stage.key):
            values[name] = value
    return values


def words_of_value(flag: Flag, value: str) -> list[str]:
    """`--flag value`; nothing for `-`; switches are on or off; several values are joined by +."""
    if value == LEFT_OUT or (flag.argparse.get("action") == "store_true" and value == "off"):
        return []
    if flag.argparse.get("action") == "store_true":
        if value != "on":
            raise UserError(f"--grid {flag.dest}={value}: is a switch; should be on or off")
        return [flag.name]
    return [flag.name, *(value.split("+") if flag.argparse.get("nargs") else [value])]


def name_of(values: dict[str, str]) -> str:
    """An arm's folder name: its values, in characters that every file system allows."""
    return ",".join(f"{name}={_UNSAFE.sub('_', value)}" for name, value in values.items()) or "all"
