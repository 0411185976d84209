"""Who uses a device: every sign the host has of it, and none that deceives."""

from __future__ import annotations

import errno
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from virt_usher.host import Host, users
from virt_usher.testing.pci import PciHost

A, B = "0000:01:00.0", "0000:02:00.0"
NVME, NIC, VGA, SOUND, USB = "010802", "020000", "030000", "040300", "0c0330"
ROUTES = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\n"


def make(root: Path, driver: str = "a-driver", kind: str = NVME) -> PciHost:
    return PciHost(root).device(A, "1234:5678", driver, kind=kind, under="0000:00:01.0")


def found(host: PciHost, *addresses: str) -> list[tuple[str, str]]:
    return [(u.problem, u.what) for u in users.find(host, addresses or [A])]


def disk(host: PciHost, name: str = "nvme0n1", number: str = "259:0") -> PciHost:
    """A disk with one partition; /dev/sdb1 of somewhere else is mounted too."""
    host.hangs_on(A, "block", name, f"nvme/nvme0/{name}", dev=number)
    host.hangs_on(A, "block", f"{name}p1", f"nvme/nvme0/{name}/{name}p1", dev="259:1")
    mounts(host, "8:17 / /srv - ext4 /dev/sdb1")
    return host


def mounts(host: PciHost, *lines: str) -> None:
    """Write mountinfo lines: NUMBER ROOT PLACE - KIND SOURCE [OPTIONS]."""
    text = ""
    for i, line in enumerate(lines):
        number, root, place, _, kind, source, *options = line.split(" ")
        text += f"{i + 20} 1 {number} {root} {place} rw,noatime shared:1 - {kind} {source} "
        text += ",".join(["rw", *options]) + "\n"
    host.file("/proc/1/mountinfo", text)


def stack(host: PciHost, above: str, below: str, number: str, **files: str) -> None:
    """Put a dm or md device on a disk."""
    host.file(f"/sys/class/block/{below}/holders/{above}/uevent")
    for file, text in {"dev": number, **files}.items():
        host.file(f"/sys/devices/virtual/block/{above}/{file.replace('__', '/')}", text)
    host.link_to(f"/sys/class/block/{above}", f"../../devices/virtual/block/{above}")


def loop(host: PciHost, name: str, file: str, number: str) -> None:
    """Set up a loop device on a file or on another device."""
    host.file(f"/sys/devices/virtual/block/{name}/dev", number)
    host.file(f"/sys/devices/virtual/block/{name}/loop/backing_file", file)
    host.link_to(f"/sys/class/block/{name}", f"../../devices/virtual/block/{name}")


# -- disks


def on_disk(host: PciHost) -> None:
    mounts(disk(host), "8:17 / / - ext4 /dev/sdb1", "259:0 / /mnt - xfs /dev/nvme0n1")


def on_partition(host: PciHost) -> None:
    mounts(disk(host), "259:1 / /boot - ext4 /dev/nvme0n1p1", "259:1 / /mnt/b\\040c - ext4 /dev/nvme0n1p1")


def on_lvm(host: PciHost) -> None:
    stack(disk(host), "dm-0", "nvme0n1p1", "254:0", dm__name="vg-root")
    mounts(host, "254:0 / / - ext4 /dev/mapper/vg-root")


def on_luks_on_raid(host: PciHost) -> None:
    stack(disk(host), "md0", "nvme0n1", "9:0")
    stack(host, "dm-3", "md0", "254:3", dm__name="secret")
    mounts(host, "254:3 / /home - ext4 /dev/mapper/secret")


def on_btrfs(host: PciHost) -> None:
    """Its number is not the disk's; the source is."""
    mounts(disk(host), "0:31 /@ / - btrfs /dev/nvme0n1p1")


def on_second_disk_of_btrfs(host: PciHost) -> None:
    mounts(disk(host), "0:31 /@ /data - btrfs /dev/sdb1")
    host.file("/sys/fs/btrfs/8f2c/devices/nvme0n1p1/uevent").file("/sys/fs/btrfs/features/raid56")


def on_middle_disk_of_bcachefs(host: PciHost) -> None:
    mounts(disk(host), "0:31 / /data - bcachefs /dev/sda:/dev/nvme0n1p1:/dev/sdb")


def log_of_xfs(host: PciHost) -> None:
    mounts(disk(host), "8:17 / /srv - xfs /dev/sdb1 attr2,logdev=/dev/nvme0n1p1,noquota")


