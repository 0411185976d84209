"""The journal alone brings all back: cut short, of another version, without configuration and plugins."""

from __future__ import annotations

import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
from tests.attacks.conftest import Tally
from tests.attacks.table import ROWS, Row
from tests.attacks.test_kill_and_fail import MOST, SOAK, all_of, points, sample

from virt_usher.journal import Journal
from virt_usher.testing import run_hook
from virt_usher.testing.conformance import call, differences

pytestmark = pytest.mark.timeout(4 * 3600 if SOAK else 1800)
JOURNAL = "/run/virt-usher/guest.jnl"


def torn(row: Row, root: Path, case: tuple[int, int]) -> bool:
    """Kill hook and daemon right after a record, and cut that record short."""
    point, cut = case
    host = row.host(root / f"{point}-{cut}")
    before = host.snapshot()
    killed = call(host, "guest", "prepare", row.xml(), point, "family").killed
    text = host.journal("guest")
    if killed and text:
        last = text.splitlines(keepends=True)[-1]
        Path(host.path(JOURNAL)).write_text(text[: len(text) - 1 - cut % len(last)])
    for operation in ("release", "prepare", "release"):
        result = call(host, "guest", operation, row.xml())
        assert result.status == 0, f"{case}: {operation}: {result.stderr}"
        if operation == "release":
            changed = differences(before, host.snapshot())
            assert not changed, f"{case}: {changed}"
    shutil.rmtree(host.root)
    return bool(killed and text)


@pytest.mark.parametrize("name", ROWS)
def test_a_record_cut_short_is_not_there(room: Path, name: str, tried: Tally) -> None:
    row = ROWS[name]
    passed = points(row, room / "count")["prepare"]
    # Right after a record is before the deed that it announces: only then may it be torn.
    after = [i + 2 for i, path in enumerate(passed[:-1]) if path == JOURNAL]
    chosen = [after[n - 1] for n in sample(len(after), MOST * 2, name)]
    cases = [(point, cut) for point in chosen for cut in sample(200, MOST, f"{name} {point}")]
    tried("torn", all_of(partial(torn, row, room), cases))


@pytest.mark.parametrize("name", ROWS)
def test_a_record_cut_at_any_byte_reads_as_none(room: Path, name: str, tried: Tally) -> None:
    """Not even when the next record is written behind what is left of it. All else goes by the records."""
    row, cases = ROWS[name], 0
    host = row.host(room / "host")
    assert call(host, "guest", "prepare", row.xml()).status == 0
    path = Path(host.path(JOURNAL))
    if not path.exists():  # reset_check holds nothing
        return
    lines = path.read_bytes().splitlines(keepends=True)
    for n, line in enumerate(lines):
        path.write_bytes(b"".join(lines[:n]))
        whole = Journal(host, "guest").records
        assert len(whole) == n
        for cut in range(1, len(line) + 1):
            path.write_bytes(b"".join(lines[:n]) + line[:-cut])
            journal = Journal(host, "guest")
            assert journal.records == whole, (n, cut)
            journal.append({"next": cut})
            assert Journal(host, "guest").records == journal.records == [*whole, {"next": cut}], (n, cut)
            cases += 1
    tried("torn", cases)


@pytest.mark.parametrize("name", ROWS)
def test_a_journal_of_a_newer_version_waits_for_it(room: Path, name: str, tried: Tally) -> None:
    row = ROWS[name]
    host = row.host(room / "host")
    before = host.snapshot()
    assert call(host, "guest", "prepare", row.xml()).status == 0
    held, journal = host.snapshot(), Path(host.path(JOURNAL))
    if not journal.exists():  # reset_check holds nothing
        return
    text = journal.read_text()
    journal.write_text(text.replace('{"usher":1,', '{"usher":99,', 1))
    assert call(host, "guest", "release", b"").status == 0
    refused = call(host, "guest", "prepare", row.xml())
    assert refused.status == 3
    assert "was written by a newer virt-usher" in refused.stderr
    journal.write_text(text.replace('{"usher":1,', '{"usher":0,', 1))
    assert not [x for x in differences(held, host.snapshot()).splitlines() if "/run/virt-usher" not in x]
    assert call(host, "guest", "release", b"").status == 0
    changed = differences(before, host.snapshot())
    assert not changed
    tried("other", 1)


def no_plugins() -> None:
    """Let nothing of the start's side be imported any more: the package is being replaced, or gone."""
    for name in ("plugins", "config", "domain", "prepare", "actions", "options"):
        sys.modules[f"virt_usher.{name}"] = None  # type: ignore[assignment]  # Python's way to say so


@pytest.mark.parametrize("name", ROWS)
def test_release_needs_the_journal_alone(room: Path, name: str, tried: Tally) -> None:
    row = ROWS[name]
    host = row.host(room / "host")
    before = host.snapshot()
    assert call(host, "guest", "prepare", row.xml()).status == 0
    shutil.rmtree(host.path("/etc/virt-usher"))
    assert run_hook(host, "guest", "release", b"", prepare=no_plugins).status == 0
    changed = differences(before, host.snapshot()).splitlines()
    assert not [x for x in changed if not x.startswith("/etc/virt-usher")]
    tried("other", 1)
