"""The page says what the tests try."""

from __future__ import annotations

import re

from tests.attacks import tally


def test_the_page_has_the_rows_that_the_tests_have() -> None:
    rows = re.findall(r"^\| (.+) \| (\d+) \| (.+) \|$", tally.PAGE.read_text(), re.MULTILINE)
    assert [(what, seen) for what, _, seen in rows] == list(tally.ATTACKS.values())
    assert all(int(cases) > 0 for _, cases, _ in rows)
