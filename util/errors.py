"""The one exception that means "the user can mend this", which mains print as one line; other errors in one line."""


class UserError(ValueError):
    """A mistake in flags, files or data. The message is one line: the flag or path, its value, what would be right."""


def reason_of(error: BaseException) -> str:
    """Why it was raised, in one short line: the system's word for it, else what it says, else the name of its type.

    A KeyError says no more than the key, so its type stands before it.
    """
    text = getattr(error, "strerror", None) or " ".join(str(error).split())
    if isinstance(error, LookupError) or not text:
        text = f"{type(error).__name__}: {text}".removesuffix(": ")
    return text[:160]
