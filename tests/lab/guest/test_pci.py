"""The plugin pci on a real kernel: devices go to the domain and come back as they were."""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import signal
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.lab import machine
from tests.lab.guest import kernel, usher
from tests.lab.guest.domains import Domain, run, virsh, wait_for

pytestmark = pytest.mark.product
VTCONSOLES = Path("/sys/class/vtconsole")
# linux/if_pppox.h, linux/ppp-ioctl.h
AF_PPPOX = 24
PPPIOCGCHAN, PPPIOCATTCHAN, PPPIOCCONNECT, PPPIOCNEWUNIT = 0x80047437, 0x40047438, 0x4004743A, 0xC004743E
KNOBS = ("driver_override", "power/control", "d3cold_allowed")
# Alone in their group, or with all of it; each has a reset, so reset_check lets them pass.
PASSED = [("nic",), ("nvme",), ("usb",), ("twin", "twin_second"), ("switched",)]
# Unmanaged they all go the same way: one alone and two in a group stand for the rest.
WAYS = [(roles, True) for roles in PASSED] + [
    pytest.param(roles, False, marks=[] if roles[0] in ("nic", "twin") else pytest.mark.soak)
    for roles in PASSED
]


def address(role: str) -> str:
    return machine.device(role).address


def state() -> dict[str, tuple[str | None, ...]]:
    """Return driver and knobs of every device of the zoo."""
    folders = {d.role: kernel.DEVICES / d.address for d in machine.DEVICES}
    return {
        role: (kernel.driver(folder.name), *((folder / knob).read_text() for knob in KNOBS))
        for role, folder in folders.items()
    }


@pytest.fixture(autouse=True)
def all_comes_back(domain: Domain) -> Iterator[None]:
    """Every test ends with every device as it was."""
    before = state()
    yield
    if domain.state == "running":
        domain.stop()
    usher.given_back(domain)
    assert state() == before


def start(domain: Domain, check: bool = True) -> str:
    """Start a domain that is defined and configured; return what virsh said."""
    return virsh("start", domain.name, check=check).stderr


def refused(domain: Domain) -> str:
    """Try a start that is refused before anything is touched; return what virsh said."""
    before = state()
    said = start(domain, check=False)
    assert domain.state == "shut off"
    assert state() == before
    return said


@pytest.mark.parametrize(
    ("roles", "managed"),
    WAYS,
    ids=lambda v: v[0] if isinstance(v, tuple) else "managed" if v else "unmanaged",
)
def test_passed(domain: Domain, roles: tuple[str, ...], managed: bool) -> None:
    domain.devices, domain.managed, domain.confined = roles, managed, roles == ("nic",)
    start(usher.enable(domain, "pci"))
    assert {kernel.driver(address(r)) for r in roles} == {"vfio-pci"}
    assert all(f'"key":"pci-{address(r)}"' in usher.journal(domain).read_text() for r in roles)


@pytest.mark.smoke
def test_the_admins_own_override_comes_back(domain: Domain) -> None:
    override = kernel.DEVICES / address("nic") / "driver_override"
    override.write_text("e1000e\n")
    try:
        before = state()
        domain.devices = ("nic",)
        start(usher.enable(domain, "pci"))
        assert override.read_text() == "vfio-pci\n"
        domain.stop()
        usher.given_back(domain)
        assert state() == before
    finally:
        override.write_text("\n")


def test_a_driverless_device_stays_driverless(domain: Domain) -> None:
    domain.devices = ("pair", "pair_edu")
    start(usher.enable(domain, "pci"))
    domain.stop()


def test_the_rest_of_the_group(domain: Domain) -> None:
    domain.devices = ("twin",)
    domain.define()
    run("virt-usher", "enable", domain.name, "pci", "group=true")
    start(domain)
    assert kernel.driver(address("twin_second")) == "vfio-pci"


def test_a_group_that_stays_is_named(domain: Domain) -> None:
    domain.devices = ("twin",)
    usher.enable(domain, "pci")
    said = refused(domain)
    assert f"{address('twin')} (8086:10d3) shares IOMMU group " in said
    assert f"{address('twin_second')}, which stays with e1000e" in said