def files_of_xfs_on_lvm(host: PciHost) -> None:
    """As the admin named it: mount(8) does not resolve this one."""
    stack(disk(host), "dm-2", "nvme0n1p1", "254:2")
    host.link_to("/dev/vg/files", "../dm-2")
    mounts(host, "8:17 / /srv - xfs /dev/sdb1 rtdev=/dev/vg/files")


def through_a_loop_device(host: PciHost) -> None:
    loop(disk(host), "loop1", "/var/lib/snapd/snaps/core22.snap", "7:1")
    loop(host, "loop0", "/dev/nvme0n1p1", "7:0")
    mounts(host, "7:1 / /snap/core22 - squashfs /dev/loop1", "7:0 / /srv - ext4 /dev/loop0")


def zfs(host: PciHost, *, label: str = "tank", guid: str = "4242", pool: str = "tank", now: str = "") -> None:
    """What udev found on the disk's partition, and a pool that the host has imported, with its guid."""
    found = f"E:ID_FS_TYPE=zfs_member\nE:ID_FS_LABEL={label}\nE:ID_FS_UUID={guid}"
    disk(host).file("/run/udev/data/b259:1", found).file("/proc/spl/kstat/zfs/arcstats", "13 1 0x01")
    if pool:
        host.file(f"/proc/spl/kstat/zfs/{pool}/state", "ONLINE")
    if now:
        host.file(f"/proc/spl/kstat/zfs/{pool}/guid", now)


def on_zfs(host: PciHost) -> None:
    zfs(host, now="4242")
    mounts(host, "0:40 / /tank - zfs tank/home")


def on_zfs_that_tells_no_guid(host: PciHost) -> None:
    zfs(host)
    mounts(host, "0:40 / /tank - zfs tank/home")


def on_zfs_without_mounts(host: PciHost) -> None:
    zfs(host, now="4242")


def on_zfs_that_was_imported_by_another_name(host: PciHost) -> None:
    zfs(host, label="old", now="4242")


def on_swap(host: PciHost) -> None:
    disk(host).file("/proc/swaps", "Filename\tType\tSize\n/dev/sda2 partition 1\n/dev/nvme0n1p1 partition 1")


def on_multipath(host: PciHost) -> None:
    """The controller has only a hidden path; the disk hangs on the subsystem."""
    host.hangs_on(A, "block", "nvme0c0n1", "nvme/nvme0/nvme0c0n1")
    host.hangs_on(A, "nvme", "nvme0")
    host.link_to(
        "/sys/class/nvme-subsystem/nvme-subsys0/nvme0",
        "../../../pci0000:00/0000:00:01.0/0000:01:00.0/nvme/nvme0",
    )
    host.file("/sys/devices/virtual/nvme-subsystem/nvme-subsys0/nvme0n1/dev", "259:7")
    host.link_to("/sys/class/block/nvme0n1", "../../devices/virtual/nvme-subsystem/nvme-subsys0/nvme0n1")
    mounts(host, "259:7 / / - ext4 /dev/nvme0n1")


DISKS: dict[Callable[[PciHost], None], str] = {
    on_disk: "carries what is mounted on /mnt",
    on_partition: r"carries what is mounted on /boot, /mnt/b\040c",
    on_lvm: "carries what is mounted on /",
    on_luks_on_raid: "carries what is mounted on /home",
    on_btrfs: "carries what is mounted on /",
    on_second_disk_of_btrfs: "carries what is mounted on a btrfs (8f2c)",
    on_middle_disk_of_bcachefs: "carries what is mounted on /data",
    log_of_xfs: "carries what is mounted on /srv",
    files_of_xfs_on_lvm: "carries what is mounted on /srv",
    through_a_loop_device: "carries what is mounted on /srv",
    on_zfs: "carries what is mounted on /tank",
    on_zfs_that_tells_no_guid: "carries what is mounted on /tank",
    on_zfs_that_was_imported_by_another_name: "carries the ZFS pool tank",
    on_zfs_without_mounts: "carries the ZFS pool tank",
    on_swap: "carries the swap space /dev/nvme0n1p1",
    on_multipath: "carries what is mounted on /",
}


