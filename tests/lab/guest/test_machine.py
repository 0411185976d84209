"""The machine is what its table says: without that no test means much."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest
from tests.lab import machine
from tests.lab.guest import kernel
from tests.lab.guest.domains import run

pytestmark = pytest.mark.smoke
ROLES = [device.role for device in machine.DEVICES]


def test_system_is_up() -> None:
    assert Path("/proc/1/comm").read_text().strip() == "systemd"
    assert run("systemctl", "is-system-running", check=False).stdout.strip() == "running", _failed_units()


def _failed_units() -> str:
    return run("systemctl", "--failed", "--no-legend", check=False).stdout


def test_cgroups_are_unified() -> None:
    controllers = Path("/sys/fs/cgroup/cgroup.controllers").read_text().split()
    assert {"cpuset", "cpu", "memory", "hugetlb"} <= set(controllers)


def test_bridges_are_where_the_table_has_them() -> None:
    wrong = [b.address for b in machine.BRIDGES if not (kernel.DEVICES / b.address).exists()]
    assert not wrong


@pytest.mark.parametrize("role", ROLES)
def test_device(role: str) -> None:
    device = machine.device(role)
    assert (kernel.DEVICES / device.address).exists()
    seen = {
        "driver": kernel.driver(device.address),
        "methods": kernel.reset_methods(device.address),
        "node": int((kernel.DEVICES / device.address / "numa_node").read_text()),
        "group": kernel.group(device.address),
    }
    assert seen == {
        "driver": device.driver,
        "methods": device.methods,
        "node": device.node,
        "group": {other.address for other in machine.group_of(role)},
    }


def test_no_device_besides_the_table() -> None:
    """Whatever has a slot above the machine's own is in the table."""
    known = {d.address for d in machine.DEVICES} | {b.address for b in machine.BRIDGES}
    own = {f"0000:00:{slot}" for slot in ("00.0", "02.0", "03.0", "04.0", "1f.0", "1f.2", "1f.3")}
    assert {path.name for path in kernel.DEVICES.iterdir()} == known | own


@pytest.mark.parametrize("role", [d.role for d in machine.DEVICES if d.methods])
def test_function_reset(role: str) -> None:
    """Writing to `reset` works where the table says so, and fails with ENOTTY elsewhere."""
    device = machine.device(role)
    said = ""
    file = os.open(kernel.DEVICES / device.address / "reset", os.O_WRONLY)
    try:
        os.write(file, b"1")
    except OSError as error:
        said = errno.errorcode[error.errno or 0]
    finally:
        os.close(file)
    assert said == ("" if device.reset else "ENOTTY")


def test_nodes() -> None:
    nodes = sorted(kernel.NODES.glob("node[0-9]*"))
    assert [kernel.cpu_list((node / "cpulist").read_text()) for node in nodes] == [
        set(cpus) for cpus in machine.NODES
    ]


def test_siblings_are_as_the_profile_says() -> None:
    siblings = Path("/sys/devices/system/cpu/cpu0/topology/thread_siblings_list").read_text()
    profile = machine.CPU_PROFILES[os.environ["LAB_CPU"]]
    assert kernel.cpu_list(siblings) == ({0, 1} if profile.smt else {0})
    assert Path("/dev/kvm").exists() == profile.kvm


def test_frequency_policies() -> None:
    policies = [kernel.cpu_list((p / "affected_cpus").read_text().replace(" ", ","))
                for p in sorted(kernel.CPUFREQ.glob("policy*"))]  # fmt: skip
    assert policies == [set(cpus) for cpus in machine.CPUFREQ_POLICIES]


def test_governor_can_be_set() -> None:
    before = kernel.governors()
    for name in before:
        file = kernel.CPUFREQ / name / "scaling_governor"
        file.write_text("performance")
        assert file.read_text().strip() == "performance"
        file.write_text(before[name])


@pytest.mark.parametrize("kib", [2048, 1048576])
def test_page_pools(kib: int) -> None:
    for node in range(len(machine.NODES)):
        assert kernel.pages(node, kib) == 0


def test_pages_come_per_node(empty_pools: None) -> None:
    (kernel.pool(1) / "nr_hugepages").write_text("8")
    assert (kernel.pages(0), kernel.pages(1)) == (0, 8)


def test_interrupts_are_remapped() -> None:
    # The address width says that the driver really talks to the unit, not only that a table is there.
    assert list(Path("/sys/class/iommu").glob("dmar*"))
    log = subprocess.run(["journalctl", "-k", "-b", "-o", "cat"], capture_output=True, text=True, check=True)
    assert "IRQ remapping" in log.stdout


def test_apparmor_confines_libvirt() -> None:
    profiles = Path("/sys/kernel/security/apparmor/profiles").read_text().splitlines()
    assert "libvirtd (enforce)" in profiles
    assert "virt-aa-helper (enforce)" in profiles
