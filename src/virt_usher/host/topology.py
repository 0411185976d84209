"""How the CPUs of a machine hang together: cores, shared caches, NUMA nodes, sockets."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from virt_usher import cpulist
from virt_usher.errors import UsherError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from virt_usher.host import Host

CPUS = "/sys/devices/system/cpu"
NODES = "/sys/devices/system/node"


@dataclass(frozen=True)
class Cpu:
    """One online CPU (a hardware thread) and what it shares.

    `core` are the threads of its core, `cache` the CPUs that share its last-level cache.
    """

    number: int
    core: frozenset[int]
    cache: frozenset[int]
    node: int
    socket: int


class Topology:
    """The CPUs of a host; an offline CPU has no topology (the kernel removes the directory)."""

    def __init__(self, host: Host) -> None:
        self._host = host

    @cached_property
    def online(self) -> frozenset[int]:
        """The CPUs that run."""
        return cpulist.parse(self._host.get(f"{CPUS}/online", "0"))

    @cached_property
    def present(self) -> frozenset[int]:
        """The CPUs that are plugged in, online or not."""
        return cpulist.parse(self._host.get(f"{CPUS}/present", "0"))

    @cached_property
    def cpus(self) -> dict[int, Cpu]:
        """All online CPUs by number."""
        return {n: self._cpu(n) for n in sorted(self.online)}

    @cached_property
    def cores(self) -> tuple[frozenset[int], ...]:
        """The cores, by their lowest thread."""
        return tuple(dict.fromkeys(c.core for c in self.cpus.values()))

    def whole_cores(self, cpus: Iterable[int]) -> frozenset[int]:
        """Return these CPUs with all other threads of their cores."""
        wanted = frozenset(cpus)
        return wanted.union(*(core for core in self.cores if core & wanted))

    @cached_property
    def first_core(self) -> frozenset[int]:
        """The core of CPU 0, or of the lowest CPU that is online: what a host can least do without."""
        return self.cores[0]

    @cached_property
    def _node_of(self) -> dict[int, int]:
        nodes = [n for n in self._host.entries(NODES) if n[:4] == "node" and n[4:].isdigit()]
        return {
            cpu: int(name[4:])
            for name in nodes
            for cpu in cpulist.parse(self._host.get(f"{NODES}/{name}/cpulist"))
        }

    def _cpu(self, number: int) -> Cpu:
        base = f"{CPUS}/cpu{number}"
        core = cpulist.parse(self._host.get(f"{base}/topology/thread_siblings_list", str(number)))
        levels = {
            self._host.number(f"{base}/cache/{i}/level"): f"{base}/cache/{i}/shared_cpu_list"
            for i in self._host.entries(f"{base}/cache")
            if i.startswith("index")
        }
        # Emulated CPUs may show no cache; below level 2 nothing is shared between cores anyway.
        last = levels.get(max(levels, default=0), "")
        cache = cpulist.parse(self._host.get(last)) if last else self._package(base)
        socket = self._host.number(f"{base}/topology/physical_package_id")
        return Cpu(number, core or frozenset({number}), cache or core, self._node_of.get(number, 0), socket)

    def _package(self, base: str) -> frozenset[int]:
        return cpulist.parse(self._host.get(f"{base}/topology/package_cpus_list"))


def propose(
    topology: Topology, vcpus: int, threads: int = 0, taken: Iterable[int] = (), node: int | None = None
) -> list[tuple[int, ...]]:
    """Return, for each core that a domain's vCPUs would best be pinned to, the CPUs of it to use.

    Whole cores that are free: not the host's first, nor any with a CPU that is `taken`. All `threads` of each
    (0: as many as they have, or one if the vCPUs do not come out even). Near a node, if that can be; then
    on one last-level cache, else one node; the tightest fit, to leave the rest in large pieces.
    """
    busy = topology.first_core.union(taken)
    free = [core for core in topology.cores if not core & busy]
    sizes = [threads] if threads else [*sorted({len(c) for c in free}, reverse=True), 1]
    for size in (s for s in sizes if vcpus % s == 0):
        # Cores of one kind where all threads are used: a hybrid CPU has cores with one and with two.
        fitting = [core for core in free if len(core) == size or size == 1 or len(core) > size == threads]
        if found := _pick(topology, fitting, vcpus // size, node):
            return [tuple(sorted(core))[:size] for core in found]
    raise UsherError(
        f"{len(free)} of {len(topology.cores)} cores are free, too few for {vcpus} vCPUs"
        + (f" with {threads} threads each" if threads else ""),
        "fewer vCPUs, or stop or pin elsewhere the domains that have the others: virt-usher cpus",
    )


def _pick(
    topology: Topology, cores: list[frozenset[int]], count: int, node: int | None
) -> list[frozenset[int]]:
    """Return so many cores that share as much as possible, the highest ones; none if there are too few."""
    near = [core for core in cores if node is None or topology.cpus[min(core)].node == node]
    for pool in (near, cores):
        for shared in ("cache", "node"):
            groups: dict[object, list[frozenset[int]]] = {}
            for core in pool:
                groups.setdefault(getattr(topology.cpus[min(core)], shared), []).append(core)
            for group in sorted(groups.values(), key=len):
                if len(group) >= count:
                    return group[-count:]
    return cores[-count:] if len(cores) >= count else []
