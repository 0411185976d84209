"""What the emulated machine is made of: one table for both sides.

The QEMU command line is built from it, and the tests inside look their
devices up in it by role. A new device is one row; see docs/lab.md.
"""

from __future__ import annotations

from dataclasses import dataclass

CPUS = 4
NODES: tuple[tuple[int, ...], ...] = ((0, 1), (2, 3))
NODE_MIB = 2560
# Two CPUs of their own and two that share one clock: both kinds exist on real hosts.
CPUFREQ_POLICIES: tuple[tuple[int, ...], ...] = ((0,), (1,), (2, 3))
FREQUENCIES_MHZ = (3000, 2000, 1000)


@dataclass(frozen=True)
class CpuProfile:
    """A CPU model: TCG gives either nested KVM or SMT siblings, not both."""

    model: str
    smp: str
    kvm: bool
    smt: bool


# Without these Linux clears and copies memory by words: under TCG six times as fast as byte by byte.
_WORDS = "la57=off,erms=off,fsrm=off"

CPU_PROFILES = {
    # acpi-cpufreq refuses AMD family 15, which is what "max" claims to be. Without invtsc, which TCG has but
    # does not announce, the first change of a frequency makes Linux drop that clock for the HPET.
    "kvm": CpuProfile(
        f"max,{_WORDS},family=23,model=1,stepping=2,x-force-features=on,invtsc=on",
        "4,sockets=2,cores=2,threads=1",
        True,
        False,
    ),
    "smt": CpuProfile(f"max,{_WORDS},vendor=GenuineIntel", "4,sockets=2,cores=1,threads=2", False, True),
}


@dataclass(frozen=True)
class Bridge:
    """A bus to put devices on. `name` is its QEMU id."""

    name: str
    address: str
    parent: str
    qemu: str


@dataclass(frozen=True)
class Device:
    """One emulated PCI function, and what the kernel makes of it.

    `methods` is what `reset_method` reads after boot (None: there is no such
    file); `reset` is the method that really works when 1 is written to
    `reset`. The two differ for the first function of a slot, which claims a
    bus reset that fails. `hot_reset`: VFIO can reset the whole bus once
    every function on it is bound to vfio-pci.
    """

    role: str
    address: str
    bus: str
    qemu: str
    driver: str | None
    methods: str | None = None
    reset: str | None = None
    hot_reset: bool = False
    group: str = ""
    node: int = -1
    backends: tuple[str, ...] = ()
    attached: tuple[str, ...] = ()

    @property
    def short(self) -> str:
        """The address without its domain."""
        return self.address.removeprefix("0000:")


def port(name: str, bus: int, slot: int, options: str = "") -> Bridge:
    """Return a root port at pcie.0's `slot`, whose secondary bus is `bus`."""
    return Bridge(
        name, f"0000:00:{slot:02x}.0", "pcie.0", f"pcie-root-port,chassis={bus},slot={bus}{options}"
    )


# Firmware numbers the buses in this order; the tests check that it did.
BRIDGES: tuple[Bridge, ...] = (
    port("rp1", 0x01, 0x10),
    port("rp2", 0x02, 0x11),
    port("rp3", 0x03, 0x12),
    port("rp4", 0x04, 0x13),
    port("rp5", 0x05, 0x14),
    Bridge("pci", "0000:05:00.0", "rp5", "pcie-pci-bridge"),
    port("rp7", 0x07, 0x15),
    port("rp8", 0x08, 0x16),
    port("rp9", 0x09, 0x17),
    port("rp10", 0x0A, 0x18),
    port("rp11", 0x0B, 0x19),
    Bridge("up", "0000:0b:00.0", "rp11", "x3130-upstream"),
    Bridge("down", "0000:0c:00.0", "up", "xio3130-downstream,chassis=12,slot=12"),
    Bridge("pxb", "0000:00:1a.0", "pcie.0", "pxb-pcie,bus_nr=0x80,numa_node=1"),
    port("rp14", 0x0E, 0x1B),
    Bridge("rp128", "0000:80:00.0", "pxb", "pcie-root-port,chassis=128,slot=128"),
)

_NET = "-netdev hubport,hubid={hub},id={name}"


def _disk(name: str) -> str:
    return f"-drive if=none,id={name},file={{scratch}}/{name}.img,format=raw,cache=unsafe"


