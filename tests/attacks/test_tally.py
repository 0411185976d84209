"""The page says what the tests try."""

from __future__ import annotations

import re

from tests.attacks import tally


def test_the_page_has_the_rows_that_the_tests_have() -> None:
    rows = re.findall(r"^\| (.+) \| (\d+) \| (.+) \|$", tally.PAGE.read_text(), re.MULTILINE)
    assert [(what, seen) for what, _, seen in rows] == list(tally.ATTACKS.values())
    held = re.findall(r"^\| (.+) \| ([0-9.]+) s \| ([0-9.]+) s \|$", tally.PAGE.read_text(), re.MULTILINE)
    assert tuple(what for what, _, _ in held) == tally.HOLDS
    assert all(int(cases) > 0 for _, cases, _ in rows)
