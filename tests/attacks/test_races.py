"""Many hooks at once: nobody loses a claim, undoes what another has, or waits for what he does not share."""

from __future__ import annotations

import os
import random
import re
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.attacks.calls import gone_daemon, recovery
from tests.attacks.conftest import Tally
from tests.attacks.table import GPU, KNOBS, NIC, PINS, SET, UNITS, WholeHost, furnish, given
from tests.attacks.test_kill_and_fail import SOAK
from tests.conftest import eventually

from virt_usher.testing import domain_xml, run_hook, start_hook
from virt_usher.testing.conformance import differences, left, settled

ROUNDS = 200 if SOAK else 3
PAGES = 60
# What all of them share. Whoever has the card takes it from the one who had it before.
SHARED = f"[plugins.governor]\n[plugins.hugepages]\n[plugins.cpu_isolation]\nshare = true\n{SET}{UNITS}"
CARD = "[plugins.pci]\n"
NAMES = {"one": False, "two": False, "red": True, "blue": True}  # and whether it wants the card
GOVERNOR = "/sys/devices/system/cpu/cpufreq/policy2/scaling_governor"


class Busy(WholeHost):
    """A host where a process loses its CPU at any read or write, so that others come in between."""

    def load(self, path: str) -> None:
        time.sleep(random.expovariate(500))
        super().load(path)

    def store(self, path: str, value: str) -> None:
        time.sleep(random.expovariate(500))
        super().store(path, value)


def shared_host(root: Path) -> WholeHost:
    furnish(root)
    host = Busy(root)
    host.config("[plugins.reset_check]\nenabled = false\n")
    for name, card in {**NAMES, "victim": False}.items():
        host.domain(name, SHARED + CARD * card)
    return host


def xml(name: str, card: bool) -> bytes:
    return domain_xml(name, PINS + given(NIC) * card, PAGES * 2048, True)


@contextmanager
def process(room: Path, work: Callable[[], None]) -> Iterator[int]:
    """Do work in a process of its own meanwhile; wait for its end, and fail as it did."""
    trouble, pid = room / f"trouble-{time.monotonic_ns()}", os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            trouble.write_text(traceback.format_exc())
        finally:
            os._exit(0)
    try:
        yield pid
    finally:
        os.waitpid(pid, 0)
    assert not trouble.exists(), trouble.read_text()


def lives(host: WholeHost, room: Path, name: str, card: bool) -> None:
    """Start and stop one domain again and again."""
    chance = random.Random(name)  # noqa: S311  # no secret
    for _ in range(ROUNDS):
        end = time.monotonic() + 60
        while (result := run_hook(host, name, "prepare", xml(name, card))).status:
            assert card, result.stderr
            assert re.search("is held by domain|held by pid", result.stderr), result.stderr
            assert time.monotonic() < end, f"the card is never free again: {result.stderr}"
            time.sleep(chance.uniform(0, 0.1))
        runs(host, chance.uniform(0, 0.3), room / "owner of the card" if card else None)
        assert run_hook(host, name, "release", b"").status == 0


def runs(host: WholeHost, seconds: float, owner: Path | None = None) -> None:
    """Let a domain run; it must have all that it was given, and the card for itself."""
    if owner:
        os.close(os.open(owner, os.O_CREAT | os.O_EXCL))  # or two have it
    time.sleep(seconds)
    assert host.read(GOVERNOR) == "performance"
    assert host.read(KNOBS[0]) == "120"
    assert sum(host.pages(node)[0] for node in (0, 1)) >= PAGES
    states = [host.get(f"/.kernel/states/{u}.service") for u in ("smb", "greeter")]
    assert states == ["active", "inactive"]
    if owner:
        owner.unlink()


def dies(host: WholeHost) -> None:
    """Start a domain, and let all of it be killed somewhere: for `recover`, or the next start."""
    chance = random.Random(4)  # noqa: S311  # no secret
    for again in (True, False) * ROUNDS:
        gone_daemon(host, "victim", "prepare", xml("victim", False), chance.randint(1, 90), "family")
        if again:
            assert run_hook(host, "victim", "prepare", xml("victim", False)).status == 0
            runs(host, chance.uniform(0, 0.3))
            assert run_hook(host, "victim", "release", b"").status == 0
        eventually(lambda: not host.journal("victim"), "recover gives back what the victim left")


