"""Which flags change a run's results, and in which of them two command lines differ.

Each flag declares it where it is added (Parser in util/cli/parser.py). These declarations alone decide how a resume and
the finished folds of a k-fold run are compared with the command line.
"""

import json
import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Flag:
    """What `add_argument` declared. changes_results: with another value the run would end with other numbers.

    free_at_resume: a run may go on with another value, which holds from there on: the schedule and what goes with it.
    """

    name: str
    changes_results: bool
    free_at_resume: bool


@dataclass(frozen=True)
class Difference:
    """A flag that changes results, its value in a run that was saved and in this command line, as text."""

    flag: Flag
    before: str
    now: str


def differences(flags: dict[str, Flag], before: dict, now: dict) -> list[Difference]:
    """Flags that change results and differ. `before`, `now`: options by argparse's names; what one of them lacks, as a
    run of an earlier version does, is not compared."""
    return [
        Difference(flag, _show(before[k]), _show(now[k]))
        for k, flag in flags.items()
        if flag.changes_results and k in before and k in now and not _same(before[k], now[k])
    ]


def refusal(found: list[Difference], where: str, advice: str) -> str:
    """The line that names the first difference with both values, and the other flags."""
    first, others = found[0], [d.flag.name for d in found[1:]]
    also = f" (other values of {', '.join(others[:6])}{', ...' if len(others) > 6 else ''}, too)" if others else ""
    return f"{first.flag.name} {first.now}: {where} {first.before}{also}; {advice}"


def _plain(value):
    """As it comes back from a checkpoint or from JSON: tuples are lists there. Keywords have no order."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, (list, tuple)) for v in value):
        value = {str(name): v for name, v in value}
    return json.loads(json.dumps(value, default=str))


def _same(a, b) -> bool:
    if isinstance(a, str) and isinstance(b, str):
        return a == b or os.path.realpath(a) == os.path.realpath(b)  # another way to write the same path
    return _plain(a) == _plain(b)


def _show(value) -> str:
    value = _plain(value)
    if isinstance(value, dict):
        value = [f"{name}={v}" for name, v in value.items()]
    if isinstance(value, list):
        return " ".join(map(str, value))[:80] or "(nothing)"
    if value is None or isinstance(value, bool):
        return {None: "(not given)", True: "on", False: "off"}[value]
    return str(value)[:80] or "(nothing)"