DEVICES: tuple[Device, ...] = (
    # No reset of any kind: on the root bus, no FLR, no power management.
    Device("stuck", "0000:00:05.0", "pcie.0", "edu", None),
    Device("stuck_sound", "0000:00:06.0", "pcie.0", "ES1370,audiodev=silence", "snd_ens1370"),
    Device("stuck_vga", "0000:00:07.0", "pcie.0", "secondary-vga", "bochs-drm"),
    # Only a power-management reset, and no bus of its own.
    Device(
        "pm_only", "0000:00:08.0", "pcie.0", "e1000e,netdev=pm", "e1000e", "pm", "pm",
        backends=(_NET.format(hub=8, name="pm"),),
    ),
    Device(
        "nic", "0000:01:00.0", "rp1", "e1000e,netdev=nic", "e1000e", "pm bus", "pm", True,
        backends=(_NET.format(hub=1, name="nic"),),
    ),
    # Function-level reset; big enough for a filesystem.
    Device(
        "nvme", "0000:02:00.0", "rp2", "nvme,serial=lab-nvme,drive=nvme", "nvme", "flr bus", "flr", True,
        backends=(_disk("nvme"),),
    ),
    Device(
        "usb", "0000:03:00.0", "rp3", "qemu-xhci,id=usb", "xhci_hcd", "bus", "bus", True,
        attached=("usb-kbd,bus=usb.0",),
    ),
    # A graphics card with its sound function.
    Device(
        "gpu", "0000:04:00.0", "rp4", "secondary-vga", "bochs-drm", "bus", None, True, group="gpu"
    ),
    Device(
        "gpu_audio", "0000:04:00.1", "rp4", "ich9-intel-hda,id=hda", "snd_hda_intel", None, None, True,
        group="gpu", attached=("hda-output,bus=hda.0,audiodev=silence",),
    ),
    # Two conventional devices that share a bridge, and with it one group.
    Device(
        "pci_nic", "0000:06:01.0", "pci", "e1000,netdev=pci", "e1000", "bus", None, True, group="pci",
        backends=(_NET.format(hub=6, name="pci"),),
    ),
    Device(
        "pci_sound", "0000:06:02.0", "pci", "AC97,audiodev=silence", "snd_intel8x0", None, None, True,
        group="pci",
    ),
    Device(
        "sriov", "0000:07:00.0", "rp7",
        "nvme,serial=lab-sriov,subsys=sriov,sriov_max_vfs=2,sriov_vq_flexible=4,sriov_vi_flexible=4",
        "nvme", "flr bus", "flr", True,
        backends=("-device nvme-subsys,id=sriov,nqn=sriov",),
    ),
    # Two functions that no driver wants.
    Device("pair", "0000:08:00.0", "rp8", "pci-testdev", None, "bus", None, True, group="pair"),
    Device("pair_edu", "0000:08:00.1", "rp8", "edu", None, None, None, True, group="pair"),
    # A graphics card alone on its bus; it may carry the console.
    Device("vga", "0000:09:00.0", "rp9", "secondary-vga", "bochs-drm", "bus", "bus", True),
    # Two functions, each with a reset of its own.
    Device(
        "twin", "0000:0a:00.0", "rp10", "e1000e,netdev=twin", "e1000e", "pm bus", "pm", True, group="twin",
        backends=(_NET.format(hub=10, name="twin"),),
    ),
    Device(
        "twin_second", "0000:0a:00.1", "rp10", "e1000e,netdev=twin2", "e1000e", "pm", "pm", True,
        group="twin", backends=(_NET.format(hub=10, name="twin2"),),
    ),
    # Behind a PCIe switch.
    Device(
        "switched", "0000:0d:00.0", "down", "virtio-net-pci,netdev=switched", "virtio-pci",
        "flr pm bus", "flr", True, backends=(_NET.format(hub=13, name="switched"),),
    ),
    # A network card whose virtual functions libvirt can hand out of a network.
    Device(
        "pool_nic", "0000:0e:00.0", "rp14", "igb,netdev=pool", "igb", "flr pm bus", "flr", True,
        backends=(_NET.format(hub=14, name="pool"),),
    ),
    Device(
        "far_nic", "0000:81:00.0", "rp128", "e1000e,netdev=far", "e1000e", "pm bus", "pm", True, node=1,
        backends=(_NET.format(hub=129, name="far"),),
    ),
)  # fmt: skip

# Images that a device's backend opens, in MiB; made anew for every run.
SCRATCH_IMAGES = {"nvme": 64}
BY_ROLE = {device.role: device for device in DEVICES}


def device(role: str) -> Device:
    """Return the device that plays `role`."""
    return BY_ROLE[role]


def group_of(role: str) -> list[Device]:
    """Return the devices in the group of `role`, itself included."""
    label = BY_ROLE[role].group
    return [other for other in DEVICES if other.role == role or (label and other.group == label)]