def recovers(host: WholeHost, done: Path) -> None:
    """Run recover all the while."""
    while not done.exists():
        assert recovery(host) in (0, 1)
        time.sleep(0.02)


@pytest.mark.timeout(7200 if SOAK else 300)
def test_domains_at_once_keep_what_they_have_and_leave_nothing(room: Path, tried: Tally) -> None:
    host, done = shared_host(room / "host"), room / "done"
    before = host.snapshot()
    with process(room, lambda: recovers(host, done)):
        try:
            with process(room, lambda: dies(host)):
                at_once(room, host)
        finally:
            done.touch()
    assert not differences(before, host.snapshot())
    assert not left(host)
    tried("race", ROUNDS * (len(NAMES) + 3))  # the victim starts thrice a round


def at_once(room: Path, host: WholeHost, names: tuple[str, ...] = tuple(NAMES)) -> None:
    """Let domains live, each in a process of its own."""
    if names:
        with process(room, lambda: lives(host, room, names[0], NAMES[names[0]])):
            at_once(room, host, names[1:])


def test_one_stuck_in_the_kernel_keeps_its_device_and_nobody_waits_for_it(room: Path, tried: Tally) -> None:
    """It is never sent a signal: one would end it here, and the device would be free."""
    host = furnish(room / "host")
    host.config("[deadlines]\nstart = 4\nstop = 1\n[plugins.reset_check]\nenabled = false\n")
    for name, toml in {
        "stuck": CARD,
        "same": CARD,
        "other": f"[plugins.consoles]\n{CARD}{SET}[plugins.hugepages]\n",
    }.items():
        host.domain(name, toml)
    before = host.snapshot()
    host.stall(f"*/{NIC}/*")
    stuck = start_hook(host, "stuck", "prepare", domain_xml("stuck", given(NIC)))
    eventually(lambda: host.stalled, "the start reaches the kernel")

    other = domain_xml("other", given(GPU), PAGES * 2048, True)
    for _ in range(3):
        assert run_hook(host, "other", "prepare", other).status == 0
        assert run_hook(host, "other", "release", b"").status == 0
    assert host.stalled, "all that was meanwhile"

    def refused() -> None:
        result = run_hook(host, "same", "prepare", domain_xml("same", given(NIC)))
        assert result.status == 3
        assert re.search(r"is held by (domain 'stuck'|pid \d+ \('stuck' prepare\))", result.stderr)
        assert "busy with 'same'" not in result.stderr, "it gave up by itself"
        assert run_hook(host, "same", "release", b"").status == 0

    refused()
    late = stuck.wait()
    assert late.status == 3
    assert "was not ready in time" in late.stderr
    assert run_hook(host, "stuck", "release", b"").status == 0
    assert recovery(host) == 1, "its own work is left to it"
    refused()
    worker = re.search(r"pid (\d+)", late.stderr)
    assert worker
    assert host.started_at(int(worker[1])), "it was left alone"
    host.resume()
    assert not differences(before, settled(host, before))
    assert not left(host)
    tried("race", 6)


def test_recover_leaves_a_start_alone_that_outlives_its_daemon(room: Path, tried: Tally) -> None:
    """All but the lock says that the domain is stale: the daemon is gone, and no QEMU runs."""
    host = furnish(room / "host").domain("guest", f"{UNITS}{SET}")
    before = host.snapshot()
    host.stall(KNOBS[0])
    daemon = os.fork()
    if daemon == 0:
        if os.fork() == 0:
            start_hook(host, "guest", "prepare")
            os._exit(0) if _happens(lambda: host.stalled) else os._exit(1)
        os._exit(os.waitstatus_to_exitcode(os.wait()[1]))
    assert os.waitstatus_to_exitcode(os.waitpid(daemon, 0)[1]) == 0
    journal = host.journal("guest")
    assert recovery(host) == 1
    assert host.journal("guest") == journal
    assert host.read("/.kernel/states/smb.service") == "active"
    host.resume()
    eventually(lambda: recovery(host) == 0, "the start ends, and recover gives back what it did")
    assert not differences(before, host.snapshot())
    tried("race", 1)


def _happens(condition: Callable[[], bool]) -> bool:
    """Wait in a process that must not come back into the test."""
    end = time.monotonic() + 60
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()
