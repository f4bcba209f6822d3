"""Flags as fields: a settings group is a frozen dataclass whose fields are flags, a main's options are its groups.

    @dataclass(frozen=True)
    class Noise:
        '''DiffNoise: alpha-blended noise'''            # the group's title in --help
        alpha_blend: int = flag(15, "timestep t of abar; 0 switches off", type=number(int, 0, 999))

    @dataclass(frozen=True)
    class FinetuneOptions(Options):
        MAIN = "finetune"
        noise: Noise

`flag` says all there is to say of a flag: the parser, a resume's comparison and the dry run read it from here.
"""

import dataclasses
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, TypeVar

Own = TypeVar("Own", bound="Options")


class by_main(dict):
    """A value for each of the mains that have the flag: by_main(finetune=64, pretrain=128)."""


@dataclass(frozen=True)
class Flag:
    """A flag as one main has it. `argparse`: the keywords of add_argument; `also`: further flags for the same value.

    changes_results: with another value the run would end with other numbers. free_at_resume: a run may go on with
    another value, which holds from there on: the schedule and what goes with it.
    """

    dest: str
    names: tuple[str, ...]
    default: Any
    changes_results: bool
    free_at_resume: bool
    argparse: dict[str, Any]
    also: dict[str, dict[str, Any]]

    @property
    def name(self) -> str:
        return self.names[0]


def flag(
    default: Any,
    help: Any,
    *,
    mains: str = "",
    names: Any = (),
    changes_results: bool = True,
    free_at_resume: bool = False,
    also: dict[str, dict] | None = None,
    **argparse: Any,
) -> Any:
    """A field that is a flag: `--` and the field's name, unless `names` has others.

    mains: those that have it, all of the group's if empty. default: one value, or by_main(...), which tells the mains
    as well. help: text, or by_main(...); it says what the default is where no value can: "(default: the data set's)".
    names: a tuple, or by_main(...) for mains that call it otherwise. also: further flags that set the same value, with
    their keywords of add_argument.
    """
    if isinstance(default, by_main):
        mains = " ".join(default)
    shown = next(iter(default.values())) if isinstance(default, by_main) else default
    if isinstance(shown, bool) and "action" not in argparse:
        argparse["action"] = "store_true"
    declared = {"default": default, "help": help, "mains": frozenset(mains.split()), "names": names, "also": also or {}}
    declared |= {"changes_results": changes_results, "free_at_resume": free_at_resume}
    metadata = {"declared": declared, "argparse": argparse}
    if isinstance(shown, list):
        return field(default_factory=lambda: list(shown), metadata=metadata)
    return field(default=shown, metadata=metadata)


def flags_of_group(group: type, main: str) -> Iterator[Flag]:
    for one in dataclasses.fields(group):
        declared = one.metadata["declared"]
        if declared["mains"] and main not in declared["mains"]:
            continue
        default, text, names = (
            v[main] if isinstance(v, by_main) and main in v else v
            for v in (declared["default"], declared["help"], declared["names"])
        )
        names = (f"--{one.name}",) if not names or isinstance(names, by_main) else names
        yield Flag(
            one.name,
            tuple(names),
            default,
            declared["changes_results"],
            declared["free_at_resume"],
            {"help": text, **one.metadata["argparse"]},
            declared["also"],
        )


@dataclass(frozen=True)
class Options:
    """The whole command line of a main: each field a settings group, each field of that a flag.

    NETWORK_FROM: the argument whose file says what the network is, for a main without flags of its own for that.
    """

    MAIN: ClassVar[str] = ""
    DESCRIPTION: ClassVar[str] = ""
    NETWORK_FROM: ClassVar[str] = ""

    @classmethod
    def groups(cls) -> dict[str, type]:
        return {one.name: one.type for one in dataclasses.fields(cls)}  # type: ignore[misc]

    @classmethod
    @cache
    def flags(cls) -> dict[str, Flag]:
        """By the names of their values."""
        return {one.dest: one for group in cls.groups().values() for one in flags_of_group(group, cls.MAIN)}

    @classmethod
    def of(cls: type[Own], **values: Any) -> Own:
        """Options with these values, and the defaults for all others. TypeError for a name that is no flag's."""
        if unknown := set(values) - set(cls.flags()):
            raise TypeError(f"{cls.__name__}: has no {', '.join(sorted(unknown))}")
        values = {
            **{k: list(f.default) if isinstance(f.default, list) else f.default for k, f in cls.flags().items()},
            **values,
        }
        built = {
            name: group(**{one.name: values[one.name] for one in dataclasses.fields(group) if one.name in values})
            for name, group in cls.groups().items()
        }
        return cls(**built)

    def flat(self) -> dict[str, Any]:
        """Every flag's value by name, in one dict: what args.json and checkpoints keep."""
        return {
            k: getattr(getattr(self, name), k)
            for name, group in self.groups().items()
            for k in (one.dest for one in flags_of_group(group, self.MAIN))
        }

    def words(self, *dests: str) -> list[str]:
        """A command line's words for these flags, by the names of their values, unless at their defaults."""
        words = []
        for flag, value in ((self.flags()[k], self.flat()[k]) for k in dests):
            if value != flag.default:
                values = [] if value is True else value if isinstance(value, list) else [value]
                words += [flag.name, *map(str, values)]
        return words

    def having(self: Own, **values: Any) -> Own:
        """The same options with other values of some flags."""
        return type(self).of(**{**self.flat(), **values})


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
    if isinstance(value, (list, tuple)) and len(value) == 1:  # of a flag that took one value, and takes several now
        value = value[0]
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
