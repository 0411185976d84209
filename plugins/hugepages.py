"""Allocate the huge pages a domain needs, on the nodes it needs them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from virt_usher import Action, AddPages, Domain, Host, Note, Plan, Problem, UsherError, hookimpl, option
from virt_usher.actions import size


@dataclass(frozen=True, eq=False)
class Plugin:
    drop_caches: bool = option(False, help="drop the host's file caches when pages are short")

    @hookimpl
    def usher_prepare(self, domain: Domain, host: Host) -> Iterator[Action | Note]:
        wanted = self._wanted(domain, host)
        if not wanted:
            yield Note("the domain asks for no huge pages: <memoryBacking><hugepages/> would")
        for (page, nodes), count in wanted.items():
            yield AddPages(page, count, nodes, self.drop_caches)

    def _wanted(self, domain: Domain, host: Host) -> dict[tuple[int, tuple[int, ...]], int]:
        """Return (page size, host nodes) -> pages; one sum for all that is bound alike."""
        wanted: dict[tuple[int, tuple[int, ...]], int] = defaultdict(int)
        for block in domain.memory_blocks:
            if block.pages is None or block.pages == 4:  # 4 KiB: <page> may say 'no huge pages here'
                continue
            page = block.pages or host.memory.default_page_kib
            if page <= 0:
                raise UsherError("this kernel has no huge pages")
            # 'preferred' is a wish, and pages elsewhere serve as well; the others bind.
            bound = block.nodes is not None and block.mode != "preferred"
            nodes = tuple(sorted(block.nodes or ())) if bound else host.memory.nodes
            count = -(-block.kib // page)
            if block.mode == "interleave" and bound:
                for i, node in enumerate(nodes):
                    wanted[page, (node,)] += count // len(nodes) + (i < count % len(nodes))
            else:
                wanted[page, nodes] += count
        # Tight bindings first: what may lie anywhere must not take their node's pages.
        return {k: v for k, v in sorted(wanted.items(), key=lambda kv: len(kv[0][1])) if v}

    @hookimpl
    def usher_check(self, domain: Domain, host: Host, plan: Plan) -> Iterator[Problem]:
        for action in plan.actions:
            if isinstance(action, AddPages):
                yield from _no_such_pool(action, host) or _too_much(action, host)
                yield from _no_mount(action, domain, host)
                yield from _cgroup_limit(action, host)


def _no_such_pool(action: AddPages, host: Host) -> list[Problem]:
    if action.size_kib not in host.memory.page_sizes:
        have = ", ".join(size(s) for s in host.memory.page_sizes) or "none"
        return [Problem(f"this host has no pages of {size(action.size_kib)}", f"it has: {have}")]
    gone = [n for n in action.nodes if not host.memory.pool(action.size_kib, n).exists]
    return [Problem(f"this host has no memory node {n}", "see <numatune>; numactl --hardware") for n in gone]


def _too_much(action: AddPages, host: Host) -> list[Problem]:
    """Memory that cannot be there: growing a pool beyond it would only push the host out."""
    pools = [host.memory.pool(action.size_kib, n) for n in action.nodes]
    free = sum(p.free for p in pools)
    room = sum(host.memory.reclaimable(n) for n in action.nodes) // action.size_kib
    if action.pages <= free + room:
        return []
    where = "node " + " and ".join(map(str, action.nodes))
    asked, most = size(action.pages * action.size_kib), size((free + room) * action.size_kib)
    return [
        Problem(
            f"{action.pages} pages of {size(action.size_kib)} ({asked}) are needed on {where}, "
            f"and at most {free + room} ({most}) could be had",
            "lower the domain's <memory>, stop other domains, or bind it to another node",
        )
    ]


def _no_mount(action: AddPages, domain: Domain, host: Host) -> list[Problem]:
    """libvirt wants a hugetlbfs mount of the size that it saw when it started.

    It makes libvirt/qemu in each (qemuStateInitialize), so a mount without it came later. memfd takes
    its pages from none, but libvirt wants one of any size all the same (seen: 9.0, 11.3, 12.8).
    """
    memfd = domain.memory_source == "memfd"
    kib = host.memory.default_page_kib if memfd else action.size_kib
    mounts = [m.path for m in host.memory.mounts() if memfd or m.size_kib == kib]
    if any(host.exists(f"{m}/libvirt/qemu") for m in mounts):
        return []
    daemon = "systemctl restart libvirtd (domains keep running)"
    if mounts:
        return [Problem(f"libvirt does not know the hugetlbfs mount {mounts[0]} yet", daemon)]
    at = "/dev/hugepages" if kib == host.memory.default_page_kib else f"/dev/hugepages-{kib}kB"
    mount = f"mkdir -p {at}; mount -t hugetlbfs -o pagesize={kib}K none {at}; {daemon}"
    return [Problem(f"no hugetlbfs with pages of {size(kib)} is mounted", mount)]


def _cgroup_limit(action: AddPages, host: Host) -> Iterator[Problem]:
    """A limit on machine.slice: QEMU would be killed by SIGBUS when it touches the page."""
    unit = "GB" if action.size_kib >= 1 << 20 else "MB"
    page = f"{action.size_kib >> (20 if unit == 'GB' else 10)}{unit}"
    for name in (f"hugetlb.{page}.max", f"hugetlb.{page}.rsvd.max"):
        limit = host.get(f"/sys/fs/cgroup/machine.slice/{name}")
        if limit.isdigit() and int(limit) < action.pages * action.size_kib * 1024:
            yield Problem(
                f"machine.slice may have {size(int(limit) // 1024)} of such pages ({name}), "
                f"and {size(action.pages * action.size_kib)} are needed",
                f"raise /sys/fs/cgroup/machine.slice/{name}",
            )
