"""The one error type of virt-usher."""

from __future__ import annotations


class UsherError(Exception):
    """A problem with a cause and, where there is one, a next step.

    `message` names the thing, the value and the cause; `hint` is what to do about it, a ready
    command where possible. It is caught in one place per program: dispatch, and the CLI.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


def printable(text: str) -> str:
    """Make foreign text harmless for a terminal or a log line.

    Names and file contents are not ours: control characters (newline and escape included) are
    shown as \\xNN, and lone surrogates (undecodable bytes) likewise.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def typed(name: str) -> str:
    """Write a domain's name as an argument in a command for people to copy.

    `--` goes before one that looks like an option, and control characters are shown, as everywhere.
    """
    import shlex  # here: release refuses nothing

    return "-- " * name.startswith("-") + shlex.quote(printable(name))


def nearest(word: str, known: list[str]) -> str:
    """Return ' (did you mean X?)' for the known word nearest to this one, or ''."""
    import difflib

    match = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f" (did you mean {match[0]!r}?)" if match else ""
