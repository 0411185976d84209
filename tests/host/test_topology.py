"""Proposed pins: whole cores, siblings together, what is shared, and the first core for the host."""

from __future__ import annotations

from pathlib import Path

import pytest

from virt_usher.errors import UsherError
from virt_usher.host.topology import Topology, propose
from virt_usher.testing.cgroup import CpuHost


def machine(root: Path, *cores: list[int], nodes: int = 1, caches: int = 1) -> Topology:
    return Topology(CpuHost(root).cores(*cores, nodes=nodes, caches=caches))


def quad(root: Path) -> Topology:
    """A quad core with hyper-threading: the core is the CPU's number modulo 4."""
    return machine(root, [0, 4], [1, 5], [2, 6], [3, 7])


def two_nodes(root: Path) -> Topology:
    """Two nodes with two caches each, of two cores with one thread."""
    return machine(root, *([n] for n in range(8)), nodes=2, caches=4)


def test_whole_cores_with_the_host_on_the_first_ones(tmp_path: Path) -> None:
    assert propose(quad(tmp_path), 4) == [(2, 6), (3, 7)]
    assert propose(quad(tmp_path), 6) == [(1, 5), (2, 6), (3, 7)]


def test_a_core_for_each_vcpu(tmp_path: Path) -> None:
    assert propose(quad(tmp_path), 3) == [(1,), (2,), (3,)]
    assert propose(quad(tmp_path), 2, threads=1) == [(2,), (3,)]


def test_one_cache_then_one_node_near_the_device(tmp_path: Path) -> None:
    topology = two_nodes(tmp_path)
    assert propose(topology, 2, node=1) == [(4,), (5,)]
    assert propose(topology, 2, node=0) == [(2,), (3,)]
    assert propose(topology, 3, node=1) == [(5,), (6,), (7,)]
    assert propose(topology, 4, node=0) == [(4,), (5,), (6,), (7,)]
    assert propose(topology, 1) == [(1,)], "the rest stays in large pieces"


def test_what_others_have_is_left_to_them(tmp_path: Path) -> None:
    assert propose(quad(tmp_path), 2, taken=[7]) == [(2, 6)]


def test_hybrid_cpus_give_cores_of_one_kind(tmp_path: Path) -> None:
    topology = machine(tmp_path, [0, 1], [2, 3], [4, 5], [6], [7], [8], [9])
    assert propose(topology, 4) == [(2, 3), (4, 5)]
    assert propose(topology, 3) == [(7,), (8,), (9,)]


@pytest.mark.parametrize(("vcpus", "threads"), [(8, 0), (7, 0), (4, 1), (4, 3)])
def test_too_few_cores_are_an_error(tmp_path: Path, vcpus: int, threads: int) -> None:
    with pytest.raises(UsherError, match="3 of 4 cores are free"):
        propose(quad(tmp_path), vcpus, threads)


def test_an_offline_cpu_belongs_to_no_core(tmp_path: Path) -> None:
    host = CpuHost(tmp_path).cores([0, 2], [1, 3])
    host.set_online(3, False)
    host.file("/sys/devices/system/cpu/cpu1/topology/thread_siblings_list", "1")
    assert list(map(set, Topology(host).cores)) == [{0, 2}, {1}]
    assert Topology(host).whole_cores([1]) == {1}
