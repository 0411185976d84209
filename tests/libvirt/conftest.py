"""One private libvirt daemon for the whole run; each test ends on the host it began on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.libvirt import product
from tests.libvirt.pool import POOL, free_pages, held_pool, nr_pages
from tests.libvirt.private import DAEMON_LOG, HOOKS, PrivateLibvirt

PRISTINE = "/run/private/etc-virt-usher"  # the configuration as installed
DEBIAN_PACKAGES = {
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "libvirtd": "libvirt-daemon-system",
    "virtlogd": "libvirt-daemon-system",
    "virsh": "libvirt-clients",
    "qemu-system-x86_64": "qemu-system-x86",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.libvirt)


def missing() -> str | None:
    """Say in one line what this machine lacks."""
    if os.geteuid() != 0:
        return "the tests with a real libvirt need root: sudo"
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    packages = {
        package for command, package in DEBIAN_PACKAGES.items() if not shutil.which(command, path=path)
    }
    if packages:
        return f"the tests with a real libvirt need: apt-get install {' '.join(sorted(packages))}"
    if not POOL.exists():
        return "the tests with a real libvirt need a kernel with huge pages of 2 MiB"
    return None


@pytest.fixture(scope="session")
def daemon() -> Iterator[PrivateLibvirt]:
    """Start the daemon, or fail where a missing prerequisite must not go unnoticed."""
    if problem := missing():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(problem)
    with held_pool():
        assert free_pages() == 0, f"the pool must be empty for these tests: echo 0 >{POOL}/nr_hugepages"
        libvirt = PrivateLibvirt()
        try:
            libvirt.run("virtlogd", "--daemon", check=True)
            libvirt.start_daemon()
            yield libvirt
        finally:
            libvirt.close()


@pytest.fixture
def lv(daemon: PrivateLibvirt) -> Iterator[PrivateLibvirt]:
    """The daemon without domains, as each test finds it and must be able to leave it."""
    pages = nr_pages()
    daemon.path(DAEMON_LOG).write_text("")
    yield daemon
    print(daemon.path(DAEMON_LOG).read_text())  # pytest shows it if the test failed
    left = daemon.clear()
    if nr_pages() != pages:
        left.append(f"{nr_pages() - pages} huge pages")
        (POOL / "nr_hugepages").write_text(str(pages))
    assert not left, f"left behind: {left}"


@pytest.fixture
def bare(lv: PrivateLibvirt) -> PrivateLibvirt:
    """The daemon without any hook."""
    lv.remove(HOOKS)
    return lv


@pytest.fixture
def usher(lv: PrivateLibvirt) -> PrivateLibvirt:
    """The daemon with virt-usher installed as its README says, and nothing enabled yet."""
    if not lv.path(f"{HOOKS}/qemu").exists() or not lv.path(PRISTINE).exists():
        lv.remove(HOOKS, PRISTINE)
        product.install(lv)
        lv.run("cp", "-a", product.CONFIG, PRISTINE, check=True)
    lv.remove(product.CONFIG)
    lv.run("cp", "-a", PRISTINE, product.CONFIG, check=True)
    return lv
