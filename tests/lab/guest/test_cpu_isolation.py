"""The host stays off the CPUs of its domains and gets all of them back, on the real kernel and systemd."""

from __future__ import annotations

import itertools
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from lxml import etree
from tests.lab import machine
from tests.lab.guest.agent import CHECKOUT
from tests.lab.guest.domains import Domain, run, virsh, wait_for
from tests.lab.guest.kernel import cpu_list
from tests.lab.guest.usher import enable, given_back

pytestmark = pytest.mark.product
CGROUP = Path("/sys/fs/cgroup")
UNITS = ("init.scope", "system.slice", "user.slice", "machine.slice")
CPUS = Path("/sys/devices/system/cpu")
WORKQUEUES = Path("/sys/devices/virtual/workqueue")
KERNEL_THREAD = 0x00200000  # PF_KTHREAD in field 9 of /proc/PID/stat
ALL = {0, 1, 2, 3}
# Each queue of these has an interrupt that its driver manages; 0 and 2 are the timer and the cascade.
STAYS = re.compile(r"nvme\d+q[1-9]|virtio\d+-req|timer")
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


def own(unit: str) -> set[int]:
    """Return the cpuset of a unit: no file, an empty one and one with all CPUs confine it alike."""
    file = CGROUP / unit / "cpuset.cpus"
    return (cpu_list(file.read_text()) if file.exists() else set()) or ALL


