"""PCI functions as the kernel shows them in sysfs, and how they hang together."""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from virt_usher.host import Host

BUS = "/sys/bus/pci"
GROUPS = "/sys/kernel/iommu_groups"
_ADDRESS = re.compile(r"[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_ROOT_BUS = re.compile(r"pci[0-9a-f]{4,}:[0-9a-f]{2}")
# PCI-to-PCI, CardBus and semi-transparent bridges: what has a bus behind it. Host and ISA bridges do not.
_BRIDGES = ("0604", "0607", "0609")


def claim_key(address: str) -> str:
    """Return the key under which a domain holds a device in its journal."""
    return f"pci-{address}"


@dataclass(frozen=True)
class Pci:
    """All PCI functions of a host.

    A snapshot: what was read once is not read again, so that many questions about one bus stay cheap.
    Take a new one (`host.pci`) after something changed.
    """

    host: Host

    def device(self, address: str) -> Device:
        """Return the view on one function, there or not."""
        if address not in self._known:
            self._known[address] = Device(self, address)
        return self._known[address]

    @property
    def devices(self) -> list[Device]:
        """Every function, by address."""
        names = (n for n in self.host.entries(f"{BUS}/devices") if _ADDRESS.fullmatch(n))
        return [self.device(n) for n in sorted(names, key=lambda n: (len(n), n))]

    @cached_property
    def _known(self) -> dict[str, Device]:
        return {}

    def _children(self, folder: str) -> list[str]:
        """Return what hangs below a function or a root bus: functions, or a root bus again (Intel VMD)."""
        if folder not in self._listed:
            names = self.host.entries(folder)
            self._listed[folder] = [n for n in names if _ADDRESS.fullmatch(n) or _ROOT_BUS.fullmatch(n)]
        return self._listed[folder]

    @cached_property
    def _listed(self) -> dict[str, list[str]]:
        return {}

    @cached_property
    def _hotplug(self) -> frozenset[str]:
        # Ports that pciehp drives: only it can reset a slot. /sys/bus/pci/slots shows acpiphp's and
        # shpchp's slots as well, which have no reset_slot.
        names = self.host.entries("/sys/bus/pci_express/drivers/pciehp")
        return frozenset(n.rpartition(":pcie")[0] for n in names if ":pcie" in n)

    def same_bus(self, address: str) -> list[str]:
        """Return the other functions on the same bus, virtual ones included."""
        near = self._children(posixpath.dirname(self.device(address).path))
        return [a for a in near if a != address and a.rpartition(":")[0] == address.rpartition(":")[0]]

    def below(self, bridge: str) -> list[str]:
        """Return every function on the bus behind a bridge and on the buses below that."""
        found, todo = [], [self.device(bridge).path]
        while todo:
            folder = todo.pop()
            here = self._children(folder)
            found += [a for a in here if not a.startswith("pci")]
            todo += [f"{folder}/{n}" for n in here]
        return sorted(found)

    def pciehp(self, bridge: str) -> bool:
        """Tell whether pciehp drives a port, so that its slot can be reset."""
        return bridge in self._hotplug

    def group(self, number: str) -> list[str]:
        """Return the members of an IOMMU group."""
        return self.host.entries(f"{GROUPS}/{number}/devices") if number else []


@dataclass(frozen=True)
class Device:
    """One PCI function; each property is read from sysfs when first asked for."""

    pci: Pci
    address: str

    @cached_property
    def dir(self) -> str:
        """The function's directory in sysfs."""
        return f"{BUS}/devices/{self.address}"

    def _get(self, name: str) -> str:
        # Not get(): a device whose class or id cannot be read must not pass for a harmless one.
        return self.pci.host.known(f"{self.dir}/{name}")

    def _has(self, name: str) -> bool:
        return self.pci.host.exists(f"{self.dir}/{name}")

    def _hex(self, name: str) -> str:
        return self._get(name).removeprefix("0x")

    @cached_property
    def exists(self) -> bool:
        """Whether the kernel has this function now."""
        return self._has("vendor")

    @cached_property
    def id(self) -> str:
        """vendor:device, as the kernel read them when it found the function; '' if it is not there."""
        return f"{self._hex('vendor')}:{self._hex('device')}".strip(":")

    @cached_property
    def class_code(self) -> str:
        """Class, subclass and interface: six hex digits."""
        return self._hex("class").rjust(6, "0")

    @cached_property
    def revision(self) -> str:
        """The revision, two hex digits."""
        return self._hex("revision")

    @cached_property
    def modalias(self) -> str:
        """What modules are matched by."""
        return self._get("modalias")

    @cached_property
    def driver(self) -> str:
        """The name of the bound driver, '' without one."""
        return self.pci.host.link(f"{self.dir}/driver")

    @cached_property
    def driver_override(self) -> str:
        """The only driver that may bind, '' where any may: the kernel shows that as '(null)'."""
        text = self._get("driver_override")
        return "" if text == "(null)" else text

    @cached_property
    def on_vfio(self) -> bool:
        """Whether a vfio driver is bound, vfio-pci or a variant; only these take part in a hot reset."""
        driver = self.driver.replace("_", "-")
        return driver.endswith("vfio-pci") or (driver != "" and self._has("vfio-dev"))

    @cached_property
    def group(self) -> str:
        """The number of its IOMMU group, '' without an IOMMU."""
        return self.pci.host.link(f"{self.dir}/iommu_group")

    @cached_property
    def path(self) -> str:
        """Where it really sits: its directory below that of its bridge."""
        return posixpath.normpath(f"{BUS}/devices/{self.pci.host.target(self.dir)}")

    @cached_property
    def parent(self) -> str:
        """The bridge right above it, '' on a root bus."""
        above = posixpath.basename(posixpath.dirname(self.path))
        return above if _ADDRESS.fullmatch(above) else ""

    @cached_property
    def is_bridge(self) -> bool:
        """Whether a bus lies behind it. vfio-pci refuses those."""
        return self.class_code[:4] in _BRIDGES

    def config(self, size: int = 64) -> bytes:
        """Return the start of config space; the kernel gives more than 64 bytes to root only."""
        try:
            return self.pci.host.read_bytes(f"{self.dir}/config", size)
        except (FileNotFoundError, PermissionError):
            return b""

    @cached_property
    def multifunction(self) -> bool:
        """Whether its header says that the slot has more functions."""
        return bool(self._header & 0x80)

    @cached_property
    def answers(self) -> bool:
        """Whether the hardware answers: reads of a dead function give all ones.

        The header type decides: vendor and device of a virtual function read as all ones too.
        """
        return self._header != 0xFF

    @cached_property
    def _header(self) -> int:
        start = self.config()[:0x0F]
        return start[0x0E] if len(start) == 0x0F else 0  # not readable: nothing is known, so nothing is wrong

    @cached_property
    def physfn(self) -> str:
        """The physical function of a virtual one, else ''."""
        return self.pci.host.link(f"{self.dir}/physfn")

    @cached_property
    def virtual_functions(self) -> int:
        """How many virtual functions are switched on."""
        return int(self._get("sriov_numvfs") or "0")

    @cached_property
    def has_reset(self) -> bool:
        """Whether the kernel shows a `reset` file. That alone proves nothing since 5.15."""
        return self._has("reset")

    @cached_property
    def reset_methods(self) -> tuple[str, ...] | None:
        """What `reset_method` lists; None without that file, as on every kernel before 5.15."""
        if not self._has("reset_method"):
            return None
        return tuple(self._get("reset_method").split())

    @cached_property
    def numa_node(self) -> int | None:
        """Its NUMA node, None where the firmware names none."""
        node = self.pci.host.number(f"{self.dir}/numa_node", -1)
        return node if node >= 0 else None

    @cached_property
    def boot_vga(self) -> bool:
        """Whether it is the display that the firmware chose."""
        return self._get("boot_vga") == "1"

    @cached_property
    def msi(self) -> str:
        """MSI as its capabilities say: 'on', 'off', '' without it (or not seen: only root may look)."""
        config = self.config(256)
        if len(config) < 64 or not config[0x06] & 0x10:  # PCI_STATUS_CAP_LIST
            return ""
        at, states, left = config[0x34] & 0xFC, [], 48
        while 0x40 <= at <= len(config) - 4 and left:
            control = int.from_bytes(config[at + 2 : at + 4], "little")
            if config[at] in (0x05, 0x11):  # PCI_CAP_ID_MSI, PCI_CAP_ID_MSIX
                states.append(control & (1 if config[at] == 0x05 else 1 << 15))
            at, left = config[at + 1] & 0xFC, left - 1
        return ("on" if any(states) else "off") if states else ""
