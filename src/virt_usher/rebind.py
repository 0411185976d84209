"""The effect kind 'driver': one PCI device on another driver while the domain runs.

Part of the release side, loaded when a journal has such a step. It knows sysfs alone: the protocol is
override first, unbind, bind by name, and look at the link, since the kernel reports success for probes that
bound nothing (drivers/base/bus.c: drivers_probe_store). Whatever is interrupted, the next undo reads where
the device stands and goes on from there.
"""

from __future__ import annotations

import contextlib
import errno
import time

from virt_usher import inuse
from virt_usher.effects import KINDS, Kind
from virt_usher.errors import UsherError

TYPE_CHECKING = False  # importing typing would cost release more than all its work
if TYPE_CHECKING:
    from typing import Any

    from virt_usher.host import Host, LiveHost
    from virt_usher.journal import Step

BUS = "/sys/bus/pci"
UNSET = "(null)"  # what an empty driver_override reads as (driver_override_show); never to be written back
NOBODY = "none"  # an override that no driver has: keeps them all away
UDEV_SECONDS = 10.0  # how long a device may wait for udev, which is busy, and for its driver
UNDO_SECONDS = 30.0  # how long an undo waits for modprobe

_WHY = {
    errno.EBUSY: "its IOMMU group is in use, or it has virtual functions (see its sriov_numvfs)",
    errno.EINVAL: "the driver refuses it: a bridge, or on its list of devices that break",
    errno.ENODEV: "the driver does not know such a device",
}


class Driver(Kind):
    """A device's driver: one domain has it, and the driver it had comes back."""

    @staticmethod
    def before(host: LiveHost, fields: dict[str, Any], others: list[Step]) -> dict[str, Any]:
        device = Device(host, fields["address"])
        if others:
            raise UsherError(f"{device.address} is held by {_whose(host, others[0])}", "virt-usher status")
        if not device.exists:
            raise UsherError(f"{device.address} is not there", f"lspci -s {device.address}")
        device.wait_for_its_driver()
        return {
            "id": device.id,
            "driver": device.driver,
            "module": device.module,
            "override": device.override,
            "power": device.get("power/control"),
            "d3cold": device.get("d3cold_allowed"),
        }

    @staticmethod
    def do(host: LiveHost, step: Step, others: list[Step], deadline: float) -> dict[str, Any]:
        device, to = Device(host, step.data["address"]), str(step.data["to"])
        if device.driver != to:
            if not device.known(to):
                modprobe(host, step.data.get("load") or to, deadline)
            if not device.known(to):
                raise UsherError(f"no module has a PCI driver called {to}", "ls /sys/bus/pci/drivers")
            _in_time(device, deadline)
            # What comes now may take the host down: let the next boot say what it was.
            step.journal.keep_last(sync=True)
            if step.data.get("awake"):
                device.set("d3cold_allowed", "0")
            device.aim(to)
            if device.driver != step.data["driver"]:
                now = device.driver or "no driver"
                raise UsherError(f"{device.address} went to {now} meanwhile", "start the domain again")
            waived = {*step.data.get("waived", ()), *(("display",) if inuse.released(host, step) else ())}
            if found := inuse.settled(step, lambda: inuse.by(host, [device.address], waived), deadline):
                raise found
            _in_time(device, deadline)
            device.unbind()
            _in_time(device, deadline)
            device.bind(to)
        if step.data.get("awake"):
            device.set("d3cold_allowed", "0")
            device.set("power/control", "on")  # vfio turns it to auto when it binds
        return {}

    @staticmethod
    def undo(host: LiveHost, step: Step, others: list[Step]) -> str:
        device, data = Device(host, step.data["address"]), step.data
        if not device.exists:
            return f"{device.address} is gone"
        if device.id != data["id"]:
            return f"{device.address} is another device now, {device.id}: left alone"
        back, now, aim = data["driver"], device.driver, data["driver"] or NOBODY
        # Our own marks; and what libvirt's reattach makes of a managed device: its default driver, and no
        # override (virPCIDeviceUnbindFromStub). Before the step was done, libvirt was not there yet.
        managed = data.get("managed") and step.done
        if not back and now in _homes(step):
            back = now  # an undo that failed half-way had let go of it, and its driver was loaded again
        marks = (data["to"], aim, UNSET) if managed else (data["to"], aim)
        remark = ""
        if now != back:
            ours = now in ("", data["to"]) or (managed and (device.override == now or device.on_vfio))
            if not ours and not (managed and device.override in marks):
                remark = f"{device.address} is with {now}, which is not ours any more: left alone"
            else:
                remark = _bring_back(device, back, data)
        if device.override != data["override"]:
            if device.override in marks:
                device.restore(data["override"])
            else:
                remark = remark or f"its driver_override is {device.override!r} and not ours: left alone"
        if device.driver == back:
            device.set("power/control", data["power"])
            device.set("d3cold_allowed", data["d3cold"])
        return remark