def test_shpchp_blocks_the_group_behind_its_bridge(domain: Domain) -> None:
    """Its bridge has no other use for it than hot-plugging, which nobody does in there."""
    domain.devices = ("pci_nic", "pci_sound")
    bridge = next(b.address for b in machine.BRIDGES if b.name == "pci")
    blocked = kernel.driver(bridge) == "shpchp"
    usher.enable(domain, "pci")
    if blocked:
        unbind = "/sys/bus/pci/drivers/shpchp/unbind"
        assert f"echo {bridge} >{unbind}" in refused(domain)
        Path(unbind).write_text(bridge)
    try:
        start(domain)
        domain.stop()
        usher.given_back(domain)
    finally:
        if blocked:
            Path("/sys/bus/pci/drivers/shpchp/bind").write_text(bridge)


def test_a_program_that_holds_a_graphics_card(domain: Domain) -> None:
    node = next((kernel.DEVICES / address("vga") / "drm").glob("card*")).name
    domain.devices = ("vga",)
    usher.enable(domain, "pci")
    run("virt-usher", "waive", "--every-domain", address("vga"), "display", "a test")
    with open(f"/dev/dri/{node}", "rb"):
        assert f"is in use (/dev/dri/{node}) by python3 (pid {os.getpid()})" in refused(domain)
    Path("/etc/virt-usher/every-domain.toml").unlink()


def test_the_card_with_the_text_console_is_refused(domain: Domain) -> None:
    consoles = {(c / "name").read_text(): (c / "bind").read_text() for c in VTCONSOLES.iterdir()}
    assert [n for n, bound in consoles.items() if "frame buffer" in n and bound == "1\n"], consoles
    role = next(d.role for d in machine.DEVICES if (kernel.DEVICES / d.address / "graphics/fb0").exists())
    domain.devices = (role,)
    usher.enable(domain, "pci")
    run("virt-usher", "waive", domain.name, address(role), "reset", "a test")
    said = refused(domain)
    assert f"{address(role)} (" in said
    assert "the text console (fb0)" in said


def test_a_usb_device_of_a_running_guest(domain: Domain, second_domain: Domain) -> None:
    """The controller it hangs on stays, for as long as the guest has it."""
    keyboard = next((kernel.DEVICES / address("usb")).glob("usb*/[0-9]*-[0-9]*"))
    bus, device = (int((keyboard / n).read_text()) for n in ("busnum", "devnum"))
    source = f"<source><address bus='{bus}' device='{device}'/></source>"
    second_domain.more_devices = f"<hostdev mode='subsystem' type='usb'>{source}</hostdev>"
    second_domain.start()
    domain.devices = ("usb",)
    said = refused(usher.enable(domain, "pci"))
    user = f"qemu-system-x86 (pid {second_domain.pid}, domain 'second')"
    assert f"is in use (/dev/bus/usb/{bus:03}/{device:03}) by {user}" in said
    assert "waive" not in said
    second_domain.stop()
    start(domain)


@pytest.fixture
def disk() -> str:
    path = next((kernel.DEVICES / address("nvme")).glob("nvme/nvme*/nvme*n1")).name
    return f"/dev/{re.sub(r'c[0-9]+', '', path)}"  # nvme0c0n1 is one of the paths to nvme0n1


@contextmanager
def above(disk: str, kind: str) -> Iterator[str]:
    """Put a device of a kind on a disk; yield its node."""
    node, remove = disk, ["true"]
    if kind == "loop":
        node = run("losetup", "--find", "--show", disk).stdout.strip()
        remove = ["losetup", "--detach", node]
    elif kind == "dm":  # called as what is mounted on /lab, which is no disk
        run("dmsetup", "create", "lab", "--table", f"0 65536 linear {disk} 0")
        node, remove = "/dev/mapper/lab", ["dmsetup", "remove", "--retry", "lab"]
    try:
        yield node
    finally:
        run(*remove)


@pytest.mark.parametrize("kind", [pytest.param("itself", marks=pytest.mark.smoke), "loop", "dm"])
def test_a_mounted_disk_is_refused(domain: Domain, tmp_path: Path, disk: str, kind: str) -> None:
    domain.devices = ("nvme",)
    usher.enable(domain, "pci")
    with above(disk, kind) as node:
        run("mkfs.ext4", "-q", "-F", node)
        run("mount", node, str(tmp_path))
        try:
            said = refused(domain)
            assert f"carries what is mounted on {tmp_path}" in said
            assert f"umount {tmp_path}" in said
        finally:
            run("umount", str(tmp_path))


def test_a_disk_with_swap_space_or_part_of_another_is_refused(domain: Domain, disk: str) -> None:
    domain.devices = ("nvme",)
    usher.enable(domain, "pci")
    with above(disk, "dm") as node:
        assert "carries dm-" in refused(domain)
        run("mkswap", node)
        run("swapon", node)
        try:
            assert "carries the swap space /dev/dm-" in refused(domain)
        finally:
            run("swapoff", node)


