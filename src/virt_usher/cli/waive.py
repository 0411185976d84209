"""virt-usher waive: write down an exception to one problem of one device."""

from __future__ import annotations

import re

import click

from virt_usher.cli import base
from virt_usher.cli.edit import ConfigFile, warn_if_unknown, who
from virt_usher.config import Waiver
from virt_usher.errors import UsherError
from virt_usher.host import Host

USAGE = "DOMAIN DEVICE PROBLEM REASON"
_ADDRESS = re.compile(r"(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}:[01][0-9a-f]\.[0-7])")


@click.command(name="waive")
@click.argument("words", nargs=-1, metavar=USAGE, shell_complete=base.complete_words)
@click.option("--every-domain", is_flag=True, help="For every domain; give no DOMAIN then.")
@click.option("--device-id", metavar="VENDOR:DEVICE", help="Where the device is not in this host now.")
@click.pass_obj
def command(usher: base.Usher, words: tuple[str, ...], every_domain: bool, device_id: str | None) -> None:
    """Write down an exception to one problem of one device.

    DEVICE is a PCI address such as 0000:01:00.0, PROBLEM the name that the refusal gave, REASON a
    text for whoever reads it later. It binds this card alone: another one at the address is refused.
    """
    usher.need_root()
    rest = list(words)
    name = who(rest, every_domain, USAGE)
    if len(rest) != 3 or not all(rest):
        raise click.UsageError(f"needs {USAGE}; quote a REASON of several words")
    device, problem, reason = rest
    address = _address(device)
    identity = (device_id or _identity(usher.host, address)).lower()
    if wrong := Waiver(address, identity, problem, reason).mistakes():
        raise UsherError("; ".join(wrong.values()), "the refusal names the problem, and lspci -n the device")
    file = ConfigFile(usher.host, name)
    table = file.entry("waive", address, "problem", problem)
    table.update({"device": identity, "problem": problem, "reason": reason})
    warn_if_unknown(usher, name)
    file.write()


def _address(text: str) -> str:
    """Write a PCI address in full, as the kernel does."""
    match = _ADDRESS.fullmatch(text.lower())
    if match is None:
        raise UsherError(f"{text!r} is not a PCI address such as 0000:01:00.0", "lspci -D shows them")
    return f"{match[1] or '0000'}:{match[2]}"


def _identity(host: Host, address: str) -> str:
    """Read vendor:device of what sits at an address."""
    folder = f"/sys/bus/pci/devices/{address}"
    if not host.exists(f"{folder}/vendor"):
        raise UsherError(
            f"this host has no PCI device {address}",
            "lspci -D shows those it has; --device-id VENDOR:DEVICE is for one that is not in it now",
        )
    return ":".join(host.read(f"{folder}/{name}").removeprefix("0x") for name in ("vendor", "device"))
