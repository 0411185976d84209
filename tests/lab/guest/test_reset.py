"""The verdict on each device of the zoo is what VFIO answers, alone and with all that shares its bus."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
from tests.lab import machine
from tests.lab.guest import kernel, vfio
from tests.lab.guest.agent import CHECKOUT
from tests.lab.guest.domains import Domain, run, virsh

sys.path.insert(0, str(CHECKOUT / "src"))
if TYPE_CHECKING:
    from virt_usher.host.reset import Verdict

# What VFIO must answer where the verdict is this one: (function reset, hot reset); None: either.
ANSWERS = {
    "function": (True, None),
    "hot": (None, True),
    "pm": (True, False),
    "none": (False, False),
}


def verdict(address: str, given: list[str]) -> Verdict:
    """Ask virt-usher, as a start of a domain with these devices would."""
    from virt_usher.host import Host, reset
    from virt_usher.host.quirks import Quirks

    host = Host()
    every = frozenset(given)
    return reset.verdict(host.pci.device(address), reset.Given(every, every), Quirks(host))


def bus_of(address: str) -> list[str]:
    """Return every device of the table on the same bus."""
    bus = address.rpartition(":")[0]
    on_root = bus == "0000:00"
    return [d.address for d in machine.DEVICES if d.address == address or (not on_root and bus in d.address)]


def shpchp(address: str) -> set[str]:
    """Return the bridges of a device's group that shpchp drives: no group with one can be VFIO's."""
    members = (kernel.DEVICES / address / "iommu_group/devices").iterdir()
    return {member.name for member in members if kernel.driver(member.name) == "shpchp"}


@pytest.mark.parametrize("together", [False, True], ids=["alone", "together"])
@pytest.mark.parametrize("role", [d.role for d in machine.DEVICES])
def test_the_verdict_is_what_vfio_answers(role: str, together: bool) -> None:
    address = machine.device(role).address
    near = bus_of(address)
    given = near if together else [address]
    # Siblings without a driver leave the group viable, and are what a hot reset does not accept.
    others = (set(near) | kernel.group(address) | shpchp(address)) - set(given)
    said = verdict(address, given)
    with vfio.bound(given, sorted(others)):
        function, hot = vfio.resets(address, given)
    expected = ANSWERS[said.kind]
    assert expected in ((function, hot), (function, None), (None, hot)), (said, function, hot)
    assert bool(said.methods) == function, (said, function)


@pytest.mark.product
@pytest.mark.parametrize("roles", [("stuck",), ("stuck_sound", "stuck_vga"), ("gpu",)], ids=lambda r: r[0])
def test_a_plain_start_is_refused_and_touches_nothing(domain: Domain, roles: tuple[str, ...]) -> None:
    addresses = [machine.device(r).address for r in roles]
    before = [(kernel.driver(a), (kernel.DEVICES / a / "driver_override").read_text()) for a in addresses]
    domain.devices = roles
    domain.define()
    said = virsh("start", domain.name, check=False).stderr
    assert all(f"{a} (" in said for a in addresses), said
    assert "cannot be reset" in said
    assert f"virt-usher waive {domain.name}" in said or f"virt-usher enable {domain.name} pci" in said
    assert domain.state == "shut off"
    after = [(kernel.driver(a), (kernel.DEVICES / a / "driver_override").read_text()) for a in addresses]
    assert after == before


@pytest.mark.product
def test_a_waiver_lets_it_start(domain: Domain) -> None:
    domain.devices = ("stuck",)
    domain.define()
    address = machine.device("stuck").address
    run("virt-usher", "waive", domain.name, address, "reset", "the lab's edu keeps no state")
    virsh("start", domain.name)
    assert kernel.driver(address) == "vfio-pci"
    domain.stop()


@pytest.mark.product
def test_a_card_with_its_sound_starts(domain: Domain) -> None:
    domain.devices = ("gpu", "gpu_audio")
    domain.define()
    virsh("start", domain.name)
    assert run("virt-usher", "devices", "--domain", domain.name).stdout.count("reset, together with") == 2
    domain.stop()
