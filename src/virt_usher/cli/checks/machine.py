"""What of this host is supported, and what stands in the way."""

from __future__ import annotations

from collections.abc import Iterator

from virt_usher.cli.checks import Check, ok, warning
from virt_usher.host import Host, vfio
from virt_usher.host.cpu import CPUFREQ

MANAGERS = ("power-profiles-daemon", "tuned", "tuned-ppd")


def check(host: Host) -> Iterator[Check]:
    """Look at huge pages, CPU frequency, cgroups and the IOMMU."""
    yield from _hugetlbfs(host)
    yield from _cpufreq(host)
    if host.exists("/sys/fs/cgroup/cgroup.controllers"):
        yield ok("cgroup", "version 2")
    else:
        yield warning("cgroup", "not version 2 alone: CPU isolation needs that", "boot a current systemd")
    groups = len(host.entries("/sys/kernel/iommu_groups"))
    if groups:
        yield ok("IOMMU", f"{groups} groups")
        yield from _interrupts(host)
    else:
        hint = "switch VT-d or AMD-Vi on in the firmware; on Intel boot with intel_iommu=on"
        yield warning("IOMMU", "no groups: PCI devices cannot be given to domains", hint)


def _interrupts(host: Host) -> Iterator[Check]:
    remapped = vfio.remaps_interrupts(host)
    if remapped:
        yield ok("interrupts", "remapped")
    elif remapped is False:
        allowed = vfio.allows_unsafe_interrupts(host)
        text = "a guest with a device can send any" if allowed else "VFIO gives no device to a domain"
        hint = "switch x2APIC on in the firmware; or see docs/pci.md"
        yield warning("interrupts", f"not remapped: {text}", hint)


def _hugetlbfs(host: Host) -> Iterator[Check]:
    """libvirt makes libvirt/qemu in each mount that it sees when it starts, and uses no other."""
    mounts = host.memory.mounts()
    if not mounts:
        hint = "mkdir -p /dev/hugepages; mount -t hugetlbfs none /dev/hugepages; restart the daemon"
        yield warning("huge pages", "no hugetlbfs is mounted: no domain can use huge pages", hint)
    for mount in mounts:
        what = f"{mount.path}, pages of {mount.size_kib} KiB"
        if host.exists(f"{mount.path}/libvirt/qemu"):
            yield ok("huge pages", f"{what}, known to libvirt")
        else:
            hint = "systemctl restart libvirtd (or virtqemud; domains keep running)"
            yield warning("huge pages", f"{what}, not known to libvirt yet", hint)


def _cpufreq(host: Host) -> Iterator[Check]:
    policies = [n for n in host.entries(CPUFREQ) if n.startswith("policy")]
    if not policies:
        yield ok("cpufreq", "none on this host: the governor plugin leaves itself out")
        return
    yield ok(
        "cpufreq", f"{len(policies)} policies, driver {host.get(f'{CPUFREQ}/{policies[0]}/scaling_driver')}"
    )
    for name in MANAGERS:
        if host.exists(f"/sys/fs/cgroup/system.slice/{name}.service"):
            text = f"{name} runs, and may set governors again whenever the power profile changes"
            yield warning("cpufreq", text, f"systemctl disable --now {name}, or leave governors to it")
