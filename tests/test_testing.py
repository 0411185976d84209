"""The fake host does what the kernel does (mm/hugetlb.c, drivers/cpufreq); every row was seen there."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from virt_usher.testing import FakeHost, Killed, run_hook

POOL = "/sys/devices/system/node/node{}/hugepages/hugepages-{}kB/nr_hugepages"
GLOBAL = "/sys/kernel/mm/hugepages/hugepages-2048kB"
POLICY = "/sys/devices/system/cpu/cpufreq/policy0"
EPP = f"{POLICY}/energy_performance_preference"
GOVERNOR = f"{POLICY}/scaling_governor"


@pytest.fixture
def nodes(host: FakeHost) -> FakeHost:
    """Two nodes with room for 10 and 20 pages of 2 MiB."""
    return host.node(0, free_kib=10 * 2048).node(1, free_kib=20 * 2048)


def test_a_pool_grows_as_far_as_memory_goes_and_reports_success(nodes: FakeHost) -> None:
    nodes.write(POOL.format(0, 2048), "25\n")
    assert nodes.pages(0) == (10, 10, 0)
    assert nodes.read(f"{GLOBAL}/nr_hugepages") == "10"
    assert "MemFree:              0 kB" in nodes.read("/sys/devices/system/node/node0/meminfo")


def test_a_pool_grows_in_one_piece_only_until_memory_is_compacted(host: FakeHost) -> None:
    host.node(0, free_kib=10 * 2048, cache_kib=4 * 2048, in_one_piece_kib=3 * 2048)
    for helps, pages in ((None, 3), ("/sys/devices/system/node/node0/compact", 10)):
        if helps:
            host.write(helps, "1")
        host.write(POOL.format(0, 2048), "20")
        assert host.pages(0)[0] == pages
    host.write("/proc/sys/vm/drop_caches", "3")
    host.write(POOL.format(0, 2048), "20")
    assert host.pages(0)[0] == 14


def test_shrinking_never_takes_pages_in_use_they_become_surplus(nodes: FakeHost) -> None:
    nodes.resize(0, 8)
    nodes.take(0, 4)
    nodes.write(POOL.format(0, 2048), "0")
    assert nodes.pages(0) == (4, 0, 4)
    nodes.give(0, 3)
    assert nodes.pages(0) == (1, 0, 1)
    nodes.give(0, 1)
    assert nodes.pages(0) == (0, 0, 0)


def test_reserved_pages_stay_as_surplus_too(nodes: FakeHost) -> None:
    nodes.resize(0, 8)
    nodes.take(0, 4)
    nodes.reserve(4)
    nodes.write(POOL.format(0, 2048), "0")
    assert nodes.pages(0) == (8, 4, 8)


def test_growing_makes_surplus_persistent_first(nodes: FakeHost) -> None:
    nodes.resize(0, 8)
    nodes.take(0, 8)
    nodes.write(POOL.format(0, 2048), "2")
    assert nodes.pages(0) == (8, 0, 6)
    nodes.write(POOL.format(0, 2048), "7")
    assert nodes.pages(0) == (8, 0, 1)
    nodes.write(POOL.format(0, 2048), "9")
    assert nodes.pages(0) == (9, 1, 0)


def test_the_global_file_spreads_over_the_nodes(nodes: FakeHost) -> None:
    nodes.resize(1, 10)
    nodes.write(f"{GLOBAL}/nr_hugepages", "14")
    assert (nodes.pages(0)[0], nodes.pages(1)[0]) == (2, 12)


@pytest.mark.parametrize(
    ("path", "value", "number"),
    [
        (POOL.format(0, 2048), "-1", errno.EINVAL),
        (POOL.format(0, 2048), "many", errno.EINVAL),
        (POOL.format(0, 2048), "", errno.EINVAL),
        (POOL.format(0, 2048), "99999999999999999999999", errno.ERANGE),
        (POOL.format(7, 2048), "1", errno.ENOENT),
        (POOL.format(0, 2048).replace("nr_", "free_"), "1", errno.EACCES),
        ("/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_overcommit_hugepages", "1", errno.EINVAL),
        ("/proc/sys/vm/compact_memory", "2", errno.EINVAL),
    ],
)
def test_the_kernel_refuses_what_makes_no_sense(nodes: FakeHost, path: str, value: str, number: int) -> None:
    before = nodes.snapshot()
    with pytest.raises(OSError, match=r".") as caught:
        nodes.write(path, value)
    assert caught.value.errno == number
    assert nodes.snapshot() == before


def test_what_cannot_be_read_says_so(nodes: FakeHost) -> None:
    with pytest.raises(PermissionError):
        nodes.read("/proc/sys/vm/compact_memory")


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["write", "take", "give", "reserve"]), st.integers(0, 1), st.integers(0, 25)
        )
    )
)
def test_pools_and_memory_always_add_up(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, int]]
) -> None:
    host = FakeHost(tmp_path_factory.mktemp("h")).node(0, free_kib=10 * 2048).node(1, free_kib=20 * 2048)
    for what, node, count in steps:
        nr, free, _ = host.pages(node)
        if what == "write":
            host.write(POOL.format(node, 2048), str(count))
        elif what == "take":
            host.take(node, min(count, free))
        elif what == "give":
            host.give(node, min(count, nr - free))
        elif what == "reserve":
            total = sum(host.pages(n)[1] for n in (0, 1))
            host.reserve(min(count, total) - host.number(f"{GLOBAL}/resv_hugepages"))
        for n, room in ((0, 10), (1, 20)):
            nr, free, surplus = host.pages(n)
            assert 0 <= free <= nr
            assert 0 <= surplus <= nr
            memfree = host.count(f"/sys/devices/system/node/node{n}/meminfo", "MemFree")
            assert memfree + nr * 2048 == room * 2048
        assert host.number(f"{GLOBAL}/nr_hugepages") == host.pages(0)[0] + host.pages(1)[0]


@pytest.mark.parametrize(
    ("driver", "value", "number"),
    [
        ("acpi-cpufreq", "schedutil", 0),
        ("acpi-cpufreq", "ondemand", 0),  # the kernel loads the module
        ("acpi-cpufreq", "warp", errno.EINVAL),
        ("intel_pstate", "performance", 0),
        ("intel_pstate", "schedutil", errno.EINVAL),
        ("amd-pstate-epp", "ondemand", errno.EINVAL),
    ],
)
def test_a_governor_must_be_known_to_the_driver(host: FakeHost, driver: str, value: str, number: int) -> None:
    host.policy(0, cpus=[0], driver=driver)
    if number == 0:
        host.write(GOVERNOR, value)
        assert host.read(GOVERNOR) == value
        return
    with pytest.raises(OSError, match=r".") as caught:
        host.write(GOVERNOR, value)
    assert caught.value.errno == number


def test_a_policy_without_online_cpus_answers_busy_to_reads_and_writes(host: FakeHost) -> None:
    host.policy(0, cpus=[0, 1], governor="schedutil").policy(2, cpus=[2])
    host.set_online(1, False)
    assert host.read(f"{POLICY}/affected_cpus") == "0"
    host.set_online(0, False)
    for act in (lambda: host.read(GOVERNOR), lambda: host.write(GOVERNOR, "performance")):
        with pytest.raises(OSError, match=r".") as caught:
            act()
        assert caught.value.errno == errno.EBUSY
    host.set_online(0, True)
    assert host.read(GOVERNOR) == "schedutil"


@pytest.mark.parametrize(
    ("driver", "after"), [("intel_pstate", "balance_power"), ("amd-pstate-epp", "performance")]
)
def test_performance_owns_the_preference_and_only_intel_gives_it_back(
    host: FakeHost, driver: str, after: str
) -> None:
    host.policy(0, cpus=[0], driver=driver, epp="balance_power")
    host.write(GOVERNOR, "performance")
    assert host.read(EPP) == "performance"
    with pytest.raises(OSError, match=r".") as caught:
        host.write(EPP, "power")
    assert caught.value.errno == errno.EBUSY
    host.write(EPP, "0")
    host.write(GOVERNOR, "powersave")
    assert host.read(EPP) == after


def test_other_processes_see_whole_steps_also_of_one_that_was_killed(nodes: FakeHost) -> None:
    nodes.resize(0, 4)
    redo = Path(nodes.root, ".kernel/redo")
    pool = POOL.format(0, 2048)
    redo.write_text(f'{{"{pool}": [420, "9\\n"], "{GLOBAL}/nr_hugepages": [420, "9\\n"]}}')
    Path(nodes.path(pool)).unlink()  # as far as the killed one came
    other = FakeHost(nodes.root)
    assert other.read(f"{GLOBAL}/nr_hugepages") == "9"
    assert other.read(pool) == "9"


def test_faults_strike_at_the_nth_write_or_read(nodes: FakeHost) -> None:
    nodes.fail("*/nr_hugepages", errno.EIO, nth=2)
    nodes.write(POOL.format(0, 2048), "1")
    with pytest.raises(OSError, match="Input/output"):
        nodes.write(POOL.format(0, 2048), "2")
    nodes.write(POOL.format(0, 2048), "3")
    assert nodes.pages(0)[0] == 3
    nodes.fail("*/meminfo", errno.ENOENT, on="read")
    with pytest.raises(FileNotFoundError):
        nodes.read("/proc/meminfo")


def test_kill_points_lie_before_within_and_after_a_write(nodes: FakeHost) -> None:
    seen = []
    for point in (1, 2, 3):
        nodes.kill_at(point)
        with pytest.raises(Killed):
            nodes.write(POOL.format(0, 2048), str(8))
        seen.append(nodes.pages(0)[0])
        nodes.kill_at(0)
        nodes.write(POOL.format(0, 2048), "0")
    assert seen == [0, 4, 8]


def test_a_kill_point_kills_the_real_process(pc: FakeHost) -> None:
    pc.domain("guest", "[plugins.governor]\n")
    result = run_hook(pc, "guest", "prepare", kill_at=1)
    assert result.killed
    assert (result.status, result.stdout) == (3, "")
    assert f"killed by signal {signal.SIGKILL.value}" in result.stderr
    assert run_hook(pc, "guest", "prepare", kill_at=1, kill="family").status == -signal.SIGKILL


def test_a_qemu_takes_its_pages_and_frees_them(nodes: FakeHost) -> None:
    nodes.resize(0, 4)
    pid = nodes.qemu_runs("it's", pages={(0, 2048): 3})
    assert nodes.pages(0) == (4, 1, 0)
    assert nodes.qemu("it's", "5dd6a1c8-6e5b-4c0e-9f43-000000000001") == pid
    nodes.qemu_ends("it's")
    assert nodes.pages(0) == (4, 4, 0)
    assert nodes.qemu("it's", "5dd6a1c8-6e5b-4c0e-9f43-000000000001") is None


def test_real_processes_show_through_proc(host: FakeHost) -> None:
    assert host.started_at(os.getpid()) is not None
