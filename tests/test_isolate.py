"""However domains that isolate CPUs come and go, the host has the rest of them, and in the end all of it."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import virt_usher
from virt_usher import cli, cpulist
from virt_usher.host import cgroup, irq
from virt_usher.isolate import drift
from virt_usher.masks import PARTS
from virt_usher.testing import domain_xml, run_hook, start_hook
from virt_usher.testing.cgroup import CpuHost
from virt_usher.testing.conformance import differences

UNITS = ("init.scope", "system.slice", "user.slice", "custom.slice")
ALL = frozenset(range(8))
ADMINS = {"custom.slice": frozenset({0, 1, 2, 3})}  # an AllowedCPUs= of the admin's own
IRQS = {1: ALL, 2: frozenset({2}), 3: frozenset({0, 1, 2, 3}), 4: frozenset({6, 7}), 9: ALL}
MANAGED = {8: frozenset({2}), 7: ALL}
NAMES = ("one", "two", "three")


def build(root: str | Path, guests: bool = False) -> CpuHost:
    """Four cores of two threads, systemd, interrupts of all kinds."""
    host = CpuHost(root).cores([0, 4], [1, 5], [2, 6], [3, 7]).systemd(guests, custom="0-3").workqueues()
    for managed, irqs in ((False, IRQS), (True, MANAGED)):
        for number, cpus in irqs.items():
            host.irq(number, cpulist.show(cpus), managed)
    return host


def isolate(host: CpuHost, name: str, cpus: frozenset[int] | str) -> bytes:
    """Configure a domain to isolate the CPUs it is pinned to, whoever else does."""
    text = cpus if isinstance(cpus, str) else cpulist.show(cpus)
    host.domain(name, "[plugins.cpu_isolation]\nwhole_cores = false\nshare = true\n")
    return domain_xml(name, f"<vcpu cpuset='{text}'>1</vcpu>")


def start(host: CpuHost, name: str, cpus: frozenset[int] | str) -> None:
    result = run_hook(host, name, "prepare", isolate(host, name, cpus))
    assert result.status == 0, result.stderr


def stop(host: CpuHost, name: str) -> None:
    assert run_hook(host, name, "release").status == 0


def recover(host: CpuHost) -> None:
    """Run virt-usher recover; libvirt, its own test driver, knows none of these domains."""
    pytest.importorskip("libvirt", reason="Python's libvirt module: apt-get install python3-libvirt")
    for _ in range(50):  # libvirt has its answer before the worker ends and lets go of its locks
        with contextlib.redirect_stdout(said := io.StringIO()), pytest.raises(SystemExit) as ended:
            cli.main(("recover",), host, "test:///default")
        if "is held by pid" not in said.getvalue():
            break
        time.sleep(0.1)
    assert ended.value.code == 0, said.getvalue()


def affinity(host: CpuHost, number: int) -> frozenset[int]:
    return cpulist.parse(host.read(f"/proc/irq/{number}/smp_affinity_list"))


def remarks(host: CpuHost, name: str) -> str:
    """Return what the last release of a domain said of things that were not ours any more."""
    lines = Path(host.path(f"/var/lib/virt-usher/last/{name}.jnl")).read_text().splitlines()
    return "; ".join(r["remark"] for r in map(json.loads, lines) if "remark" in r)


def rule(host: CpuHost, isolated: frozenset[int]) -> None:
    """Assert that everything is what it was less the isolated CPUs, or if that is nothing, all others."""
    online = cpulist.parse(host.read("/sys/devices/system/cpu/online"))
    for unit in UNITS:
        expected = (ADMINS.get(unit, ALL) - isolated or ALL - isolated) & online
        assert cgroup.effective(host, unit) == expected, unit
    assert cgroup.effective(host, "machine.slice") == online
    for number, was in IRQS.items():
        assert affinity(host, number) == (was - isolated or ALL - isolated), number
    assert {n: affinity(host, n) for n in MANAGED} == MANAGED
    for path in (irq.DEFAULT, *irq.masks(host)):
        assert irq.read(host, path) == ALL - isolated, path


cpus_of_guests = st.sets(st.integers(1, 7), min_size=1, max_size=5).map(
    lambda s: frozenset(s - {4}) or frozenset({1})
)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("start"), st.sampled_from(NAMES), cpus_of_guests, st.just(0)),
        st.tuples(st.just("stop"), st.sampled_from(NAMES), cpus_of_guests, st.just(0)),
        st.tuples(st.just("start"), st.sampled_from(NAMES), cpus_of_guests, st.integers(1, 40)),
        st.tuples(st.just("stop"), st.sampled_from(NAMES), cpus_of_guests, st.integers(1, 30)),
        st.tuples(st.just("reload"), st.just(""), cpus_of_guests, st.just(0)),
        st.tuples(st.just("recover"), st.just(""), cpus_of_guests, st.just(0)),
    ),
    min_size=3,
    max_size=9,
)


# No shrinking: each example takes a second, and is short.
@pytest.mark.timeout(900)
@settings(max_examples=40, phases=(Phase.explicit, Phase.generate))
@given(steps, st.booleans(), st.sampled_from(["process", "family"]))
def test_any_sequence_of_starts_stops_crashes_and_recovers(
    sequence: list[tuple[str, str, frozenset[int], int]], guests: bool, kill: str
) -> None:
    with tempfile.TemporaryDirectory() as root:
        host = build(root, guests)
        before, holding, crashed = host.snapshot(), dict[str, frozenset[int]](), set[str]()
        for what, name, cpus, kill_at in sequence:
            if what == "reload":
                host.systemctl("daemon-reload")
            elif what == "start" and name not in holding:
                result = run_hook(
                    host, name, "prepare", isolate(host, name, cpus), kill_at=kill_at, kill=kill
                )
                if result.killed:
                    crashed.add(name)
                else:
                    assert result.status == 0, result.stderr
                    crashed.discard(name)
                    holding[name] = cpus
                    host.qemu_runs(name)
            elif what == "recover":
                recover(host)  # it leaves those that run alone
                crashed.clear()
            elif what == "stop":
                if name in holding:
                    host.qemu_ends(name)
                result = run_hook(host, name, "release", kill_at=kill_at, kill=kill)
                holding.pop(name, None)
                (crashed.add if result.killed else crashed.discard)(name)
            if not crashed:
                rule(host, frozenset().union(*holding.values()))
        for name in holding:
            host.qemu_ends(name)
        for name in {*holding, *crashed}:
            stop(host, name)
        rule(host, frozenset())
        for unit in UNITS:
            assert host.property(unit) == cpulist.show(ADMINS.get(unit, ()))
            assert not any(host.exists(d) for d in cgroup.drop_ins(unit))
        changed = differences(before, host.snapshot()).splitlines()
        # As long as custom.slice needs the controller there is no way back from a list in a cpuset with
        # processes: it is that of all CPUs instead, which the rule has seen.
        left = [x for x in changed if "/cpuset.cpus:" not in x and "/etc/virt-usher" not in x]
        assert not left


def test_nobody_is_confined_any_more_when_systemd_switches_the_controller_off(tmp_path: Path) -> None:
    host = CpuHost(tmp_path).cores([0], [1], [2], [3]).systemd()
    host.file("/sys/devices/system/cpu/possible", "0-7", 0o444)  # as many firmwares have it
    before = host.snapshot()
    for by_hand in (False, True):
        start(host, "one", "2-3")
        assert host.read(f"{cgroup.CGROUP}/user.slice/cpuset.cpus.effective") == "0-1"
        if by_hand:  # or by a release that was killed then: systemd is to be told all the same
            host.write(f"{cgroup.CGROUP}/user.slice/cpuset.cpus", "0-7")
        stop(host, "one")
        assert not host.exists(f"{cgroup.CGROUP}/user.slice/cpuset.cpus")
        assert host.property("user.slice") == ""
        assert not [x for x in differences(before, host.snapshot()).splitlines() if "/etc/" not in x]


def test_as_long_as_a_cpu_is_offline_the_units_keep_their_cpusets_to_get_it_back(tmp_path: Path) -> None:
    host = CpuHost(tmp_path).cores([0], [1], [2], [3]).systemd()
    before = host.snapshot()
    start(host, "one", "2")
    host.set_online(3, False)
    stop(host, "one")
    host.set_online(3, True)
    assert host.read(f"{cgroup.CGROUP}/user.slice/cpuset.cpus") == "0-3"
    host.systemctl("daemon-reload")
    assert host.read(f"{cgroup.CGROUP}/user.slice/cpuset.cpus.effective") == "0-3"
    start(host, "one", "2")
    stop(host, "one")  # the next one leaves nothing
    assert host.property("user.slice") == ""
    assert not [x for x in differences(before, host.snapshot()).splitlines() if "/etc/" not in x]


def test_the_first_records_and_the_last_restores(new_cpu_host: Callable[[], CpuHost]) -> None:
    host = new_cpu_host()
    for names in (("one", "two", "three"), ("three", "two", "one"), ("two", "three", "one")):
        for name, cpus in zip(NAMES, ("1", "2,6", "3,7"), strict=True):
            start(host, name, cpus)
        rule(host, frozenset({1, 2, 3, 6, 7}))
        for name in names:
            stop(host, name)
        rule(host, frozenset())


@pytest.fixture
def new_cpu_host(tmp_path: Path) -> Callable[[], CpuHost]:
    return lambda: build(tmp_path / "host")


@pytest.fixture
def pc8(tmp_path: Path) -> CpuHost:
    """The host of `build`, in one fixture."""
    return build(tmp_path / "host")


def test_one_call_of_systemd_for_each_unit_that_changes(pc8: CpuHost) -> None:
    start(pc8, "one", "2,6")
    assert len(pc8.systemctl_calls("set-property")) == len(UNITS)
    assert len(pc8.systemctl_calls("show")) == 1
    start(pc8, "two", "2,6")  # nothing changes
    stop(pc8, "one")
    assert len(pc8.systemctl_calls("set-property")) == len(UNITS)
    assert len(pc8.systemctl_calls("show")) == 1
    stop(pc8, "two")
    assert len(pc8.systemctl_calls("set-property")) == 2 * len(UNITS)


def test_interrupts_that_appear_meanwhile_get_the_default_they_missed(pc8: CpuHost) -> None:
    start(pc8, "one", "2,6")
    pc8.irq(20, pc8.read(irq.DEFAULT) and "0-1,3-5,7")  # as request_irq() does: from the default
    pc8.irq(21, "1")  # its driver says where
    start(pc8, "two", "1")
    assert affinity(pc8, 20) == ALL - {1, 2, 6}
    assert affinity(pc8, 21) == ALL - {1, 2, 6}
    stop(pc8, "two")
    assert affinity(pc8, 20) == ALL - {2, 6}
    assert affinity(pc8, 21) == {1}
    stop(pc8, "one")
    assert affinity(pc8, 20) == ALL
    assert affinity(pc8, 21) == {1}


def test_what_a_later_domain_met_is_handed_on_when_it_leaves_first(pc8: CpuHost) -> None:
    start(pc8, "one", "2,6")
    pc8.irq(21, "2-3")
    pc8.unit("late.slice")
    start(pc8, "two", "3")
    assert cgroup.effective(pc8, "late.slice") == ALL - {2, 3, 6}
    stop(pc8, "two")
    assert affinity(pc8, 21) == {3}
    assert cgroup.effective(pc8, "late.slice") == ALL - {2, 6}
    stop(pc8, "one")
    assert affinity(pc8, 21) == {2, 3}
    assert cgroup.effective(pc8, "late.slice") == ALL


def test_interrupts_that_vanish_are_no_trouble(pc8: CpuHost) -> None:
    start(pc8, "one", "2,6")
    Path(pc8.path("/proc/irq/2/smp_affinity_list")).unlink()
    Path(pc8.path("/proc/irq/2")).rmdir()
    stop(pc8, "one")
    assert affinity(pc8, 1) == ALL


def test_managed_interrupts_are_listed_and_refuse_nothing(pc8: CpuHost) -> None:
    pc8.irq(11, "6", managed=True, answer=errno.EIO)
    start(pc8, "one", "2,6")
    journal = [json.loads(line) for line in pc8.journal("one").splitlines()]
    (stays,) = [r["stays"] for r in journal if "stays" in r]
    why = {**dict.fromkeys(MANAGED, "Operation not permitted"), 11: "Input/output error"}
    assert stays == {f"/proc/irq/{n}/smp_affinity_list": text for n, text in why.items()}


@pytest.mark.parametrize("number", [1, 2, 4])
def test_an_interrupt_that_somebody_else_moved_stays_there_and_is_reported(pc8: CpuHost, number: int) -> None:
    start(pc8, "one", "2,6")
    pc8.write(f"/proc/irq/{number}/smp_affinity_list", "5")
    stop(pc8, "one")
    assert affinity(pc8, number) == {5}
    assert f"left alone: {number} (5)" in remarks(pc8, "one")


def test_a_unit_that_the_admin_confined_meanwhile_stays_so_and_is_reported(pc8: CpuHost) -> None:
    start(pc8, "one", "2,6")
    pc8.systemctl("--runtime", "set-property", "--", "system.slice", "AllowedCPUs=0,4")
    stop(pc8, "one")
    assert pc8.property("system.slice") == "0,4"
    assert pc8.exists(cgroup.drop_ins("system.slice")[0])
    assert cgroup.effective(pc8, "user.slice") == ALL
    assert "system.slice (0,4)" in remarks(pc8, "one")


@pytest.mark.parametrize("order", [("one", "two"), ("two", "one")])
def test_what_the_admin_set_between_two_starts_comes_back(pc8: CpuHost, order: tuple[str, str]) -> None:
    start(pc8, "one", "2,6")
    pc8.systemctl("--runtime", "set-property", "--", "system.slice", "AllowedCPUs=0,3-4")
    pc8.write("/proc/irq/1/smp_affinity_list", "3,5")
    start(pc8, "two", "3")
    assert cgroup.effective(pc8, "system.slice") == {0, 4}
    assert affinity(pc8, 1) == {5}
    for name in order:
        stop(pc8, name)
    assert cgroup.effective(pc8, "system.slice") == {0, 3, 4}
    assert pc8.property("system.slice") == "0,3-4"
    assert affinity(pc8, 1) == {3, 5}


def test_a_runtime_drop_in_of_the_admin_comes_back(pc8: CpuHost) -> None:
    pc8.systemctl("--runtime", "set-property", "--", "user.slice", "AllowedCPUs=0-2,4")
    before = Path(pc8.path(cgroup.drop_ins("user.slice")[0])).read_text()
    start(pc8, "one", "2,6")
    assert cgroup.effective(pc8, "user.slice") == {0, 1, 4}
    stop(pc8, "one")
    assert Path(pc8.path(cgroup.drop_ins("user.slice")[0])).read_text() == before


def test_cpus_that_go_and_come_meanwhile(pc8: CpuHost) -> None:
    start(pc8, "one", "2,6")
    pc8.set_online(5, False)
    start(pc8, "two", "3")
    stop(pc8, "one")
    rule(pc8, frozenset({3}))
    pc8.set_online(5, True)
    stop(pc8, "two")
    rule(pc8, frozenset())


def test_an_interrupt_that_has_only_offline_cpus_to_go_back_to_stays_and_is_named(pc8: CpuHost) -> None:
    start(pc8, "one", "2,6")
    pc8.set_online(2, False)
    stop(pc8, "one")
    assert affinity(pc8, 2) == ALL - {2, 6}
    assert "left alone: 2 (0-1,3-5,7)" in remarks(pc8, "one")
    assert affinity(pc8, 4) == {6, 7}
    assert not pc8.journal("one")


def test_user_slice_is_confined_before_anybody_logs_in(pc8: CpuHost) -> None:
    for file in ("cgroup.events", "cpuset.cpus", "cpuset.cpus.effective"):
        Path(pc8.path(f"{cgroup.CGROUP}/user.slice/{file}")).unlink(missing_ok=True)
    Path(pc8.path(f"{cgroup.CGROUP}/user.slice")).rmdir()
    start(pc8, "one", "2,6")
    pc8.unit("user.slice").systemctl("daemon-reload")
    assert cgroup.effective(pc8, "user.slice") == ALL - {2, 6}
    stop(pc8, "one")
    assert cgroup.effective(pc8, "user.slice") == ALL


@pytest.mark.parametrize("unit", ["custom.slice", "late.slice", "batch.service"])
@pytest.mark.parametrize("meanwhile", ["", "stops", "starts", "stops and starts"])
def test_a_unit_that_is_stopped_at_the_release_comes_back_as_it_was(
    pc8: CpuHost, unit: str, meanwhile: str
) -> None:
    """custom.slice is confined by the admin; another domain may start and stop while it is away."""
    if unit != "custom.slice":
        pc8.unit(unit)
    own = ADMINS.get(unit, ALL)
    start(pc8, "one", "2,6")
    shutil.rmtree(pc8.path(f"{cgroup.CGROUP}/{unit}"))
    if "starts" in meanwhile:
        start(pc8, "two", "3")
    if "stops" in meanwhile:
        start(pc8, "three", "1")
        stop(pc8, "three")
    assert cgroup.allowed(pc8, unit, ALL) == own - {2, 6} - ({3} if "starts" in meanwhile else set())
    stop(pc8, "one")
    if "starts" in meanwhile:
        assert cgroup.allowed(pc8, unit, ALL) == own - {3}
        stop(pc8, "two")
    assert pc8.property(unit) == cpulist.show(ADMINS.get(unit, ()))
    assert not any(pc8.exists(d) for d in cgroup.drop_ins(unit))
    pc8.unit(unit).systemctl("daemon-reload")
    assert cgroup.effective(pc8, unit) == own


@pytest.mark.parametrize("lost", [False, True])
def test_a_unit_that_takes_no_property_any_more_is_kept_only_if_it_may_come_back(
    pc8: CpuHost, lost: bool
) -> None:
    """Its file is gone, or it is masked; else systemd only would not answer now."""
    pc8.unit("batch.service")
    start(pc8, "one", "2,6")
    shutil.rmtree(pc8.path(f"{cgroup.CGROUP}/batch.service"))
    trouble = "/.kernel/units/.lost.batch.service" if lost else "/.kernel/units/.refuses"
    pc8.file(trouble)
    stop(pc8, "one")
    assert bool(pc8.journal("one")) != lost
    Path(pc8.path(trouble)).unlink()
    stop(pc8, "one")
    assert not pc8.journal("one")
    assert not any(pc8.exists(d) for d in cgroup.drop_ins("batch.service"))
    if not lost:
        assert pc8.property("batch.service") == ""


def test_a_systemctl_that_outlives_its_hook_does_not_have_the_last_word(pc8: CpuHost) -> None:
    xml = isolate(pc8, "one", "2,6")
    pc8.file("/.kernel/units/.slow")
    hook = start_hook(pc8, "one", "prepare", xml)
    while not pc8.systemctl_calls("set-property"):
        time.sleep(0.01)
    os.kill(int(Path(f"/proc/{hook.pid}/task/{hook.pid}/children").read_text()), signal.SIGKILL)
    assert hook.wait().status != 0
    Path(pc8.path("/.kernel/units/.slow")).unlink()
    stop(pc8, "one")
    time.sleep(1.5)
    rule(pc8, frozenset())


def test_systemd_that_fails_refuses_the_start_with_all_as_it_was(pc8: CpuHost) -> None:
    xml, before = isolate(pc8, "one", "2,6"), pc8.snapshot()
    pc8.file("/.kernel/units/.refuses")
    result = run_hook(pc8, "one", "prepare", xml)
    assert "Failed to set unit properties" in result.stderr
    assert result.status != 0
    Path(pc8.path("/.kernel/units/.refuses")).unlink()
    stop(pc8, "one")
    assert not differences(before, pc8.snapshot())


def test_what_the_kernel_does_not_grant_refuses_the_start(pc8: CpuHost) -> None:
    pc8.config("[deadlines]\nstart = 2\n").file("/.kernel/units/.ignores")
    result = run_hook(pc8, "one", "prepare", isolate(pc8, "one", "2,6"))
    assert "custom.slice may run on CPUs 0-3, though systemd was told 0-1,3" in result.stderr
    assert result.status != 0


def test_drift_is_what_others_put_on_isolated_cpus(pc8: CpuHost) -> None:
    start(pc8, "one", "2,6")
    assert not [part for part in PARTS if drift(pc8, part)]
    pc8.write("/proc/irq/1/smp_affinity_list", "3")  # as irqbalance does
    pc8.write("/proc/irq/9/smp_affinity_list", "2-3")
    pc8.write(f"{irq.WORKQUEUES}/cpumask", "3")
    pc8.systemctl("--runtime", "set-property", "--", "system.slice", "AllowedCPUs=0")
    assert drift(pc8, "irqs") == ["9"]
    assert drift(pc8, "workqueues") == ["cpumask"]
    assert drift(pc8, "units") == ["system.slice"]


def test_giving_back_needs_no_heavy_module() -> None:
    """One worker of libvirt shuts all guests down: a module that costs more than the work is not imported."""
    heavy = ("typing", "dataclasses", "subprocess", "socket", "pathlib")
    code = f"import sys, virt_usher.isolate; print([m for m in {heavy} if m in sys.modules])"
    source = {"PYTHONPATH": str(Path(virt_usher.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-S", "-c", code], env=source, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize(
    "unread",
    [
        "/sys/fs/cgroup/system.slice/cpuset.cpus",
        "/sys/fs/cgroup/init.scope/cgroup.events",
        "/proc/irq/1/smp_affinity_list",
        "/sys/devices/virtual/workqueue/cpumask*",
        "/sys/devices/system/cpu/possible",
    ],
)
def test_isolation_that_cannot_be_read_at_a_stop_is_kept_and_told(tmp_path: Path, unread: str) -> None:
    host = build(tmp_path)
    xml = isolate(host, "one", "2-3")
    before = host.snapshot()
    assert run_hook(host, "one", "prepare", xml).status == 0
    host.fail(unread, errno.EIO, on="read")
    stop(host, "one")
    assert "Input/output error" in host.journal("one")
    with contextlib.redirect_stdout(told := io.StringIO()), pytest.raises(SystemExit) as ended:
        cli.main(("status",), host, "test:///default")
    assert ended.value.code == 1
    assert "left behind" in told.getvalue()
    assert "Input/output error" in told.getvalue()
    refused = run_hook(host, "one", "prepare", xml)
    assert refused.status == 3
    assert "Input/output error" in refused.stderr
    host.heal()
    stop(host, "one")
    changed = differences(before, host.snapshot()).splitlines()
    # A cpuset with processes cannot be emptied: all CPUs are as good.
    assert not [x for x in changed if not x.endswith("cpuset.cpus: '644' before, '644 0-7' now")]


@pytest.mark.parametrize("cpus", ["2,6", "3,7"])
def test_cpus_that_a_stopped_domain_could_not_give_back_are_free(tmp_path: Path, cpus: str) -> None:
    host = build(tmp_path)
    xml = isolate(host, "one", "2,6")
    host.domain("two", "[plugins.cpu_isolation]\n")
    before = host.snapshot()
    assert run_hook(host, "one", "prepare", xml).status == 0
    host.fail("/sys/devices/virtual/workqueue/cpumask", errno.EIO)
    stop(host, "one")
    host.heal()
    assert "Input/output error" in host.journal("one")
    other = domain_xml("two", f"<vcpu cpuset='{cpus}'>2</vcpu>")
    result = run_hook(host, "two", "prepare", other)
    assert result.status == 0, result.stderr
    rest = ALL - cpulist.parse(cpus)
    assert int(host.read("/sys/devices/virtual/workqueue/cpumask"), 16) == sum(1 << n for n in rest)
    stop(host, "two")
    assert not host.journal("two")
    assert host.read("/sys/devices/virtual/workqueue/cpumask") == "ff"
    stop(host, "one")
    changed = differences(before, host.snapshot()).splitlines()
    assert not [x for x in changed if not x.endswith("cpuset.cpus: '644' before, '644 0-7' now")]


def test_a_unit_and_an_interrupt_that_vanished_are_given_back(tmp_path: Path) -> None:
    host = build(tmp_path)
    start(host, "one", "2-3")
    shutil.rmtree(host.path("/proc/irq/1"))
    shutil.rmtree(host.path("/sys/fs/cgroup/custom.slice"))
    stop(host, "one")
    assert not host.journal("one")
