"""NUMA nodes, their memory, and their pools of huge pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from virt_usher import cpulist
from virt_usher.host import pool

if TYPE_CHECKING:
    from virt_usher.host import Host


@dataclass(frozen=True)
class Mount:
    """A hugetlbfs mount: where it is and the size of its pages in KiB."""

    path: str
    size_kib: int


@dataclass(frozen=True)
class Memory:
    """The memory of a host; all sizes in KiB."""

    host: Host

    @property
    def nodes(self) -> tuple[int, ...]:
        """The NUMA nodes that have memory; node 0 alone on a kernel without NUMA."""
        listed = self.host.get("/sys/devices/system/node/has_memory", "0")
        return tuple(sorted(cpulist.parse(listed))) or (0,)

    @property
    def default_page_kib(self) -> int:
        """The default huge page size: what <hugepages/> without <page> means."""
        return self._field("/proc/meminfo", "Hugepagesize:")

    @property
    def page_sizes(self) -> list[int]:
        """The huge page sizes this kernel offers, smallest first."""
        names = self.host.entries("/sys/kernel/mm/hugepages")
        return sorted(int(n[len("hugepages-") : -len("kB")]) for n in names if n.startswith("hugepages-"))

    def pool(self, size_kib: int, node: int) -> pool.Pool:
        """Return the pool of one page size on one node."""
        return pool.Pool(self.host, size_kib, node)

    def total(self, node: int) -> int:
        """Return all the memory of a node."""
        return self._field(f"/sys/devices/system/node/node{node}/meminfo", "MemTotal:")

    def reclaimable(self, node: int) -> int:
        """Return what a node could give to new pages: free, file cache, reclaimable slab.

        MemAvailable per node does not exist; this is its upper bound (mm/show_mem.c).
        """
        meminfo = f"/sys/devices/system/node/node{node}/meminfo"
        fields = ("MemFree:", "Active(file):", "Inactive(file):", "SReclaimable:")
        return sum(self._field(meminfo, f) for f in fields)

    def mounts(self) -> list[Mount]:
        """Return the hugetlbfs mounts this process (and so the daemon that called it) sees."""
        found = []
        for line in self.host.get("/proc/mounts").splitlines():
            _, path, fstype, options, *_ = [*line.split(" "), "", "", "", ""]
            if fstype == "hugetlbfs":
                size = next((o[9:] for o in options.split(",") if o.startswith("pagesize=")), "")
                found.append(Mount(_unescape(path), _mount_size(size) or self.default_page_kib))
        return found

    def _field(self, path: str, name: str) -> int:
        for line in self.host.get(path).splitlines():
            head, found, rest = line.partition(name)
            if found and (not head or head.endswith(" ")):
                return int(rest.split()[0])
        return 0


def _mount_size(text: str) -> int:
    """Read pagesize=2M as KiB (fs/hugetlbfs/inode.c shows K, M or G)."""
    unit = {"K": 1, "M": 1024, "G": 1024 * 1024}.get(text[-1:].upper(), 0)
    return int(text[:-1]) * unit if unit and text[:-1].isdigit() else 0


def _unescape(path: str) -> str:
    """Undo /proc/mounts' octal escapes for blanks, tabs, newlines and backslashes."""
    for code, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        path = path.replace(code, char)
    return path
