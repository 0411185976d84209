"""Take PCI devices from the host's drivers while the domain runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from virt_usher import BindDriver, Domain, Host, Plan, Problem, ending, handover, hookimpl, option, rebind
from virt_usher.host import users, vfio
from virt_usher.host.pci import Device
from virt_usher.host.quirks import Quirks


@dataclass(frozen=True, eq=False)
class Plugin:
    group: bool = option(False, help="take what else is in the devices' IOMMU groups too, bridges excepted")
    driver: str = option("auto", help="driver for what libvirt does not manage; auto is the best vfio driver")
    keep_awake: bool = option(False, help="keep the devices out of D3, where they do not come back from it")
    expect: tuple[str, ...] = option(
        (), help="which device must be where, as 0000:01:00.0=10de:1288", check=handover.identities
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
        yield from handover.absent_or_bridge(domain, given)
        yield from handover.unexpected(domain, given, handover.identities(self.expect))
        quirks = Quirks(host)
        for address, bind in binds.items():
            device = host.pci.device(address)
            if holder := rebind.holder(host, bind.key, domain.name):
                yield Problem(f"{address} is held by {holder}", "virt-usher status")
            for found in vfio.obstacles(host, device, bind.driver, quirks):
                yield ending.problem(domain, device, found.problem, found.what, found.hint)
            yield from ending.problems(domain, host, plan, bind, bind.users)
        yield from handover.left(domain, host, binds.keys())
        taken = dict.fromkeys([*(d.address for d in given), *binds])
        yield from handover.groups(domain, [host.pci.device(a) for a in taken], taken)