@pytest.mark.parametrize("case", DISKS, ids=lambda f: str(f.__name__))
def test_data_is_never_to_be_waived(tmp_path: Path, case: Callable[[PciHost], None]) -> None:
    host = make(tmp_path)
    case(host)
    assert found(host) == [(users.DATA, DISKS[case])]


def test_a_disk_that_nobody_uses(tmp_path: Path) -> None:
    assert not found(disk(make(tmp_path)))


def test_a_stack_without_mounts(tmp_path: Path) -> None:
    host = disk(make(tmp_path))
    stack(host, "md0", "nvme0n1p1", "9:0")
    assert found(host) == [(users.USE, "carries md0")]


@pytest.mark.parametrize("mounted", [True, False])
def test_a_guests_own_pool_of_the_same_name(tmp_path: Path, mounted: bool) -> None:
    zfs(host := make(tmp_path), now="2323")
    mounts(host, "0:40 / / - zfs tank/home" if mounted else "8:17 / / - ext4 /dev/sdb1")
    assert not found(host)


@pytest.mark.parametrize("pool", ["tank", ""])
def test_a_cache_or_a_spare_of_a_pool(tmp_path: Path, pool: str) -> None:
    """Its label names no pool; where the host has none, it is none of the host's."""
    zfs(host := make(tmp_path), label="", guid="", pool=pool)
    assert found(host) == ([(users.USE, "may be a cache or a spare of a ZFS pool")] if pool else [])


def test_a_loop_device_without_a_mount(tmp_path: Path) -> None:
    loop(host := disk(make(tmp_path)), "loop0", "/dev/nvme0n1", "7:0")
    assert found(host) == [(users.USE, "carries loop0")]


@pytest.mark.parametrize("source", ["/dev/sda:/dev/sdb", "/dev/sdb1 logdev=/dev/sdc1"])
def test_other_disks_of_a_mount_are_others(tmp_path: Path, source: str) -> None:
    kind = "xfs" if " " in source else "bcachefs"
    mounts(host := disk(make(tmp_path)), f"0:31 / /data - {kind} {source}")
    assert not found(host)


def test_what_is_called_as_a_disk_is_need_not_be_one(tmp_path: Path) -> None:
    """A 9p's tag, an NFS's path, a file to swap to."""
    host = disk(make(tmp_path)).file("/proc/swaps", "Filename Type\n/srv/nvme0n1 file\n")
    mounts(host, "0:31 / /shared - 9p nvme0n1", "0:32 / /backup - nfs4 nas:/nvme0n1p1")
    assert not found(host)


def test_a_disk_that_a_program_has_open(tmp_path: Path) -> None:
    host = disk(make(tmp_path))
    pid = host.runs("dd", "/dev/nvme0n1")
    assert found(host) == [(users.USE, f"is in use (/dev/nvme0n1) by dd (pid {pid})")]


@pytest.mark.parametrize(
    ("case", "hint"),
    [
        (on_lvm, "the host needs it: give the domain another device"),
        (on_disk, "umount /mnt"),
        (on_zfs, "zpool export tank"),
        (on_zfs_without_mounts, "zpool export tank"),
        (on_swap, "swapoff /dev/nvme0n1p1"),
    ],
)
def test_the_hint_of_a_disk(tmp_path: Path, case: Callable[[PciHost], None], hint: str) -> None:
    case(host := make(tmp_path))
    assert users.find(host, [A])[0].hint == hint


# -- network


def card(host: PciHost, flags: str = "0x1003", **files: str) -> PciHost:
    return host.hangs_on(A, "net", "eth0", flags=flags, **files)


def test_a_card_that_is_up_without_an_address(tmp_path: Path) -> None:
    host = card(make(tmp_path, kind=NIC))
    host.file("/proc/net/if_inet6", "fe80000000000000525400fffe000000 02 40 20 80 eth0")
    assert not found(host)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("/proc/net/route", f"{ROUTES}eth0\t0002A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF"),
        ("/proc/net/if_inet6", "20010db8000000000000000000000001 02 40 00 80 eth0"),
    ],
)
@pytest.mark.parametrize("up", [True, False])
def test_an_address(tmp_path: Path, file: str, text: str, up: bool) -> None:
    host = card(make(tmp_path, kind=NIC), "0x1003" if up else "0x1002").file(file, text)
    assert found(host) == ([(users.USE, "is eth0, which is up with an address")] if up else [])


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("/proc/net/route", f"{ROUTES}eth0\t00000000\t0102A8C0\t0003\t0\t0\t0\t00000000"),
        ("/proc/net/ipv6_route", f"{'0' * 32} 00 {'0' * 32} 00 {'f' * 32} 400 1 0 00000003 eth0"),
    ],
)
def test_the_default_route(tmp_path: Path, file: str, text: str) -> None:
    host = card(make(tmp_path, kind=NIC)).file(file, text)
    assert found(host) == [(users.USE, "is eth0, the way of the default route")]


