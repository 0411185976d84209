"""status knows for each kind of change what it was, what it is, and when it is not ours any more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests import test_rebind
from tests.cli.conftest import Cli, hook
from tests.plugins import test_modules, test_pci, test_services

from virt_usher.testing import FakeHost, domain_xml
from virt_usher.testing.cgroup import CpuHost

NIC = test_rebind.NIC


def start(cli: Cli, host: FakeHost, xml: bytes) -> dict[str, Any]:
    """Start the domain and return what status tells of its first change."""
    hook(host, "guest", "prepare", xml)
    host.qemu_runs("guest")
    return look(cli, host)


def look(cli: Cli, host: FakeHost) -> dict[str, Any]:
    ran = cli("status", "--json", host=host)
    held: dict[str, Any] = ran.json[0]["holds"][0]
    assert (ran.status == 1) == held["drift"]
    return held


def test_a_device_has_a_driver_before_and_now(cli: Cli, tmp_path: Path) -> None:
    host = test_rebind.make(tmp_path)
    held = start(cli, host, test_rebind.xml())
    assert (held["original"], held["present"], held["drift"]) == ("e1000e", "vfio-pci", False)


def test_the_vfio_driver_that_libvirt_chose_is_no_drift(cli: Cli, tmp_path: Path) -> None:
    host = test_rebind.make(tmp_path)
    start(cli, host, test_rebind.xml())
    host.libvirt_detaches(NIC, "mlx5_vfio_pci")
    assert look(cli, host)["present"] == "mlx5_vfio_pci"


def test_a_device_on_a_driver_that_nobody_of_us_chose_is_drift(cli: Cli, tmp_path: Path) -> None:
    host = test_rebind.make(tmp_path)
    start(cli, host, test_rebind.xml())
    host.write(f"/sys/bus/pci/devices/{NIC}/driver_override", "special")
    host.write(f"/sys/bus/pci/devices/{NIC}/driver/unbind", NIC)
    host.write("/sys/bus/pci/drivers/special/bind", NIC)
    assert look(cli, host)["drift"]


@pytest.fixture
def systemd(host: FakeHost) -> FakeHost:
    """A host with systemd, where 'greeter' is active."""
    host.file("/usr/bin/systemctl", test_services.SYSTEMCTL, 0o755).file("/run/systemd/system/.keep")
    host.file("/units/.system", "running").file("/units/.calls").file("/units/greeter.service", "active")
    return host


def test_a_unit_has_a_state_before_and_now(cli: Cli, systemd: FakeHost) -> None:
    held = start(cli, systemd, test_services.enable(systemd, "guest", 'stop = ["greeter"]'))
    assert (held["original"], held["present"], held["drift"]) == ("active", "inactive", False)
    systemd.file("/units/greeter.service", "active")
    assert look(cli, systemd)["drift"]


def test_a_module_that_is_loaded_again_is_drift(cli: Cli, tmp_path: Path) -> None:
    host = test_modules.make(tmp_path, "modules", unload=("nvidia_uvm",))
    held = start(cli, host, test_pci.xml(test_pci.GPU))
    assert (held["original"], held["present"], held["drift"]) == ("loaded", "not loaded", False)
    host.modprobe("nvidia_uvm")
    assert look(cli, host)["drift"]


def test_masks_that_somebody_set_meanwhile_are_named(cli: Cli, tmp_path: Path) -> None:
    host = CpuHost(tmp_path).cores([0], [1], [2], [3]).systemd().workqueues().irq(9, "0-3", False)
    host.domain("guest", '[plugins.cpu_isolation]\ncpus = "2-3"\n')
    hook(host, "guest", "prepare", domain_xml())
    host.qemu_runs("guest")
    assert cli("status", host=host).status == 0
    host.write("/proc/irq/9/smp_affinity_list", "2")
    host.write("/sys/devices/virtual/workqueue/writeback/cpumask", "c")
    host.systemctl("--runtime", "set-property", "--", "system.slice", "AllowedCPUs=1")
    ran = cli("status", host=host)
    told = [x.rpartition(": ")[2] for x in ran.out.splitlines() if "not as the domains' claims want" in x]
    assert (ran.status, told) == (1, ["9", "writeback/cpumask", "system.slice"])


def test_a_change_of_a_kind_unknown_here_is_told_all_the_same(cli: Cli, pc: FakeHost) -> None:
    step = '{"do":1,"kind":"new","plugin":"p","what":"w"}'
    pc.file("/run/virt-usher/guest.jnl", f'{{"usher":1,"id":"x"}}\n{step}\n')
    assert "p: w" in cli("status").out


def test_a_choice_that_shows_all_words_is_no_drift_while_ours_is_chosen(cli: Cli, host: FakeHost) -> None:
    knob = "/sys/kernel/mm/transparent_hugepage/defrag"
    host.file(knob, "always defer [madvise] never")
    host.domain("guest", f'[plugins.sysfs]\nset = ["{knob} = defer"]\n')
    held = start(cli, host, domain_xml("guest"))
    assert held["what"] == f"{knob}: madvise → defer"
    host.file(knob, "always [defer] madvise never")  # as the kernel answers the write
    held = look(cli, host)
    assert (held["original"], held["present"], held["drift"]) == ("madvise", "defer", False)
    host.file(knob, "[always] defer madvise never")
    assert look(cli, host)["drift"]
