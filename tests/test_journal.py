"""Journal and claims: the undo is on disk before the deed, and the last to let go restores the original."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as given_settings
from hypothesis import strategies as st
from tests.conftest import furnish, hold, journals, let_go

from virt_usher import AddPages, OneWay, UsherError, Write
from virt_usher.journal import VERSION, Journal
from virt_usher.testing import FakeHost, Killed, run_hook
from virt_usher.testing.conformance import differences

pytestmark = pytest.mark.timeout(600)  # many cases in one test, on CPUs that others use too

GOVERNOR = "/sys/devices/system/cpu/cpufreq/policy0/scaling_governor"
OTHER = "/sys/devices/system/cpu/cpufreq/policy2/scaling_governor"
POOL = "/sys/devices/system/node/node0/hugepages/hugepages-2048kB/nr_hugepages"
LAST = "/var/lib/virt-usher/last"


def records(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize(
    ("action", "needed"),
    [
        (Write(GOVERNOR, "performance"), {"path": GOVERNOR, "old": "schedutil", "new": "performance"}),
        (AddPages(2048, 4, (0,)), {"pool": 1, "node": 0, "before": 0, "by": 4}),
        (OneWay("/proc/sys/vm/compact_memory", "1", "nothing to undo"), {"kind": "oneway"}),
    ],
)
def test_the_undo_is_on_disk_before_the_deed(
    pc: FakeHost, action: Write | AddPages | OneWay, needed: dict[str, object]
) -> None:
    before = pc.snapshot()
    pc.kill_at(1)
    with pytest.raises(Killed):
        hold(pc, "guest", action)
    pc.kill_at(0)
    last = records(pc.journal("guest"))[-1]
    assert last.items() >= needed.items()
    assert {p: t for p, t in pc.snapshot().items() if not p.startswith("/run")} == before


@pytest.mark.parametrize("done", [1, 2])
def test_a_journal_torn_at_any_byte_of_its_last_line_gives_everything_back(pc: FakeHost, done: int) -> None:
    """The last line announces what is not done yet (1), or says that something was done (2)."""
    pc.kill_at(3 if done == 1 else 0)
    try:
        hold(pc, "guest", Write(GOVERNOR, "performance"), Write(OTHER, "performance"))
    except Killed:
        pc.kill_at(0)
    whole = Path(pc.path("/run/virt-usher/guest.jnl")).read_bytes()
    start = whole[:-1].rfind(b"\n") + 1
    for cut in range(start, len(whole)):
        path = Path(pc.path("/run/virt-usher/guest.jnl"))
        path.write_bytes(whole[:cut])
        pc.write(GOVERNOR, "performance")
        if done == 2:
            pc.write(OTHER, "performance")
        known = journals(pc)
        journal = known.of("guest")
        assert known.roll_back(journal) == []
        assert (pc.read(GOVERNOR), pc.read(OTHER)) == ("schedutil", "schedutil")
        # What is appended after a torn tail can be read, and tells the same.
        assert Journal(pc, "guest").live() == []


def test_a_record_that_does_not_fit_leaves_the_deed_undone(pc: FakeHost) -> None:
    known = journals(pc)
    journal = known.of("guest")
    journal.begin("uuid", 0, 15.0)
    text = pc.journal("guest")
    pc.fail("/run/virt-usher/guest.jnl", errno.ENOSPC)
    with pc.watched(), pytest.raises(OSError, match="No space left"):
        known.do(journal, "test", "governor", Write(GOVERNOR, "performance").record())
    assert pc.read(GOVERNOR) == "schedutil"
    assert pc.journal("guest") == text


def test_a_newer_versions_journal_is_left_alone_and_refuses_the_start(pc: FakeHost) -> None:
    pc.domain("guest", "[plugins.governor]\n")
    run_hook(pc, "guest", "prepare")
    path = Path(pc.path("/run/virt-usher/guest.jnl"))
    path.write_text(path.read_text().replace(f'"usher":{VERSION}', f'"usher":{VERSION + 1}'))
    before = pc.snapshot()
    assert run_hook(pc, "guest", "release").status == 0
    refused = run_hook(pc, "guest", "prepare")
    assert refused.status == 3
    assert "written by a newer virt-usher" in refused.stderr
    assert not differences(before, pc.snapshot())


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\n\n\n",
        b"\0" * 100,
        b'[]\n1\nnull\n"x"\n',
        b"\xff\xfe{}\n",
        b'{"got":1,"by":1}\n',
        b'{"ok":{}}\n',
    ],
)
def test_a_journal_of_nonsense_holds_nothing_and_blocks_nothing(pc: FakeHost, text: bytes) -> None:
    pc.domain("guest", "[plugins.governor]\n").file("/run/virt-usher/guest.jnl")
    Path(pc.path("/run/virt-usher/guest.jnl")).write_bytes(text)
    assert run_hook(pc, "guest", "release").status == 0
    pc.file("/run/virt-usher/guest.jnl")
    Path(pc.path("/run/virt-usher/guest.jnl")).write_bytes(text)
    result = run_hook(pc, "guest", "prepare")
    assert (result.status, result.stderr) == (0, "")
    run_hook(pc, "guest", "release")
    assert pc.read(GOVERNOR) == "schedutil"


@pytest.mark.parametrize("name", ["a/b", "", "../x", "a\0b"])
def test_a_name_that_is_no_file_name_is_refused(pc: FakeHost, name: str) -> None:
    with pytest.raises(UsherError, match="cannot be the name"):
        Journal(pc, name)


def test_what_could_not_be_given_back_is_carried_into_the_next_journal(pc: FakeHost) -> None:
    hold(pc, "guest", Write(GOVERNOR, "performance"), Write(OTHER, "performance"))
    pc.fail(GOVERNOR, errno.EIO)
    assert let_go(pc, "guest") == [f"{pc.path(GOVERNOR)}: Input/output error"]
    journal = hold(pc, "guest")
    assert [s.key for s in journal.live()] == [GOVERNOR]
    pc.heal()
    assert let_go(pc, "guest") == []
    assert pc.read(GOVERNOR) == "schedutil"
    assert pc.journal("guest") == ""


def test_a_journal_whose_qemu_lives_is_never_given_back(pc: FakeHost) -> None:
    for name in ("guest", 'it\'s "x" <&>'):
        hold(pc, name, Write(GOVERNOR, "performance"))
        pid = pc.qemu_runs(name)
        assert let_go(pc, name) == [f"QEMU still runs as pid {pid}"]
        assert pc.read(GOVERNOR) == "performance"
        pc.qemu_ends(name, pid_file_stays=True)
        assert let_go(pc, name) == []
        assert pc.read(GOVERNOR) == "schedutil"


ORDERS = sorted(set(itertools.permutations("AABBCC")))


@pytest.mark.parametrize("failing", ["", "B"])
def test_the_earliest_claim_rules_and_the_last_to_go_restores_in_every_order(
    host: FakeHost, failing: str
) -> None:
    """All 90 ways in which three domains start (first letter) and stop (second) on one knob."""
    host.policy(0, cpus=[0], governors=("schedutil", "a", "b", "c"))
    wants = {"A": "a", "B": "b", "C": "c"}
    for order in ORDERS:
        holding: list[str] = []
        for name in order:
            if name in holding:
                holding.remove(name)
                let_go(host, name)
            else:
                holding.append(name)
                if name == failing:  # killed right after the announcement, or where it has nothing to write
                    host.kill_at(1)
                try:
                    hold(host, name, Write(GOVERNOR, wants[name]))
                except Killed:
                    assert host.read(GOVERNOR) == "schedutil"
                host.kill_at(0)
            if not failing:
                assert host.read(GOVERNOR) == (wants[holding[0]] if holding else "schedutil"), order
        assert host.read(GOVERNOR) == "schedutil", order


@pytest.mark.parametrize("others", [(), ("B",), ("B", "C")])
def test_a_value_changed_by_somebody_else_is_left_alone_and_said(
    pc: FakeHost, others: tuple[str, ...]
) -> None:
    names = ("A", *others)
    for name in names:
        hold(pc, name, Write(GOVERNOR, "performance"))
    pc.write(GOVERNOR, "ondemand")
    for name in names:
        let_go(pc, name)
    assert pc.read(GOVERNOR) == "ondemand"
    last = pc.read(f"{LAST}/{names[-1]}.jnl")
    assert "is 'ondemand' and not ours any more: left alone" in last


def test_a_knob_that_vanished_counts_as_given_back(pc: FakeHost) -> None:
    hold(pc, "guest", Write(GOVERNOR, "performance"))
    Path(pc.path(GOVERNOR)).unlink()
    assert let_go(pc, "guest") == []
    assert "is gone" in pc.read(f"{LAST}/guest.jnl")


def test_the_kernels_own_spelling_of_our_value_is_still_ours(pc: FakeHost) -> None:
    """0 reads back as 'performance'; it must not be taken for somebody else's change."""
    pc.policy(9, cpus=[9], driver="intel_pstate")
    epp = "/sys/devices/system/cpu/cpufreq/policy9/energy_performance_preference"
    hold(pc, "guest", Write(epp, "0"))
    assert pc.read(epp) == "performance"
    let_go(pc, "guest")
    assert pc.read(epp) == "balance_performance"


