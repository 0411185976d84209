"""Huge pages come from the right node, in both sizes, and go back."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.lab.guest import kernel
from tests.lab.guest.domains import Domain, run, virsh
from tests.lab.guest.usher import enable, given_back, journal

pytestmark = [pytest.mark.product, pytest.mark.usefixtures("empty_pools")]
GIB = 1048576
ANY = "<hugepages/>"
GIGANTIC = f"<hugepages><page size='{GIB}' unit='KiB'/></hugepages>"


@pytest.fixture
def nodes_are_readable() -> None:
    """Let QEMU's libnuma see the nodes: Debian 12's AppArmor profile hides them, and <numatune> fails."""
    if "bookworm" in Path("/etc/os-release").read_text():
        local = Path("/etc/apparmor.d/local/abstractions/libvirt-qemu")
        local.parent.mkdir(parents=True, exist_ok=True)
        local.write_text("/sys/devices/system/node/** r,\n/sys/devices/system/cpu/** r,\n")


@pytest.mark.smoke
@pytest.mark.usefixtures("nodes_are_readable")
@pytest.mark.parametrize("node", [0, 1])
def test_pages_come_from_the_node_of_numatune(domain: Domain, node: int) -> None:
    domain.hugepages, domain.nodeset, domain.confined = ANY, str(node), True
    enable(domain, "hugepages").start()
    assert kernel.pages(node) == 32
    assert kernel.pages(1 - node) == 0
    domain.stop()
    given_back(domain)
    assert (kernel.pages(0), kernel.pages(1)) == (0, 0)


def test_a_saved_domain_is_restored_with_pages_again(domain: Domain) -> None:
    domain.hugepages, domain.nodeset = ANY, "1"
    enable(domain, "hugepages").start()
    virsh("managedsave", domain.name)
    given_back(domain)
    assert kernel.pages(1) == 0
    virsh("start", domain.name)
    assert kernel.pages(1) == 32
    domain.stop()
    given_back(domain)
    assert kernel.pages(1) == 0


def test_pages_of_the_admin_stay(domain: Domain) -> None:
    (kernel.pool(1) / "nr_hugepages").write_text("5")
    domain.hugepages, domain.nodeset = ANY, "1"
    enable(domain, "hugepages").start()
    domain.stop()
    given_back(domain)
    assert kernel.pages(1) == 5


def test_two_starts_at_once_on_one_node(domain: Domain, second_domain: Domain) -> None:
    both = (domain, second_domain)
    for one in both:
        one.hugepages, one.nodeset = ANY, "1"
        enable(one, "hugepages")
    for verb, expected in (("start", 64), ("destroy", 0)):
        calls = [subprocess.Popen(["virsh", "-c", "qemu:///system", verb, one.name]) for one in both]
        assert [call.wait(180) for call in calls] == [0, 0]
        if verb == "destroy":
            for one in both:
                given_back(one)
        assert (kernel.pages(0), kernel.pages(1)) == (0, expected)


def test_more_than_the_node_has_is_refused(domain: Domain) -> None:
    domain.hugepages, domain.nodeset, domain.memory_mib = ANY, "0", 16384
    refusal = enable(domain, "hugepages").start(check=False)
    assert refusal.returncode == 1
    assert "node 0" in refusal.stderr
    assert not journal(domain).exists()
    assert kernel.pages(0) == 0


@pytest.fixture
def gigantic(domain: Domain) -> Domain:
    """A domain of one page of 1 GiB, on the node that has room for it."""
    domain.hugepages, domain.nodeset, domain.memory_mib, domain.confined = GIGANTIC, "1", 1024, True
    return enable(domain, "hugepages")


@pytest.fixture
def no_gigantic_mount() -> Iterator[None]:
    """Whatever a test mounts for pages of 1 GiB is gone afterwards."""
    yield
    for line in Path("/proc/mounts").read_text().splitlines():
        _, where, kind, options, *_ = line.split()
        if kind == "hugetlbfs" and "pagesize=1024M" in options:
            run("umount", where)
    run("systemctl", "restart", "libvirtd")


def test_a_missing_mount_is_refused_and_its_remedy_works(gigantic: Domain, no_gigantic_mount: None) -> None:
    refusal = gigantic.start(check=False)
    assert refusal.returncode == 1
    assert not journal(gigantic).exists()
    assert kernel.pages(1, GIB) == 0
    remedy = re.search(r"mkdir -p .*?systemctl restart libvirtd", refusal.stderr, re.DOTALL)
    assert remedy, refusal.stderr
    run("sh", "-ec", remedy[0])
    run("sh", "-c", "sync; echo 3 >/proc/sys/vm/drop_caches; echo 1 >/proc/sys/vm/compact_memory")
    virsh("start", gigantic.name)
    assert (kernel.pages(0, GIB), kernel.pages(1, GIB)) == (0, 1)
    gigantic.stop()
    given_back(gigantic)
    assert kernel.pages(1, GIB) == 0
