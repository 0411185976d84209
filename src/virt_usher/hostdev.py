"""Which PCI devices of the host a domain's XML gives to it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from lxml import etree

from virt_usher.errors import UsherError

_QEMU = "{http://libvirt.org/schemas/domain/qemu/1.0}"
_ADDRESS = re.compile(r"(?:([0-9a-f]{1,8}):)?([0-9a-f]{1,2}):([0-9a-f]{1,2})(?:\.([0-7]))?", re.IGNORECASE)
_DRIVERS = ("vfio-pci", "vfio-pci-nohotplug")


@dataclass(frozen=True)
class PciHostdev:
    """A PCI device of the host that a domain gets.

    `address` is the kernel's spelling, dddd:bb:dd.f; `managed` tells whether libvirt detaches and
    reattaches it; `given` is how: hostdev, interface, disk or commandline; `driver` is the one that
    <driver model=> names, or ''.
    """

    address: str
    managed: bool
    given: str
    driver: str = ""


def canonical(text: str) -> str:
    """Return a PCI address as the kernel spells it: 1:A.0 is 0000:01:0a.0; '' for anything else."""
    match = _ADDRESS.fullmatch(text.strip())
    if not match:
        return ""
    domain, bus, slot, function = (int(part or "0", 16) for part in match.groups())
    return _spell(domain, bus, slot, function)


def _spell(domain: int, bus: int, slot: int, function: int) -> str:
    # %04x: domains beyond 0xffff (Intel VMD) have more digits
    return f"{domain:04x}:{bus:02x}:{slot:02x}.{function:x}" if slot < 32 else ""


def pci_devices(domain: etree._Element) -> Iterator[PciHostdev]:
    """Yield each host device once, in the XML's order; UsherError where an address makes no sense."""
    seen = set()
    for device in (*_of_devices(domain), *_of_commandline(domain)):
        if device.address not in seen:
            seen.add(device.address)
            yield device


def _of_devices(domain: etree._Element) -> Iterator[PciHostdev]:
    """Read <devices>: only below <source> is an address the host's; the device's own is the guest's."""
    for device in domain.iterfind("devices/*"):
        kind = (device.tag, device.get("type"))
        if kind in (("hostdev", "pci"), ("interface", "hostdev")):
            for address in device.iterfind("source/address"):
                if address.get("type", "pci") == "pci":
                    managed, driver = device.get("managed") == "yes", device.find("driver")
                    model = driver.get("model", "") if driver is not None and kind[0] == "hostdev" else ""
                    yield PciHostdev(_from_xml(address), managed, str(device.tag), model)
        elif device.tag == "disk":
            # An NVMe controller that QEMU drives itself, through VFIO (virHostdevPrepareNVMeDisks);
            # the disk may be a mirror's or a backing file's as well.
            for source in device.iter("source"):
                for address in source.iterfind("address") if source.get("type") == "pci" else ():
                    yield PciHostdev(_from_xml(address), source.get("managed") == "yes", "disk")


def _from_xml(element: etree._Element) -> str:
    """Read an address as libvirt does (virPCIDeviceAddressParseXML): C's numbers, absent is 0."""
    numbers = []
    for name in ("domain", "bus", "slot", "function"):
        text = element.get(name, "0").strip().lower()
        base = 16 if text.startswith("0x") else 8 if text.startswith("0") else 10
        try:
            numbers.append(int(text, base))
        except ValueError:
            raise UsherError(f"<address {name}={text!r}> of a host device is no number of C's") from None
    if address := canonical("{:x}:{:x}:{:x}.{:x}".format(*numbers)):
        return address
    raise UsherError(f"<address> {etree.tostring(element).decode().strip()} is no PCI address")


def _of_commandline(domain: etree._Element) -> Iterator[PciHostdev]:
    """Read -device vfio-pci of <qemu:commandline>; `host` is the address, `sysfsdev` its directory."""
    arguments = [a.get("value", "") for a in domain.iterfind(f"{_QEMU}commandline/{_QEMU}arg")]
    for argument, following in zip(arguments, [*arguments, ""][1:], strict=True):
        option, joined, _ = argument.strip().replace("=", " ", 1).partition(" ")
        if option.startswith("-") and option.lstrip("-") == "device":
            properties = _properties(argument.strip()[len(option) + 1 :] if joined else following)
            if properties.get("driver") in _DRIVERS:
                folder = properties.get("sysfsdev", "").rstrip("/")
                if address := canonical(properties.get("host") or folder.rpartition("/")[2]):
                    yield PciHostdev(address, False, "commandline")


def _properties(value: str) -> dict[str, str]:
    """Read QEMU's two ways to write properties: driver,key=value,… with ',,' for a comma, and JSON."""
    value = value.strip()
    if value.startswith("{"):
        for text in (value, value.replace("'", '"')):  # QEMU takes single quotes too
            try:
                found = json.loads(text)
                return {str(k): str(v) for k, v in found.items()}
            except ValueError:
                continue
        return {}
    words = [w.replace("\0", ",") for w in value.replace(",,", "\0").split(",")]
    pairs = [w.partition("=") for w in words]
    named = {key.strip(): text for key, equals, text in pairs if equals}
    return {"driver": words[0].strip(), **named} if "=" not in words[0] else named
