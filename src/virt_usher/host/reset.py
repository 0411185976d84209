"""Can a device be reset when its domain stops? A verdict from sysfs alone, nothing is touched.

QEMU starts with a device that nothing can reset and only logs it; the next domain, or the host, then
gets it as the guest left it. VFIO resets a function on its own (pci_try_reset_function), or the slot or bus
it sits on if every function there is with the domain (VFIO_DEVICE_PCI_HOT_RESET).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from virt_usher.host import Host
    from virt_usher.host.pci import Device, Pci
    from virt_usher.host.quirks import Quirk, Quirks
    from virt_usher.hostdev import PciHostdev
    from virt_usher.prepare import Plan

# From the best to the worst.
FUNCTION, HOT, PM, NONE, BAD = "function", "hot", "pm", "none", "known-bad"
SILENT, BRIDGE, ABSENT = "silent", "bridge", "absent"
GOOD = (FUNCTION, HOT)
_BUS = ("bus", "cxl_bus")


@dataclass(frozen=True)
class Verdict:
    """What becomes of a device when its domain stops.

    `methods` are the function resets that work, as the kernel tries them ('?' where it names none);
    `partners` are reset along in a hot reset; `companions` would make one possible if the domain
    had them too; `part_of` is the function whose fate it shares; `why` says it in words.
    """

    kind: str
    why: str
    methods: tuple[str, ...] = ()
    partners: tuple[str, ...] = ()
    companions: tuple[str, ...] = ()
    part_of: str = ""

    @property
    def good(self) -> bool:
        """Whether the device can be reset for sure."""
        return self.kind in GOOD


@dataclass(frozen=True)
class Given:
    """What a domain has: the devices it is given, and those that will be on a vfio driver."""

    devices: frozenset[str]
    bound: frozenset[str]

    @classmethod
    def to(cls, devices: Iterable[PciHostdev], plan: Plan | None = None) -> Given:
        """Say so of a domain: libvirt binds what is managed, a plan what its actions say."""
        listed = list(devices)
        managed = {d.address for d in listed if d.managed}
        return cls(frozenset(d.address for d in listed), frozenset(managed | bound_by(plan)))


def bound_by(plan: Plan | None) -> frozenset[str]:
    """Return what a plan puts on a vfio driver: the `binds` of the actions that have one."""
    actions = plan.actions if plan else []
    return frozenset(a for action in actions if isinstance(a := getattr(action, "binds", None), str))


def verdicts(host: Host, devices: Iterable[PciHostdev], plan: Plan | None = None) -> dict[Device, Verdict]:
    """Return the verdict on each device a domain is given, by address.

    What is part of another of them (a graphics card's sound) shares that one's verdict, and is left out.
    """
    from virt_usher.host.quirks import Quirks

    given, pci, quirks = Given.to(devices, plan), host.pci, Quirks(host)
    found = {pci.device(a): verdict(pci.device(a), given, quirks) for a in sorted(given.devices)}
    return {d: v for d, v in found.items() if v.part_of not in given.devices}


def verdict(device: Device, given: Given, quirks: Quirks) -> Verdict:
    """Tell whether and how a device can be reset, if a domain is started with what it is given.

    Follows what the kernel does when it resets (pci_reset_bus_function, vfio_pci_dev_set_hot_reset), not what
    `reset` and `reset_method` show: those are decided before a device's siblings are known.
    """
    if not device.exists:
        return Verdict(ABSENT, "there is no such device")
    if device.is_bridge:
        return Verdict(BRIDGE, "it is a bridge, which cannot be given to a domain")
    if not device.answers:
        return Verdict(SILENT, "it does not answer: its config space reads as all ones")
    if bad := _known_bad(device, quirks):
        return Verdict(BAD, bad)
    methods = tuple(_methods(device, quirks))
    if methods and methods[0] != "pm":
        return Verdict(FUNCTION, _named(methods[0]), methods)
    hot = _HotReset(device, given, quirks)
    if not hot.obstacles:
        return Verdict(HOT, hot.text, methods, hot.partners)
    if unit := hot.bad_unit(quirks):
        return Verdict(BAD, f"it is part of {unit}, which no reset is known to help", methods, part_of=unit)
    if "pm" in methods:
        why = f"power management only (D3hot and back), which resets little; {hot.told}"
        return Verdict(PM, why, methods, companions=hot.companions)
    own = "its reset_method is empty" if device.reset_methods == () else "no reset of its own"
    return Verdict(NONE, f"{own}, and {hot.told}", companions=hot.companions)


def _named(method: str) -> str:
    if method == "?":
        return "function reset (this kernel does not say how)"
    return f"function reset ({method})" + (", alone on its bus" if method in _BUS else "")


def _known_bad(device: Device, quirks: Quirks) -> str:
    """Say why no reset of a device is to be trusted, or ''."""
    methods = device.reset_methods or ()
    row = quirks.of(device, "known_bad")
    if row is None and not _vendor_reset(device):
        row = quirks.of(device, "amd_reset_bug")
    if row is not None:
        return f"{row.name}: {row.note or 'no reset of it works'}"
    if methods[:1] in (("flr",), ("af_flr",)) and (row := quirks.of(device, "no_flr")):
        return f"{row.name}: this kernel would use {methods[0]}, which does not work"
    return ""


def _vendor_reset(device: Device) -> bool:
    """Whether the module vendor-reset will reset a device: since 5.15 only if told to."""
    listed = device.reset_methods
    told = device.has_reset if listed is None else listed[:1] == ("device_specific",)
    return told and device.pci.host.exists("/sys/module/vendor_reset")


def _methods(device: Device, quirks: Quirks) -> Iterator[str]:
    """Yield the function resets that will work, in the kernel's order.

    `bus` is recorded when a function is found, before those that share its bus: so function 0 of
    most multifunction devices pretends to have it. When it is tried, the kernel looks again.
    """
    listed = device.reset_methods
    if listed is None:
        # Before 5.15 the file appears once the whole bus is known; later none means none.
        yield from ("?",) if device.has_reset else ()
    for method in listed or ():
        if method not in _BUS or _bus_is_its_own(device, quirks):
            yield method


def _bus_is_its_own(device: Device, quirks: Quirks) -> bool:
    """Whether a reset of the bus reaches this function alone (pci_parent_bus_reset and for slots)."""
    pci, bridge = device.pci, device.parent
    if not bridge or _no_bus_reset(pci, (bridge, device.address), quirks):
        return False
    return not pci.same_bus(device.address) or (pci.pciehp(bridge) and not device.multifunction)


def _no_bus_reset(pci: Pci, addresses: Iterable[str], quirks: Quirks) -> list[tuple[str, Quirk]]:
    """Return those with PCI_DEV_FLAGS_NO_BUS_RESET, which sysfs does not show."""
    return [(a, row) for a in addresses if (row := quirks.of(pci.device(a), "no_bus_reset"))]


@dataclass(frozen=True)
class _Obstacle:
    """What stands in the way of a hot reset; `fix` is a device that could be given along."""

    text: str
    fix: str = ""


class _HotReset:
    """Whether VFIO could reset the slot or bus of a device, with all that is on it."""

    def __init__(self, device: Device, given: Given, quirks: Quirks) -> None:
        self._pci, self._device, self._given = device.pci, device, given
        self._bridge = device.parent
        self._affected = self._pci.below(self._bridge) if self._bridge else []
        self.partners = tuple(a for a in self._affected if a != device.address)
        self.obstacles = list(self._find(quirks))

    @property
    def text(self) -> str:
        """The reset in words, where nothing stands in its way."""
        what = "slot reset" if self._pci.pciehp(self._bridge) else "bus reset"
        return f"{what}, " + (
            f"together with {_list(self.partners)}" if self.partners else "alone on its bus"
        )

    @property
    def told(self) -> str:
        """The obstacles in words, the first few of them."""
        texts = [o.text for o in self.obstacles]
        return "; ".join(texts[:3]) + (f"; and {len(texts) - 3} more" if len(texts) > 3 else "")

    @property
    def companions(self) -> tuple[str, ...]:
        """What the domain would have to be given as well; nothing where that would not help."""
        fixes = [o.fix for o in self.obstacles]
        return tuple(fixes) if all(fixes) else ()

    def bad_unit(self, quirks: Quirks) -> str:
        """Return a known-bad function of the same slot that the domain has too, such as its GPU, or ''."""
        slot = self._device.address.rpartition(".")[0]
        near = [a for a in self.partners if a.startswith(slot) and a in self._given.devices]
        return next((a for a in near if _known_bad(self._pci.device(a), quirks)), "")

    def _find(self, quirks: Quirks) -> Iterator[_Obstacle]:
        if not self._bridge:
            yield _Obstacle("a root bus cannot be reset")
            return
        if self._device.physfn:
            yield _Obstacle("a virtual function takes no part in a bus reset")
            return
        for address, row in _no_bus_reset(self._pci, (self._bridge, *self._affected), quirks):
            yield _Obstacle(f"{address} ({row.name}) does not stand a bus reset")
        groups = {self._pci.device(a).group for a in (*self._given.devices, self._device.address)}
        for address in self.partners:
            yield from self._partner(self._pci.device(address), groups, quirks)

    def _partner(self, other: Device, groups: set[str], quirks: Quirks) -> Iterator[_Obstacle]:
        """Ask one that would be reset along: vfio_pci_dev_set_hot_reset wants each of them on vfio."""
        if other.is_bridge:
            yield _Obstacle(f"the bridge {other.address} would be reset along, and cannot be on vfio")
        elif bad := _known_bad(other, quirks):
            yield _Obstacle(f"{other.address} would be reset along: {bad}")
        elif not other.on_vfio and other.address not in self._given.bound:
            stays = f"stays with {other.driver}" if other.driver else "has no driver; it needs vfio-pci"
            yield _Obstacle(f"{other.address} shares the bus and {stays}", other.address)
        elif other.group not in groups:
            yield _Obstacle(
                f"{other.address} shares the bus, and its IOMMU group {other.group} is not the domain's",
                other.address,
            )


def _list(addresses: tuple[str, ...]) -> str:
    return ", ".join(addresses[:3]) + (f" and {len(addresses) - 3} more" if len(addresses) > 3 else "")
