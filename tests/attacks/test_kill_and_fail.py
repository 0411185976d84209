"""Every plugin, and all of them at once: killed and failed at the writes of every operation.

In CI each plugin alone is tried at every write, with one errno after the other. All at once are tried at as
many as time allows, spread over the operation and others for each attack; with VIRT_USHER_SOAK=1 at all of
them, and each with all errnos.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import shutil
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.attacks.calls import gone_daemon, recover
from tests.attacks.conftest import Tally
from tests.attacks.table import GPU, PLUGINS, ROWS, SCRIPTS, Row
from tests.conftest import ROOT

from virt_usher.testing.conformance import ATTACKS, ERRNOS, LIFE, Attack, attacked, call, differences, settled

SOAK = bool(os.environ.get("VIRT_USHER_SOAK"))
CI = os.environ.get("CI") == "true"
ALL = 10**6
# Points of each attack.
MOST = ALL if SOAK else 1
# Reads that fail at a stop, with each of two errnos; for one plugin in CI all of them.
READS = ALL if SOAK else 12 if CI else 4

pytestmark = pytest.mark.timeout(4 * 3600 if SOAK else 1800)  # many cases in one test, and CPUs are shared

MORE = tuple(
    Attack(operation, how, then)
    for operation in ("prepare", "release")
    for how, then in (
        ("killed", "recover"),
        ("killed with its daemon", "release"),
        ("killed with its daemon", "recover"),
        ("its parent killed", "prepare"),
        ("errno+", "release"),
        ("errno+", "recover"),
    )
)


def test_every_shipped_plugin_has_a_row() -> None:
    assert set(PLUGINS) == {p.stem for p in (ROOT / "plugins").glob("*.py")}


def points(row: Row, root: Path) -> dict[str, list[str]]:
    """Return the places that each operation passes."""
    host, passed = row.host(root), {}
    for operation in LIFE:
        result = call(host, "guest", operation, row.xml(), -1)
        assert result.status == 0, result.stderr
        passed[operation] = host.passed()
    shutil.rmtree(root)
    return passed


def many(combined: bool) -> int:
    """Return how many points of an attack are tried on one plugin, or on all at once."""
    if SOAK or (CI and not combined):
        return ALL
    return 12 if CI else 2 if combined else 1


def sample(count: int, most: int, seed: str) -> list[int]:
    """Return so many of the points 1 to count, spread over all of them."""
    if count <= most:
        return list(range(1, count + 1))
    dice = random.Random(zlib.crc32(seed.encode()))  # noqa: S311  # the same points in every run
    part = count / most
    return sorted({1 + int(part * (i + dice.random())) for i in range(most)})


def one(row: Row, root: Path, case: tuple[Attack, int]) -> bool:
    """Try one case, in a process that does nothing else."""
    attack, point = case
    host = row.host(root / f"{os.getpid()}-{attack}-{point}".replace(" ", "-"))
    calls = gone_daemon if attack.then == "recover" else call
    hit = attacked(host, "guest", row.xml(), attack, point, calls, recover)
    shutil.rmtree(host.root)
    return hit


def all_of(try_one: Callable[[Any], bool], cases: list[Any]) -> int:
    """Try cases on all CPUs; return how many hit."""
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        return sum(pool.imap_unordered(try_one, cases))


def in_turn(attack: Attack, number: int) -> list[Attack]:
    """Return the attack with its errnos: with all of them in a soak, else with one after the other."""
    codes = ERRNOS if SOAK else [ERRNOS[number % len(ERRNOS)]]
    if not attack.how.startswith("errno"):
        return [attack]
    return [Attack(attack.operation, attack.how.replace("errno", c), attack.then) for c in codes]


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("what", ["kill", "fail"])
def test_nothing_stays(room: Path, name: str, what: str, tried: Tally) -> None:
    row, combined = ROWS[name], name == "combined"
    passed = points(row, room / "count")
    cases = [
        (turned, point)
        for attack in (*ATTACKS, *MORE)
        if ("errno" in attack.how) == (what == "fail")
        for point in sample(len(passed[attack.operation]), many(combined), f"{name} {attack}")
        for turned in in_turn(attack, point)
    ]
    hits = all_of(partial(one, row, room), cases)
    assert hits > len(cases) * 0.6  # a failure may strike after the last write, and a killed parent one less
    tried(what, hits)


def vanished(row: Row, root: Path, case: tuple[str, str, int]) -> bool:
    """Let the nth file that a start reads be gone: it copes or says so, and all comes back."""
    on, code, nth = case
    host = row.host(root / "-".join(map(str, case)))
    before = host.snapshot()
    host.fail("*", getattr(errno, code), nth, on=on)
    result = call(host, "guest", "prepare", row.xml())
    host.heal()
    hit = bool(result.struck)
    for text in ("Traceback", "an error in virt-usher"):
        assert text not in result.stderr, f"{case}: {result.struck}: {result.stderr}"
    if result.status:
        assert not differences(before, host.snapshot()), f"{case}: {result.struck}"
    assert call(host, "guest", "release", row.xml()).status == 0
    changed = differences(before, host.snapshot())
    assert not changed, f"{case}: {changed}"
    shutil.rmtree(host.root)
    return hit


@pytest.mark.parametrize("name", ["cpu_isolation", "governor", "hugepages", "pci", "combined"])
def test_a_file_that_vanishes_is_no_catastrophe(room: Path, name: str, tried: Tally) -> None:
    row, cases = ROWS[name], []
    for on, code in (("read", "ENOENT"), ("read", "ENODEV"), ("list", "EIO")):
        cases += [(on, code, n) for n in sample(60, MOST * 2, f"{name} {code}")]
    tried("vanish", all_of(partial(vanished, row, room), cases))


def unreadable(row: Row, root: Path, case: tuple[str, str, int]) -> bool:
    """Let the nth read of a stop fail: what cannot be given back for it is kept, and given back later."""
    on, code, nth = case
    host = row.host(root / "-".join(map(str, case)))
    before = host.snapshot()
    assert call(host, "guest", "prepare", row.xml()).status == 0
    host.fail("*", getattr(errno, code), nth, on=on)
    result = call(host, "guest", "release", row.xml())
    host.heal()
    assert "Traceback" not in result.stderr, f"{case}: {result.struck}: {result.stderr}"
    changed = differences(before, host.snapshot())
    assert not changed or host.journal("guest"), f"{case}: {result.struck}: forgotten:\n{changed}"
    for again in ("prepare", "release") if nth % 2 else ("release",):
        ran = call(host, "guest", again, row.xml())
        assert ran.status == 0, f"{case}: {result.struck}: {ran.stderr}"
    changed = differences(before, host.snapshot())
    assert not changed, f"{case}: {result.struck}: {changed}"
    shutil.rmtree(host.root)
    return bool(result.struck)


@pytest.mark.parametrize("name", [n for n in ROWS if n not in ("reset_check", "scripts", "services")])
def test_what_cannot_be_read_at_a_stop_is_kept(room: Path, name: str, tried: Tally) -> None:
    row = ROWS[name]
    host = row.host(room / "count")
    assert call(host, "guest", "prepare", row.xml()).status == 0
    assert call(host, "guest", "release", row.xml(), -1).status == 0
    counts = {"read": len(host.looked()), "list": len(host.listed())}
    most, cases = ALL if CI and name != "combined" else READS, []
    for on, code in (("read", "EIO"), ("read", "ENODEV"), ("list", "EIO")):
        cases += [(on, code, n) for n in sample(counts[on], most, f"{name} {code}")]
    tried("unread", all_of(partial(unreadable, row, room), cases))


def unplugged(row: Row, root: Path, case: tuple[str, int]) -> bool:
    """Let something go for good when it is read or written for the nth time; the rest is as before."""
    operation, nth = case
    host = row.host(root / "-".join(map(str, case)))
    before = host.snapshot()
    if operation == "release":
        assert call(host, "guest", "prepare", row.xml()).status == 0
    host.vanish_at = nth
    results = [call(host, "guest", operation, row.xml())]
    host.vanish_at = 0
    gone = host.happened("gone")
    results += [call(host, "guest", "release", row.xml())]
    for result in results:
        assert "Traceback" not in result.stderr, f"{case}: {gone}: {result.stderr}"
        assert "an error in virt-usher" not in result.stderr, f"{case}: {gone}: {result.stderr}"
    changed = differences(before, host.snapshot()).splitlines()
    # The text console goes with its card, for the kernel too.
    left = [x for x in changed if not gone or not (gone in x or (gone == GPU and "/vtcon" in x))]
    assert not left, f"{case}: {gone}: {left}"
    shutil.rmtree(host.root)
    return bool(gone)


@pytest.mark.parametrize("name", ["cpu_isolation", "modules", "pci", "sysfs", "combined"])
def test_what_vanished_for_good_is_nothing_to_give_back(room: Path, name: str, tried: Tally) -> None:
    row = ROWS[name]
    count = {"prepare": 40, "release": 30}
    cases = [(o, n) for o, most in count.items() for n in sample(most, READS, f"{name} {o} gone")]
    tried("vanish", all_of(partial(unplugged, row, room), cases))


def troubled(row: Row, root: Path, case: tuple[str, str, int]) -> bool:
    """Give the hook trouble with the nth program it starts; tell whether it started so many."""
    operation, how, nth = case
    host = row.host(root / "-".join(map(str, case)).replace(" ", "-"))
    config = host.get("/etc/virt-usher/config.toml")
    host.config(config := config + "\n")
    before, start = host.snapshot(), 5 if operation == "prepare" else 60
    host.config(f"[deadlines]\nstart = {start}\nstop = 2\n{config}")
    if operation == "release":
        assert call(host, "guest", "prepare", row.xml()).status == 0
    host.trouble(nth, how)
    before |= {p: t for p, t in host.snapshot().items() if p.startswith((SCRIPTS, "/sbin"))}
    result = call(host, "guest", operation, row.xml())
    hit = host.children() >= nth
    assert "Traceback" not in result.stderr
    assert result.status in ((0, 3) if operation == "prepare" else (0,)), result.stderr
    host.settle()
    host.config(config)
    for again in (["prepare"] if operation == "release" else []) + ["release"]:
        result = call(host, "guest", again, row.xml())
        assert result.status == 0, f"{case}: {result.stderr}"
    changed = differences(before, settled(host, before))
    assert not changed, f"{case}: {changed}"
    shutil.rmtree(host.root)
    return hit


@pytest.mark.parametrize("name", ["cpu_isolation", "modules", "scripts", "services", "combined"])
def test_a_program_that_fails_hangs_or_kills_its_hook(room: Path, name: str, tried: Tally) -> None:
    cases = [
        (operation, how, nth)
        for operation, count in (("prepare", 12), ("release", 10))
        for how in ("fails", "hangs", "kills first", "kills last")
        for nth in sample({"scripts": 1, "modules": 4}.get(name, count), MOST, f"{name} {operation} {how}")
    ]
    tried("child", all_of(partial(troubled, ROWS[name], room), cases))
