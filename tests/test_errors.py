"""Texts that people copy into a shell, and texts that are not ours."""

from __future__ import annotations

import shlex

import pytest

from virt_usher.errors import printable, typed


@pytest.mark.parametrize(
    "name", ["win10", "-rf", "two words", "a$(b)", "it's", 'quo"te', "..", "ünïcode", ";reboot", "x" * 200]
)
def test_a_name_in_a_command_is_one_argument_and_no_option(name: str) -> None:
    words = shlex.split(f"virt-usher plan {typed(name)}")
    assert words == ["virt-usher", "plan", *(["--"] if name.startswith("-") else []), name]


def test_what_would_move_a_terminal_is_shown_instead() -> None:
    assert typed("a\x1b[2Jb\nc") == r"'a\x1b[2Jb\nc'"
    assert printable("\udcff") == r"\udcff"
