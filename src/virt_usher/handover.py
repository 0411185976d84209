"""What speaks against handing PCI devices to a domain, whoever takes them from their drivers."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping

from virt_usher import ending
from virt_usher.actions import Problem
from virt_usher.domain import Domain
from virt_usher.errors import UsherError, typed
from virt_usher.host import Host
from virt_usher.host.pci import Device
from virt_usher.hostdev import canonical

NO_DMA = ("pci-stub", "pcieport")  # they leave the group to vfio (driver_managed_dma), as vfio's own do


def identities(entries: Iterable[str]) -> dict[str, str]:
    """Return address -> vendor:device; UsherError for an entry that is no such pair."""
    found = {}
    for entry in entries:
        address, _, device = (part.strip().lower() for part in entry.partition("="))
        if not canonical(address) or not re.fullmatch("[0-9a-f]{4}:[0-9a-f]{4}", device):
            raise UsherError(f"{entry!r} is not of the form 0000:01:00.0=10de:1288")
        found[canonical(address)] = device
    return found


def absent_or_bridge(domain: Domain, devices: list[Device]) -> Iterator[Problem]:
    """Name what no domain can have."""
    edit = f"virsh edit {typed(domain.name)}"
    for device in devices:
        if not device.exists:
            yield Problem(f"{device.address} is not in this host", f"lspci -D shows what is; {edit}")
        elif device.is_bridge:
            yield Problem(f"{device.address} is a bridge, which no domain can have", edit)


def unexpected(domain: Domain, devices: list[Device], wanted: Mapping[str, str]) -> Iterator[Problem]:
    """Compare what is there with what an admin said must be: addresses change with the slots in use."""
    for device in devices:
        id_ = wanted.get(device.address, device.id)
        if id_ != device.id:
            now = [d.address for d in device.pci.devices if d.id == id_]
            edit = f"it is at {' and '.join(now)}: virsh edit {typed(domain.name)}"
            hint = edit if now else "lspci -Dnn"
            yield Problem(f"{device.address} is {device.id or 'not there'}, and {id_} is expected", hint)


def left(domain: Domain, host: Host, taken: Collection[str]) -> Iterator[Problem]:
    """Name what came out of a network's pool, and libvirt should have taken from its driver by `start`.

    It does not, and says nothing, while that driver is just being loaded (see rebind).
    """
    for device in (host.pci.device(d.address) for d in domain.pci_devices if d.managed):
        if device.driver and not (device.address in taken or device.on_vfio or device.is_bridge):
            what = f"libvirt has left {device.address} with {device.driver}"
            yield Problem(what, f"virsh start {typed(domain.name)}")


def groups(domain: Domain, devices: list[Device], taken: Collection[str]) -> Iterator[Problem]:
    """Name what keeps an IOMMU group from being handed over: drivers that use DMA for the host."""
    for group, first in {d.group: d for d in reversed(devices) if d.exists and d.group}.items():
        for other in map(first.pci.device, first.pci.group(group)):
            if not other.driver or other.address in taken or other.on_vfio or other.driver in NO_DMA:
                continue
            hint = f"virt-usher enable {typed(domain.name)} pci group=true"
            if other.class_code[:2] == "06":
                hint = "it belongs to the host's chipset: give the domain another device"
            if other.is_bridge:  # shpchp drives bridges, and lacks driver_managed_dma
                hint = f"echo {other.address} >/sys/bus/pci/drivers/{other.driver}/unbind"
            what = f"shares IOMMU group {group} with {other.address}, which stays with {other.driver}"
            yield ending.problem(domain, first, "group", what, hint)
