"""doctor finds each thing that would keep libvirt from calling the hook, or the hook from working."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.conftest import GATE, Cli

from virt_usher.testing import FakeHost

HOOK = "/etc/libvirt/hooks/qemu"
PACKAGE = "/usr/local/lib/virt-usher/current"
PID = 1 << 23  # above all real ones, so that the fake host's own /proc answers
HERTZ = os.sysconf("SC_CLK_TCK")
SOURCE = Path(__file__).resolve().parents[2] / "src"


def install(host: FakeHost, path: str = HOOK, mode: int = 0o755) -> None:
    """Install as install.sh does: the gate, and a package that is this checkout."""
    host.file(path, GATE.read_text(), mode)
    host.file(f"{PACKAGE}/virt_usher/hook.py")
    host.file("/usr/bin/python3", PYTHON.format(sys.executable, SOURCE), 0o755)


# Stands for the interpreter: runs what it is given, with this checkout for the package.
PYTHON = '#!/bin/sh\nexec {} -I -B -c "$4" {}\n'


def daemon(host: FakeHost, name: str = "libvirtd", age: float = -10, label: str = "unconfined") -> None:
    """Let a daemon run that started `age` seconds ago (before now, when the hook appeared)."""
    uptime = 1000.0
    ticks = int((uptime - age) * HERTZ)
    host.file(f"/run/{name}.pid", str(PID)).file(f"/proc/{PID}/comm", name)
    host.file(f"/proc/{PID}/stat", f"{PID} ({name}) S 1 " + " ".join(["0"] * 17) + f" {ticks} 0")
    host.file(f"/proc/{PID}/attr/current", label).file("/proc/uptime", f"{uptime} 5000.0")


@pytest.fixture
def good(pc: FakeHost) -> FakeHost:
    """A host where everything is right."""
    install(pc)
    daemon(pc)
    pc.file("/run/virt-usher/.called").file("/sys/fs/cgroup/cgroup.controllers", "cpuset cpu")
    pc.file("/sys/kernel/iommu_groups/0/type", "DMA")
    return pc


def levels(cli: Cli, level: str) -> dict[str, str]:
    """Return what it is about -> text and hint, for all lines of a level."""
    checks = cli("doctor", "--json").json
    return {c["about"]: f"{c['text']} {c['hint']}" for c in checks if c["level"] == level}


def test_a_host_where_all_is_right_has_no_problem_and_no_warning(cli: Cli, good: FakeHost) -> None:
    ran = cli("doctor")
    assert (ran.status, ran.err) == (0, "")
    assert {line[:9] for line in ran.out.splitlines()} == {"ok       "}, ran.out


def test_nothing_is_changed(cli: Cli, good: FakeHost) -> None:
    before = good.snapshot()
    cli("doctor")
    assert good.snapshot() == before


def _no_hook(host: FakeHost) -> None:
    os.unlink(host.path(HOOK))


def _foreign_hook(host: FakeHost) -> None:
    host.file(HOOK, "#!/bin/sh\n# calls virt-usher one day\n", 0o755)


def _not_executable(host: FakeHost) -> None:
    os.chmod(host.path(HOOK), 0o644)


def _writable(host: FakeHost) -> None:
    os.chmod(host.path(HOOK), 0o777)


def _folder_writable(host: FakeHost) -> None:
    os.chmod(host.path("/etc/libvirt/hooks"), 0o777)


def _twice(host: FakeHost) -> None:
    install(host, f"{HOOK}.d/50-virt-usher")


def _package_writable(host: FakeHost) -> None:
    os.chmod(host.path(f"{PACKAGE}/virt_usher"), 0o777)


def _package_gone(host: FakeHost) -> None:
    os.unlink(host.path(f"{PACKAGE}/virt_usher/hook.py"))


def _python_gone(host: FakeHost) -> None:
    os.unlink(host.path("/usr/bin/python3"))


def _python_fails(host: FakeHost) -> None:
    host.file("/usr/bin/python3", "#!/bin/sh\necho 'No module named lxml' >&2\nexit 1\n", 0o755)


def _started_before(host: FakeHost) -> None:
    daemon(host, age=100)
    old = time.time() - 200
    os.utime(host.path("/run/virt-usher/.called"), (old, old))


def _virtqemud_started_before(host: FakeHost) -> None:
    os.unlink(host.path("/run/libvirtd.pid"))
    daemon(host, "virtqemud", age=100)
    old = time.time() - 200
    os.utime(host.path("/run/virt-usher/.called"), (old, old))


def _broken_config(host: FakeHost) -> None:
    host.config("[deadlines\n")


def _unknown_key(host: FakeHost) -> None:
    host.domain("guest", "[plugins.hugepages]\ndrop_cache = true\n")


def _unknown_plugin(host: FakeHost) -> None:
    host.every_domain("[plugins.govenor]\n")


PROBLEMS: list[tuple[Callable[[FakeHost], None], str, str]] = [
    (_no_hook, "hook", "./install.sh"),
    (_foreign_hook, "hook", "./install.sh"),
    (_not_executable, "hook", f"chmod 755 {HOOK}"),
    (_writable, "hook", "chmod go-w"),
    (_folder_writable, "hook", "chmod go-w"),
    (_twice, "hook", "2 times"),
    (_package_writable, "package", "chmod go-w"),
    (_package_gone, "package", "No such file"),
    (_python_gone, "interpreter", "cannot be run"),
    (_python_fails, "interpreter", "No module named lxml apt install"),
    (_started_before, "daemon", "systemctl reload libvirtd"),
    (_virtqemud_started_before, "daemon", "systemctl reload virtqemud"),
    (_broken_config, "configuration", "config.toml"),
    (_unknown_key, "configuration", "did you mean 'drop_caches'?"),
    (_unknown_plugin, "configuration", "did you mean 'governor'?"),
]


@pytest.mark.parametrize(("breaks", "about", "text"), PROBLEMS)
def test_each_thing_that_breaks_is_a_problem_with_what_to_do(
    cli: Cli, good: FakeHost, breaks: Callable[[FakeHost], None], about: str, text: str
) -> None:
    breaks(good)
    found = levels(cli, "problem")
    assert text in found[about]
    assert cli("doctor").status == 1


def test_a_daemon_that_was_told_knows_the_hook(cli: Cli, good: FakeHost) -> None:
    _started_before(good)
    good.file("/run/virt-usher/.told", f"1 1\n{PID} {good.started_at(PID)}\n")
    assert "daemon" not in levels(cli, "problem")


def test_another_daemon_that_was_told_is_no_proof(cli: Cli, good: FakeHost) -> None:
    _started_before(good)
    good.file("/run/virt-usher/.told", f"{PID} 1\n")
    assert "daemon" in levels(cli, "problem")


def test_a_call_since_the_daemon_started_is_proof(cli: Cli, good: FakeHost) -> None:
    daemon(good, age=100)
    assert "has called the hook" in levels(cli, "ok")["daemon"]


def _off(host: FakeHost) -> None:
    host.file("/etc/virt-usher/off")


def _never_called(host: FakeHost) -> None:
    os.unlink(host.path("/run/virt-usher/.called"))


def _no_daemon(host: FakeHost) -> None:
    os.unlink(host.path("/run/libvirtd.pid"))
    os.unlink(host.path(f"/proc/{PID}/comm"))


def _selinux(host: FakeHost) -> None:
    daemon(host, label="system_u:system_r:virtqemud_t:s0")
    host.file("/sys/fs/selinux/enforce", "1")


def _no_iommu(host: FakeHost) -> None:
    os.rename(host.path("/sys/kernel/iommu_groups/0"), host.path("/run/0"))


def _not_remapped(host: FakeHost) -> None:
    host.file("/sys/class/iommu/dmar0/x").file("/sys/kernel/irq/0/chip_name", "IO-APIC")


def _unsafe(host: FakeHost) -> None:
    _not_remapped(host)
    host.file("/proc/cmdline", "vfio_iommu_type1.allow_unsafe_interrupts=1")


def _cgroup_v1(host: FakeHost) -> None:
    os.unlink(host.path("/sys/fs/cgroup/cgroup.controllers"))


def _mounted_later(host: FakeHost) -> None:
    mount = host.memory.mounts()[0].path
    os.rmdir(host.path(f"{mount}/libvirt/qemu"))


def _tuned(host: FakeHost) -> None:
    host.file("/sys/fs/cgroup/system.slice/tuned.service/cgroup.procs")


WARNINGS: list[tuple[Callable[[FakeHost], None], str, str]] = [
    (_off, "switch", "rm /etc/virt-usher/off"),
    (_never_called, "last call", "start a domain"),
    (_no_daemon, "daemon", "systemctl start libvirtd"),
    (_selinux, "confinement", "virtqemud_t"),
    (_no_iommu, "IOMMU", "intel_iommu=on"),
    (_not_remapped, "interrupts", "VFIO gives no device to a domain"),
    (_unsafe, "interrupts", "a guest with a device can send any"),
    (_cgroup_v1, "cgroup", "version 2"),
    (_mounted_later, "huge pages", "restart"),
    (_tuned, "cpufreq", "systemctl disable --now tuned"),
]


@pytest.mark.parametrize(("changes", "about", "text"), WARNINGS)
def test_what_may_matter_is_a_warning_and_not_a_problem(
    cli: Cli, good: FakeHost, changes: Callable[[FakeHost], None], about: str, text: str
) -> None:
    changes(good)
    assert text in levels(cli, "warning")[about]
    assert cli("doctor").status == 0


def test_remapped_interrupts_are_told(cli: Cli, good: FakeHost) -> None:
    good.file("/sys/class/iommu/ivhd0/x").file("/sys/kernel/irq/0/chip_name", "IR-IO-APIC")
    assert levels(cli, "ok")["interrupts"] == "remapped "


def test_apparmor_is_told(cli: Cli, good: FakeHost) -> None:
    daemon(good, label="libvirtd (enforce)")
    assert "AppArmor confines libvirtd" in levels(cli, "ok")["confinement"]


def test_the_hook_beside_a_foreign_one_is_found(cli: Cli, good: FakeHost) -> None:
    good.file(HOOK, "#!/bin/sh\n", 0o755)
    install(good, f"{HOOK}.d/50-virt-usher")
    daemon(good)
    assert cli("doctor").status == 0


def test_other_programs_that_move_devices_are_named(cli: Cli, good: FakeHost) -> None:
    good.file("/etc/supergfxd.conf", "{}").file("/etc/vdsm/vdsm.conf", "[vars]")
    good.file("/etc/driverctl.d/0000:01:00.0", "vfio-pci")
    assert {"supergfxctl", "vdsm"} <= levels(cli, "warning").keys()
    assert "0000:01:00.0 is meant for vfio-pci" in levels(cli, "ok")["driverctl"]
