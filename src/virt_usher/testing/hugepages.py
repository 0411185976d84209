"""NUMA nodes and their pools of huge pages, as mm/hugetlb.c keeps them."""

from __future__ import annotations

import errno
import os
import re
from typing import Self

from virt_usher import cpulist
from virt_usher.testing.tree import Tree

NODES = "/sys/devices/system/node"
GLOBAL = "/sys/kernel/mm/hugepages"
_NODE_POOL = re.compile(rf"{NODES}/node(\d+)/hugepages/hugepages-(\d+)kB/nr_hugepages")
_GLOBAL_POOL = re.compile(rf"{GLOBAL}/hugepages-(\d+)kB/nr_hugepages(?:_mempolicy)?")
_OVERCOMMIT = re.compile(rf"{GLOBAL}/hugepages-(\d+)kB/nr_overcommit_hugepages")
_COMPACT = re.compile(rf"{NODES}/node(\d+)/compact")
_COUNTS = ("nr_hugepages", "free_hugepages", "surplus_hugepages")


class HugepageKernel(Tree):
    """The memory of a host; the kernel's default huge page is the smallest size."""

    # -- building

    def node(
        self,
        number: int,
        free_kib: int = 4 << 20,
        cache_kib: int = 0,
        in_one_piece_kib: int | None = None,
        pages: dict[int, int] | None = None,
        sizes: tuple[int, ...] = (2048, 1 << 20),
    ) -> Self:
        """Add a NUMA node.

        `free_kib` is what pools can grow by; of it, only `in_one_piece_kib` before memory is compacted.
        `cache_kib` is file cache, which drop_caches turns into free memory. `pages` are the pools' pages
        by size in KiB, all of them free.
        """
        pages = pages or {}
        used = sum(size * count for size, count in pages.items())
        base = f"{NODES}/node{number}"
        self.file(f"{base}/compact", mode=0o200)
        self.file(f"{base}/distance", "10", 0o444)
        self.file(
            f"{base}/meminfo", _node_meminfo(number, free_kib + cache_kib + used, free_kib, cache_kib), 0o444
        )
        for size in sizes:
            folder = f"{base}/hugepages/hugepages-{size}kB"
            self.file(f"{folder}/nr_hugepages", "0")
            self.file(f"{folder}/free_hugepages", "0", 0o444)
            self.file(f"{folder}/surplus_hugepages", "0", 0o444)
            self._global_pool(size)
        self.hide(f"node{number}.piece", "" if in_one_piece_kib is None else in_one_piece_kib)
        self._list_nodes()
        self.file("/proc/sys/vm/compact_memory", mode=0o200)
        self.file("/proc/sys/vm/drop_caches", mode=0o200)
        self.file("/proc/meminfo", "", 0o444)
        with self.step():
            for size, count in pages.items():
                self._put_pool(number, size, count, count, 0)
            self._sum_up()
        return self

    def hugetlbfs(self, path: str = "/dev/hugepages", size_kib: int = 2048, known: bool = True) -> Self:
        """Mount huge pages; libvirt knows the mount if it was there when the daemon started."""
        unit = f"{size_kib >> 20}G" if size_kib >= 1 << 20 else f"{size_kib >> 10}M"
        old = self.get("/proc/mounts")
        line = f"hugetlbfs {path} hugetlbfs rw,relatime,pagesize={unit} 0 0"
        self.file("/proc/mounts", f"{old}\n{line}".lstrip("\n"), 0o444)
        os.makedirs(self.path(f"{path}/libvirt/qemu" if known else path), exist_ok=True)
        return self

    def _global_pool(self, size: int) -> None:
        folder = f"{GLOBAL}/hugepages-{size}kB"
        if os.path.exists(self.path(folder)):
            return
        for name in ("nr_hugepages", "nr_hugepages_mempolicy", "nr_overcommit_hugepages"):
            self.file(f"{folder}/{name}", "0")
        for name in ("free_hugepages", "resv_hugepages", "surplus_hugepages"):
            self.file(f"{folder}/{name}", "0", 0o444)

    def _list_nodes(self) -> None:
        listed = cpulist.show(self.nodes())
        for name in ("online", "possible", "has_memory", "has_normal_memory", "has_cpu"):
            self.file(f"{NODES}/{name}", listed, 0o444)

    # -- what others do to the pools

    def nodes(self) -> list[int]:
        """Return the nodes there are."""
        return sorted(int(n[4:]) for n in self.entries(NODES) if re.fullmatch(r"node\d+", n))

    def pages(self, node: int, size: int = 2048) -> tuple[int, int, int]:
        """Return a pool: nr, free and surplus."""
        folder = f"{NODES}/node{node}/hugepages/hugepages-{size}kB"
        nr, free, surplus = (self.count(f"{folder}/{name}") for name in _COUNTS)
        return nr, free, surplus

    def resize(self, node: int, by: int, size: int = 2048) -> None:
        """Let another program change a pool by some pages, as far as the kernel goes along."""
        with self.step():
            nr, _, surplus = self.pages(node, size)
            self._set(node, size, max(0, nr - surplus + by))

    def take(self, node: int, count: int, size: int = 2048) -> None:
        """Let a process (a QEMU) touch free pages."""
        with self.step():
            nr, free, surplus = self.pages(node, size)
            assert count <= free, f"node {node} has {free} free pages, and {count} are to be taken"
            self._put_pool(node, size, nr, free - count, surplus)
            self._sum_up()

    def give(self, node: int, count: int, size: int = 2048) -> None:
        """Let a process end that had taken pages: surplus pages go back to the system first."""
        with self.step():
            nr, free, surplus = self.pages(node, size)
            assert count <= nr - free, f"node {node} has {nr - free} pages taken, and {count} are to be freed"
            gone = min(surplus, count)
            self._put_pool(node, size, nr - gone, free + count - gone, surplus - gone)
            self._free_memory(node, gone * size)
            self._sum_up()

    def reserve(self, count: int, size: int = 2048) -> None:
        """Let a process map pages without touching them; a negative count unmaps them."""
        with self.step():
            path = f"{GLOBAL}/hugepages-{size}kB/resv_hugepages"
            self.put(path, self.count(path) + count)

    # -- the kernel

    def store(self, path: str, value: str) -> None:
        if m := _NODE_POOL.fullmatch(path):
            self._resize(int(m[1]), int(m[2]), _number(value), path)
        elif m := _GLOBAL_POOL.fullmatch(path):
            with self.step():
                self._set_all(int(m[1]), _number(value))
        elif m := _OVERCOMMIT.fullmatch(path):
            if int(m[1]) >= 1 << 20:
                raise OSError(errno.EINVAL, "gigantic pages cannot be overcommitted")
            super().store(path, str(_number(value)))
        elif m := _COMPACT.fullmatch(path):
            self.hide(f"node{m[1]}.piece", "")
        elif path == "/proc/sys/vm/compact_memory":
            if value.strip() != "1":
                raise OSError(errno.EINVAL, "only 1 may be written")
            for node in self.nodes():
                self.hide(f"node{node}.piece", "")
        elif path == "/proc/sys/vm/drop_caches":
            if not 1 <= _number(value) <= 4:
                raise OSError(errno.EINVAL, "1 to 4 may be written")
            with self.step():
                for node in self.nodes():
                    total = self.count(f"{NODES}/node{node}/meminfo", "MemTotal")
                    cache = self.count(f"{NODES}/node{node}/meminfo", "Inactive(file)")
                    self._put_memory(node, total, self._free(node) + cache, 0)
                self._sum_up()
        else:
            super().store(path, value)

    def _resize(self, node: int, size: int, target: int, path: str) -> None:
        """Grow in two goes: a signal in between stops a write that has allocated some pages already."""
        with self.step():
            nr, _, surplus = self.pages(node, size)
            halfway = (nr - surplus + target) // 2
            if target > nr - surplus + 1:
                self._set(node, size, halfway)
        if target > nr - surplus + 1:
            self.point(path)
        with self.step():
            self._set(node, size, target)

    def _set(self, node: int, size: int, target: int) -> None:
        """set_max_huge_pages() for one node: `target` persistent pages, as near as can be had."""
        nr, free, surplus = self.pages(node, size)
        converted = min(surplus, max(0, target - (nr - surplus)))
        surplus -= converted
        if (missing := target - (nr - surplus)) > 0:
            got = min(missing, self._in_one_piece(node) // size)
            nr, free = nr + got, free + got
            self._free_memory(node, -got * size)
        elif missing < 0:
            # What is reserved is kept, whatever node it may be taken from one day.
            everywhere = [self.pages(n, size) for n in self.nodes()]
            reserved = self.count(f"{GLOBAL}/hugepages-{size}kB/resv_hugepages")
            spare = max(0, sum(p[1] for p in everywhere) - reserved)
            gone = min(-missing, free, spare)
            nr, free = nr - gone, free - gone
            self._free_memory(node, gone * size)
            surplus += -missing - gone
        self._put_pool(node, size, nr, free, surplus)
        self._sum_up()

    def _set_all(self, size: int, target: int) -> None:
        """Write the pool of all nodes: page by page, each from the next node in turn."""
        nodes = self.nodes()

        def persistent(node: int) -> int:
            nr, _, surplus = self.pages(node, size)
            return nr - surplus

        while (missing := target - sum(map(persistent, nodes))) != 0:
            before = sum(map(persistent, nodes))
            for node in nodes[: abs(missing)]:
                self._set(node, size, max(0, persistent(node) + (1 if missing > 0 else -1)))
            if sum(map(persistent, nodes)) == before:
                return

    def _free(self, node: int) -> int:
        return self.count(f"{NODES}/node{node}/meminfo", "MemFree")

    def _in_one_piece(self, node: int) -> int:
        piece = self.hidden(f"node{node}.piece")
        return min(int(piece), self._free(node)) if piece else self._free(node)

    def _free_memory(self, node: int, kib: int) -> None:
        meminfo = f"{NODES}/node{node}/meminfo"
        total, cache = self.count(meminfo, "MemTotal"), self.count(meminfo, "Inactive(file)")
        self._put_memory(node, total, self._free(node) + kib, cache)
        piece = self.hidden(f"node{node}.piece")
        if piece:
            self.hide(f"node{node}.piece", max(0, int(piece) + kib))

    def _put_memory(self, node: int, total: int, free: int, cache: int) -> None:
        self.put(f"{NODES}/node{node}/meminfo", _node_meminfo(node, total, free, cache))

    def _put_pool(self, node: int, size: int, *counts: int) -> None:
        folder = f"{NODES}/node{node}/hugepages/hugepages-{size}kB"
        for name, number in zip(_COUNTS, counts, strict=True):
            self.put(f"{folder}/{name}", number)

    def _sum_up(self) -> None:
        """Keep the files for all nodes in step with those of each."""
        for entry in self.entries(GLOBAL):
            size = int(entry[len("hugepages-") : -len("kB")])
            every = [self.pages(n, size) for n in self.nodes() if self._has_pool(n, size)]
            for i, name in enumerate(_COUNTS):
                self.put(f"{GLOBAL}/{entry}/{name}", sum(p[i] for p in every))
            self.put(f"{GLOBAL}/{entry}/nr_hugepages_mempolicy", sum(p[0] for p in every))
        sizes = sorted(int(e[len("hugepages-") : -len("kB")]) for e in self.entries(GLOBAL))
        meminfos = [f"{NODES}/node{n}/meminfo" for n in self.nodes()]
        total, free = (sum(self.count(m, name) for m in meminfos) for name in ("MemTotal", "MemFree"))
        lines = [f"MemTotal: {total} kB", f"MemFree: {free} kB", f"MemAvailable: {free} kB"]
        for size in sizes[:1]:
            folder = f"{GLOBAL}/hugepages-{size}kB"
            lines += [
                f"HugePages_Total: {self.count(f'{folder}/nr_hugepages')}",
                f"HugePages_Free: {self.count(f'{folder}/free_hugepages')}",
                f"HugePages_Rsvd: {self.count(f'{folder}/resv_hugepages')}",
                f"HugePages_Surp: {self.count(f'{folder}/surplus_hugepages')}",
                f"Hugepagesize: {size} kB",
            ]
        self.put("/proc/meminfo", "\n".join(lines))

    def _has_pool(self, node: int, size: int) -> bool:
        return self.exists(f"{NODES}/node{node}/hugepages/hugepages-{size}kB")


def _node_meminfo(node: int, total: int, free: int, cache: int) -> str:
    fields = {
        "MemTotal": total,
        "MemFree": free,
        "MemUsed": total - free,
        "Active(file)": 0,
        "Inactive(file)": cache,
        "SReclaimable": 0,
    }
    return "\n".join(f"Node {node} {name}: {kib:>14} kB" for name, kib in fields.items())


def _number(value: str) -> int:
    """Read a number as kstrtoul() does: digits, perhaps a plus, one newline."""
    if not re.fullmatch(r"\+?[0-9]+\n?", value, re.ASCII):
        raise OSError(errno.EINVAL, f"{value!r} is no number")
    if (number := int(value)) >= 1 << 64:
        raise OSError(errno.ERANGE, f"{value!r} is too large")
    return number
