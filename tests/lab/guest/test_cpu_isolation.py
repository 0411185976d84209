"""The host stays off the CPUs of its domains and gets all of them back, on the real kernel and systemd."""

from __future__ import annotations

import itertools
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.lab import machine
from tests.lab.guest.kernel import cpu_list
from tests.lab.guest.libvirt import Domain, run, virsh, wait_for
from tests.lab.guest.usher import enable, given_back

pytestmark = pytest.mark.product
CGROUP = Path("/sys/fs/cgroup")
UNITS = ("init.scope", "system.slice", "user.slice", "machine.slice")
WORKQUEUES = Path("/sys/devices/virtual/workqueue")
KERNEL_THREAD = 0x00200000  # PF_KTHREAD in field 9 of /proc/PID/stat
ALL = {0, 1, 2, 3}
# The first to come leaves last; all others take their time.
ORDERS = [
    pytest.param(order, marks=[] if order == (2, 1, 0) else pytest.mark.soak)
    for order in itertools.permutations((0, 1, 2))
]


class Pinned(Domain):
    """A domain with its vCPUs on some CPUs and its emulator on CPU 0."""

    def xml(self) -> str:
        return super().xml().replace("</cputune>", "<emulatorpin cpuset='0'/></cputune>")


@pytest.fixture
def domains() -> Iterator[list[Pinned]]:
    """Three domains: on CPUs 1, 2 and 3."""
    made = [Pinned(f"cpu{n}", memory_mib=32, pins=str(n)) for n in (1, 2, 3)]
    yield made
    for one in made:
        one.remove()


@pytest.fixture
def pinned() -> Iterator[Pinned]:
    """A domain with two vCPUs, on CPUs 2 and 3."""
    made = Pinned("pinned", memory_mib=32, vcpus=2, pins="2-3")
    yield made
    made.remove()


def effective(unit: str) -> set[int]:
    file = CGROUP / unit / "cpuset.cpus.effective"
    return cpu_list(file.read_text()) if file.exists() else ALL


def host_state() -> dict[str, object]:
    """Return all that isolation changes, read without virt-usher's help."""
    shown = run("systemctl", "show", "-p", "Id", "-p", "AllowedCPUs", "--", *UNITS).stdout.split("\n\n")
    irqs = {p: p.read_text() for p in Path("/proc/irq").glob("*/smp_affinity_list")}
    masks = {p: p.read_text() for p in WORKQUEUES.glob("**/cpumask*")}
    drop_ins = [*Path("/run/systemd").glob("*/*.d/50-AllowedCPUs.conf")]
    return {
        "effective": {unit: effective(unit) for unit in UNITS},
        "properties": {tuple(sorted(block.split())) for block in shown},
        "irqs": irqs,
        "default": Path("/proc/irq/default_smp_affinity").read_text(),
        "masks": masks,
        "drop-ins": drop_ins,
    }


def same(before: dict[str, object]) -> None:
    """Assert that the host is as it was; guests' own interrupts may have come and gone."""
    after = host_state()
    for what, was in before.items():
        now = after[what]
        if what == "irqs":
            assert isinstance(was, dict)
            assert isinstance(now, dict)
            now = {p: v for p, v in now.items() if p in was}
            was = {p: v for p, v in was.items() if p in now}
        assert now == was, what


def isolated(cpus: set[int]) -> None:
    """Assert that the host's units have just the other CPUs."""
    for unit in UNITS[:-1]:
        assert effective(unit) == ALL - cpus, unit
    assert effective("machine.slice") == ALL


def threads() -> Iterator[tuple[str, set[int], int, bool, str]]:
    """Yield name, allowed CPUs, last CPU, is it the kernel's, and cgroup of every thread."""
    for task in Path("/proc").glob("[0-9]*/task/[0-9]*"):
        try:
            stat = (task / "stat").read_text()
            status = (task / "status").read_text()
            group = (task / "cgroup").read_text()
        except OSError:
            continue
        name, fields = stat[stat.index("(") + 1 : stat.rindex(")")], stat[stat.rindex(")") + 2 :].split()
        allowed = next(x for x in status.splitlines() if x.startswith("Cpus_allowed_list:"))
        kernel = bool(int(fields[6]) & KERNEL_THREAD)
        yield name, cpu_list(allowed.split()[1]), int(fields[36]), kernel, group.strip()


def test_nothing_of_the_host_runs_on_isolated_cpus(pinned: Pinned) -> None:
    before = host_state()
    enable(pinned, "cpu_isolation").start()
    isolated({2, 3})
    everything = list(threads())
    users = [t for t in everything if not t[3] and "/machine.slice/" not in t[4]]
    assert len(users) > 10
    assert not [t for t in users if t[1] & {2, 3}]
    exceptions = {re.sub(r"[/:].*|\d+$", "", t[0]) for t in everything if t[3] and t[1] & {2, 3}}
    print("kernel threads that may run on isolated CPUs:", *sorted(exceptions))
    guests = {t[0]: t for t in everything if "/machine.slice/" in t[4]}
    assert [t[1] for name, t in guests.items() if name.startswith("CPU ")] == [{2, 3}] * 2
    stays = [
        p.parent.name
        for p in Path("/proc/irq").glob("*/smp_affinity_list")
        if cpu_list(p.read_text()) & {2, 3}
    ]
    interrupts = {
        x.split(":")[0].strip(): x.split()[-1] for x in Path("/proc/interrupts").read_text().splitlines()
    }
    named = {interrupts[n] for n in stays if n in interrupts}
    print("interrupts that stay:", *sorted(named))
    # Each queue of these has an interrupt that its driver manages; 0 and 2 are the timer and the cascade.
    assert {n for n in named if not re.match(r"(nvme\d+q[1-9]|virtio\d+-req)", n)} <= {"timer"}
    assert (WORKQUEUES / "cpumask").read_text().strip() == "3"
    said = run("virt-usher", "status", pinned.name).stdout
    assert "changed by somebody else" not in said
    print(run("virt-usher", "last", pinned.name).stdout)
    pinned.stop()
    given_back(pinned)
    print(run("virt-usher", "last", pinned.name).stdout)
    same(before)


