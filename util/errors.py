"""The one exception type that means "the user can mend this": mains print it as one line and exit with code 2."""


class UserError(ValueError):
    """A mistake in flags, files or data. The message is one line: the flag or path, its value, what would be right."""
