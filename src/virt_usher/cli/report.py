"""virt-usher report: what virt-usher reads of this host, as one file for a bug report."""

from __future__ import annotations

import glob
import json
import os
from pathlib import Path
from typing import Any

import click

from virt_usher import __version__
from virt_usher.cli import base
from virt_usher.host import Host

VERSION = 1
# All of it is about the machine, nothing about who owns it: no serial numbers, addresses of network
# cards, names of the host or its users. Patterns as glob has them.
FILES = (
    "/proc/meminfo",
    "/proc/sys/kernel/osrelease",
    "/sys/devices/system/cpu/*",
    "/sys/devices/system/cpu/cpu[0-9]*/online",
    "/sys/devices/system/cpu/cpu[0-9]*/topology/*",
    "/sys/devices/system/cpu/cpu[0-9]*/cache/index*/*",
    "/sys/devices/system/cpu/cpufreq/policy*/*",
    "/sys/devices/system/node/*",
    "/sys/devices/system/node/node[0-9]*/cpulist",
    "/sys/devices/system/node/node[0-9]*/meminfo",
    "/sys/devices/system/node/node[0-9]*/hugepages/*/*",
    "/sys/kernel/mm/hugepages/*/*",
    "/sys/kernel/iommu_groups/*/type",
)
LINKS = (
    "/sys/bus/pci/devices/*",
    "/sys/bus/pci_express/drivers/pciehp/*:*",
    "/sys/kernel/iommu_groups/*/devices/*",
)
PCI_FILES = (
    *(
        "vendor",
        "device",
        "subsystem_vendor",
        "subsystem_device",
        "class",
        "revision",
        "modalias",
        "numa_node",
    ),
    *("driver_override", "reset", "reset_method", "boot_vga", "d3cold_allowed", "power/control"),
    *("sriov_numvfs", "sriov_totalvfs", "msi_bus"),
)
PCI_LINKS = ("driver", "driver/module", "iommu_group", "physfn")
HEADER = 64  # bytes of configuration space that anybody may read


@click.command(name="report")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.pass_obj
def command(usher: base.Usher, file: Path) -> None:
    """Write what virt-usher reads of this host to FILE.

    PCI devices, IOMMU groups, reset methods, CPUs, cpufreq, memory nodes and huge pages; no serial
    numbers, network addresses, or names of hosts and users. Attach it to a bug report.
    """
    recorded = record(usher.host)
    with file.open("x", encoding="utf-8") as stream:
        json.dump(recorded, stream, indent=0, sort_keys=True)
    count = len(recorded["links"]) + len(recorded["files"]) + len(recorded["bytes"])
    base.say(f"{file}: {count} files and links of this host. Have a look at it before you send it.")


def record(host: Host) -> dict[str, Any]:
    """Record a host: path -> text of files, path -> target of links, path -> hex of binary files."""
    found: dict[str, Any] = {
        "report": VERSION,
        "virt-usher": __version__,
        "files": {},
        "links": {},
        "bytes": {},
    }
    for pattern in FILES:
        for path in _match(host, pattern):
            _file(host, path, found)
    for pattern in LINKS:
        for path in _match(host, pattern):
            _link(host, path, found)
    for path in _match(host, "/sys/bus/pci/devices/*"):
        real = os.path.realpath(host.path(path))[len(os.path.realpath(host.path("/")).rstrip("/")) :]
        for name in PCI_FILES:
            _file(host, f"{real}/{name}", found)
        for name in PCI_LINKS:
            _link(host, f"{real}/{name}", found)
        with open(host.path(f"{real}/config"), "rb") as stream:
            found["bytes"][f"{real}/config"] = stream.read(HEADER).hex()
    return found


def _match(host: Host, pattern: str) -> list[str]:
    return sorted(p[len(host.root) :] for p in glob.glob(host.path(pattern)))


def _file(host: Host, path: str, found: dict[str, Any]) -> None:
    """Record a file; one that only takes writes is recorded as there, and empty."""
    if os.path.isfile(host.path(path)):
        found["files"][path] = host.get(path)


def _link(host: Host, path: str, found: dict[str, Any]) -> None:
    if os.path.islink(host.path(path)):
        found["links"][path] = os.readlink(host.path(path))
