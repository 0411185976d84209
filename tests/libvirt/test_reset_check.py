"""A plain virsh start is refused for a device that cannot be reset, with nothing enabled."""

from __future__ import annotations

import pytest
from tests.libvirt.domain import Domain
from tests.libvirt.private import PrivateLibvirt

from virt_usher.host import Host, reset
from virt_usher.hostdev import PciHostdev

NOWHERE = "ffff:ff:1f.7"


def given(address: str) -> Domain:
    """Return a domain that is given a device on QEMU's command line."""
    return Domain("guest", memory="", qemu_args=("-device", f"vfio-pci,host={address}"))


def test_a_device_that_is_not_there(usher: PrivateLibvirt) -> None:
    result = usher.start(given(NOWHERE))
    assert result.returncode != 0
    assert f"reset_check: {NOWHERE}: there is no such device" in result.stderr
    assert "take it out of the domain: virsh edit guest" in result.stderr


def test_a_device_of_this_machine_that_cannot_be_reset(usher: PrivateLibvirt) -> None:
    host = Host()
    every = [PciHostdev(d.address, True, "hostdev") for d in host.pci.devices]
    bad = [d for e in every for d, v in reset.verdicts(host, [e]).items() if v.kind == reset.NONE]
    if not bad:
        pytest.skip("every PCI device of this machine can be reset")
    guest = given(bad[0].address)
    result = usher.start(guest)
    assert result.returncode != 0
    assert f"{bad[0].address} ({bad[0].id}) cannot be reset" in result.stderr
    assert f"virt-usher waive guest {bad[0].address} reset 'REASON'" in result.stderr
    assert len(result.stderr.strip().splitlines()) <= 10
    waive = ("virt-usher", "waive", "guest", bad[0].address, "reset", "for the test")
    usher.run(*waive, check=True)
    assert "virt-usher" not in usher.virsh("start", guest.uuid).stderr  # at most, QEMU finds no VFIO


def test_a_domain_without_devices_starts(usher: PrivateLibvirt) -> None:
    result = usher.start(Domain("guest", memory=""))
    assert result.returncode == 0, result.stderr
