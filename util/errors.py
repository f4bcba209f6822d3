"""The one exception that means "the user can mend this", which mains print as one line; other errors in one line."""

import re
from collections.abc import Sequence

_KEYWORD = re.compile(r"<(\w+)>")


class UserError(ValueError):
    """A mistake in flags, files or data. The message is one line: the flag or path, its value, what would be right."""


class ParameterError(UserError):
    """A mistake in a keyword of a network, which the message has as `<keyword>`: `<drop_path> 3: should be ...`.

    As text it names keywords. A main, whose users set them by flags, says `by_flags`.
    """

    def __init__(self, message: str):
        self.message = message
        super().__init__(_KEYWORD.sub(r"\1", message))

    def by_flags(self, flags: dict[str, str]) -> UserError:
        """flags: of the keywords that have a flag of another name."""
        return UserError(_KEYWORD.sub(lambda m: flags.get(m[1], f"--{m[1]}"), self.message))


def reason_of(error: BaseException) -> str:
    """Why it was raised, in one short line: the system's word for it, else what it says, else the name of its type.

    A KeyError says no more than the key, so its type stands before it.
    """
    text = getattr(error, "strerror", None) or " ".join(str(error).split())
    if isinstance(error, LookupError) or not text:
        text = f"{type(error).__name__}: {text}".removesuffix(": ")
    return text[:160]


def listed(names: Sequence[str], most: int = 5) -> str:
    """`a, b, c and 4 more`."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
