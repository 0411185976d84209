"""Which other programs move PCI devices between drivers on this host."""

from __future__ import annotations

from collections.abc import Iterator

from virt_usher.cli.checks import Check, ok, warning
from virt_usher.host import Host

DRIVERCTL = "/etc/driverctl.d"  # one file per device, which holds the driver's name
SUPERGFX = "/etc/supergfxd.conf"
VDSM = "/etc/vdsm"


def check(host: Host) -> Iterator[Check]:
    """Look for their settings; docs/pci.md says who gets along with whom."""
    for address in host.entries(DRIVERCTL):
        driver = host.get(f"{DRIVERCTL}/{address}")
        yield ok("driverctl", f"{address} is meant for {driver}, which is what it comes back to")
    if host.exists(SUPERGFX):
        text = "supergfxctl switches this laptop's graphics, and may take a card that a domain has"
        yield warning(
            "supergfxctl", text, "do not switch while a domain runs, or give its cards to no domain"
        )
    if host.exists(VDSM):
        text = "vdsm (oVirt) detaches and reattaches the devices of its domains by itself"
        yield warning("vdsm", text, "do not enable the plugins pci, consoles and modules for its domains")
