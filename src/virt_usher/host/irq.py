"""Interrupts, workqueues and other masks of CPUs: where they are and how they are spelt.

Imported by release, so nothing heavy here.
"""

from __future__ import annotations

from virt_usher import cpulist

TYPE_CHECKING = False  # importing typing would cost release more than all its work
if TYPE_CHECKING:
    from virt_usher.host import Host

IRQS = "/proc/irq"
DEFAULT = f"{IRQS}/default_smp_affinity"  # what an interrupt requested from now on gets
WORKQUEUES = "/sys/devices/virtual/workqueue"


def affinities(host: Host) -> list[str]:
    """Return the files that say where each interrupt may go, by number; the default for new ones first.

    Number 0 and the like have a file and cannot be moved: writing says so (kernel/irq/proc.c).
    """
    numbers = sorted(int(n) for n in host.entries(IRQS) if n.isdigit())
    return [DEFAULT, *(f"{IRQS}/{n}/smp_affinity_list" for n in numbers)]


def masks(host: Host) -> list[str]:
    """Return the files that say where unbound kernel work may run, writeback's own included."""
    files = (f"{WORKQUEUES}/cpumask", f"{WORKQUEUES}/writeback/cpumask")
    return [f for f in files if host.exists(f)]


def read(host: Host, path: str) -> frozenset[int]:
    """Read a mask or list of CPUs; OSError as the kernel gives it."""
    if path == f"{WORKQUEUES}/cpumask" and host.exists(f"{path}_requested"):
        # Since 6.9 `cpumask` shows what is left after isolated partitions; what was asked for is there.
        path = f"{path}_requested"
    text = host.read(path)
    return cpulist.parse(text) if path.endswith("_list") else unmask(text)


def spell(path: str, cpus: frozenset[int]) -> str:
    """Write a set of CPUs as a file wants it: a list, or a mask."""
    return cpulist.show(cpus) if path.endswith("_list") else mask(cpus)


def unmask(text: str) -> frozenset[int]:
    """Read the kernel's hexadecimal mask: 32 bits a group, the highest first."""
    bits = int(text.replace(",", "") or "0", 16)
    return frozenset(n for n in range(bits.bit_length()) if bits >> n & 1)


def mask(cpus: frozenset[int]) -> str:
    """Write a set of CPUs as the kernel's mask."""
    digits = f"{sum(1 << n for n in cpus):x}"
    groups = [digits[max(0, i - 8) : i] for i in range(len(digits), 0, -8)]
    return ",".join(reversed(groups))
