"""What the kernel says, read by the tests without virt-usher's help."""

from __future__ import annotations

from pathlib import Path

DEVICES = Path("/sys/bus/pci/devices")
NODES = Path("/sys/devices/system/node")
CPUFREQ = Path("/sys/devices/system/cpu/cpufreq")


def driver(address: str) -> str | None:
    """Return the driver that a PCI device is bound to."""
    link = DEVICES / address / "driver"
    return link.resolve().name if link.exists() else None


def group(address: str) -> set[str]:
    """Return the addresses of a device's IOMMU group, bridges left out."""
    members = (DEVICES / address / "iommu_group/devices").resolve().iterdir()
    return {member.name for member in members if not (member / "pci_bus").exists() and not _bridge(member)}


def _bridge(device: Path) -> bool:
    return (device / "class").read_text().startswith("0x0604")


def reset_methods(address: str) -> str | None:
    """Return `reset_method`, None where there is no such file."""
    file = DEVICES / address / "reset_method"
    return file.read_text().strip() if file.exists() else None


def pool(node: int, kib: int = 2048) -> Path:
    """Return the folder of one node's pool of pages of one size."""
    return NODES / f"node{node}/hugepages/hugepages-{kib}kB"


def pages(node: int, kib: int = 2048) -> int:
    """Return how many pages a node's pool has."""
    return int((pool(node, kib) / "nr_hugepages").read_text())


def governors() -> dict[str, str]:
    """Return every cpufreq policy's governor."""
    return {p.name: (p / "scaling_governor").read_text().strip() for p in sorted(CPUFREQ.glob("policy*"))}


def cpu_list(text: str) -> set[int]:
    """Parse "0-1,3"."""
    numbers: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        numbers |= set(range(int(first), int(last or first) + 1))
    return numbers
