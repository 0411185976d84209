"""The effect kind 'module': a kernel module unloaded while domains run.

Any claim will do: the first remembers whether it was loaded and which devices its drivers had, the last one
loads it again and sees that these are back. One module at a time and by rmmod, which never waits: `modprobe
-r` takes along what it thinks is unused. Unloading a driver takes it from all its devices, in use or
not, so who uses them is looked at right before.
"""

from __future__ import annotations

import time

from virt_usher import children, inuse
from virt_usher.effects import KINDS, Kind
from virt_usher.errors import UsherError
from virt_usher.rebind import BUS, UNDO_SECONDS, UNSET, Device, holder, modprobe

TYPE_CHECKING = False  # importing typing would cost release more than all its work
if TYPE_CHECKING:
    from collections.abc import Collection
    from typing import Any

    from virt_usher.host import Host, LiveHost
    from virt_usher.journal import Step

RMMOD = "/sbin/rmmod"
HOUR = 3600.0
PROBED = 5.0  # seconds that a driver which was just loaded may take for its devices: some probe later


class Module(Kind):
    """A module that is to be out of the kernel."""

    @staticmethod
    def before(host: LiveHost, fields: dict[str, Any], others: list[Step]) -> dict[str, Any]:
        name, live = fields["module"], [s for s in others if not s.left]
        if live and not loaded(host, name):
            return {"old": live[-1].data["old"]}
        devices = [[p.rpartition("/")[2], d] for d, p in bound(host, name) if d[:4] == "pci:"]
        return {"old": {"loaded": loaded(host, name), "devices": devices}}

    @staticmethod
    def do(host: LiveHost, step: Step, others: list[Step], deadline: float) -> dict[str, Any]:
        name = step.data["module"]
        if not loaded(host, name):
            return {}
        if found := inuse.settled(step, lambda: _in_use(host, step), deadline):
            raise found
        step.journal.keep_last(sync=True)  # what comes now may take the host down
        # Not given up at the deadline: it would unload after the undo. libvirt is answered all the same.
        status, said = children.run(host, [RMMOD, "--", name], time.monotonic() + HOUR)
        if status or loaded(host, name):
            why = said.splitlines()[-1] if said else f"rmmod ended with {status}"
            raise UsherError(f"the module {name} cannot be unloaded: {why}", f"lsmod | grep {name}")
        return {}

    @staticmethod
    def undo(host: LiveHost, step: Step, others: list[Step]) -> str:
        name, old = step.data["module"], step.data["old"]
        if live := [s for s in others if not s.left]:
            live[-1].inherit(step, found=not live[-1].data["old"]["loaded"])
            return ""
        if not old["loaded"]:
            return ""
        held = {s.data["address"] for s in step.journal.live() if s.kind == "driver"}
        # Tried again later it may meet a domain that got the device without its driver, and gives it back so.
        held |= {a for a, _ in old["devices"] if step.left and holder(host, f"pci-{a}", step.domain)}
        if waits := held.intersection(a for a, _ in old["devices"]):
            raise UsherError(f"{name} waits for {min(waits)}, which is not back yet", "virt-usher recover")
        if not (step.done or step.failed):
            _wait_for_rmmod(host, name)
        if host.known(f"/sys/module/{name}/initstate") == "going":
            raise UsherError(f"{name} is still on its way out of the kernel", "virt-usher recover")
        if not loaded(host, name):
            modprobe(host, name, time.monotonic() + UNDO_SECONDS)
        for address, driver in old["devices"]:
            _bring_back(host, address, driver.removeprefix("pci:"))
        return ""


def loaded(host: Host, name: str) -> bool:
    """Tell whether a module is loaded; what is built into the kernel has no such file."""
    return host.exists(f"/sys/module/{name}/initstate")


def bound(host: Host, name: str) -> list[tuple[str, str]]:
    """Return (bus:driver, path) of each device that a driver of a module has, on any bus."""
    base = f"/sys/module/{name}/drivers"
    links = (
        (d, host.target(f"{base}/{d}/{n}")) for d in host.entries(base) for n in host.entries(f"{base}/{d}")
    )
    return [(driver, path) for driver, path in links if "/devices/" in path]


def mine(host: Host, name: str, own: Collection[str]) -> list[str]:
    """Return those of some PCI devices that would lose their driver, or what is on them its own."""
    paths = [path for _, path in bound(host, name)]
    return [a for a in own if any(f"/{a}/" in f"{p}/" for p in paths)]


def foreign(host: Host, name: str, own: Collection[str]) -> list[str]:
    """Return the devices, other than these PCI devices and what is on them, that would lose their driver."""
    paths = [path for _, path in bound(host, name)]
    return [p.rpartition("/")[2] for p in paths if not any(f"/{a}/" in f"{p}/" for a in own)]


def references(host: Host, name: str) -> int:
    """Return how many uses of a module there are besides those of other modules."""
    count = host.number(f"/sys/module/{name}/refcnt")
    return count - len(host.entries(f"/sys/module/{name}/holders"))


def _in_use(host: Host, step: Step) -> UsherError | None:
    name, own = step.data["module"], step.data["devices"]
    if others := foreign(host, name, own):
        return UsherError(f"{name} drives {others[0]} too, which stays with the host")
    for address in mine(host, name, own):
        waived = {p for a, p in step.data["waived"] if a == address}
        if inuse.released(host, step):
            waived.add("display")
        if found := inuse.by(host, [address], waived):
            return found
    if holders := host.entries(f"/sys/module/{name}/holders"):
        return UsherError(f"the module {name} is used by {', '.join(holders)}", "lsmod")
    if references(host, name):
        return UsherError(f"the module {name} is in use", f"lsmod | grep {name}; lsof /dev")
    return None


def _wait_for_rmmod(host: Host, name: str) -> None:
    """Wait for what a hook that was killed has started: it may not have come to its work yet."""
    end = time.monotonic() + PROBED
    while any(
        host.get(f"/proc/{pid}/cmdline").split("\0")[-3:] == ["--", name, ""]
        and "rmmod" in host.get(f"/proc/{pid}/comm")
        for pid in host.entries("/proc")
        if pid.isdigit()
    ):
        if time.monotonic() > end:
            raise UsherError(f"rmmod {name} is still running", "virt-usher recover")
        time.sleep(0.05)


def _bring_back(host: LiveHost, address: str, driver: str) -> None:
    """See that a device without a driver is with this one again; nobody else's is taken from him."""
    device = Device(host, address)
    end = time.monotonic() + PROBED
    while True:
        if not device.exists or device.driver or device.override not in (UNSET, driver):
            return
        if time.monotonic() >= end:
            break
        time.sleep(0.05)
    if not device.known(driver):
        raise UsherError(f"{address} has no driver: there is no {driver}", f"ls {BUS}/drivers")
    device.bind(driver)


KINDS["module"] = Module
