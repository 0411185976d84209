"""What the tests attack, and how many cases they tried: the table in docs/attacks.md.

    VIRT_USHER_TALLY=FILE pytest …           every test adds its counts to FILE
    python -m tests.attacks.tally FILE       writes them into docs/attacks.md

`tests/run attacks` does both.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "attacks.md"
BEGIN, END = "<!-- the tests write this -->\n", "<!-- to here -->\n"

# key -> what was done, and what was seen of every case
ATTACKS = {
    "kill": (
        "The hook is killed at a write; then a release, a start, `recover`, or a call while it still works",
        "the host is as before, byte for byte",
    ),
    "fail": (
        "A write, or the start of a program, fails with each errno in turn, once or from there on",
        "a start is refused with that reason; what a stop cannot undo is kept, and given back later",
    ),
    "vanish": ("A file is gone when a start reads it", "refused with that reason, or not needed"),
    "child": (
        "A program fails, hangs, or kills the hook that started it",
        "refused within the deadline; the host is as before",
    ),
}


def note(key: str, cases: int) -> None:
    """Add cases to an attack's count, if a tally is kept."""
    assert key in ATTACKS
    assert cases > 0
    print(f"{key}: {cases} cases")
    if path := os.environ.get("VIRT_USHER_TALLY"):
        counts = json.loads(Path(path).read_text()) if os.path.exists(path) else {}
        counts[key] = counts.get(key, 0) + cases
        Path(path).write_text(json.dumps(counts))


def table(counts: dict[str, int]) -> str:
    """Write the table."""
    lines = ["| what was tried | cases | what was seen of each |", "|---|---|---|"]
    lines += [f"| {what} | {counts[key]} | {seen} |" for key, (what, seen) in ATTACKS.items()]
    return "\n".join(lines) + "\n"


def main(path: str) -> None:
    """Put the counts of a file into the page."""
    head, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}{table(json.loads(Path(path).read_text()))}{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main(sys.argv[1])
