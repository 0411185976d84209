"""Refuse a start with PCI devices that cannot be reset afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from virt_usher import Domain, Host, Note, Plan, Problem, hookimpl, option
from virt_usher.errors import typed
from virt_usher.host import reset
from virt_usher.host.pci import Device


@dataclass(frozen=True, eq=False)
class Plugin:
    refuse: bool = option(True, help="refuse the start; false only writes down what is wrong")

    @hookimpl
    def usher_prepare(self, domain: Domain, host: Host) -> Iterator[Note]:
        for device, verdict in reset.verdicts(host, domain.pci_devices).items():
            if verdict.kind == reset.PM or not (verdict.good or self.refuse):
                yield Note(f"{device.address}: {verdict.why}")

    @hookimpl
    def usher_wants(self, domain: Domain) -> bool:
        return bool(domain.networks)

    @hookimpl
    def usher_start(self, domain: Domain, host: Host) -> Iterator[Note]:
        # What comes out of a network's pool is known only now, as an <interface>.
        late = {d.address for d in domain.pci_devices if d.given == "interface"}
        yield from (n for n in self.usher_prepare(domain, host) if n.text.partition(": ")[0] in late)

    @hookimpl
    def usher_check(self, domain: Domain, host: Host, plan: Plan) -> Iterator[Problem]:
        for device, verdict in reset.verdicts(host, domain.pci_devices, plan).items():
            if self.refuse and not verdict.good and verdict.kind != reset.PM:
                yield _problem(domain, device, verdict)


def _problem(domain: Domain, device: Device, verdict: reset.Verdict) -> Problem:
    name = typed(domain.name)
    shown = f"{device.address} ({device.id})".removesuffix(" ()")
    if verdict.kind in (reset.ABSENT, reset.BRIDGE):
        return Problem(f"{shown}: {verdict.why}", f"take it out of the domain: virsh edit {name}")
    about = (device.address, device.id, "silent" if verdict.kind == reset.SILENT else "reset")
    way = f"virt-usher waive {name} {about[0]} {about[2]} 'REASON'"
    if verdict.kind == reset.SILENT:
        way = f"power the host off and on, since a reboot may not do; or: {way}"
    elif 0 < len(verdict.companions) <= 3:
        if all(device.pci.device(c).group == device.group != "" for c in verdict.companions):
            way = f"virt-usher enable {name} pci group=true"  # no waiver makes the group viable
        way = f"give the domain {' and '.join(verdict.companions)} too; or: {way}"
    return Problem(f"{shown} cannot be reset: {verdict.why}", way, about)
