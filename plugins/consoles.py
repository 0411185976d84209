"""Take the text console off the domain's graphics cards while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from virt_usher import Action, Domain, Host, Note, OneWay, Write, hookimpl
from virt_usher.host import console


@dataclass(frozen=True, eq=False)
class Plugin:
    BEFORE = ("pci",)  # where `enable` puts it
    FILES_ONLY = True  # it ends what pci refuses for

    @hookimpl
    def usher_prepare(self, domain: Domain, host: Host) -> Iterator[Action | Note]:
        given = [d.address for d in domain.pci_devices if host.pci.device(d.address).class_code[:2] == "03"]
        shows = [a for a in given if console.framebuffer(host, a)]
        if given and not shows:
            yield Note(f"the text console is not on {', '.join(given)}")
        bound = console.bound(host) if shows else []
        for path in bound:
            yield Write(path, "0", f"text console ({path.split('/')[-2]})")
        # Old kernels leave these where they are when vfio-pci takes the card.
        for driver, device in (f for a in shows for f in console.firmware(host, a)):
            why = "the firmware's picture is back after the next boot of the host, and not before"
            yield OneWay(f"{console.PLATFORM}/{driver}/unbind", device, why)
