"""Files that are written whole or not at all, streams that may fail, names as text."""

import csv
import os
import sys
import unicodedata
from contextlib import contextmanager, suppress
from types import SimpleNamespace

from util.errors import UserError, reason_of


def write_atomic(path: str, write) -> None:
    """`write(file)` to a temporary neighbour, fsync, rename: the old file stays whole until the new one is."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself must survive a power cut
    finally:
        os.close(folder)


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


@contextmanager
def survive(path: str, what: str = "not written"):
    """Around all that is drawn or logged: whatever goes wrong there (a full disk, a class name that a font chokes on)
    costs that file and a warning, not the run."""
    try:
        yield
    except Exception as error:
        if "DataLoader worker" in str(error):  # torch's signal handler raises in the middle of anything
            raise
        kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
        warn(f"{path}: {what} ({kind}{reason_of(error)})")


class Sturdy:
    """A stream whose disk may be full or whose reader may be gone: what cannot be written is lost, the run goes on."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


@contextmanager
def must_write(flag: str, path: str):
    """Around what a script is run for: a place that cannot be written to is the user's to mend."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {path}: cannot be written ({reason_of(error)})") from None


def write_text(path: str, text: str, flag: str = "") -> None:
    """Written whole or not at all; a full disk costs the report, not what it is about. Lone surrogates are escaped.

    flag: which said where; then it is what the script is run for, and a UserError if it cannot be written.
    """
    with must_write(flag, path) if flag else survive(path):
        write_atomic(path, lambda file: file.write(text.encode("utf-8", "backslashreplace")))


def write_csv(path: str, header: list[str], rows: list[list], flag: str = "") -> None:
    """As write_text. Lines end in a line feed; names may hold any character."""
    lines: list[str] = []
    # csv quotes what its own line end is made of: with "\n" alone, a name with a carriage return would be cut in two.
    sink = SimpleNamespace(write=lambda line: lines.append(line.removesuffix("\r\n") + "\n"))
    csv.writer(sink, lineterminator="\r\n").writerows([header, *rows])
    write_text(path, "".join(lines), flag)


def printable(path: str) -> str:
    """A file name as text: names that are no UTF-8 keep their bytes as escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def composed(text: str) -> str:
    """Unicode's composed form: file systems and archives write accents either way."""
    return unicodedata.normalize("NFC", text)
