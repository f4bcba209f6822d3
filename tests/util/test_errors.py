"""Errors in one line."""

import errno
import os

from util.errors import listed, reason_of


def test_a_reason_is_one_short_line_whatever_was_raised():
    assert reason_of(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a/file")) == "No space left on device"
    assert reason_of(RuntimeError("sizes differ:\n\t3 against\n\t4")) == "sizes differ: 3 against 4"
    assert reason_of(EOFError()) == "EOFError" and reason_of(KeyError("name")) == "KeyError: 'name'"
    assert reason_of(ValueError("x" * 1000)) == "x" * 160


def test_a_list_of_names_says_how_many_it_leaves_out():
    assert listed(["a"]) == "a" and listed(["a", "b", "c"], 3) == "a, b, c"
    assert listed([*"abcdefg"], 5) == "a, b, c, d, e and 2 more"