def test_a_network_card_in_use_is_refused(domain: Domain) -> None:
    name = next((kernel.DEVICES / address("nic") / "net").iterdir()).name
    run("ip", "address", "add", "192.0.2.1/24", "dev", name)
    run("ip", "link", "set", name, "up")
    try:
        domain.devices = ("nic",)
        said = refused(usher.enable(domain, "pci"))
        assert f"is {name}, which is up with an address" in said
        assert f"virt-usher waive {domain.name} {address('nic')} in-use 'REASON'" in said
        run("ip", "route", "add", "default", "via", "192.0.2.2", "dev", name)
        assert f"is {name}, the way of the default route" in refused(domain)
        run("virt-usher", "waive", domain.name, address("nic"), "in-use", "a test")
        start(domain)
    finally:
        run("ip", "address", "flush", "dev", name, check=False)
        run("ip", "link", "set", name, "down", check=False)


@contextmanager
def pppoe(name: str) -> Iterator[str]:
    """Make the kernel's side of a PPPoE session over an interface, as pppd does; yield its own interface."""
    run("modprobe", "-a", "pppoe", "ppp_generic")
    connection = os.open("/dev/ppp", os.O_RDWR)
    channel = os.open("/dev/ppp", os.O_RDWR)
    with socket.socket(AF_PPPOX, socket.SOCK_STREAM) as session:
        # struct sockaddr_pppox (linux/if_pppox.h), which Python's sockets do not know.
        peer = struct.pack("=HI", AF_PPPOX, 0) + struct.pack("!H6s16s", 1, b"\x52\x54\0\0\0\1", name.encode())
        assert ctypes.CDLL(None).connect(session.fileno(), peer, len(peer)) == 0
        number = struct.unpack("i", fcntl.ioctl(session, PPPIOCGCHAN, bytes(4)))[0]
        fcntl.ioctl(channel, PPPIOCATTCHAN, struct.pack("i", number))
        unit = struct.unpack("i", fcntl.ioctl(connection, PPPIOCNEWUNIT, struct.pack("i", -1)))[0]
        fcntl.ioctl(channel, PPPIOCCONNECT, struct.pack("i", unit))
        try:
            yield f"ppp{unit}"
        finally:
            os.close(channel)
            os.close(connection)


def test_a_network_card_below_pppoe_is_refused(domain: Domain) -> None:
    """The card's interface has no address, and nothing in sysfs says what is above it."""
    name = next((kernel.DEVICES / address("nic") / "net").iterdir()).name
    domain.devices = ("nic",)
    usher.enable(domain, "pci")
    run("ip", "link", "set", name, "up")
    try:
        with pppoe(name) as above:
            run("ip", "link", "set", above, "name", "wan")
            run("ip", "address", "add", "192.0.2.1", "peer", "192.0.2.2", "dev", "wan")
            run("ip", "link", "set", "wan", "up")
            assert f"is {name}, a part of wan" in refused(domain)
            run("ip", "route", "add", "default", "dev", "wan")
            assert f"is {name}, the way of the default route through wan" in refused(domain)
        start(domain)
    finally:
        run("ip", "link", "set", name, "down", check=False)


def test_a_second_domain_is_refused_and_the_first_runs_on(domain: Domain, second_domain: Domain) -> None:
    domain.devices = second_domain.devices = ("nic",)
    start(usher.enable(domain, "pci"))
    usher.enable(second_domain, "pci")
    said = start(second_domain, check=False)
    assert f"is held by domain '{domain.name}'" in said
    assert domain.state == "running"
    assert kernel.driver(address("nic")) == "vfio-pci"


@pytest.mark.smoke
def test_qemu_killed(domain: Domain) -> None:
    domain.devices = ("nvme",)
    start(usher.enable(domain, "pci"))
    os.kill(domain.pid, signal.SIGKILL)
    wait_for("the domain to be off", lambda: domain.state == "shut off")


def test_the_daemon_killed_while_a_domain_runs(domain: Domain) -> None:
    domain.devices = ("nic",)
    start(usher.enable(domain, "pci"))
    run("systemctl", "kill", "--signal=KILL", "--kill-whom=main", "libvirtd")
    domain.wait_for_daemon()
    domain.stop()


