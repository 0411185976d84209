"""Which vfio driver a device gets, and what VFIO will refuse: seen from files, before anything is touched."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from virt_usher.host.pci import GROUPS

if TYPE_CHECKING:
    from virt_usher.host import Host
    from virt_usher.host.pci import Device
    from virt_usher.host.quirks import Quirks

WAIVABLE, FINAL = "vfio", "no-driver"
_UNSAFE = "allow_unsafe_interrupts"
_MODPROBE_D = ("/etc/modprobe.d", "/run/modprobe.d", "/usr/lib/modprobe.d")


@dataclass(frozen=True)
class Obstacle:
    """Why a device cannot have a driver, and what would change that; `problem` is WAIVABLE or FINAL."""

    problem: str
    what: str
    hint: str = ""


def best_driver(host: Host, device: Device) -> str:
    """Return the vfio driver made for a device: the vfio_pci: alias with the fewest wildcards wins.

    Drivers of that kind are called as their module is; the general one is not.
    """
    alias = f"vfio_{device.modalias}"
    found = {}
    text = _modules(host, "alias")
    for line in text.splitlines() if "alias vfio_pci:" in text else []:
        words = line.split()
        if line.startswith("alias vfio_pci:") and len(words) == 3 and fnmatchcase(alias, words[1]):
            found[words[1].count("*")] = words[2]
    best = found[min(found)] if found else "vfio_pci"
    return "vfio-pci" if best.replace("-", "_") == "vfio_pci" else best


def obstacles(host: Host, device: Device, driver: str, quirks: Quirks) -> Iterator[Obstacle]:
    """Tell what keeps a device from a driver, and from a domain through a vfio driver."""
    if not driver.replace("-", "").replace("_", "").isalnum():  # it becomes a part of paths
        yield Obstacle(FINAL, f"cannot have {driver!r}, which is no driver's name")
        return
    if not host.exists(f"/sys/bus/pci/drivers/{driver}"):
        listed = (_modules(host, "dep") + _modules(host, "builtin")).replace("-", "_")
        if f"/{driver.replace('-', '_')}.ko" not in listed:
            yield Obstacle(
                FINAL, f"needs {driver!r}, a driver this kernel has not", "ls /sys/bus/pci/drivers"
            )
    if "vfio" not in driver:
        return
    if not device.group:
        hint = "switch it on in the firmware, and boot with intel_iommu=on; see: virt-usher doctor"
        yield Obstacle(FINAL, "has no IOMMU group: the IOMMU is off", hint)
        return
    denied = quirks.of(device, "vfio_denylist") if driver == "vfio-pci" else None
    if denied and not _is_on(host, "vfio_pci", "disable_denylist"):
        hint = "if you trust its guests: options vfio-pci disable_denylist=1 in /etc/modprobe.d"
        yield Obstacle(WAIVABLE, f"is on vfio-pci's list of devices that it refuses ({denied.name})", hint)
    if "direct" in _region_kinds(host, device.group):
        what = f"shares memory with the firmware (a 'direct' region of IOMMU group {device.group}, RMRR)"
        yield Obstacle(WAIVABLE, what, "the firmware may have a switch for it, such as of remote management")
    if every := interrupts(host):
        yield every


def interrupts(host: Host) -> Obstacle | None:
    """Tell whether VFIO refuses every device of this host, since interrupts are not remapped (-EPERM)."""
    if remaps_interrupts(host) is not False or allows_unsafe_interrupts(host):
        return None
    what = "could send any interrupt, since this host does not remap them: VFIO refuses that"
    return Obstacle(WAIVABLE, what, f"switch x2APIC on in the firmware, or set {_UNSAFE}=1 (see docs/pci.md)")


def remaps_interrupts(host: Host) -> bool | None:
    """Tell whether the IOMMU checks the interrupts of devices; None where files do not tell (not x86).

    Intel's and AMD's drivers remap all interrupts or none, and put IR- before the names of the chips
    then (arch/x86/kernel/apic/io_apic.c, apic/msi.c); the first of the old fixed interrupts tells.
    """
    if any(name.startswith(("dmar", "ivhd")) for name in host.entries("/sys/class/iommu")):
        for number in range(16):
            chip = host.known(f"/sys/kernel/irq/{number}/chip_name")
            if chip.endswith("IO-APIC"):
                return chip.startswith("IR-")
    return None


def allows_unsafe_interrupts(host: Host) -> bool:
    """Tell whether an admin let VFIO do without interrupt remapping."""
    return any(_is_on(host, module, _UNSAFE) for module in ("vfio_iommu_type1", "iommufd"))


def _is_on(host: Host, module: str, parameter: str) -> bool:
    """Tell whether a module's switch is on, or may be once it is loaded."""
    file = f"/sys/module/{module}/parameters/{parameter}"
    if host.exists(file):
        return host.known(file) == "Y"
    places = ("/proc/cmdline", *(f"{d}/{n}" for d in _MODPROBE_D for n in host.entries(d)))
    return any(parameter in host.get(place) for place in places)


def _region_kinds(host: Host, group: str) -> set[str]:
    """Return the kinds of a group's reserved regions; 'direct-relaxable' ones are in nobody's way."""
    lines = host.known(f"{GROUPS}/{group}/reserved_regions").splitlines()
    return {line.split()[2] for line in lines if len(line.split()) > 2}


def _modules(host: Host, which: str) -> str:
    """Return one of depmod's lists for the running kernel."""
    return host.known(f"/lib/modules/{host.known('/proc/sys/kernel/osrelease')}/modules.{which}")