def _homes(step: Step) -> set[str]:
    """Return the drivers that a device had before the modules of these were unloaded for its domain."""
    modules = [s.data["old"] for s in step.journal.steps.values() if s.kind == "module"]
    owned = [pair for old in modules for pair in old["devices"]]
    return {driver.removeprefix("pci:") for address, driver in owned if address == step.data["address"]}


def _bring_back(device: Device, back: str, data: dict[str, Any]) -> str:
    """Take a device from where it is to the driver it had; return a remark, or ''.

    Its override keeps all others away meanwhile, `vfio-pci ids=` and udev included.
    """
    if device.driver and (found := inuse.by(device.host, [device.address])):
        raise found
    if back and not device.known(back):
        with contextlib.suppress(UsherError):  # whether it came shows below
            modprobe(device.host, data["module"] or back, time.monotonic() + UNDO_SECONDS)
    if back and not device.known(back):
        device.restore(data["override"])
        if device.driver == data["to"]:
            device.unbind()
        if not device.driver:
            device.host.write(f"{BUS}/drivers_probe", device.address)
        if not device.driver:
            raise UsherError(
                f"{device.address} has no driver: {back}, which it had, is not loaded",
                f"modprobe {data['module'] or back}; virt-usher recover",
            )
        return f"{device.address} is with {device.driver}: {back}, which it had, is not loaded"
    device.aim(back or NOBODY)
    device.unbind()
    if back:
        device.bind(back)
    return ""


