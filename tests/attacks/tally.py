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
from typing import Any

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
    "vanish": (
        "A file is gone, or a directory unreadable, when a start reads it, for once or for good",
        "refused with that reason, or not needed; what is gone is nothing to give back",
    ),
    "unread": (
        "A file or a directory cannot be read at a stop",
        "what cannot be given back for it is kept, and given back later; nothing is forgotten",
    ),
    "torn": (
        "The journal's last record is cut short: each at each byte, some with the hook killed there",
        "it is not there, nor when more is written; a release brings all back, another start and stop too",
    ),
    "other": (
        "The journal is of another version; or configuration and plugins are gone at the stop",
        "a newer one waits for its version, an older one and a lonely one are given back",
    ),
    "hostile": (
        "Metadata sets options to hostile values; names have each byte there is; a domain's XML is mutated",
        "what is not harmless is refused, nothing switched off, nothing touched; a name is data",
    ),
    "laws": (
        "Three domains start, stop, crash, get stuck and recover in random order, while an admin sets things",
        "the host is as before once nobody holds it, with what the admin set; those that run are left alone",
    ),
    "race": (
        "Domains that share all of a host start and stop at once, while one dies and `recover` never rests",
        "each has what it was given until it stops, one at a time a device; then the host is as before",
    ),
    "child": (
        "A program fails, hangs, or kills the hook that started it",
        "refused within the deadline; the host is as before",
    ),
    "alive": (
        "With a real libvirt a hook hangs, is killed, refuses, finds no Python or a full disk",
        "`virsh list` and `domstate` answer, and the other domain runs on",
    ),
}
# What held a real libvirt, measured; the deadlines were 4 s.
HOLDS = (
    *(
        f"{how} at {when}"
        for how in ("hung", "killed", "no python", "full disk")
        for when in ("prepare", "start", "started", "release")
    ),
    "refused at prepare",
)


def note(key: str, cases: int) -> None:
    """Add cases to an attack's count, if a tally is kept."""
    assert key in ATTACKS
    assert cases > 0
    print(f"{key}: {cases} cases")
    _keep(key, cases)


def measured(what: str, seconds: float, slowest: float) -> None:
    """Note how long a call took libvirt, and the slowest answer about another domain meanwhile."""
    assert what in HOLDS
    print(f"{what}: {seconds:.1f} s, {slowest:.1f} s")
    _keep(what, [round(seconds, 1), round(slowest, 1)])


def _keep(what: str, figures: int | list[float]) -> None:
    """Add a line to the tally; several processes may do so at once."""
    if path := os.environ.get("VIRT_USHER_TALLY"):
        with open(path, "a") as tally:
            tally.write(json.dumps([what, figures]) + "\n")


def counted(lines: str) -> dict[str, Any]:
    """Sum up a tally."""
    counts: dict[str, Any] = {}
    for what, figures in map(json.loads, lines.splitlines()):
        counts[what] = counts.get(what, 0) + figures if what in ATTACKS else figures
    return counts


def table(counts: dict[str, Any]) -> str:
    """Write the tables."""
    lines = ["| what was tried | cases | what was seen of each |", "|---|---|---|"]
    lines += [f"| {what} | {counts[key]} | {seen} |" for key, (what, seen) in ATTACKS.items()]
    lines += [
        "",
        "How long libvirt was held, with deadlines of 4 s, on a machine that did other things too:",
        "",
    ]
    lines += [
        "| the hook | `virsh start` or `destroy` answered after | slowest answer meanwhile |",
        "|---|---|---|",
    ]
    lines += [f"| {what} | {counts[what][0]} s | {counts[what][1]} s |" for what in HOLDS]
    return "\n".join(lines) + "\n"


def main(path: str) -> None:
    """Put the counts of a file into the page."""
    head, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}{table(counted(Path(path).read_text()))}{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main(sys.argv[1])
