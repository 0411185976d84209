"""Huge pages are a sum of deltas: each domain gives back what it added, and never takes others' pages."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tests.conftest import hold, journals, let_go

from virt_usher import AddPages, UsherError
from virt_usher.testing import FakeHost, Killed

pytestmark = pytest.mark.timeout(600)  # many cases in one test, on CPUs that others use too

# The first failure is the best explained one, and to shrink one for minutes helps nobody.
LAW = settings(max_examples=25, stateful_step_count=15, report_multiple_bugs=False)
NAMES = ("A", "B", "C")
UUIDS = {name: f"00000000-0000-0000-0000-00000000000{i}" for i, name in enumerate(NAMES)}
NODES = ((0,), (1,), (0, 1))


def persistent(host: FakeHost, node: int) -> int:
    nr, _, surplus = host.pages(node)
    return nr - surplus


def pools(host: FakeHost) -> tuple[int, int]:
    return persistent(host, 0), persistent(host, 1)


@pytest.fixture
def nodes(host: FakeHost) -> FakeHost:
    """Two nodes of 100 and 50 pages."""
    return host.node(0, free_kib=100 * 2048).node(1, free_kib=50 * 2048)


@pytest.mark.parametrize(
    ("there", "asked", "added"),
    [
        ((0, 0), (10, (0,)), (10, 0)),
        ((4, 0), (10, (0,)), (6, 0)),  # what is free already is used
        ((20, 0), (10, (0,)), (0, 0)),
        ((0, 0), (120, (0, 1)), (100, 20)),  # the first node as far as it goes
        ((0, 0), (120, (1, 0)), (70, 50)),
        ((3, 30), (40, (1,)), (0, 10)),
    ],
)
def test_only_what_is_missing_is_added_and_just_that_given_back(
    nodes: FakeHost, there: tuple[int, int], asked: tuple[int, tuple[int, ...]], added: tuple[int, int]
) -> None:
    for node in (0, 1):
        nodes.resize(node, there[node])
    hold(nodes, "A", AddPages(2048, *asked))
    assert pools(nodes) == (there[0] + added[0], there[1] + added[1])
    let_go(nodes, "A")
    assert pools(nodes) == there


def test_a_domain_waiting_for_its_qemu_keeps_its_pages_from_the_next(nodes: FakeHost) -> None:
    hold(nodes, "A", AddPages(2048, 10, (0,)), uuid=UUIDS["A"])
    hold(nodes, "B", AddPages(2048, 10, (0,)), uuid=UUIDS["B"])
    assert nodes.pages(0) == (20, 20, 0)
    nodes.qemu_runs("A", UUIDS["A"], {(0, 2048): 10})  # its pages are no longer free, and not promised
    hold(nodes, "C", AddPages(2048, 10, (0,)), uuid=UUIDS["C"])
    assert nodes.pages(0) == (30, 20, 0)


@pytest.mark.parametrize("point", range(1, 12))
def test_what_a_killed_start_still_wanted_is_nobodys(nodes: FakeHost, point: int) -> None:
    nodes.kill_at(point)
    try:
        hold(nodes, "A", AddPages(2048, 10, (0,)), uuid=UUIDS["A"])
        killed = False
    except Killed:
        killed = True
    nodes.kill_at(0)
    had = nodes.pages(0)[0]
    hold(nodes, "B", AddPages(2048, 10, (0,)), uuid=UUIDS["B"])
    assert nodes.pages(0)[0] == had + 10
    assert killed or had == 10
    let_go(nodes, "A")
    assert nodes.pages(0)[0] == 10
    let_go(nodes, "B")
    assert nodes.pages(0)[0] == 0


@pytest.mark.parametrize(
    ("held", "reserved", "free_for_b"),
    [
        ({(0, 2048): 40}, 0, 60),  # all taken
        ({(0, 2048): 20}, 20, 60),  # it is taking them: the rest is mapped, or is not yet
        ({(0, 2048): 20}, 5, 60),
        ({(0, 2048): 20}, 26, 54),  # 6 are another program's
        ({(0, 2048): 39}, 0, 60),  # a balloon gave one back, for ever
        ({}, 0, 60),
        ({}, 40, 20),  # whose these are nobody can tell
    ],
)
def test_what_another_qemu_has_still_to_take_counts_once(
    nodes: FakeHost, held: dict[tuple[int, int], int], reserved: int, free_for_b: int
) -> None:
    hold(nodes, "A", AddPages(2048, 40, (0,)), uuid=UUIDS["A"])
    nodes.qemu_runs("A", UUIDS["A"], held)
    nodes.reserve(reserved)
    with pytest.raises(UsherError, match=f"only {free_for_b} could be had"):
        hold(nodes, "B", AddPages(2048, free_for_b + 1, (0,)), uuid=UUIDS["B"])
    hold(nodes, "B", AddPages(2048, free_for_b, (0,)), uuid=UUIDS["B"])
    assert nodes.pages(0)[0] == 100


def test_what_a_qemu_of_two_nodes_lacks_may_be_on_either(nodes: FakeHost) -> None:
    hold(nodes, "A", AddPages(2048, 20, (0,)), AddPages(2048, 20, (1,)), uuid=UUIDS["A"])
    nodes.qemu_runs("A", UUIDS["A"], {(0, 2048): 20, (1, 2048): 5})
    hold(nodes, "B", AddPages(2048, 40, (0,)), uuid=UUIDS["B"])
    assert nodes.pages(0)[:2] == (75, 55)
    let_go(nodes, "B")
    hold(nodes, "B", AddPages(2048, 40, (0, 1)), uuid=UUIDS["B"])
    assert nodes.pages(0)[1] + nodes.pages(1)[1] == 55


def test_pages_that_others_have_reserved_do_not_count_as_free(nodes: FakeHost) -> None:
    nodes.resize(0, 10)
    nodes.reserve(6)
    hold(nodes, "A", AddPages(2048, 10, (0,)))
    assert nodes.pages(0)[0] == 16


def test_too_few_pages_are_refused_with_what_could_be_had_and_given_back(nodes: FakeHost) -> None:
    nodes.resize(1, 5)
    with pytest.raises(UsherError) as caught:
        hold(nodes, "A", AddPages(2048, 60, (1,)))
    assert "60 pages" in caught.value.message
    assert "node 1" in caught.value.message
    assert "only 50 could be had" in caught.value.message
    let_go(nodes, "A")
    assert pools(nodes) == (0, 5)


@pytest.mark.parametrize(("drop", "most"), [(False, 10), (True, 14)])
def test_memory_is_compacted_and_caches_are_dropped_only_where_that_is_allowed(
    host: FakeHost, drop: bool, most: int
) -> None:
    host.node(0, free_kib=10 * 2048, cache_kib=4 * 2048, in_one_piece_kib=2048)
    hold(host, "A", AddPages(2048, 10, (0,), drop))
    let_go(host, "A")
    if drop:
        hold(host, "A", AddPages(2048, most, (0,), drop))
    else:
        with pytest.raises(UsherError, match="only 10 could be had") as caught:
            hold(host, "A", AddPages(2048, 11, (0,), drop))
        assert "hugepages drop_caches=true" in caught.value.hint
    let_go(host, "A")
    assert host.pages(0) == (0, 0, 0)


@pytest.mark.parametrize(
    ("foreign", "expected", "said"),
    [(5, 5, ""), (-4, 0, "had 6 pages left of our 10"), (-20, 0, "had 0 pages left of our 10")],
)
def test_pages_that_another_program_added_or_took_are_left_alone(
    nodes: FakeHost, foreign: int, expected: int, said: str
) -> None:
    hold(nodes, "A", AddPages(2048, 10, (0,)))
    nodes.resize(0, foreign)
    let_go(nodes, "A")
    assert persistent(nodes, 0) == expected
    assert said in nodes.read("/var/lib/virt-usher/last/A.jnl")


def test_pages_another_program_uses_are_never_taken_from_it(nodes: FakeHost) -> None:
    hold(nodes, "A", AddPages(2048, 10, (0,)))
    nodes.take(0, 7)
    let_go(nodes, "A")
    assert nodes.pages(0) == (7, 0, 7)
    nodes.give(0, 7)
    assert nodes.pages(0) == (0, 0, 0)


@pytest.mark.parametrize("next_call", ["release", "prepare", "another domain"])
def test_a_change_that_was_cut_short_is_settled_by_whoever_comes_next(
    nodes: FakeHost, next_call: str
) -> None:
    """Killed before, within and after each write of a pool: between `pool` and `got` of its journal."""
    nodes.resize(1, 3)
    for point in range(1, 7):
        nodes.kill_at(point)
        with contextlib.suppress(Killed):
            hold(nodes, "A", AddPages(2048, 120, (0, 1)), uuid=UUIDS["A"])
        nodes.kill_at(0)
        if next_call == "prepare":
            hold(nodes, "A", AddPages(2048, 120, (0, 1)), uuid=UUIDS["A"])
        if next_call == "another domain":
            # It builds on what the dead one left, which still counts as needed.
            with contextlib.suppress(UsherError):
                hold(nodes, "B", AddPages(2048, 20, (0,)), uuid=UUIDS["B"])
            changes = [c for s in journals(nodes).of("A").live() for c in s.data.get("pool", [])]
            assert all("got" in c for c in changes)
            let_go(nodes, "B")
        assert let_go(nodes, "A") == []
        assert pools(nodes) == (0, 3), point


def test_a_node_that_is_gone_counts_as_given_back(nodes: FakeHost) -> None:
    hold(nodes, "A", AddPages(2048, 10, (0,)))
    folder = Path(nodes.path("/sys/devices/system/node/node0/hugepages"))
    folder.rename(folder.with_name("gone"))
    assert let_go(nodes, "A") == []


class Pools(RuleBasedStateMachine):
    """Any interleaving of starts, stops, crashes and other programs' changes, against a simple sum."""

    host: FakeHost
    factory: pytest.TempPathFactory

    @initialize(free=st.tuples(st.integers(0, 40), st.integers(0, 40)), there=st.integers(0, 10))
    def begin(self, free: tuple[int, int], there: int) -> None:
        self.host = FakeHost(self.factory.mktemp("h"))
        self.host.node(0, free_kib=free[0] * 2048, pages={2048: there}).node(1, free_kib=free[1] * 2048)
        self.ours: dict[str, list[int]] = {}  # what each domain has added to each node
        self.needs: dict[str, tuple[int, tuple[int, ...]]] = {}  # of those whose QEMU does not run yet
        self.running: dict[str, int] = {}
        self.torn = ""  # who died while changing a pool, which nobody has settled yet
        self.robbed = False
        self.foreign = [0, 0]  # pages another program has taken

    def expect_given_back(self, name: str, before: tuple[int, int]) -> None:
        ours = self.ours.pop(name, [0, 0])
        self.needs.pop(name, None)
        assert pools(self.host) == tuple(max(0, b - o) for b, o in zip(before, ours, strict=True))

    @rule(
        name=st.sampled_from(NAMES),
        count=st.integers(1, 30),
        where=st.sampled_from(NODES),
        point=st.integers(0, 6),
    )
    def prepare(self, name: str, count: int, where: tuple[int, ...], point: int) -> None:
        if name in self.running:
            return
        before = pools(self.host)
        let_go(self.host, name)  # as prepare itself does first; apart, so that the sum can be checked
        self.expect_given_back(name, before)
        before = pools(self.host)
        self.host.kill_at(point)
        try:
            hold(self.host, name, AddPages(2048, count, where), uuid=UUIDS[name])
            self.torn = ""
            self.needs[name] = count, where
            free = [self.host.pages(n)[1] for n in (0, 1)]
            for group in () if self.robbed else NODES:
                promised = sum(c for c, w in self.needs.values() if set(w) <= set(group))
                assert promised <= sum(free[n] for n in group)
        except UsherError:
            self.torn = ""
        except Killed:
            self.torn = name
        self.host.kill_at(0)
        self.ours[name] = [now - then for now, then in zip(pools(self.host), before, strict=True)]

    @rule(name=st.sampled_from(NAMES))
    def qemu_runs(self, name: str) -> None:
        if name not in self.needs:
            return
        count, where = self.needs[name]
        taken = {}
        for node in where:
            if part := min(count, self.host.pages(node)[1]):
                taken[node, 2048], count = part, count - part
        if count == 0:  # else another program was quicker, and the start fails
            self.running[name] = self.host.qemu_runs(name, UUIDS[name], taken)
            del self.needs[name]

    @rule(name=st.sampled_from(NAMES))
    def release(self, name: str) -> None:
        if name in self.running:
            self.host.qemu_ends(name)
            del self.running[name]
        before = pools(self.host)
        assert let_go(self.host, name) == []
        self.expect_given_back(name, before)
        if self.torn == name:
            self.torn = ""

    @precondition(lambda self: not self.torn)
    @rule(node=st.integers(0, 1), by=st.integers(-10, 10))
    def somebody_resizes(self, node: int, by: int) -> None:
        self.host.resize(node, by)
        self.robbed = self.robbed or by < 0  # what was promised may be gone

    @rule(node=st.integers(0, 1), count=st.integers(1, 5))
    def somebody_takes(self, node: int, count: int) -> None:
        promised = sum(c for c, _ in self.needs.values())
        if count <= self.host.pages(node)[1] - promised:
            self.host.take(node, count)
            self.foreign[node] += count

    @invariant()
    def others_keep_what_they_use(self) -> None:
        for node in (0, 1):
            nr, free, _ = self.host.pages(node)
            assert nr - free >= self.foreign[node]

    def teardown(self) -> None:
        if hasattr(self, "ours"):
            for name in NAMES:
                self.release(name)


def test_any_interleaving_gives_back_exactly_what_was_added(tmp_path_factory: pytest.TempPathFactory) -> None:
    Pools.factory = tmp_path_factory
    run_state_machine_as_test(Pools, settings=LAW)
