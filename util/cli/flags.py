"""Flags as dataclass fields: a settings group is a frozen dataclass of flags; a main's options are its groups.

    @dataclass(frozen=True)
    class Noise:
        '''DiffNoise: alpha-blended noise'''            # the group's title in --help
        alpha_blend: int = flag(15, "timestep t of abar; 0 switches off", type=number(int, 0, 999))

    @dataclass(frozen=True)
    class FinetuneOptions(Options):
        MAIN = "finetune"
        noise: Noise

`flag` declares everything about a flag; the parser, the comparison on resume and the dry run read it.
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
    """A value for each main that has the flag: by_main(finetune=64, pretrain=128)."""


@dataclass(frozen=True)
class Flag:
    """A flag of one main. `argparse`: keywords of add_argument; `also`: more flags that set the same value.

    changes_results: another value leads to different numbers. free_at_resume: a resumed run may use another value from
    then on (the schedule and related flags).
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
    """A field that is a flag, named `--` and the field's name unless `names` is given.

    mains: the mains that have it; empty for all mains with the group. default: one value, or by_main(...), which also
    names the mains. help: text, or by_main(...); it states the default if that is not a fixed value: "(default: the
    data set's)". names: a tuple, or by_main(...). also: more flags that set the same value, with their keywords of
    add_argument.
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
    """The command line of a main: each field is a settings group, whose fields are flags.

    NETWORK_FROM: for mains without flags for the network, the argument whose file describes it.
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
        """Flags by field name."""
        return {one.dest: one for group in cls.groups().values() for one in flags_of_group(group, cls.MAIN)}

    @classmethod
    def of(cls: type[Own], **values: Any) -> Own:
        """Options with these values and defaults for the others. TypeError for an unknown name."""
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
        """Every flag's value by field name, as stored in args.json and checkpoints."""
        return {
            k: getattr(getattr(self, name), k)
            for name, group in self.groups().items()
            for k in (one.dest for one in flags_of_group(group, self.MAIN))
        }

    def words(self, *dests: str) -> list[str]:
        """Command-line words that set the flags of these fields; none for defaults."""
        words = []
        for flag, value in ((self.flags()[k], self.flat()[k]) for k in dests):
            if value != flag.default:
                values = [] if value is True else value if isinstance(value, list) else [value]
                words += [flag.name, *map(str, values)]
        return words

    def having(self: Own, **values: Any) -> Own:
        """A copy with other values for some flags."""
        return type(self).of(**{**self.flat(), **values})


@dataclass(frozen=True)
class Difference:
    """A flag that changes results, with its value in a saved run and on this command line, as text."""

    flag: Flag
    before: str
    now: str


def differences(flags: dict[str, Flag], before: dict, now: dict) -> list[Difference]:
    """Flags that change results and differ. `before`, `now`: values by field name; what one of them lacks (a run of an
    earlier version) is not compared."""
    return [
        Difference(flag, shown(before[k]), shown(now[k]))
        for k, flag in flags.items()
        if flag.changes_results and k in before and k in now and not _same(before[k], now[k])
    ]


def refusal(found: list[Difference], where: str, advice: str) -> str:
    """A line with both values of the first difference, and the names of the other flags."""
    first, others = found[0], [d.flag.name for d in found[1:]]
    also = f" (other values of {', '.join(others[:6])}{', ...' if len(others) > 6 else ''}, too)" if others else ""
    return f"{first.flag.name} {first.now}: {where} {first.before}{also}; {advice}"


def _plain(value):
    """The value as read from a checkpoint or JSON, where tuples are lists; keywords sorted."""
    if isinstance(value, (list, tuple)) and len(value) == 1:  # the flag took one value in earlier versions
        value = value[0]
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, (list, tuple)) for v in value):
        value = {str(name): v for name, v in value}
    return json.loads(json.dumps(value, default=str))


def _same(a, b) -> bool:
    if isinstance(a, str) and isinstance(b, str):
        return a == b or os.path.realpath(a) == os.path.realpath(b)  # the same path, written differently
    return _plain(a) == _plain(b)


def shown(value) -> str:
    value = _plain(value)
    if isinstance(value, dict):
        value = [f"{name}={v}" for name, v in value.items()]
    if isinstance(value, list):
        return " ".join(map(str, value))[:80] or "(nothing)"
    if value is None or isinstance(value, bool):
        return {None: "(not given)", True: "on", False: "off"}[value]
    return str(value)[:80] or "(nothing)"
