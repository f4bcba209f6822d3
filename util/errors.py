"""UserError, which mains print as one line and without a traceback, and short texts about other errors."""

import re
from collections.abc import Sequence

_KEYWORD = re.compile(r"<(\w+)>")


class UserError(ValueError):
    """A mistake in flags, files or data. The message is one line: the flag or path, its value, what is expected."""


class ParameterError(UserError):
    """A wrong keyword of a network, written `<keyword>` in the message: `<drop_path> 3: should be ...`.

    str() names the keyword. Mains, where users set keywords by flags, print `by_flags`.
    """

    def __init__(self, message: str):
        self.message = message
        super().__init__(_KEYWORD.sub(r"\1", message))

    def by_flags(self, flags: dict[str, str]) -> UserError:
        """The error with flags in place of keywords. flags: those whose name differs from the keyword's."""
        return UserError(_KEYWORD.sub(lambda m: flags.get(m[1], f"--{m[1]}"), self.message))


def reason_of(error: BaseException) -> str:
    """The reason in one short line: the system's text, else the message, else the name of the type.

    A KeyError's message is only the key, so the type is put before it.
    """
    text = getattr(error, "strerror", None) or " ".join(str(error).split())
    if isinstance(error, LookupError) or not text:
        text = f"{type(error).__name__}: {text}".removesuffix(": ")
    return text[:160]


def listed(names: Sequence[str], most: int = 5) -> str:
    """`a, b, c and 4 more`."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