class Device:
    """What the kernel shows of one PCI function, and lets be done to it."""

    __slots__ = ("address", "dir", "host")

    def __init__(self, host: LiveHost, address: str) -> None:
        self.host = host
        self.address = address
        self.dir = f"{BUS}/devices/{address}"

    def get(self, name: str) -> str:
        return self.host.known(f"{self.dir}/{name}")

    @property
    def exists(self) -> bool:
        return self.host.exists(f"{self.dir}/vendor")

    @property
    def id(self) -> str:
        return f"{self.get('vendor')}:{self.get('device')}".replace("0x", "")

    @property
    def driver(self) -> str:
        return self.host.link(f"{self.dir}/driver")

    @property
    def module(self) -> str:
        return self.host.link(f"{self.dir}/driver/module")

    @property
    def override(self) -> str:
        # Not get(): an original that could not be read must not pass for none.
        return self.host.read(f"{self.dir}/driver_override") or UNSET

    @property
    def on_vfio(self) -> bool:
        return self.host.exists(f"{self.dir}/vfio-dev") or self.driver == "vfio-pci"

    def known(self, driver: str) -> bool:
        """Tell whether the kernel has a PCI driver of this name now."""
        return self.host.exists(f"{BUS}/drivers/{driver}")

    def set(self, name: str, value: str) -> None:
        """Set an attribute that not every kernel has, if it is not so already."""
        if value and self.get(name) not in ("", value):
            self.host.write(f"{self.dir}/{name}", value)

    def aim(self, driver: str) -> None:
        """Let no driver but this one bind the device from now on (pci_match_device)."""
        if self.override != driver:
            self.host.write(f"{self.dir}/driver_override", driver)

    def restore(self, override: str) -> None:
        """Set the override as it was read; an empty one is written as a newline."""
        self.host.write(f"{self.dir}/driver_override", "" if override == UNSET else override)

    def unbind(self) -> None:
        """Take the device from its driver. May sleep as long as the driver's remove() likes."""
        driver = self.driver
        if not driver:
            return
        try:
            self.host.write(f"{self.dir}/driver/unbind", self.address)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV) or self.driver:
                raise self._error(error, f"cannot be taken from {driver}", "dmesg | tail") from None

    def bind(self, driver: str) -> None:
        """Give the device to a driver, and see that it took it."""
        try:
            self.host.write(f"{BUS}/drivers/{driver}/bind", self.address)
        except OSError as error:
            if self.driver != driver:  # somebody's modprobe may have been first
                hint = f"{_WHY.get(error.errno or 0, 'the driver could not start it')}; dmesg | tail"
                raise self._error(error, f"cannot be given to {driver}", hint) from None
        if self.driver != driver:
            raise UsherError(
                f"{self.address} should be with {driver} now, and is with {self.driver or 'no driver'}",
                "another program handles the device: see docs/pci.md",
            )

    def _error(self, error: OSError, what: str, hint: str) -> UsherError:
        code = errno.errorcode.get(error.errno or 0, str(error.errno))
        return UsherError(f"{self.address} {what}: {error.strerror} ({code})", hint)

    def wait_for_its_driver(self) -> None:
        """Wait while the device's driver may still be about to be loaded, as at boot, or is just being.

        udev's queue file is there as long as it has events to handle. A driver has no `unbind` until it has
        seen all devices that were there when it was loaded (bus_add_driver()).
        """
        end, exists = time.monotonic() + UDEV_SECONDS, self.host.exists
        while not exists(f"{self.dir}/driver/unbind") and (self.driver or exists("/run/udev/queue")):
            if time.monotonic() > end:
                return
            time.sleep(0.05)


def modprobe(host: LiveHost, module: str, deadline: float) -> None:
    """Load a module, by modprobe: nothing in the kernel does it for a driver_override."""
    from virt_usher import children

    status, said = children.run(host, ["/sbin/modprobe", "--", module], deadline)
    if status:
        why = said.splitlines()[-1] if said else f"modprobe ended with {status}"
        raise UsherError(f"the module {module} cannot be loaded: {why}", f"modprobe -v {module}")


def _in_time(device: Device, deadline: float) -> None:
    if time.monotonic() > deadline:
        raise UsherError(
            f"{device.address} could not be taken from its driver in time",
            "virt-usher last shows what took long",
        )


def holder(host: Host, key: str, but: str = "") -> str:
    """Say which domain other than one has a device by its journal, '' if none has."""
    from virt_usher.host import RUN_DIR
    from virt_usher.journal import Journal

    for name in host.entries(RUN_DIR):
        if name.endswith(".jnl") and name[:-4] != but:
            for step in Journal(host, name[:-4]).live():
                if step.key == key:
                    return _whose(host, step)
    return ""


def _whose(host: Host, step: Step) -> str:
    """Say which domain has a device, and what holds it up if its hook was left alone."""
    for record in step.journal.records:
        pid, started = record.get("abandoned", (0, 0))
        if pid and host.started_at(pid) == started:
            where = host.waits_in(pid) or "?"
            return f"domain {step.domain!r}, whose hook (pid {pid}) waits in the kernel in {where}"
    return f"domain {step.domain!r}"


KINDS["driver"] = Driver
