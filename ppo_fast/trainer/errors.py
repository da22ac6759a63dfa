"""The one exception that a user may cause."""

from __future__ import annotations


class UserError(Exception):
    """Wrong input, or a surrounding that does not work: one line that says what was expected and what came.

    The command line prints it and exits with code 2; nothing is half-written when it is raised.
    """

    #: Of several ranks: whether this one prints it. None: all raise the same, and the first prints.
    speaks: bool | None = None


def one_line(error: BaseException) -> str:
    """An exception as part of a one-line message: its type and the first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
