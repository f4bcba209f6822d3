"""Atomic writes, output streams that tolerate failed writes, printable file names."""

import csv
import os
import sys
import unicodedata
from contextlib import contextmanager, suppress
from types import SimpleNamespace

from util.errors import UserError, reason_of


def write_atomic(path: str, write) -> None:
    """`write(file)` to a temporary file beside it, fsync, rename: the old file stays until the new one is complete."""
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
        os.fsync(folder)  # so that the rename survives a power cut
    finally:
        os.close(folder)


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


@contextmanager
def survive(path: str, what: str = "not written"):
    """For pictures and logs: any error inside (a full disk, a character that the font lacks) becomes a warning, and the
    run continues without that file."""
    try:
        yield
    except Exception as error:
        if "DataLoader worker" in str(error):  # raised by torch's signal handler, wherever it interrupts
            raise
        kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
        warn(f"{path}: {what} ({kind}{reason_of(error)})")


class TolerantStream:
    """Drops what cannot be written (a full disk, a closed pipe), so that the run continues."""

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
    """For a script's main output: UserError if it cannot be written."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {path}: cannot be written ({reason_of(error)})") from None


def write_text(path: str, text: str, flag: str = "") -> None:
    """Written atomically; if that fails, a warning. Lone surrogates are escaped.

    flag: the flag that set the path, for a script's main output; if that cannot be written, a UserError.
    """
    with must_write(flag, path) if flag else survive(path):
        write_atomic(path, lambda file: file.write(text.encode("utf-8", "backslashreplace")))


def write_csv(path: str, header: list[str], rows: list[list], flag: str = "") -> None:
    """Like write_text. Lines end in a line feed; names may contain any character."""
    lines: list[str] = []
    # csv quotes only characters of its line end: with "\n" alone, a carriage return in a name would break the row.
    sink = SimpleNamespace(write=lambda line: lines.append(line.removesuffix("\r\n") + "\n"))
    csv.writer(sink, lineterminator="\r\n").writerows([header, *rows])
    write_text(path, "".join(lines), flag)


def printable(path: str) -> str:
    """A file name as text; bytes that are not UTF-8 become escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def composed(text: str) -> str:
    """Unicode's composed form (NFC): file systems and archives use both forms of accents."""
    return unicodedata.normalize("NFC", text)
