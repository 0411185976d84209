"""Domains for the tests: started and stopped by virsh, looked at and cleared away by its library."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_DNS, uuid5

from tests.lab import machine

import libvirt

libvirt.registerErrorHandler(lambda *_: None, None)  # else each is printed too

# Emulation within an emulation, on a machine that may have other work.
PATIENCE = 180.0
HOOKS = Path("/etc/libvirt/hooks")


def run(*command: str, check: bool = True, timeout: float = PATIENCE) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; its output is in the failure, if it fails."""
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL, check=False
    )
    if check:
        said = f"{done.stdout}{done.stderr}"
        assert done.returncode == 0, f"{' '.join(command)}: status {done.returncode}\n{said}"
    return done


def virsh(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run one virsh command against the system's daemon."""
    return run("virsh", "--quiet", "--connect", "qemu:///system", *arguments, check=check)


@contextmanager
def daemon() -> Iterator[Any]:
    """Talk to the system's daemon; a virsh takes five times as long to come up."""
    connection = libvirt.open("qemu:///system")
    try:
        yield connection
    finally:
        connection.close()


def wait_for(what: str, ready: Callable[[], object], seconds: float = PATIENCE) -> None:
    """Wait until `ready` is true."""
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.5)


@dataclass
class Domain:
    """A domain without a system: its firmware idles, which is enough."""

    name: str
    memory_mib: int = 64
    kind: str = "qemu"
    hugepages: str = ""
    nodeset: str = ""
    vcpus: int = 1
    pins: str = ""
    devices: tuple[str, ...] = ()
    managed: bool = True
    more_devices: str = ""
    extra: str = ""
    # A profile of its own costs a start some five seconds here. The daemon has its profile in any case.
    confined: bool = False
    _defined: str = ""

    def xml(self) -> str:
        """Return the definition."""
        backing = f"<memoryBacking>{self.hugepages}</memoryBacking>" if self.hugepages else ""
        node = (
            f"<numatune><memory mode='strict' nodeset='{self.nodeset}'/></numatune>" if self.nodeset else ""
        )
        pins = "".join(f"<vcpupin vcpu='{n}' cpuset='{self.pins}'/>" for n in range(self.vcpus))
        tune = f"<cputune>{pins}</cputune>" if self.pins else ""
        label = "" if self.confined else "<seclabel type='none' model='apparmor'/>"
        hostdevs = "".join(self._hostdev(role) for role in self.devices)
        return f"""\
<domain type='{self.kind}'><name>{self.name}</name><uuid>{uuid5(NAMESPACE_DNS, self.name)}</uuid>
<memory unit='MiB'>{self.memory_mib}</memory><vcpu>{self.vcpus}</vcpu>
{backing}{tune}{node}<os><type arch='x86_64' machine='q35'>hvm</type></os><features><acpi/></features>
<devices><memballoon model='none'/>{hostdevs}{self.more_devices}</devices>{label}{self.extra}</domain>"""

    def _hostdev(self, role: str) -> str:
        managed = "yes" if self.managed else "no"
        source = f"<source>{_address(role)}</source>"
        return f"<hostdev mode='subsystem' type='pci' managed='{managed}'>{source}</hostdev>"

    def define(self) -> Domain:
        """Make the domain known to libvirt."""
        if self._defined != (xml := self.xml()):
            with daemon() as connection:
                connection.defineXML(xml)
            self._defined = xml
        return self

    def start(self, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Define and start it."""
        self.define()
        return virsh("start", self.name, check=check)

    def stop(self) -> None:
        """Pull its plug."""
        virsh("destroy", self.name)

    def wait_for_daemon(self) -> None:
        """Wait until a libvirt that came back has the monitor: a stop before that is "not running"."""
        monitor = ("qemu-monitor-command", self.name, "--hmp", "info status")
        wait_for("the guest's monitor", lambda: "running" in virsh(*monitor, check=False).stdout)

    @property
    def state(self) -> str:
        """What libvirt says of it, in virsh's words; '' if it does not know it, or does not answer."""
        words = {libvirt.VIR_DOMAIN_RUNNING: "running", libvirt.VIR_DOMAIN_SHUTOFF: "shut off"}
        with suppress(libvirt.libvirtError), daemon() as connection:
            state, _ = connection.lookupByName(self.name).state()
            return words.get(state, f"state {state}")
        return ""

    @property
    def pid(self) -> int:
        """The QEMU process of a running domain."""
        return int(Path(f"/run/libvirt/qemu/{self.name}.pid").read_text())

    def remove(self) -> None:
        """Leave nothing of it."""
        with suppress(libvirt.libvirtError), daemon() as connection:
            known = connection.lookupByName(self.name)
            with suppress(libvirt.libvirtError):  # it does not run
                known.destroy()
            known.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE)
        self._defined = ""
        Path(f"/etc/virt-usher/domains/{self.name}.toml").unlink(missing_ok=True)


def _address(role: str) -> str:
    """Return libvirt's words for a device of the table, or for an address of its own (0000:07:00.1)."""
    short = role.removeprefix("0000:") if ":" in role else machine.device(role).short
    bus, slot, function = short.replace(".", ":").split(":")
    return f"<address domain='0x0' bus='0x{bus}' slot='0x{slot}' function='0x{function}'/>"
