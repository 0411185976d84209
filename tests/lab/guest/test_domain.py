"""libvirt starts and stops domains here, with and without devices."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.lab import machine
from tests.lab.guest import kernel
from tests.lab.guest.domains import Domain, run

pytestmark = pytest.mark.smoke


def test_plain_domain(domain: Domain) -> None:
    domain.confined = True
    domain.start()
    assert domain.state == "running"
    confinement = Path(f"/proc/{domain.pid}/attr/current").read_text().strip()
    assert confinement.startswith("libvirt-")
    assert confinement.endswith("(enforce)")
    assert "/machine.slice/" in Path(f"/proc/{domain.pid}/cgroup").read_text()
    domain.stop()
    assert domain.state == "shut off"


@pytest.mark.parametrize("roles", [("nic",), ("gpu", "gpu_audio")], ids=lambda roles: roles[0])
def test_domain_with_devices(domain: Domain, roles: tuple[str, ...]) -> None:
    addresses = [machine.device(role).address for role in roles]
    domain.devices, domain.confined = roles, True
    domain.start()
    assert {kernel.driver(address) for address in addresses} == {"vfio-pci"}
    domain.stop()
    for role in roles:
        assert kernel.driver(machine.device(role).address) == machine.device(role).driver


def test_host_is_as_it_was() -> None:
    """The tests before this one left no device behind and no unit failed."""
    moved = [d.role for d in machine.DEVICES if kernel.driver(d.address) != d.driver]
    assert not moved
    assert not run("systemctl", "--failed", "--no-legend", check=False).stdout