@pytest.mark.parametrize("order", ORDERS, ids=lambda o: "".join(map(str, o)))
def test_three_domains_leave_in_any_order(domains: list[Pinned], order: tuple[int, ...]) -> None:
    before, held = host_state(), {1, 2, 3}
    for one in domains:
        enable(one, "cpu_isolation").start()
    isolated(held)
    for index in order:
        domains[index].stop()
        given_back(domains[index])
        held -= {index + 1}
        isolated(held)
    same(before)


@pytest.mark.smoke
def test_a_core_is_isolated_as_a_whole(domains: list[Pinned]) -> None:
    """Pinned to one of two threads, the other is no place for the host either."""
    last = domains[2]
    smt = machine.CPU_PROFILES[os.environ["LAB_CPU"]].smt
    before = host_state()
    enable(last, "cpu_isolation").start()
    isolated({2, 3} if smt else {3})
    last.stop()
    given_back(last)
    same(before)


def test_reload_and_login_in_the_middle(pinned: Pinned) -> None:
    before = host_state()
    enable(pinned, "cpu_isolation").start()
    run("systemctl", "daemon-reload")
    isolated({2, 3})
    # What a login does: a slice of one's own below user.slice, with a process in it.
    run("systemd-run", "--quiet", "--unit=login", "--slice=user-1000.slice", "sleep", "1000")
    pid = int(run("systemctl", "show", "-p", "MainPID", "--value", "login").stdout)
    assert "/user.slice/user-1000.slice/" in Path(f"/proc/{pid}/cgroup").read_text()
    assert os.sched_getaffinity(pid) == {0, 1}
    pinned.stop()
    given_back(pinned)
    wait_for("all CPUs", lambda: os.sched_getaffinity(pid) == ALL)
    run("systemctl", "stop", "login")
    same(before)


def test_a_daemon_that_restarts_and_a_guest_that_crashes(pinned: Pinned) -> None:
    before = host_state()
    enable(pinned, "cpu_isolation").start()
    run("systemctl", "restart", "libvirtd")
    isolated({2, 3})
    virsh("list")
    os.kill(pinned.pid, signal.SIGKILL)
    given_back(pinned)
    same(before)


def test_recover_after_daemon_and_guest_were_killed(pinned: Pinned) -> None:
    before = host_state()
    enable(pinned, "cpu_isolation").start()
    qemu = pinned.pid
    run("systemctl", "kill", "--signal=KILL", "libvirtd")
    os.kill(qemu, signal.SIGKILL)
    run("systemctl", "start", "libvirtd")
    virsh("list")
    run("virt-usher", "recover", pinned.name)
    given_back(pinned)
    same(before)


def test_what_the_admin_allows_comes_back(pinned: Pinned) -> None:
    run("systemctl", "set-property", "--runtime", "--", "user.slice", "AllowedCPUs=1-2")
    run("systemd-run", "--quiet", "--unit=custom", "--slice=custom.slice", "sleep", "1000")
    pid = int(run("systemctl", "show", "-p", "MainPID", "--value", "custom").stdout)
    wait_for("the admin's wish", lambda: effective("user.slice") == {1, 2})
    before = host_state()
    enable(pinned, "cpu_isolation").start()
    assert effective("user.slice") == {1}
    assert os.sched_getaffinity(pid) == {0, 1}
    pinned.stop()
    given_back(pinned)
    assert effective("user.slice") == {1, 2}
    assert os.sched_getaffinity(pid) == ALL
    same(before)
    run("systemctl", "stop", "custom")
    run("systemctl", "set-property", "--runtime", "--", "user.slice", "AllowedCPUs=0-3")
    wait_for("all CPUs", lambda: effective("user.slice") == ALL)
    run("systemctl", "set-property", "--runtime", "--", "user.slice", "AllowedCPUs=")
    for left in Path("/run/systemd").glob("*/*.d/50-AllowedCPUs.conf"):
        left.unlink()
    run("systemctl", "daemon-reload")


def test_starts_that_cannot_be_are_refused_untouched(domains: list[Pinned], pinned: Pinned) -> None:
    before = host_state()
    first, other = Pinned("first", pins="0"), domains[1]
    said = enable(first, "cpu_isolation").start(check=False).stderr
    first.remove()
    assert "the host keeps CPU 0" in said
    same(before)
    enable(other, "cpu_isolation").start()
    said = enable(pinned, "cpu_isolation").start(check=False).stderr
    assert "CPU 2 is isolated for the domain 'cpu2'" in said
    isolated({2})
    other.stop()
    given_back(other)
    same(before)
    run("systemctl", "set-property", "--runtime", "--", "machine.slice", "AllowedCPUs=0-1")
    wait_for("a confined machine.slice", lambda: effective("machine.slice") == {0, 1})
    said = pinned.start(check=False).stderr
    assert "where machine.slice may not run" in said
    run("systemctl", "set-property", "--runtime", "--", "machine.slice", "AllowedCPUs=")
    (CGROUP / "machine.slice/cpuset.cpus").exists() and (CGROUP / "machine.slice/cpuset.cpus").write_text(
        "0-3"
    )
    for left in Path("/run/systemd").glob("*/*.d/50-AllowedCPUs.conf"):
        left.unlink()
    run("systemctl", "daemon-reload")
