"""What libvirt wants for huge pages by memfd: a contract that varies."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from tests.lab.guest import kernel
from tests.lab.guest.domains import Domain, run

pytestmark = pytest.mark.usefixtures("empty_pools")


@pytest.fixture
def no_mount() -> Iterator[None]:
    """No hugetlbfs at all, and a libvirtd that knows it."""
    run("systemctl", "stop", "dev-hugepages.mount")
    run("systemctl", "restart", "libvirtd")
    yield
    run("systemctl", "start", "dev-hugepages.mount")
    run("systemctl", "restart", "libvirtd")


@pytest.mark.usefixtures("no_mount")
def test_memfd_pages_without_any_mount(
    domain: Domain, record_testsuite_property: Callable[[str, object], None]
) -> None:
    (kernel.pool(0) / "nr_hugepages").write_text("32")
    domain.nodeset = "0"
    domain.hugepages = "<hugepages/><source type='memfd'/>"
    started = domain.start(check=False)
    print(f"libvirt without a hugetlbfs mount, memfd: {started.stderr.strip() or 'started'}")
    record_testsuite_property("memfd", started.stderr.strip() or "started")
    if started.returncode == 0:
        # The pages are really used, though nobody needs a mount for them.
        assert int((kernel.pool(0) / "free_hugepages").read_text()) == 0
    else:
        assert "hugetlbfs" in started.stderr