def test_an_unreachable_route_is_no_way_out(tmp_path: Path) -> None:
    host = card(make(tmp_path, kind=NIC))
    host.file("/proc/net/ipv6_route", f"{'0' * 32} 00 {'0' * 32} 00 {'0' * 32} ffffffff 1 0 00200200 eth0")
    assert not found(host)


def test_the_default_route_through_a_bond_and_a_bridge(tmp_path: Path) -> None:
    host = card(make(tmp_path, kind=NIC), upper_bond0="")
    host.file("/sys/class/net/bond0/upper_br0")
    host.file("/proc/net/route", f"{ROUTES}br0\t00000000\t0102A8C0\t0003\t0\t0\t0\t00000000")
    assert found(host) == [(users.USE, "is eth0, the way of the default route through bond0, br0")]


def dial_in(host: PciHost, under: str = "eth0", name: str = "ppp0") -> PciHost:
    """Let the default route leave through a PPPoE session over an interface, which has no address itself."""
    host.file(f"/sys/devices/virtual/net/{name}/type", "512")
    host.link_to(f"/sys/class/net/{name}", f"../../devices/virtual/net/{name}")
    sessions = f"Id       Address              Device\n00001234 00:11:22:33:44:55 {under:>8}"
    host.file("/proc/net/pppoe", sessions)
    return host.file("/proc/net/route", f"{ROUTES}{name}\t00000000\t00000000\t0001\t0\t0\t0\t00000000")


@pytest.mark.parametrize("name", ["ppp0", "wan"])
def test_the_default_route_through_pppoe(tmp_path: Path, name: str) -> None:
    host = dial_in(card(make(tmp_path, kind=NIC)), name=name)
    assert found(host) == [(users.USE, f"is eth0, the way of the default route through {name}")]


def test_the_default_route_through_pppoe_on_a_vlan(tmp_path: Path) -> None:
    host = dial_in(card(make(tmp_path, kind=NIC), **{"upper_eth0.7": ""}), "eth0.7")
    assert found(host) == [(users.USE, "is eth0, the way of the default route through eth0.7, ppp0")]


def test_pppoe_over_another_card(tmp_path: Path) -> None:
    assert not found(dial_in(card(make(tmp_path, kind=NIC)), "eth1"))


def test_a_part_of_a_bridge(tmp_path: Path) -> None:
    host = card(make(tmp_path, kind=NIC), "0x1002", upper_br0="")
    assert found(host) == [(users.USE, "is eth0, a part of br0")]


def test_another_namespace(tmp_path: Path) -> None:
    host = make(tmp_path, kind=NIC)
    os.mkdir(host.path(f"/sys/bus/pci/devices/{A}/net"))
    assert found(host)[0][1].startswith("has its network interface in another namespace")


# -- displays and sound


def graphics(host: PciHost, status: str = "connected", enabled: str = "enabled") -> PciHost:
    host.hangs_on(A, "drm", "card0", "drm/card0").hangs_on(A, "drm", "renderD128", "drm/renderD128")
    return host.hangs_on(
        A, "drm", "card0-HDMI-A-1", "drm/card0/card0-HDMI-A-1", status=status, enabled=enabled
    )


def console(host: PciHost) -> None:
    host.file("/sys/class/vtconsole/vtcon0/name", "(S) dummy device").file(
        "/sys/class/vtconsole/vtcon0/bind", "0"
    )
    host.file("/sys/class/vtconsole/vtcon1/name", "(M) frame buffer device")
    host.file("/sys/class/vtconsole/vtcon1/bind", "1")


def test_a_graphics_card_that_shows_nothing(tmp_path: Path) -> None:
    assert not found(graphics(make(tmp_path, kind=VGA), enabled="disabled"))