def _epp(host: FakeHost) -> str:
    """Add a knob that reads 0 back as 'performance', 128 as 'balance_performance'."""
    host.policy(9, cpus=[9], driver="intel_pstate")
    path = "/sys/devices/system/cpu/cpufreq/policy9/energy_performance_preference"
    host.write(path, "balance_power")
    return path


@pytest.mark.parametrize("chosen", ["", "power", "77"])
def test_a_spelling_that_was_never_noted_is_asked_for(new_host: Callable[[], FakeHost], chosen: str) -> None:
    """A start is killed wherever it can be, and what somebody else chose since is still his."""
    for point in itertools.count(1):
        host = furnish(new_host())
        epp = _epp(host)
        host.kill_at(point)
        try:
            hold(host, "guest", Write(epp, "0"))
            break
        except Killed:
            host.kill_at(0)
        if chosen:
            host.write(epp, chosen)
        assert let_go(host, "guest") == []
        assert host.read(epp) == (chosen or "balance_power"), point
    assert point > 2  # before and after the write


@pytest.mark.parametrize("order", ["AB", "BA"])
def test_a_spelling_that_was_never_noted_when_it_was_handed_on_is_asked_for(
    new_host: Callable[[], FakeHost], order: str
) -> None:
    for point in itertools.count(1):
        host = furnish(new_host())
        epp = _epp(host)
        hold(host, "A", Write(epp, "255"))
        hold(host, "B", Write(epp, "0"))
        assert host.read(epp) == "power"
        host.kill_at(point)
        try:
            let_go(host, "A")
            break
        except Killed:
            host.kill_at(0)
        for name in order:
            assert let_go(host, name) == []
        assert host.read(epp) == "balance_power", point
    assert point > 2  # before and after the write


