"""Which parts of the host systemd keeps in which top-level cgroup, and on which CPUs.

Imported by release, so nothing heavy here.
"""

from __future__ import annotations

from virt_usher import cpulist

TYPE_CHECKING = False  # importing typing would cost release more than all its work
if TYPE_CHECKING:
    from virt_usher.host import Host

CGROUP = "/sys/fs/cgroup"
# Where `systemctl set-property --runtime` keeps its drop-ins; init.scope counts as transient.
CONTROL = ("/run/systemd/system.control", "/run/systemd/transient")
_WITH_PROCESSES = ("scope", "service", "mount", "swap", "socket")
MACHINES = "machine.slice"  # libvirt's default partition: guests can be pinned only where it may run


def unsupported(host: Host) -> str:
    """Say in one line why the host's units cannot be confined; '' if they can."""
    if not host.exists("/run/systemd/system"):
        return "this host does not run systemd, which is what keeps the host off CPUs here"
    if not host.exists(f"{CGROUP}/cgroup.controllers"):
        return "this host uses cgroup v1, where isolation would not hold"
    if "cpuset" not in host.get(f"{CGROUP}/cgroup.controllers").split():
        return "this kernel has no cpuset controller"
    return ""


def units(host: Host) -> list[str]:
    """Return the top-level units that belong to the host: all but the machines' slice.

    Every slice counts, and whatever else has processes. user.slice is one even while nobody is logged in
    and its cgroup is not there.
    """
    names = {"user.slice"}
    for name in host.entries(CGROUP):
        kind = name.rpartition(".")[2]
        if kind == "slice" or (kind in _WITH_PROCESSES and populated(host, name)):
            names.add(name)
    return sorted(names - {MACHINES})


def strangers(host: Host) -> list[str]:
    """Return the top-level cgroups with processes that are no units: systemd cannot confine them."""
    found = [n for n in host.entries(CGROUP) if host.exists(f"{CGROUP}/{n}/cgroup.events")]
    return [n for n in found if "." not in n and populated(host, n)]


def populated(host: Host, name: str) -> bool:
    """Whether a top-level cgroup, or one below, has processes."""
    return "populated 1" in host.known(f"{CGROUP}/{name}/cgroup.events").splitlines()


def own(host: Host, unit: str) -> frozenset[int]:
    """Return a unit's cpuset; empty where it has none, or no CPUs of its own in it."""
    return cpulist.parse(host.known(f"{CGROUP}/{unit}/cpuset.cpus"))


def allowed(host: Host, unit: str, every: frozenset[int]) -> frozenset[int]:
    """Return the CPUs a unit is confined to, `every` where it is not confined.

    Of a unit without a cgroup, or with every CPU, what it will get: the word of its runtime drop-in.
    """
    cpus = own(host, unit)
    if not cpus or cpus >= every:
        drop_in = [x for d in drop_ins(unit) for x in host.known(d).splitlines()]
        words = [x for x in drop_in if x.startswith("AllowedCPUs=")]
        cpus = cpulist.parse(words[-1][len("AllowedCPUs=") :].replace(" ", ",")) if words else frozenset()
    return every if not cpus or cpus >= every else cpus


def effective(host: Host, unit: str = "") -> frozenset[int]:
    """Return the CPUs a unit really has; without one, or without a cpuset of its own, the machine's."""
    text = host.known(f"{CGROUP}/{unit}/cpuset.cpus.effective") if unit else ""
    text = text or host.known(f"{CGROUP}/cpuset.cpus.effective")
    return cpulist.parse(text or host.known("/sys/devices/system/cpu/online", "0"))


def drop_ins(unit: str) -> tuple[str, ...]:
    """Return where a unit's runtime AllowedCPUs= may be (unit_write_setting in systemd)."""
    return tuple(f"{folder}/{unit}.d/50-AllowedCPUs.conf" for folder in CONTROL)


def slice_of(partition: str) -> str:
    """Return the top-level slice of libvirt's <partition>: /custom/web is below custom.slice."""
    return partition.strip("/").partition("/")[0] + ".slice"


def machines(host: Host) -> frozenset[str]:
    """Return the top-level slices that running guests are in, wherever they were put."""
    found = {MACHINES}
    for name in host.entries("/run/libvirt/qemu"):
        said = host.known(f"/run/libvirt/qemu/{name}") if name.endswith(".pid") else ""
        for line in host.known(f"/proc/{said}/cgroup").splitlines() if said.isdecimal() else []:
            # A pid file can be stale and its pid somebody else's; a guest's scope is machine-qemu\x2d….
            if line.startswith("0::/") and "-qemu" in line:
                found.add(line[4:].partition("/")[0])
    return frozenset(n for n in found if n.endswith(".slice"))