def host_state() -> dict[str, object]:
    """Return all that isolation changes, read without virt-usher's help."""
    shown = run("systemctl", "show", "-p", "Id", "-p", "AllowedCPUs", "--", *UNITS).stdout.split("\n\n")
    irqs = {p: p.read_text() for p in Path("/proc/irq").glob("*/smp_affinity_list")}
    masks = {p: p.read_text() for p in WORKQUEUES.glob("**/cpumask*")}
    drop_ins = [*Path("/run/systemd").glob("*/*.d/50-AllowedCPUs.conf")]
    return {
        "effective": {unit: effective(unit) for unit in UNITS},
        "cpusets": {unit: own(unit) for unit in UNITS},
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
    assert not kept_off(), kept_off()


def kept_off() -> set[str]:
    """Return the host's processes that may not run where their unit may, whatever its files say."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended
            unit = (folder / "cgroup").read_text().strip().split("/")[1]
            if unit in UNITS[:-1] and os.sched_getaffinity(int(folder.name)) != effective(unit):
                found.add((folder / "comm").read_text().strip())
    return found


def isolated(cpus: set[int]) -> None:
    """Assert that the host's units have just the other CPUs."""
    for unit in UNITS[:-1]:
        assert effective(unit) == ALL - cpus, unit
    assert effective("machine.slice") == ALL


def interrupts_on(cpus: set[int]) -> set[str]:
    """Return what the interrupts that may go to some CPUs are called."""
    lines = Path("/proc/interrupts").read_text().splitlines()
    names = {x.split(":")[0].strip(): x.split()[-1] for x in lines}
    files = Path("/proc/irq").glob("*/smp_affinity_list")
    there = [p.parent.name for p in files if cpu_list(p.read_text()) & cpus]
    return {names[n] for n in there if n in names}


class Thread(NamedTuple):
    """One thread: where it may run, where it last did, and how often it has been put on a CPU."""

    name: str
    allowed: set[int]
    last: int
    runs: int
    kernel: bool
    guest: bool


def threads() -> dict[str, Thread]:
    """Return all threads by number."""
    found = {}
    for task in Path("/proc").glob("[0-9]*/task/[0-9]*"):
        try:
            stat, runs = ((task / file).read_text() for file in ("stat", "schedstat"))
            status, group = ((task / file).read_text() for file in ("status", "cgroup"))
        except OSError:
            continue
        name, fields = stat[stat.index("(") + 1 : stat.rindex(")")], stat[stat.rindex(")") + 2 :].split()
        allowed = next(x for x in status.splitlines() if x.startswith("Cpus_allowed_list:"))
        kernel = bool(int(fields[6]) & KERNEL_THREAD)
        guest = "/machine.slice/" in group
        count = int(runs.split()[2])
        found[task.name] = Thread(name, cpu_list(allowed.split()[1]), int(fields[36]), count, kernel, guest)
    return found


def strangers(cpus: set[int]) -> list[Thread]:
    """Return the threads of the host that ran on some CPUs while it was busy."""
    before = threads()
    for _ in range(20):
        run("sh", "-c", "ls -R /etc >/dev/null & ls -R /usr/lib/python3 >/dev/null; sync; wait")
    # Where a thread that slept all the time ran last, it ran before.
    awake = {n: t for n, t in threads().items() if n not in before or t.runs > before[n].runs}
    return [t for t in awake.values() if t.last in cpus and not t.guest]


def test_nothing_of_the_host_runs_on_isolated_cpus(pinned: Pinned) -> None:
    before = host_state()
    enable(pinned, "cpu_isolation").start()
    isolated({2, 3})
    everything = threads().values()
    users = [t for t in everything if not t.kernel and not t.guest]
    assert len(users) > 10
    assert not [t for t in users if t.allowed & {2, 3}]
    exceptions = {re.sub(r"[/:].*|\d+$", "", t.name) for t in everything if t.kernel and t.allowed & {2, 3}}
    print("kernel threads that may run on isolated CPUs:", *sorted(exceptions))
    ran = strangers({2, 3})
    assert not [t for t in ran if not t.kernel]
    print("kernel threads that ran there:", *sorted({t.name for t in ran}))
    assert vcpus() == [{2, 3}] * 2
    named = interrupts_on({2, 3})
    print("interrupts that stay:", *sorted(named))
    assert not [n for n in named if not STAYS.match(n)]
    assert (WORKQUEUES / "cpumask").read_text().strip() == "3"
    said = run("virt-usher", "status", pinned.name).stdout
    assert "changed by somebody else" not in said
    print(run("virt-usher", "last", pinned.name).stdout)
    pinned.stop()
    given_back(pinned)
    print(run("virt-usher", "last", pinned.name).stdout)
    same(before)
    files = {u: f.read_text().strip() if (f := CGROUP / u / "cpuset.cpus").exists() else None for u in UNITS}
    reload = run("systemctl", "show", "-p", "NeedDaemonReload", "--value", "--", *UNITS).stdout.split()
    print("left by systemd:", files, "needs daemon-reload:", reload)
    run("systemctl", "daemon-reload")
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
    assert os.sched_getaffinity(pid) == ALL
    same(before)
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


def test_a_slice_that_is_stopped_meanwhile_is_whole_when_it_is_started_again(pinned: Pinned) -> None:
    def sleeper() -> int:
        run("systemd-run", "--quiet", "--unit=custom", "--slice=custom.slice", "sleep", "1000")
        return int(run("systemctl", "show", "-p", "MainPID", "--value", "custom").stdout)

    sleeper()
    enable(pinned, "cpu_isolation").start()
    assert effective("custom.slice") == {0, 1}
    run("systemctl", "stop", "custom.slice")
    wait_for("its end", lambda: not Path("/sys/fs/cgroup/custom.slice").exists())
    pinned.stop()
    given_back(pinned)
    for _ in range(2):  # as systemd remembers it, and as its files say
        assert os.sched_getaffinity(sleeper()) == ALL
        assert not kept_off()
        run("systemctl", "stop", "custom.slice")
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
    with suppress(OSError):  # switched off by now, or in a moment
        (CGROUP / "machine.slice/cpuset.cpus").write_text("0-3")
    for left in Path("/run/systemd").glob("*/*.d/50-AllowedCPUs.conf"):
        left.unlink()
    run("systemctl", "daemon-reload")


def online(cpu: int, wanted: bool) -> None:
    (CPUS / f"cpu{cpu}/online").write_text(str(int(wanted)))


def host_has(cpus: set[int], machine: set[int]) -> None:
    """Wait until the host's units have just these CPUs, and guests all of the machine's that are online."""

    def so() -> bool:
        units = {unit: effective(unit) & machine for unit in UNITS}
        return units == {**dict.fromkeys(UNITS, cpus), "machine.slice": machine}

    # The kernel brings cpusets up to date some time after a CPU went.
    wait_for(f"the host on CPUs {cpus}", so, seconds=20)


def vcpus() -> list[set[int]]:
    """Return where each vCPU thread of a guest may run."""
    found = [(t.name, t.allowed) for t in threads().values() if t.guest and t.name.startswith("CPU ")]
    return [allowed for _, allowed in sorted(found, key=lambda one: one[0])]


def test_cpus_that_go_and_come_back_meanwhile(pinned: Pinned) -> None:
    before = host_state()
    enable(pinned, "cpu_isolation").start()
    try:
        for cpu in (1, 3):  # the host's, and one of the guest's
            online(cpu, False)
            host_has({0, 1} - {cpu}, ALL - {cpu})
            online(cpu, True)
            host_has({0, 1}, ALL)
        assert vcpus() == [{2, 3}] * 2
        online(3, False)
        pinned.stop()
        given_back(pinned)
        host_has(ALL - {3}, ALL - {3})
    finally:
        for cpu in (1, 3):
            online(cpu, True)
    host_has(ALL, ALL)
    # What could only go to a CPU that went, the kernel moved: with isolation or without.
    irqs = before["irqs"]
    assert isinstance(irqs, dict)
    before["irqs"] = {p: v for p, v in irqs.items() if cpu_list(v) not in ({1}, {3})}
    assert not kept_off()
    # The units kept their cpusets, with all CPUs; the next one leaves nothing.
    pinned.start()
    pinned.stop()
    given_back(pinned)
    same(before)


def irqbalance(pid: int, line: str, answers: bool = True) -> str:
    """Say something to the running irqbalance, as its own irqbalance-ui does."""
    with socket.socket(socket.AF_UNIX) as talk:
        talk.settimeout(60)
        talk.connect(f"/run/irqbalance/irqbalance{pid}.sock")
        talk.sendall(line.encode())
        return talk.recv(65536).decode() if answers else ""


def banned(pid: int) -> set[int]:
    """Return the CPUs that irqbalance says it leaves out."""
    words = irqbalance(pid, "setup").split()
    mask = int(words[words.index("BANNED") + 1].replace(",", ""), 16)
    return {cpu for cpu in ALL if mask >> cpu & 1}


def test_irqbalance_leaves_isolated_cpus_out_and_is_told_so_no_more(pinned: Pinned) -> None:
    units = {unit: effective(unit) for unit in UNITS}
    run("systemctl", "start", "irqbalance")
    try:
        pid = int(run("systemctl", "show", "-p", "MainPID", "--value", "irqbalance").stdout)
        wait_for("its socket", Path(f"/run/irqbalance/irqbalance{pid}.sock").exists)
        irqbalance(pid, "settings sleep 1", answers=False)
        assert banned(pid) == set()
        enable(pinned, "cpu_isolation").start()
        wait_for("the ban", lambda: banned(pid) == {2, 3})
        time.sleep(3)  # a few looks later
        assert not [n for n in interrupts_on({2, 3}) if not STAYS.match(n)]
        pinned.stop()
        given_back(pinned)
        print(run("virt-usher", "last", pinned.name).stdout)
        wait_for("the end of the ban", lambda: banned(pid) == set())
        assert int(run("systemctl", "show", "-p", "MainPID", "--value", "irqbalance").stdout) == pid
    finally:
        run("systemctl", "stop", "irqbalance")
    assert {unit: effective(unit) for unit in UNITS} == units


def test_pins_are_proposed_written_and_isolated(pinned: Pinned) -> None:
    before = host_state()
    pinned.vcpus, pinned.pins = 1, ""
    pinned.extra = "<memoryBacking><nosharepages/></memoryBacking><cputune><shares>512</shares></cputune>"
    pinned.define()
    was = etree.fromstring(virsh("dumpxml", "--inactive", pinned.name).stdout)
    said = run("virt-usher", "pins", pinned.name, "--vcpus", "2", "--apply", "--yes").stdout
    print(said)
    assert '+    <vcpupin vcpu="0" cpuset="2"/>' in said
    assert '+    <vcpupin vcpu="1" cpuset="3"/>' in said
    now = etree.fromstring(virsh("dumpxml", "--inactive", pinned.name).stdout)
    written = {"vcpu", "cputune", "numatune", "cpu"}
    kept = [
        [
            etree.canonicalize(etree.tostring(e, encoding="unicode"), strip_text=True)
            for e in root
            if e.tag not in written
        ]
        for root in (was, now)
    ]
    assert kept[0] == kept[1]
    assert now.findtext("cputune/shares") == "512"
    again = run("virt-usher", "pins", pinned.name, "--apply", "--yes").stdout
    assert again == "The domain is pinned like this already.\n"
    run("virt-usher", "enable", pinned.name, "cpu_isolation")
    virsh("start", pinned.name)
    isolated({2, 3})
    assert vcpus() == [{2}, {3}]
    print(run("virt-usher", "cpus").stdout)
    pinned.stop()
    given_back(pinned)
    same(before)


def test_the_recipes_of_the_docs_are_held_and_given_back(pinned: Pinned) -> None:
    text = (CHECKOUT / "docs/cpu.md").read_text()
    recipes = re.findall(r"^\| `(/\S+) = (\S+)` \|", text, re.MULTILINE)
    globs = {path: Path("/").glob(path.replace("{cpu}", "[23]")[1:]) for path, _ in recipes}
    # Without the hardware for it, nmi_watchdog is there and read-only, also for root.
    files = {path: [f for f in found if f.stat().st_mode & 0o200] for path, found in globs.items()}
    recipes = [(path, value) for path, value in recipes if files[path]]
    print("not on this machine:", *(path for path, found in files.items() if not found))
    assert len([found for found in files.values() if found]) >= 7

    def state() -> dict[Path, str]:
        return {file: file.read_text() for found in files.values() for file in found}

    before = state()
    lines = ", ".join(f'"-{path} = {value}"' for path, value in recipes)
    Path(f"/etc/virt-usher/domains/{pinned.name}.toml").write_text(f"[plugins.sysfs]\nset = [{lines}]\n")
    pinned.start()
    now = state()
    for path, value in recipes:
        for file in files[path]:
            chosen = re.search(r"\[(\S+)\]", now[file])  # always defer [madvise] never
            assert (chosen[1] if chosen else now[file].strip()) == value, file
    assert now != before
    assert "changed by somebody else" not in run("virt-usher", "status", pinned.name).stdout
    pinned.stop()
    given_back(pinned)
    assert state() == before