@pytest.mark.parametrize("write", range(1, 5))
def test_a_spelling_that_a_full_run_had_no_room_for_is_asked_for(pc: FakeHost, write: int) -> None:
    epp = _epp(pc)
    pc.domain("guest", f'[plugins.sysfs]\nset = ["{epp} = 0"]\n')
    pc.fail("/run/virt-usher/guest.jnl", errno.ENOSPC, -write)
    run_hook(pc, "guest", "prepare")
    pc.heal()
    run_hook(pc, "guest", "release")
    assert pc.read(epp) == "balance_power"


def test_what_was_already_as_wanted_stays_as_it_is(pc: FakeHost) -> None:
    pc.write(GOVERNOR, "performance")
    hold(pc, "guest", Write(GOVERNOR, "performance"))
    let_go(pc, "guest")
    assert pc.read(GOVERNOR) == "performance"


@given_settings(max_examples=30)
@given(
    st.lists(
        st.tuples(
            st.sampled_from("ABC"),
            st.sampled_from(["start", "start", "stop", "stop", "killed", "killed in release"]),
            st.integers(1, 4),
        ),
        max_size=14,
    )
)
def test_originals_come_back_whatever_happens_in_between(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, str, int]]
) -> None:
    """Any order of starts, stops and crashes of three domains that share two knobs."""
    host = furnish(FakeHost(tmp_path_factory.mktemp("h")))
    wants = {"A": "performance", "B": "powersave", "C": "ondemand"}
    host.write(OTHER, "conservative")
    for _ in range(2):  # the modules are loaded now, which stays
        for name in wants:
            hold(host, name, Write(GOVERNOR, wants[name]), Write(OTHER, wants[name]))
            let_go(host, name)
    before = host.snapshot()
    for name, what, point in steps:
        actions = [Write(GOVERNOR, wants[name]), Write(OTHER, wants[name])]
        host.kill_at(point if what.startswith("killed") else 0)
        with contextlib.suppress(Killed):
            hold(host, name, *actions) if what in ("start", "killed") else let_go(host, name)
        host.kill_at(0)
    for name in wants:
        assert let_go(host, name) == []
    assert not differences(before, host.snapshot())


