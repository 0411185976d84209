"""The machine reboots with domains running; nothing stale is left.

The first test belongs to the boot before and leaves its domains running.
"""

from __future__ import annotations

import pytest
from tests.lab.guest import kernel
from tests.lab.guest.domains import Domain, run, virsh, wait_for
from tests.lab.guest.usher import RUN, enable, given_back, journal

pytestmark = pytest.mark.product
COMES_BACK = Domain("comes-back", hugepages="<hugepages/>", nodeset="0")
STAYS_AWAY = Domain("stays-away", hugepages="<hugepages/>", nodeset="1")


@pytest.mark.last
def test_reboot_with_domains_running() -> None:
    for domain in (COMES_BACK, STAYS_AWAY):
        enable(domain, "hugepages", "governor").start()
        assert journal(domain).exists()
    virsh("autostart", COMES_BACK.name)


@pytest.mark.boot(1)
def test_reboot_starts_the_domain_that_is_wanted() -> None:
    wait_for("autostart", lambda: COMES_BACK.state == "running")
    assert journal(COMES_BACK).exists()
    assert (kernel.pages(0), kernel.pages(1)) == (32, 0)
    assert set(kernel.governors().values()) == {"performance"}


@pytest.mark.boot(1)
def test_reboot_leaves_nothing_stale() -> None:
    assert STAYS_AWAY.state == "shut off"
    assert {path.name for path in RUN.glob("*.jnl")} == {f"{COMES_BACK.name}.jnl"}
    run("virt-usher", "status")
    assert not run("systemctl", "--failed", "--no-legend", check=False).stdout
    STAYS_AWAY.start()
    STAYS_AWAY.stop()
    given_back(STAYS_AWAY)
    assert kernel.pages(1) == 0


@pytest.mark.boot(1)
def test_reboot_is_forgotten_in_the_end() -> None:
    COMES_BACK.stop()
    given_back(COMES_BACK)
    assert kernel.pages(0) == 0
    assert "performance" not in kernel.governors().values()
