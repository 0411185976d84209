"""What doctor looks at, one module per subject; each check tells what it saw, good or not."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One line of doctor: its level is ok, warning or problem; the hint is what to do."""

    level: str
    about: str
    text: str
    hint: str = ""


def ok(about: str, text: str) -> Check:
    """Return a check that passed."""
    return Check("ok", about, text)


def warning(about: str, text: str, hint: str = "") -> Check:
    """Return a check that found what may matter, or not."""
    return Check("warning", about, text, hint)


def problem(about: str, text: str, hint: str = "") -> Check:
    """Return a check that found why starts would be refused, or pass without us."""
    return Check("problem", about, text, hint)