def test_a_release_killed_while_it_hands_a_value_on_still_restores_the_original(pc: FakeHost) -> None:
    """B goes, sets A's value, is killed; A goes; then B's undo finds A's value and knows whence it came."""
    hold(pc, "B", Write(GOVERNOR, "powersave"))
    hold(pc, "A", Write(GOVERNOR, "performance"))
    pc.kill_at(2)
    with pytest.raises(Killed):
        let_go(pc, "B")
    pc.kill_at(0)
    assert pc.read(GOVERNOR) == "performance"
    for name in "AB":
        assert let_go(pc, name) == []
    assert pc.read(GOVERNOR) == "schedutil"


class Meddler(FakeHost):
    """A host where another process appends to the journal just before we open it to append."""

    meddled = False

    def point(self, path: str) -> None:
        if path.endswith("guest.jnl") and not self.meddled:
            self.meddled = True
            Journal(self, "guest").append({"note": "theirs"})


def test_what_another_process_appends_in_between_is_not_lost(tmp_path: Path) -> None:
    """A pool is settled in other domains' journals, while their own hooks go on writing."""
    host = Meddler(tmp_path)
    mine = journals(host).of("guest")
    mine.begin("uuid", 0, 15.0)
    with host.watched():
        mine.append({"note": "mine"})
    mine.refresh()
    assert [r.get("note") for r in mine.records] == [None, "theirs", "mine"]


def test_only_the_newest_records_of_starts_are_kept(pc: FakeHost, new_host: Callable[[], FakeHost]) -> None:
    host = new_host().policy(0, cpus=[0])
    for i in range(203):
        host.file(f"{LAST}/old{i}.jnl", "{}")
    hold(host, "guest", Write(GOVERNOR, "performance"))
    let_go(host, "guest")
    kept = host.entries(LAST)
    assert len(kept) == 200
    assert "guest.jnl" in kept


def test_a_journal_that_cannot_be_deleted_holds_nothing_and_blocks_nothing(pc: FakeHost) -> None:
    pc.domain("guest", "[plugins.governor]\n")
    before = pc.snapshot()
    journal = hold(pc, "guest")
    pc.fail("/run/virt-usher/guest.jnl", errno.EROFS)
    with pc.watched():
        journal.remove()
    assert Journal(pc, "guest").exists
    pc.heal()
    for operation in ("release", "prepare", "release"):
        assert run_hook(pc, "guest", operation).status == 0
    assert not differences(before, pc.snapshot())
