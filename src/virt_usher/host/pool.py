"""One pool of huge pages: a page size on a NUMA node.

Kept apart from host.memory because release needs it, and needs it without dataclasses.
"""

from __future__ import annotations

TYPE_CHECKING = False  # importing typing would cost release more than all its work
if TYPE_CHECKING:
    from virt_usher.host import Host, LiveHost


class Pool:
    """The pages of one size on one node (mm/hugetlb.c; counts are pages)."""

    __slots__ = ("_dir", "_host", "node", "size_kib")

    def __init__(self, host: Host, size_kib: int, node: int) -> None:
        self._host = host
        self.size_kib = size_kib
        self.node = node
        self._dir = f"/sys/devices/system/node/node{node}/hugepages/hugepages-{size_kib}kB"

    @property
    def exists(self) -> bool:
        """Whether the kernel has such a pool."""
        return self._host.exists(self._dir)

    @property
    def free(self) -> int:
        """Pages that nobody has taken; some may be reserved."""
        return self._count("free_hugepages")

    @property
    def persistent(self) -> int:
        """Pages that stay when their user goes: what a write to nr_hugepages sets.

        A read of nr_hugepages counts the surplus pages too.
        """
        return self._count("nr_hugepages") - self._count("surplus_hugepages")

    @property
    def reserved(self) -> int:
        """Pages promised to mappings that have not touched them yet; known for all nodes only."""
        everywhere = f"/sys/kernel/mm/hugepages/hugepages-{self.size_kib}kB"
        return int(self._host.known(f"{everywhere}/resv_hugepages", "0"))

    def resize(self, host: LiveHost, pages: int) -> None:
        """Ask for a number of persistent pages on this node.

        The kernel gives what it can and reports success all the same: read `persistent` again.
        """
        host.write(f"{self._dir}/nr_hugepages", str(pages))

    def _count(self, name: str) -> int:
        return int(self._host.known(f"{self._dir}/{name}", "0"))