@contextmanager
def virtual_functions() -> Iterator[str]:
    """Switch a disk's virtual functions on, which no driver gets by itself; yields the first."""
    physical = kernel.DEVICES / address("sriov")
    (physical / "sriov_drivers_autoprobe").write_text("0")
    (physical / "sriov_numvfs").write_text("2")
    try:
        yield (physical / "virtfn0").resolve().name
    finally:
        (physical / "sriov_numvfs").write_text("0")
        (physical / "sriov_drivers_autoprobe").write_text("1")


def test_virtual_functions(domain: Domain, second_domain: Domain) -> None:
    """They are devices of their own; the physical one must stay, and vfio would not have it."""
    with virtual_functions() as first:
        domain.devices, second_domain.devices = ("sriov",), (first,)
        assert "has 2 virtual functions" in refused(usher.enable(domain, "pci"))
        start(usher.enable(second_domain, "pci"))
        assert kernel.driver(first) == "vfio-pci"
        second_domain.stop()
        usher.given_back(second_domain)
        assert kernel.driver(first) is None


@pytest.fixture
def network(domain: Domain) -> Iterator[str]:
    """Make a network out of a card's virtual functions; yields the first, which libvirt gives out first."""
    physical = kernel.DEVICES / address("pool_nic")
    name = next((physical / "net").iterdir()).name
    file = Path("/tmp/network.xml")
    forward = f"<forward mode='hostdev' managed='yes'><pf dev='{name}'/></forward>"
    file.write_text(f"<network><name>functions</name>{forward}</network>")
    (physical / "sriov_numvfs").write_text("2")
    try:
        run("ip", "link", "set", name, "up")  # libvirt tells the functions' addresses by it
        first = (physical / "virtfn0").resolve().name
        # Not just the driver's link: from one that is being loaded libvirt takes no device, silently.
        wait_for("its driver", (kernel.DEVICES / first / "driver/unbind").exists)
        virsh("net-create", str(file))
        yield first
    finally:
        if domain.state == "running":  # the kernel would wait for it
            domain.stop()
        virsh("net-destroy", "functions", check=False)
        run("ip", "link", "set", name, "down")
        (physical / "sriov_numvfs").write_text("0")


NETWORK = "<devices><interface type='network'><source network='functions'/></interface></devices>"


def test_what_comes_out_of_a_network_is_the_domains(domain: Domain, network: str) -> None:
    """libvirt chooses and binds it between `prepare` and `start`, and takes it back before `release`."""
    domain.extra = NETWORK
    start(usher.enable(domain, "pci"))
    assert kernel.driver(network) == "vfio-pci"
    domain.stop()
    usher.given_back(domain)
    wait_for("its driver again", lambda: kernel.driver(network) == "igbvf")


def test_what_comes_out_of_a_network_is_checked_when_start_comes(domain: Domain, network: str) -> None:
    domain.extra = NETWORK
    usher.enable(domain, "pci")
    table = usher.CONFIG / "reset-quirks.tsv"
    table.write_text("8086:10ca\tknown_bad\ta test's\tseen here\tdoes not come back\n")
    try:
        said = start(domain, check=False)
    finally:
        table.unlink()
    assert f"{network} (8086:10ca)" in said
    assert domain.state == "shut off"
    usher.given_back(domain)
    wait_for("its driver again", lambda: kernel.driver(network) == "igbvf")


@pytest.mark.soak
@pytest.mark.parametrize("part", range(5))  # a machine that says nothing for a quarter of an hour is given up
@pytest.mark.parametrize("how", ["managed", "unmanaged"])
def test_fifty_times(domain: Domain, how: str, part: int) -> None:
    domain.devices, domain.managed = ("gpu", "gpu_audio", "nic"), how == "managed"
    usher.enable(domain, "pci")
    for role, problem in (("gpu", "display"), ("gpu_audio", "in-use")):
        run("virt-usher", "waive", domain.name, address(role), problem, "a test")
    before = host()
    for _ in range(5):
        start(domain)
        domain.stop()
        usher.given_back(domain)
        wait_for("the same host", lambda: host() == before, 20)  # drivers and udev name things a little later


def host() -> dict[str, object]:
    """Return what each of many starts might leave a little of."""
    names = {c: sorted(p.name for p in Path(f"/sys/class/{c}").iterdir()) for c in ("net", "drm", "sound")}
    held = sorted(file.name for file in usher.RUN.iterdir() if file.name[0] != ".")
    return {"devices": state(), "names": names, "held": held}
