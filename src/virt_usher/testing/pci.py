"""A PCI bus with drivers and IOMMU groups, as drivers/pci and drivers/vfio keep them.

    host = PciHost(tmp_path).driver("e1000e", ids=["8086:10d3"]).device("0000:01:00.0", "8086:10d3", "e1000e")

All of it is in files, so the hook's processes and the test see one bus.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from virt_usher.testing.fake import _PID_MAX, FakeHost
from virt_usher.testing.tree import Tree

BUS = "/sys/bus/pci"
GROUPS = "/sys/kernel/iommu_groups"
UNSET = "(null)"
CONSOLE = "/sys/class/vtconsole/vtcon1"
_NODES = {"drm": "dri/", "accel": "accel/", "graphics": ""}
NO_DMA = ("pci-stub", "pcieport")  # besides vfio's, the drivers with driver_managed_dma
_DEVICE_FILE = re.compile(
    rf"{BUS}/devices/([^/]+)/(driver_override|driver/unbind|sriov_numvfs|power/control)"
)
_DRIVER_FILE = re.compile(rf"{BUS}/drivers/([^/]+)/(bind|unbind)")
_MODPROBE = """#!/bin/sh
# Load what the test said is on disk: .kernel/module.NAME holds the driver's name.
root=${0%/sbin/modprobe}
for module; do :; done
[ -e "$root/.kernel/module.$module" ] || {
    echo "modprobe: FATAL: Module $module not found in directory /lib/modules"
    exit 1
}
read -r driver <"$root/.kernel/module.$module"
mkdir -p "$root/sys/bus/pci/drivers/$driver"
cd "$root/sys/bus/pci/drivers/$driver" || exit 1
: >bind; : >unbind
chmod 200 bind unbind
"""


class PciBus(Tree):
    """PCI functions, their drivers, and what binding and unbinding does."""

    # -- building

    def driver(self, name: str, ids: Iterable[str] = (), loaded: bool = True, module: str = "") -> Self:
        """Add a driver that knows devices by vendor:device; not loaded, its module is on the disk."""
        self.hide(f"ids.{name}", " ".join(ids))
        self.hide(f"module.{module or name}", name)
        self.file("/sbin/modprobe", _MODPROBE, 0o755)
        if not self.exists(f"{BUS}/drivers_probe"):
            self.file(f"{BUS}/drivers_probe", mode=0o200)
        if loaded:
            for file in ("bind", "unbind"):
                self.file(f"{BUS}/drivers/{name}/{file}", mode=0o200)
        return self

    def device(
        self,
        address: str,
        id: str = "8086:10d3",  # noqa: A002  # what lspci calls it
        driver: str = "",
        *,
        kind: str = "020000",
        group: int | None = None,
        under: str = "",
        override: str = UNSET,
        vfs: int | None = None,
        **files: str,
    ) -> Self:
        """Add a function below a bridge (`under`), with a driver bound; `kind` is its class.

        `group` defaults to the number of its bus; -1 is a host without IOMMU. More `files` by name.
        """
        vendor, device = id.split(":")
        above = "pci0000:00" + (f"/{under}" if under else "")
        real = f"/sys/devices/{above}/{address}"
        config = bytearray(64)
        config[0:4] = bytes.fromhex(vendor)[::-1] + bytes.fromhex(device)[::-1]
        config[0x0E] = 1 if kind.startswith("0604") else 0
        for name, text in {"vendor": f"0x{vendor}", "device": f"0x{device}", "class": f"0x{kind}"}.items():
            self.file(f"{real}/{name}", text, 0o444)
        Path(self.path(f"{real}/config")).write_bytes(config)
        ids = f"pci:v0000{vendor.upper()}d0000{device.upper()}sv0000{vendor.upper()}sd00000000"
        alias = f"{ids}bc{kind[:2].upper()}sc{kind[2:4].upper()}i{kind[4:].upper()}"
        self.file(f"{real}/modalias", alias, 0o444)
        self.file(f"{real}/driver_override", override)
        self.file(f"{real}/power/control", "on")
        self.file(f"{real}/d3cold_allowed", "1")
        if vfs is not None:
            self.file(f"{real}/sriov_numvfs", str(vfs))
        for name, text in files.items():
            self.file(f"{real}/{name}", text)
        self.link_to(f"{BUS}/devices/{address}", f"../../../devices/{above}/{address}")
        number = int(address.split(":")[1], 16) if group is None else group
        if number >= 0:
            self.link_to(f"{real}/iommu_group", f"../../../kernel/iommu_groups/{number}")
            self.link_to(f"{GROUPS}/{number}/devices/{address}", f"../../../../devices/{above}/{address}")
        if driver:
            if not self.exists(f"{BUS}/drivers/{driver}"):
                self.driver(driver, [id])
            with self.step():
                self._attach(address, driver)
        return self

    def hangs_on(
        self, address: str, kind: str, name: str, below: str = "", /, node: str = "", **files: str
    ) -> Self:
        """Let a member of a class (net, block, drm, sound, input) hang on a device.

        `node` is the character device's below /dev; that of a graphics card comes by itself.
        """
        real = f"{self.real(address)}/{below or kind}/{name}"
        if kind in _NODES and "-" not in name:  # not a connector
            node = _NODES[kind] + name
        for file, text in {"uevent": f"DEVNAME={node}" if node else "", **files}.items():
            self.file(f"{real}/{file}", text)
        if node:
            self.link_to(_number(kind, name), "../.." + real.removeprefix("/sys"))
        return self.link_to(f"/sys/class/{kind}/{name}", "../.." + real.removeprefix("/sys"))

    def framebuffer(self, address: str, name: str = "fb0") -> Self:
        """Let the driver of a device make a framebuffer; the text console is on the first."""
        self.hide(f"fb.{address}", name)
        with self.step():
            self._framebuffer(address)
        return self

    def unplug(self, address: str) -> None:
        """Let a device vanish, as hot-unplug does."""
        if self.driver_of(address):
            with self.step():
                self._detach(address)
        with self.step():
            group = self.link(f"{BUS}/devices/{address}/iommu_group")
            self._remove(f"{GROUPS}/{group}/devices/{address}")
            real = self.real(address)
            self._remove(f"{BUS}/devices/{address}")
            shutil.rmtree(self.path(real))

    # -- looking

    def real(self, address: str) -> str:
        """Return where a device really is in /sys."""
        return os.path.normpath(f"{BUS}/devices/{self.target(f'{BUS}/devices/{address}')}")

    def driver_of(self, address: str) -> str:
        """Return the bound driver, or ''."""
        return self.link(f"{BUS}/devices/{address}/driver")

    def state(self, address: str) -> tuple[str, str]:
        """Return driver and override of a device."""
        return self.driver_of(address), self.read(f"{BUS}/devices/{address}/driver_override")

    # -- other programs

    def runs(self, comm: str, *nodes: str, guest: str = "", cgroup: str = "", parent: int = 1) -> int:
        """Let a process run that has device nodes open; returns its pid."""
        pid = max([_PID_MAX, *(int(e) for e in self.entries("/proc") if e.isdigit())]) + 1
        words = [comm, *(["-name", f"guest={guest},debug-threads=on"] if guest else []), ""]
        self.file(f"/proc/{pid}/stat", f"{pid} ({comm}) S {parent} " + " ".join(["0"] * 17) + f" {pid} 0")
        self.file(f"/proc/{pid}/comm", comm)
        self.file(f"/proc/{pid}/cmdline", "\0".join(words))
        self.file(f"/proc/{pid}/cgroup", f"0::{cgroup}")
        for number, node in enumerate(nodes):
            self.link_to(f"/proc/{pid}/fd/{number}", node)
        return pid

    def logs_in(self, number: int, starter: str = "/init.scope", **about: str) -> None:
        """Let logind have a session whose leader was started by a process of a cgroup, as gdm's is."""
        leader = self.runs("worker", parent=self.runs("starter", cgroup=starter))
        words = {"UID": "1000", "USER": "jo", "CLASS": "user", "SEAT": "seat0", "LEADER": str(leader)} | about
        lines = [f"{key}={value}" for key, value in words.items() if value]
        self.file(f"/run/systemd/sessions/{number}", "\n".join(lines))

    def ends(self, pid: int) -> None:
        """Let a process end."""
        shutil.rmtree(self.path(f"/proc/{pid}"))

    def libvirt_detaches(self, address: str, driver: str = "vfio-pci") -> None:
        """Do what libvirt does for a managed device at start (virPCIDeviceBindToStub)."""
        if self.driver_of(address) == driver:
            self.hide(f"unbind_from_stub.{address}", "")  # and at the end it leaves it as it is
            return
        self.hide(f"unbind_from_stub.{address}", "yes")
        self.write(f"{BUS}/devices/{address}/driver_override", driver)
        self._rebind(address)
        assert self.driver_of(address) == driver

    def libvirt_reattaches(self, address: str) -> None:
        """Do what libvirt does at the end, before it calls `release` (virPCIDeviceUnbindFromStub)."""
        if self.hidden(f"unbind_from_stub.{address}"):
            self.write(f"{BUS}/devices/{address}/driver_override", "")
            self._rebind(address)
            self.hide(f"unbind_from_stub.{address}", "")

    def _rebind(self, address: str) -> None:
        if self.driver_of(address):
            self.write(f"{BUS}/devices/{address}/driver/unbind", address)
        self.write(f"{BUS}/drivers_probe", address)

    # -- the kernel

    def store(self, path: str, value: str) -> None:
        text = value.strip()
        if m := _DEVICE_FILE.fullmatch(path):
            if m[2] == "driver/unbind":
                self._unbind(self.driver_of(m[1]), text)
            elif m[2] == "driver_override":
                assert text != UNSET, "that would be a driver called (null), which reads like none"
                with self.step():
                    self.put(path, text or UNSET)  # driver_override_store: a newline alone clears it
            elif m[2] == "power/control" and text not in ("on", "auto"):
                raise OSError(errno.EINVAL, "on or auto")
            else:
                super().store(path, text)
        elif m := _DRIVER_FILE.fullmatch(path):
            if m[2] == "unbind":
                self._unbind(m[1], text)
            else:
                self._bind(m[1], text)
        elif path == f"{CONSOLE}/bind" and self.hidden("console_stays"):
            return  # store_bind in vt.c reports success whatever came of it
        elif path == f"{BUS}/drivers_probe":
            self._probe(text)
        else:
            super().store(path, value)

    def _unbind(self, driver: str, address: str) -> None:
        if self.driver_of(address) != driver:
            raise OSError(errno.ENODEV, "not bound to that driver")
        while self._is_vfio(driver) and self.opened(address):
            time.sleep(0.01)  # vfio_unregister_group_dev waits for the user, forever
        with self.step():
            self._detach(address)

    def _bind(self, driver: str, address: str) -> None:
        with self.step():  # the device's lock: it cannot go between a check and the probe
            if (
                not address
                or not self.exists(f"{BUS}/devices/{address}/vendor")
                or not self._matches(driver, address)
            ):
                raise OSError(errno.ENODEV, "no match")
            if self.driver_of(address):
                raise OSError(errno.EBUSY, "bound already")
            if number := self._refuses(driver, address):
                raise OSError(number, "probe failed")
            self._attach(address, driver)

    def _probe(self, address: str) -> None:
        """Bind whatever driver matches; that none does, or that its probe fails, is no error."""
        with self.step():
            if not self.exists(f"{BUS}/devices/{address}/vendor"):
                raise OSError(errno.ENODEV, "no such device")
            if self.driver_of(address):
                return
            if self.opened(address):
                raise OSError(errno.EINVAL, "its group is claimed")
            for driver in self.entries(f"{BUS}/drivers"):
                if self._matches(driver, address) and not self._refuses(driver, address):
                    self._attach(address, driver)
                    return

    def _matches(self, driver: str, address: str) -> bool:
        """pci_match_device: an override names the only one; else the ids decide."""
        override = self.read(f"{BUS}/devices/{address}/driver_override")
        if override != UNSET:
            return override == driver
        return self._id(address) in self.hidden(f"ids.{driver}").split()

    def _refuses(self, driver: str, address: str) -> int:
        """Return the errno of a driver's probe, or 0."""
        device = f"{BUS}/devices/{address}"
        if told := self.hidden(f"probe.{driver}.{address}"):
            return int(told)
        if self._is_vfio(driver):
            if self.read(f"{device}/class")[2:6] == "0604":
                return errno.EINVAL
            return errno.EBUSY if self.number(f"{device}/sriov_numvfs") else 0
        return errno.EBUSY if driver not in NO_DMA and self.opened(address) else 0

    def opened(self, address: str) -> bool:
        """Tell whether a process has the device's IOMMU group open."""
        group = self.link(f"{BUS}/devices/{address}/iommu_group")
        return any(
            self.target(f"/proc/{pid}/fd/{fd}") == f"/dev/vfio/{group}"
            for pid in self.entries("/proc")
            if pid.isdigit() and group
            for fd in self.entries(f"/proc/{pid}/fd")
        )

    def _id(self, address: str) -> str:
        device = f"{BUS}/devices/{address}"
        return f"{self.read(f'{device}/vendor')[2:]}:{self.read(f'{device}/device')[2:]}"

    def _is_vfio(self, driver: str) -> bool:
        return "vfio" in driver

    def _attach(self, address: str, driver: str) -> None:
        real = self.real(address)
        depth = real.count("/") - 1
        self._link(f"{real}/driver", "../" * depth + f"bus/pci/drivers/{driver}")
        self._link(f"{BUS}/drivers/{driver}/{address}", "../../../../" + real.removeprefix("/sys/"))
        if self._is_vfio(driver):
            self.put(f"{real}/power/control", "auto")  # vfio_pci_core_register_device
            self._folder(f"{real}/vfio-dev/vfio0")
            self._group_node(address)
        else:
            self._framebuffer(address)

    def _detach(self, address: str) -> None:
        driver = self.driver_of(address)
        self._remove(f"{BUS}/drivers/{driver}/{address}")
        self._remove(f"{self.real(address)}/driver")
        if self._is_vfio(driver):
            self.put(f"{self.real(address)}/power/control", "on")  # vfio_pci_core_unregister_device
            shutil.rmtree(self.path(f"{self.real(address)}/vfio-dev"), ignore_errors=True)
            self._group_node(address)
        else:
            self._no_framebuffer(address)

    def _framebuffer(self, address: str) -> None:
        """With the first framebuffer of all, fbcon registers and takes the console (do_fbcon_takeover)."""
        if name := self.hidden(f"fb.{address}"):
            self.hangs_on(address, "graphics", name, name="a-drmdrmfb")
            if not self.exists(CONSOLE):
                self.file(f"{CONSOLE}/name", "(M) frame buffer device", 0o444)
                self.file(f"{CONSOLE}/bind", "1")

    def _no_framebuffer(self, address: str) -> None:
        """The console goes to the dummy with its framebuffer, and fbcon goes with the last (6.12)."""
        if name := self.hidden(f"fb.{address}"):
            names = self.entries("/sys/class/graphics")
            self._remove(f"/sys/class/graphics/{name}")
            self._remove(_number("graphics", name))
            shutil.rmtree(self.path(f"{self.real(address)}/graphics"))
            if names == [name]:
                shutil.rmtree(self.path(CONSOLE))
            elif names[0] == name:
                self.put(f"{CONSOLE}/bind", "0")

    def _group_node(self, address: str) -> None:
        """/dev/vfio/GROUP is there as long as one of the group is on a vfio driver."""
        group = self.link(f"{BUS}/devices/{address}/iommu_group")
        members = self.entries(f"{GROUPS}/{group}/devices")
        node = Path(self.path(f"/dev/vfio/{group}"))
        if any(self._is_vfio(self.driver_of(m)) for m in members):
            node.parent.mkdir(parents=True, exist_ok=True)
            node.touch()
        else:
            node.unlink(missing_ok=True)

    def _folder(self, path: str) -> None:
        """Make a folder and its parent, whatever the umask of the process whose write this is."""
        for folder in (os.path.dirname(path), path):
            Path(self.path(folder)).mkdir(exist_ok=True)
            os.chmod(self.path(folder), 0o755)  # noqa: S103  # as in sysfs

    def _link(self, path: str, target: str) -> None:
        os.symlink(target, self.path(path))

    def _remove(self, path: str) -> None:
        Path(self.path(path)).unlink(missing_ok=True)


def _number(kind: str, name: str) -> str:
    """Return where a character device is by its number; only the kernel cares which one."""
    return f"/sys/dev/char/{kind}:{name}"


class PciHost(PciBus, FakeHost):
    """The fake host with a PCI bus. What its first process has mounted is its own too."""

    def path(self, path: str) -> str:
        return self.root + path if path in ("/proc/1", "/proc/1/mountinfo") else super().path(path)
