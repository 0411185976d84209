"""hugepages: from the domain's XML to pages per size and node, and the reasons to refuse."""

from __future__ import annotations

import pytest

from virt_usher import AddPages, Note
from virt_usher.testing import FakeHost, ask, domain_xml

GIB = 1 << 20  # in KiB
CELLS = f"<cpu><numa><cell id='0' memory='{GIB}'/><cell id='1' memory='{GIB}'/></numa></cpu>"
DIMM = (
    "<devices><memory model='dimm'>{source}"
    "<target><size unit='MiB'>512</size><node>{node}</node></target></memory></devices>"
)
VIRTIO_MEM = (
    "<devices><memory model='virtio-mem'><target><size unit='GiB'>4</size><node>0</node>"
    "<block unit='MiB'>2</block><requested unit='MiB'>256</requested></target></memory></devices>"
)


@pytest.fixture
def big(host: FakeHost) -> FakeHost:
    """Two nodes of 64 GiB, with 2 MiB and 1 GiB pages mounted."""
    host.node(0, free_kib=64 * GIB).node(1, free_kib=64 * GIB)
    return host.hugetlbfs().hugetlbfs("/dev/hugepages1G", GIB)


Wanted = list[tuple[int, int, tuple[int, ...]]]  # page size in KiB, pages, nodes
BOTH = (0, 1)
TABLE: dict[str, tuple[bool | str, str, int, Wanted]] = {
    # name: (what is in <hugepages>, other XML, <memory> in KiB, what the plugin wants)
    "no huge pages": (False, "", GIB, []),
    "the host's default size": (True, "", GIB, [(2048, 512, BOTH)]),
    "a size in KiB": ("<page size='2048'/>", "", GIB, [(2048, 512, BOTH)]),
    "a size in MiB": ("<page size='2' unit='MiB'/>", "", GIB, [(2048, 512, BOTH)]),
    "a size in M": ("<page size='2' unit='M'/>", "", GIB, [(2048, 512, BOTH)]),
    "1 GiB pages": ("<page size='1' unit='GiB'/>", "", 4 * GIB, [(GIB, 4, BOTH)]),
    "1 GiB pages in G": ("<page size='1' unit='G'/>", "", 4 * GIB, [(GIB, 4, BOTH)]),
    "memory that is no whole number of pages": (True, "", GIB + 1, [(2048, 513, BOTH)]),
    "less memory than one page": ("<page size='1' unit='G'/>", "", 1024, [(GIB, 1, BOTH)]),
    "a page of 4 KiB, which is none": ("<page size='4'/>", "", GIB, []),
    "guest cells": (True, CELLS, 2 * GIB, [(2048, 1024, BOTH)]),
    "guest cells with a size each": (
        "<page size='2048' nodeset='0'/><page size='1' unit='G' nodeset='1'/>",
        CELLS,
        2 * GIB,
        [(2048, 512, BOTH), (GIB, 1, BOTH)],
    ),
    "a size for one cell and another for the rest": (
        "<page size='1' unit='G' nodeset='1'/><page size='2048'/>",
        CELLS,
        2 * GIB,
        [(2048, 512, BOTH), (GIB, 1, BOTH)],
    ),
    "one cell only": ("<page size='2048' nodeset='1'/>", CELLS, 2 * GIB, [(2048, 512, BOTH)]),
    "one cell without huge pages": (
        "<page size='2048' nodeset='0'/><page size='4' nodeset='1'/>",
        CELLS,
        2 * GIB,
        [(2048, 512, BOTH)],
    ),
    "strict on one node": (
        True,
        "<numatune><memory mode='strict' nodeset='1'/></numatune>",
        GIB,
        [(2048, 512, (1,))],
    ),
    "strict on two nodes": (
        True,
        "<numatune><memory mode='strict' nodeset='0-1'/></numatune>",
        GIB,
        [(2048, 512, BOTH)],
    ),
    "no mode, which is strict": (
        True,
        "<numatune><memory nodeset='1'/></numatune>",
        GIB,
        [(2048, 512, (1,))],
    ),
    "preferred, a mere wish": (
        True,
        "<numatune><memory mode='preferred' nodeset='1'/></numatune>",
        GIB,
        [(2048, 512, BOTH)],
    ),
    "interleaved, an odd number": (
        True,
        "<numatune><memory mode='interleave' nodeset='0-1'/></numatune>",
        GIB + 2048,
        [(2048, 257, (0,)), (2048, 256, (1,))],
    ),
    "numad decides later": (
        True,
        "<numatune><memory placement='auto'/></numatune>",
        GIB,
        [(2048, 512, BOTH)],
    ),
    "each cell on a node of its own": (
        True,
        CELLS
        + "<numatune><memnode cellid='0' mode='strict' nodeset='1'/>"
        + "<memnode cellid='1' mode='strict' nodeset='0'/></numatune>",
        2 * GIB,
        [(2048, 512, (1,)), (2048, 512, (0,))],
    ),
    "one cell bound, the other as all memory": (
        True,
        CELLS
        + "<numatune><memory mode='strict' nodeset='0'/>"
        + "<memnode cellid='1' mode='strict' nodeset='1'/></numatune>",
        2 * GIB,
        [(2048, 512, (0,)), (2048, 512, (1,))],
    ),
    "a tight binding before a loose one": (
        True,
        CELLS + "<numatune><memnode cellid='1' mode='strict' nodeset='0'/></numatune>",
        2 * GIB,
        [(2048, 512, (0,)), (2048, 512, BOTH)],
    ),
    "a dimm": (True, CELLS + DIMM.format(source="", node=0), 2 * GIB + GIB // 2, [(2048, 1024 + 256, BOTH)]),
    "a dimm with pages and a node of its own": (
        True,
        CELLS
        + DIMM.format(
            source="<source><pagesize unit='GiB'>1</pagesize><nodemask>1</nodemask></source>", node=0
        ),
        2 * GIB + GIB // 2,
        [(GIB, 1, (1,)), (2048, 1024, BOTH)],
    ),
    "virtio-mem, of which only what is asked for is taken": (
        True,
        CELLS + VIRTIO_MEM,
        6 * GIB,
        [(2048, 1024 + 128, BOTH)],
    ),
}


@pytest.mark.parametrize("what", TABLE)
def test_the_pages_that_a_domain_needs(big: FakeHost, what: str) -> None:
    hugepages, body, memory, wanted = TABLE[what]
    plan = ask(big, "hugepages", domain_xml(memory_kib=memory, hugepages=hugepages, body=body))
    assert [p.message for p in plan.problems] == []
    assert [(a.size_kib, a.pages, a.nodes) for a in plan.actions if isinstance(a, AddPages)] == wanted
    notes = [p.item for p in plan.items if isinstance(p.item, Note)]
    assert bool(notes) == (not wanted), "nothing to do is said in one line"


def test_planning_changes_nothing_and_says_what_is_free(big: FakeHost) -> None:
    before = big.snapshot()
    (action,) = ask(big, "hugepages", domain_xml(hugepages=True)).actions
    assert action.describe(big) == "512 pages of 2 MiB on node 0 or 1: 0 free now"
    assert big.snapshot() == before


def test_drop_caches_is_the_admins_choice(big: FakeHost) -> None:
    for allowed in (True, False):
        (action,) = ask(big, "hugepages", domain_xml(hugepages=True), {"drop_caches": allowed}).actions
        assert isinstance(action, AddPages)
        assert action.drop_caches == allowed


PROBLEMS: dict[str, tuple[bool | str, str, int, tuple[str, ...]]] = {
    "more than there is": (
        True,
        "",
        200 * GIB,
        ("102400 pages of 2 MiB (200 GiB)", "at most 65536 (128 GiB)"),
    ),
    "more than the node has": (
        True,
        "<numatune><memory nodeset='1'/></numatune>",
        100 * GIB,
        ("on node 1", "at most 32768 (64 GiB)"),
    ),
    "a size that the kernel does not have": (
        "<page size='16' unit='MiB'/>",
        "",
        GIB,
        ("no pages of 16 MiB", "it has: 2 MiB, 1 GiB"),
    ),
    "a node that the host does not have": (
        True,
        "<numatune><memory nodeset='0,7'/></numatune>",
        GIB,
        ("no memory node 7",),
    ),
}


@pytest.mark.parametrize("what", PROBLEMS)
def test_what_cannot_be_is_refused_before_anything_is_touched(big: FakeHost, what: str) -> None:
    hugepages, body, memory, parts = PROBLEMS[what]
    plan = ask(big, "hugepages", domain_xml(memory_kib=memory, hugepages=hugepages, body=body))
    told = "\n".join(f"{p.message}\n{p.hint}" for p in plan.problems)
    for part in parts:
        assert part in told
    assert all(p.hint for p in plan.problems)


def test_free_pages_and_file_cache_count_as_room(host: FakeHost) -> None:
    host.node(0, free_kib=10 * 2048, cache_kib=5 * 2048, pages={2048: 3}).hugetlbfs()
    assert not ask(host, "hugepages", domain_xml(memory_kib=18 * 2048, hugepages=True)).problems
    assert ask(host, "hugepages", domain_xml(memory_kib=19 * 2048, hugepages=True)).problems


MEMFD = "<page size='1' unit='G'/>"


@pytest.mark.parametrize(
    ("mounts", "source", "problem", "remedy"),
    [
        ([], "", "no hugetlbfs with pages of 1 GiB is mounted", "mount -t hugetlbfs -o pagesize=1048576K"),
        (
            [(2048, True)],
            "",
            "no hugetlbfs with pages of 1 GiB is mounted",
            "mount -t hugetlbfs -o pagesize=1048576K none /dev/hugepages-1048576kB",
        ),
        ([(GIB, False)], "", "libvirt does not know the hugetlbfs mount", "systemctl restart libvirtd"),
        ([(GIB, True)], "", "", ""),
        ([], "memfd", "no hugetlbfs with pages of 2 MiB is mounted", "/dev/hugepages;"),
        ([(2048, True)], "memfd", "", ""),
        ([(2048, False)], "memfd", "libvirt does not know the hugetlbfs mount", "systemctl restart libvirtd"),
    ],
)
def test_a_mount_that_libvirt_knows_is_needed_of_any_size_for_memfd(
    host: FakeHost, mounts: list[tuple[int, bool]], source: str, problem: str, remedy: str
) -> None:
    host.node(0, free_kib=8 * GIB)
    for size, known in mounts:
        host.hugetlbfs(f"/mnt/huge{size}", size, known)
    xml = domain_xml(hugepages=MEMFD)
    if source:
        xml = xml.replace(b"</hugepages>", b"</hugepages><source type='memfd'/>")
    found = ask(host, "hugepages", xml).problems
    assert len(found) == bool(problem)
    for one in found:
        assert problem in one.message
        assert remedy in one.hint


@pytest.mark.parametrize(
    ("file", "limit", "refused"),
    [
        ("hugetlb.2MB.max", str(1 << 30), False),
        ("hugetlb.2MB.max", str((1 << 30) - 4096), True),
        ("hugetlb.2MB.rsvd.max", "0", True),
        ("hugetlb.2MB.max", "max", False),
        ("hugetlb.1GB.max", "0", False),
    ],
)
def test_a_limit_of_the_cgroup_is_a_reason_to_refuse(
    big: FakeHost, file: str, limit: str, refused: bool
) -> None:
    big.file(f"/sys/fs/cgroup/machine.slice/{file}", limit)
    found = ask(big, "hugepages", domain_xml(hugepages=True)).problems
    assert len(found) == refused
    assert all(file in p.message and file in p.hint for p in found)


def test_a_kernel_without_huge_pages_is_said_so(host: FakeHost) -> None:
    (problem,) = ask(host, "hugepages", domain_xml(hugepages=True)).problems
    assert "no huge pages" in problem.message
