"""The QEMU command line of the emulated machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from . import machine

KERNEL_OPTIONS = (
    "console=ttyS0",
    "root=/dev/vda",
    "intel_iommu=on",
    "iommu=pt",
    # What costs most under emulation and proves nothing here.
    "mitigations=off",
    "nokaslr",
    "audit=0",
    "no_timer_check",
    # Else Linux distrusts the CPU's clock and reads the HPET: an emulated device, and a lock of the emulator,
    # at each look at the time.
    "tsc=reliable",
    # A hang is looked into from outside, with SysRq keys.
    "sysrq_always_enabled",
    "loglevel=4",
    "systemd.show_status=error",
)


def pci() -> Iterator[str]:
    """Yield the arguments for the machine's own devices and the table's."""
    for bridge in machine.BRIDGES:
        yield "-device"
        # A port of the expander's bus has no room for an address but its first.
        yield f"{bridge.qemu},id={bridge.name},bus={bridge.parent},addr={_slot(bridge.address)}"
    firsts = {(d.bus, _slot(d.address)[:2]) for d in machine.DEVICES if not d.address.endswith(".0")}
    for device in machine.DEVICES:
        for backend in device.backends:
            yield from backend.split()
        slot = _slot(device.address)
        shared = ",multifunction=on" if (device.bus, slot[:2]) in firsts and slot.endswith(".0") else ""
        # The option ROMs would only cost the firmware time: nothing boots from these.
        rom = ",romfile="
        yield "-device"
        yield f"{device.qemu},bus={device.bus},addr={slot}{shared}{rom}"
        for attached in device.attached:
            yield from ("-device", attached)


def command(
    emulator: list[str], image: Path, share: Path, scratch: Path, cpu: str, table: Path, console: str
) -> list[str]:
    """Return the command with which `emulator` boots `image`, with `share` mounted inside."""
    profile = machine.CPU_PROFILES[cpu]
    nodes: list[str] = []
    for number, cpus in enumerate(machine.NODES):
        nodes += ["-object", f"memory-backend-ram,id=node{number},size={machine.NODE_MIB}M"]
        nodes += ["-numa", f"node,nodeid={number},cpus={cpus[0]}-{cpus[-1]},memdev=node{number}"]
    fixed = [
        *("-name", "virt-usher-lab"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-audiodev", "none,id=silence"),
        *("-machine", "q35", "-accel", "tcg,thread=multi"),
        *("-cpu", profile.model, "-smp", profile.smp, "-m", f"{machine.NODE_MIB * len(machine.NODES)}M"),
        # eim: so that Linux takes the x2APIC, see emulator.py.
        *("-device", "intel-iommu,intremap=on,caching-mode=on,eim=on"),
        # With ACPI hotplug a bus reset of a PCIe endpoint fails for want of a link state.
        *("-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off"),
        *("-acpitable", f"file={table}"),
        *("-serial", console),
        *("-monitor", f"unix:{scratch}/monitor,server=on,wait=off"),
        *("-kernel", str(image / "vmlinuz"), "-initrd", str(image / "initrd")),
        *("-append", " ".join(KERNEL_OPTIONS)),
        *("-drive", f"if=none,id=root,file={image / 'root.ext4'},format=raw,snapshot=on,cache=unsafe"),
        *("-device", "virtio-blk-pci,drive=root,bus=pcie.0,addr=02.0"),
        *("-fsdev", f"local,id=lab,path={share},security_model=none,multidevs=remap"),
        *("-device", "virtio-9p-pci,fsdev=lab,mount_tag=lab,bus=pcie.0,addr=03.0"),
        *("-device", "virtio-rng-pci,bus=pcie.0,addr=04.0"),
    ]
    placed = [argument.replace("{scratch}", str(scratch)) for argument in pci()]
    # No orphan burns a CPU when the runner is killed.
    return ["setpriv", "--pdeathsig", "KILL", *emulator, *fixed, *nodes, *placed]


def _slot(address: str) -> str:
    return address.rpartition(":")[2]
