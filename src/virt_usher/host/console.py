"""The text console: whether it shows, and on which graphics card, as far as sysfs tells.

Which framebuffer the console is on is the answer to an ioctl of one (FBIOGET_CON2FBMAP), and nothing is
opened here. It starts on the first, and goes to that of the firmware's display if the kernel is built so
(FRAMEBUFFER_CONSOLE_DETECT_PRIMARY): both count; and any, if the kernel was started with a map of its own
(fbcon=map:). Imported by the release side: it imports nothing.
"""

from __future__ import annotations

TYPE_CHECKING = False  # importing typing would cost release more than all its work
if TYPE_CHECKING:
    from virt_usher.host import Host

CONSOLES = "/sys/class/vtconsole"
PLATFORM = "/sys/bus/platform/drivers"
# Drivers of what the firmware left to draw on, and how their framebuffers' names begin.
FIRMWARE = ("efi-framebuffer", "vesa-framebuffer", "simple-framebuffer")
_NAMES = ("EFI", "VESA", "simple")


def bound(host: Host) -> list[str]:
    """Return the `bind` files of the framebuffer consoles that show now; one for all cards."""
    files = [f"{CONSOLES}/{n}" for n in host.entries(CONSOLES)]
    shown = (f for f in files if "frame buffer" in host.known(f"{f}/name"))
    return [f"{f}/bind" for f in shown if host.known(f"{f}/bind") == "1"]


def framebuffer(host: Host, address: str) -> str:
    """Return the framebuffer of a PCI device that the console is on when it shows, or ''."""
    base = "/sys/class/graphics"
    names = [n for n in host.entries(base) if n[:2] == "fb" and n[2:].isdigit()]
    names.sort(key=lambda n: int(n[2:]))
    primary = host.known(f"/sys/bus/pci/devices/{address}/boot_vga") == "1"
    mapped = any(w.startswith("fbcon=") and "map:" in w for w in host.known("/proc/cmdline").split())
    for name in names if primary or mapped else names[:1]:
        if f"/{address}/" in host.target(f"{base}/{name}"):
            return name
    # The firmware's hangs on its card from 6.9 on only.
    if primary and host.known(f"{base}/{names[0]}/name" if names else "").startswith(_NAMES):
        return names[0]
    return ""


def firmware(host: Host, address: str) -> list[tuple[str, str]]:
    """Return (driver, device) of the framebuffers that the firmware left on a PCI device."""
    primary = host.known(f"/sys/bus/pci/devices/{address}/boot_vga") == "1"
    found = []
    for driver in FIRMWARE:
        for name in host.entries(f"{PLATFORM}/{driver}"):
            target = host.target(f"{PLATFORM}/{driver}/{name}")
            if "/devices/" in target and (f"/{address}/" in target or (primary and "/platform/" in target)):
                found.append((driver, name))
    return found