def test_a_picture_is_somebodys_while_a_process_has_the_card(tmp_path: Path) -> None:
    host = graphics(make(tmp_path, kind=VGA))
    pid = host.runs("Xorg", "/dev/dri/card0", cgroup="/system.slice/gdm.service")
    use, shown = users.find(host, [A])
    assert (use.problem, shown.problem, shown.what) == (
        users.USE,
        users.DISPLAY,
        "shows a picture on HDMI-A-1",
    )
    assert shown.units == use.units == (frozenset({"gdm.service"}),)
    host.ends(pid)  # and what the kernel shows then is nobody's
    assert not users.find(host, [A])


def test_a_picture_of_somebody_who_may_not_be_seen() -> None:
    """Whoever looks is not root; a security module that hides what a process has open is alike."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        host = graphics(make(Path(folder), kind=VGA))
        os.chmod(host.path(f"/proc/{host.runs('kwin', '/dev/dri/card0')}/fd"), 0)
        me = os.geteuid()
        os.seteuid(65534 if me == 0 else me)
        try:
            (user,) = users.find(Host(host.root), [A])
            assert (user.problem, user.what) == (users.DISPLAY, "shows a picture on HDMI-A-1")
        finally:
            os.seteuid(me)


@pytest.mark.parametrize(
    ("words", "shown"), [("quiet fbcon=map:1", True), ("fbcon=nodefer,map:01", True), ("quiet", False)]
)
def test_the_console_where_the_kernel_was_told_to_put_it(tmp_path: Path, words: str, shown: bool) -> None:
    host = graphics(make(tmp_path, kind=VGA)).hangs_on(A, "graphics", "fb1", name="amdgpudrmfb")
    host.file("/sys/class/graphics/fb0/name", "i915drmfb").file("/proc/cmdline", f"root=/dev/sda1 {words}\n")
    console(host)
    assert bool(found(host)) == shown


def test_the_boot_display_with_the_console(tmp_path: Path) -> None:
    host = make(tmp_path, kind=VGA).hangs_on(A, "graphics", "fb0", name="amdgpudrmfb")
    host.file(f"/sys/bus/pci/devices/{A}/boot_vga", "1")
    console(host)
    shown = "shows the firmware's display (boot_vga), the text console (fb0)"
    assert found(host) == [(users.DISPLAY, shown)]


def test_a_driverless_card_with_the_firmwares_console(tmp_path: Path) -> None:
    host = make(tmp_path, "", VGA).file("/sys/class/graphics/fb0/name", "EFI VGA")
    host.file(f"/sys/bus/pci/devices/{A}/boot_vga", "1")
    assert not found(host)
    console(host)
    assert found(host) == [(users.DISPLAY, "shows the text console (fb0, EFI VGA)")]


def test_programs_on_a_graphics_card(tmp_path: Path) -> None:
    host = graphics(make(tmp_path, kind=VGA), enabled="disabled")
    host.runs("bash", "/dev/tty1", "pipe:[1]")
    pids = [
        host.runs(name, "/dev/null", "/dev/dri/card0", "/dev/dri/renderD128")
        for name in ("Xorg", "kwin", "firefox", "mpv")
    ]
    ((problem, what),) = found(host)
    assert problem == users.USE
    assert what.startswith(("is in use (/dev/dri/card0) by ", "is in use (/dev/dri/renderD128) by "))
    assert what.endswith(f"Xorg (pid {pids[0]}), kwin (pid {pids[1]}), firefox (pid {pids[2]}) and 1 more")


def test_the_unit_to_stop(tmp_path: Path) -> None:
    host = graphics(make(tmp_path, kind=VGA), enabled="disabled")
    host.runs("nvidia-persist", "/dev/dri/card0", cgroup="/system.slice/nvidia-persistenced.service")
    assert users.find(host, [A])[0].hint == "systemctl stop nvidia-persistenced.service"


def test_a_node_of_another_name_in_a_container(tmp_path: Path) -> None:
    host = graphics(make(tmp_path, kind=VGA), enabled="disabled")
    pid = host.runs("ffmpeg", "/dev/dri/renderD200", "/dev/dri/renderD201")
    host.file(f"/proc/{pid}/fdinfo/0", "pos:\t0\ndrm-driver:\tamdgpu\ndrm-pdev:\t0000:09:00.0")
    assert not found(host)
    host.file(f"/proc/{pid}/fdinfo/1", f"pos:\t0\ndrm-driver:\tamdgpu\ndrm-pdev:\t{A}")
    assert "ffmpeg" in found(host)[0][1]


@pytest.mark.parametrize("alone", [True, False])
def test_nvidias_shared_nodes_count_for_a_single_card(tmp_path: Path, alone: bool) -> None:
    host = make(tmp_path, "nvidia", VGA)
    host.file(f"/proc/driver/nvidia/gpus/{A}/information", "Model:\t GT 710\nDevice Minor: \t 0")
    if not alone:
        host.file(f"/proc/driver/nvidia/gpus/{B}/information", "Device Minor: \t 1")
    pid = host.runs("smi", "/dev/nvidiactl", "/dev/nvidia1")
    assert bool(found(host)) is alone
    host.link_to(f"/proc/{pid}/fd/7", "/dev/nvidia0")
    assert found(host)


def test_kfd_counts_for_a_single_card(tmp_path: Path) -> None:
    host = make(tmp_path, "amdgpu", VGA)
    host.runs("rocm", "/dev/kfd")
    assert found(host)
    host.device(B, "1234:5678", "amdgpu", kind=VGA)
    assert not found(host)


def test_sound(tmp_path: Path) -> None:
    host = make(tmp_path, kind=SOUND).hangs_on(A, "sound", "card1", "sound/card1")
    host.hangs_on(A, "sound", "controlC1", "sound/card1", node="snd/controlC1")
    host.runs("pipewire", "/dev/snd/controlC0", "/dev/snd/pcmC11D0p", "/dev/snd/seq")
    assert not found(host)
    host.runs("wireplumber", "/dev/snd/controlC1")
    assert "is in use (/dev/snd/controlC1) by wireplumber" in found(host)[0][1]


# -- nodes of any kind

CHARS = {
    "bus/usb/001/005": ("xhci_hcd", USB, "usb_device", "1-3", "usb1"),
    "ttyUSB0": ("xhci_hcd", USB, "tty", "ttyUSB0", "usb1/1-3/1-3:1.0/ttyUSB0/tty"),
    "sg2": ("mpt3sas", "010700", "scsi_generic", "sg2", "host0/target0:0:0/0:0:0:0/scsi_generic"),
    "dvb/adapter0/frontend0": ("cx23885", "048000", "dvb", "dvb0.frontend0", "dvb"),
    "uio0": ("uio_pci_generic", NVME, "uio", "uio0", "uio"),
    "infiniband/uverbs0": ("mlx5_core", NIC, "infiniband_verbs", "uverbs0", "infiniband_verbs"),
    "i2c-5": ("amdgpu", VGA, "i2c-dev", "i2c-5", "i2c-5/i2c-dev"),
}


@pytest.mark.parametrize("node", CHARS)
def test_a_node_of_any_kind_counts_if_it_is_open(tmp_path: Path, node: str) -> None:
    driver, kind, member, name, below = CHARS[node]
    host = make(tmp_path, driver, kind).hangs_on(A, member, name, below, node=node)
    host.device(B, "1234:5678", driver, kind=kind).hangs_on(B, member, f"{name}0", below, node=f"{node}0")
    host.runs("a-program", f"/dev/{node}0", "/dev/bus/usb/002/005", "/dev/input/event3")
    assert not found(host)
    pid = host.runs("a-program", f"/dev/{node}")
    assert found(host) == [(users.USE, f"is in use (/dev/{node}) by a-program (pid {pid})")]


def test_keyboards_and_mice_are_open_in_every_desktop(tmp_path: Path) -> None:
    host = make(tmp_path, "xhci_hcd", USB)
    for number, path in ((5, "usb1/1-2/input/input5"), (6, "usb1/1-2/input/input6")):
        host.hangs_on(A, "input", f"event{number}", path, node=f"input/event{number}")
    host.hangs_on(A, "hidraw", "hidraw0", "usb1/1-2/1-2:1.0/0003:1234:5678.0001/hidraw", node="hidraw0")
    host.runs("Xorg", "/dev/input/event5", "/dev/input/event6", "/dev/hidraw0")
    assert not found(host)


@pytest.mark.parametrize("node", ["bus/usb/001/005", "sg2"])
def test_a_node_of_a_running_guest(tmp_path: Path, node: str) -> None:
    """<hostdev type='usb'> and <hostdev type='scsi'>; what looks like a guest is none."""
    driver, kind, member, name, below = CHARS[node]
    host = make(tmp_path, driver, kind).hangs_on(A, member, name, below, node=node)
    pid = host.runs("qemu-system-x86", f"/dev/{node}", guest="haos")
    what = f"is in use (/dev/{node}) by qemu-system-x86 (pid {pid}, domain 'haos')"
    assert found(host) == [(users.GUEST, what)]
    assert users.find(host, [A])[0].hint == "virsh list; virt-usher status"
    assert not users.find(host, [A], but=pid)
    host.file(f"/proc/{pid}/cmdline", "a-program\0guest=haos\0")
    assert found(host)[0][0] == users.USE


def test_a_disk_of_a_running_guest(tmp_path: Path) -> None:
    host = disk(make(tmp_path))
    pid = host.runs("qemu-system-x86", "/dev/nvme0n1p1", guest="old")
    what = f"is in use (/dev/nvme0n1p1) by qemu-system-x86 (pid {pid}, domain 'old')"
    assert found(host) == [(users.GUEST, what)]


def test_a_part_of_the_device_that_a_running_guest_has(tmp_path: Path) -> None:
    host = make(tmp_path, "i915", VGA)
    part = f"{host.real(A)}/83c32df7-d52e-4ec1-9668-1f3c7e4df107"
    host.link_to(f"{part}/iommu_group", "../../../../../kernel/iommu_groups/42")
    host.runs("qemu-system-x86", "/dev/vfio/41", guest="other")
    assert not found(host)
    host.runs("qemu-system-x86", "/dev/vfio/42", guest="vgpu")
    assert [problem for problem, _ in found(host)] == [users.GUEST]


# -- keyboards, virtual functions, guests

KEYS = "10000 7 ff9f207ac14057ff febeffdfffefffff fffffffffffffffe"


def keyboard(host: PciHost, address: str, name: str, keys: str = KEYS) -> None:
    host.hangs_on(address, "input", name, f"usb1/1-2/{name}", name=f"Keyboard {name}")
    host.file(f"/sys/class/input/{name}/capabilities/key", keys)


def test_the_last_keyboard(tmp_path: Path) -> None:
    host = make(tmp_path, kind=USB).device(B, "1234:5678", "xhci", kind=USB)
    keyboard(host, A, "input5")
    keyboard(host, B, "input6", "3 0 0 0")  # a power button
    last = (users.USE, "has the host's last keyboard (Keyboard input5)")
    assert found(host) == [last]
    keyboard(host, B, "input7")
    assert not found(host)
    assert found(host, A, B) == [last, (users.USE, "has the host's last keyboard (Keyboard input7)")]


def test_virtual_functions(tmp_path: Path) -> None:
    host = PciHost(tmp_path).device(A, "1234:5678", "nvme", vfs=2)
    assert found(host) == [(users.VFS, "has 2 virtual functions")]


@pytest.mark.parametrize("node", ["/dev/vfio/1", "/dev/vfio/devices/vfio0"])
def test_a_device_of_a_running_guest(tmp_path: Path, node: str) -> None:
    host = make(tmp_path, "vfio-pci", NIC)
    assert not found(host)
    pid = host.runs("qemu-system-x86", "/dev/vfio/vfio", node, guest="win10")
    what = f"is in use by qemu-system-x86 (pid {pid}, domain 'win10'), with its IOMMU group"
    assert found(host) == [(users.GUEST, what)]
    assert users.find(host, [A], but=pid) == []


@pytest.mark.parametrize(("flags", "found"), [("0100002", 1), ("012000000", 0)], ids=["open", "O_PATH"])
def test_a_node_that_udev_only_names_is_not_in_use(tmp_path: Path, flags: str, found: int) -> None:
    host = PciHost(tmp_path).device("0000:01:00.0", driver="vfio-pci")
    pid = host.runs("(udev-worker)", "/dev/vfio/1")
    for fd in host.entries(f"/proc/{pid}/fd"):
        host.file(f"/proc/{pid}/fdinfo/{fd}", f"pos:\t0\nflags:\t{flags}\nmnt_id:\t29\n")
    assert len(users.find(host, ["0000:01:00.0"])) == found


def test_a_group_partner_of_a_running_guest(tmp_path: Path) -> None:
    host = make(tmp_path, "vfio-pci", NIC).device("0000:01:00.1", "1234:5678", kind=SOUND)
    host.runs("qemu-system-x86", "/dev/vfio/1", guest="win10")
    assert found(host, "0000:01:00.1")[0][0] == users.GUEST


@pytest.mark.parametrize("driver", ["vfio-pci", "pci-stub"])
def test_a_device_that_the_host_gave_away(tmp_path: Path, driver: str) -> None:
    host = make(tmp_path, driver)
    on_disk(host)
    assert not found(host)


def test_no_walk_without_a_need_and_one_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = card(make(tmp_path, kind=NIC))
    host.device(B, "1234:5678", "x", kind=VGA).device("0000:03:00.0", "1234:5678", "x", kind=VGA)
    walks: list[str] = []
    listing = host.entries

    def entries(path: str) -> list[str]:
        walks.append(path)
        return listing(path)

    monkeypatch.setattr(host, "entries", entries)
    users.find(host, [A, B])
    assert walks.count("/proc") == 0
    host.hangs_on(B, "drm", "card0").hangs_on("0000:03:00.0", "drm", "card1")
    users.find(host, [A, B, "0000:03:00.0"])
    assert walks.count("/proc") == 1
    assert walks.count("/sys/dev/char") == 2  # once for each look


def test_a_hundred_thousand_open_files(tmp_path: Path) -> None:
    """One second is the limit; the tenth of it here, since the machine may be busy."""
    host = graphics(make(tmp_path, kind=VGA), enabled="disabled")
    for _ in range(10):
        host.runs("many", *(["/dev/null"] * 1000))
    began = time.process_time()
    assert not found(host)
    assert time.process_time() - began < 0.1


# -- what cannot be read


def a_way_out(host: PciHost) -> None:
    host.file("/proc/net/route", f"{ROUTES}eth0\t00000000\t0101A8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0")
    card(host)


def a_way_out_through_pppoe(host: PciHost) -> None:
    dial_in(card(host))


def a_picture_and_a_console(host: PciHost) -> None:
    graphics(host).hangs_on(A, "graphics", "fb0", name="amdgpudrmfb")
    console(host)


def a_keyboard(host: PciHost) -> None:
    keyboard(host, A, "input5")


def virtual_functions(host: PciHost) -> None:
    host.file(f"/sys/bus/pci/devices/{A}/sriov_numvfs", "2")


def a_spare_of_zfs(host: PciHost) -> None:
    zfs(host, label="", guid="")


def a_desktop(host: PciHost) -> None:
    host.logs_in(2, "/system.slice/gdm.service")
    host.file("/var/lib/systemd/linger/somebody")
    manager = "/user.slice/user-1000.slice/user@1000.service/session.slice/kwin.service"
    graphics(host, enabled="disabled").runs("kwin", "/dev/dri/card0", cgroup=manager)


def a_guest_with_a_usb_device(host: PciHost) -> None:
    host.hangs_on(A, "usb_device", "1-3", "usb1", node="bus/usb/001/005")
    host.runs("qemu-system-x86", "/dev/bus/usb/001/005", guest="haos")


def a_program(host: PciHost) -> None:
    pid = graphics(host, enabled="disabled").runs("ffmpeg", "/dev/dri/renderD200")
    host.file(f"/proc/{pid}/fdinfo/0", f"pos:\t0\ndrm-pdev:\t{A}")


@pytest.mark.parametrize(
    "case",
    [
        *DISKS,
        a_way_out,
        a_way_out_through_pppoe,
        a_picture_and_a_console,
        a_keyboard,
        virtual_functions,
        a_program,
        a_desktop,
        a_guest_with_a_usb_device,
    ],
    ids=lambda f: str(f.__name__),
)
def test_what_cannot_be_read_is_no_sign_that_nobody_uses_it(
    tmp_path: Path, case: Callable[[PciHost], None]
) -> None:
    """Whichever file or directory it is, the same use is found, or the start refused."""

    def seen() -> list[tuple[str, object]]:
        return [(u.problem, u.units) for u in users.find(host, [A])]

    case(host := make(tmp_path))
    use = seen()
    assert len(use) == 1
    refused = 0
    for on in ("read", "list"):
        for nth in range(1, 100):
            host.heal().fail("*", errno.EIO, nth, on=on)
            try:
                assert seen() == use
            except OSError as error:
                refused += 1
                assert error.filename  # noqa: PT017  # either may be
    assert refused > 3
