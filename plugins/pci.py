"""Take PCI devices from the host's drivers while the domain runs."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from virt_usher import BindDriver, Domain, Host, Plan, Problem, UsherError, ending, hookimpl, option, rebind
from virt_usher.errors import typed
from virt_usher.host import users, vfio
from virt_usher.host.pci import Device
from virt_usher.host.quirks import Quirks
from virt_usher.hostdev import canonical

NO_DMA = ("pci-stub", "pcieport")  # they leave the group to vfio (driver_managed_dma), as vfio's own do


def expected(entries: Iterable[str]) -> dict[str, str]:
    """Return address -> vendor:device; UsherError for an entry that is no such pair."""
    found = {}
    for entry in entries:
        address, _, device = (part.strip().lower() for part in entry.partition("="))
        if not canonical(address) or not re.fullmatch("[0-9a-f]{4}:[0-9a-f]{4}", device):
            raise UsherError(f"{entry!r} is not of the form 0000:01:00.0=10de:1288")
        found[canonical(address)] = device
    return found


@dataclass(frozen=True, eq=False)
class Plugin:
    group: bool = option(False, help="take what else is in the devices' IOMMU groups too, bridges excepted")
    driver: str = option("auto", help="driver for what libvirt does not manage; auto is the best vfio driver")
    keep_awake: bool = option(False, help="keep the devices out of D3, where they do not come back from it")
    expect: tuple[str, ...] = option(
        (), help="which device must be where, as 0000:01:00.0=10de:1288", check=expected
    )

    @hookimpl
    def usher_prepare(self, domain: Domain, host: Host) -> Iterator[BindDriver]:
        pci, given = host.pci, {d.address: d for d in domain.pci_devices}
        wanted = [pci.device(a) for a in given]
        members = {m for d in wanted for m in pci.group(d.group)} - given.keys() if self.group else set()
        rest = [d for d in map(pci.device, sorted(members)) if d.class_code[:2] != "06" and not d.on_vfio]
        wanted = [d for d in (*wanted, *rest) if d.exists and not d.is_bridge]
        using = users.find(host, [d.address for d in wanted], host.qemu(domain.name, domain.uuid))
        for device in wanted:
            asked = given.get(device.address)
            managed = asked is not None and asked.managed
            driver = asked.driver or "vfio-pci" if asked and managed else self._unmanaged(device, host)
            seen = tuple(u for u in using if u.address == device.address)
            yield BindDriver(device.address, driver, managed, self.keep_awake, seen)

    def _unmanaged(self, device: Device, host: Host) -> str:
        if self.driver != "auto":
            return self.driver
        return device.driver if device.on_vfio else vfio.best_driver(host, device)

    @hookimpl
    def usher_wants(self, domain: Domain) -> bool:
        return bool(domain.networks)

    @hookimpl
    def usher_start(self) -> Iterator[BindDriver]:
        # libvirt has bound what comes out of a network's pool by now; the check is to see it, though.
        return iter(())

    @hookimpl
    def usher_check(self, domain: Domain, host: Host, plan: Plan) -> Iterator[Problem]:
        binds = {a.address: a for a in plan.actions if isinstance(a, BindDriver)}
        given = [host.pci.device(d.address) for d in domain.pci_devices]
        yield from _absent_or_bridge(given, domain)
        yield from self._unexpected(given, domain)
        quirks = Quirks(host)
        for address, bind in binds.items():
            device = host.pci.device(address)
            if holder := rebind.holder(host, bind.key, domain.name):
                yield Problem(f"{address} is held by {holder}", "virt-usher status")
            for found in vfio.obstacles(host, device, bind.driver, quirks):
                yield ending.problem(domain, device, found.problem, found.what, found.hint)
            yield from ending.problems(domain, host, plan, bind, bind.users)
        yield from _left(domain, host, binds.keys())
        taken = dict.fromkeys([*(d.address for d in given), *binds])
        yield from _groups(domain, [host.pci.device(a) for a in taken], taken)

    def _unexpected(self, devices: list[Device], domain: Domain) -> Iterator[Problem]:
        """Compare what is there with what an admin said must be: addresses change with the slots in use."""
        wanted = expected(self.expect)
        for device in devices:
            id_ = wanted.get(device.address, device.id)
            if id_ != device.id:
                now = [d.address for d in device.pci.devices if d.id == id_]
                hint = (
                    f"it is at {' and '.join(now)}: virsh edit {typed(domain.name)}" if now else "lspci -Dnn"
                )
                yield Problem(f"{device.address} is {device.id or 'not there'}, and {id_} is expected", hint)


def _absent_or_bridge(devices: list[Device], domain: Domain) -> Iterator[Problem]:
    edit = f"virsh edit {typed(domain.name)}"
    for device in devices:
        if not device.exists:
            yield Problem(f"{device.address} is not in this host", f"lspci -D shows what is; {edit}")
        elif device.is_bridge:
            yield Problem(f"{device.address} is a bridge, which no domain can have", edit)


def _left(domain: Domain, host: Host, taken: Collection[str]) -> Iterator[Problem]:
    """Name what came out of a network's pool, and libvirt should have taken from its driver by `start`.

    It does not, and says nothing, while that driver is just being loaded (see rebind).
    """
    for device in (host.pci.device(d.address) for d in domain.pci_devices if d.managed):
        if device.driver and not (device.address in taken or device.on_vfio or device.is_bridge):
            what = f"libvirt has left {device.address} with {device.driver}"
            yield Problem(what, f"virsh start {typed(domain.name)}")


def _groups(domain: Domain, devices: list[Device], taken: Collection[str]) -> Iterator[Problem]:
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
