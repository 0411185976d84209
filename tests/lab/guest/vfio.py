"""What VFIO itself answers: the ioctls of include/uapi/linux/vfio.h, as QEMU uses them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import time
from collections.abc import Iterator

from tests.lab.guest import kernel
from tests.lab.guest.domains import run

_BASE = 0x3B64  # _IO(';', 100)
_SET_IOMMU, _SET_CONTAINER, _GET_DEVICE_FD, _GET_INFO, _HOT_RESET = (_BASE + n for n in (2, 4, 6, 7, 13))
_TYPE1_V2 = 3
_FLAG_RESET = 1


@contextlib.contextmanager
def bound(addresses: list[str], loose: list[str]) -> Iterator[None]:
    """Put devices on vfio-pci and others on no driver; all are back where they were afterwards."""
    run("modprobe", "vfio-pci")
    before = {a: kernel.driver(a) for a in (*addresses, *loose)}
    try:
        for address in before:
            _override(address, "vfio-pci" if address in addresses else "none")
            _unbind(address)
        for address in addresses:
            kernel.DEVICES.parent.joinpath("drivers_probe").write_text(address)
            assert kernel.driver(address) == "vfio-pci"
        yield
    finally:
        for address in before:
            _unbind(address)
            _override(address, "\n")
        for address, driver in before.items():
            if driver:
                kernel.DEVICES.parent.joinpath("drivers", driver, "bind").write_text(address)


def _override(address: str, driver: str) -> None:
    (kernel.DEVICES / address / "driver_override").write_text(driver)


def _unbind(address: str) -> None:
    if kernel.driver(address):
        (kernel.DEVICES / address / "driver/unbind").write_text(address)


@contextlib.contextmanager
def opened(given: list[str]) -> Iterator[tuple[dict[str, int], dict[str, int]]]:
    """Open devices as QEMU does; yields their groups by number, and them by address."""
    with contextlib.ExitStack() as stack:
        container = _open(stack, "/dev/vfio/vfio")
        groups: dict[str, int] = {}
        for one in given:
            number = _group(one)
            if number not in groups:
                groups[number] = _open(stack, f"/dev/vfio/{number}")
                fcntl.ioctl(groups[number], _SET_CONTAINER, bytearray(struct.pack("i", container)))
        fcntl.ioctl(container, _SET_IOMMU, _TYPE1_V2)
        devices = {}
        for one in given:
            name = bytearray(one.encode() + b"\0")
            devices[one] = _device(groups[_group(one)], name)
            stack.callback(os.close, devices[one])
        yield groups, devices


def _device(group: int, name: bytearray) -> int:
    """Get a device; again while somebody else has its lock just then (pci_try_reset_function: EAGAIN)."""
    end = time.monotonic() + 10
    while True:
        try:
            return int(fcntl.ioctl(group, _GET_DEVICE_FD, name))
        except BlockingIOError:
            if time.monotonic() > end:
                raise
        time.sleep(0.1)


def _group(address: str) -> str:
    return (kernel.DEVICES / address / "iommu_group").resolve().name


def resets(address: str, given: list[str]) -> tuple[bool, bool]:
    """Return whether a function reset worked, and whether a hot reset does, with the groups of `given`."""
    with opened(given) as (groups, devices):
        info = bytearray(struct.pack("6I", 24, 0, 0, 0, 0, 0))
        fcntl.ioctl(devices[address], _GET_INFO, info)
        function = bool(struct.unpack("6I", info)[1] & _FLAG_RESET)
        request = struct.pack(f"3I{len(groups)}i", 12 + 4 * len(groups), 0, len(groups), *groups.values())
        try:
            fcntl.ioctl(devices[address], _HOT_RESET, bytearray(request))
        except OSError:
            return function, False
        return function, True


def _open(stack: contextlib.ExitStack, path: str) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    return fd
