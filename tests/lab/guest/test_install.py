"""Upgrading and removing virt-usher on a machine that is in use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.lab.guest import kernel
from tests.lab.guest.agent import CHECKOUT
from tests.lab.guest.domains import HOOKS, Domain, run
from tests.lab.guest.usher import CONFIG, RUN, enable, given_back, install, journal

pytestmark = [pytest.mark.product, pytest.mark.usefixtures("empty_pools")]


@pytest.fixture
def running(domain: Domain) -> Domain:
    """A domain that holds pages."""
    domain.hugepages, domain.nodeset = "<hugepages/>", "0"
    enable(domain, "hugepages").start()
    return domain


@pytest.fixture
def installed_again() -> Iterator[None]:
    """Leave an installed virt-usher to the tests that follow."""
    yield
    install()


@pytest.mark.smoke
def test_doctor_finds_nothing_wrong() -> None:
    run("virt-usher", "doctor")


def _installed() -> list[str]:
    return run("find", "/usr/local/lib/virt-usher", "/etc/virt-usher", "/etc/libvirt").stdout.splitlines()


def test_installing_again_changes_nothing(running: Domain) -> None:
    before = _installed()
    install()
    assert _installed() == before
    assert journal(running).exists()


@pytest.mark.usefixtures("installed_again")
def test_an_upgrade_while_a_domain_runs(
    running: Domain, second_domain: Domain, installed_again: None
) -> None:
    plugin = CHECKOUT / "plugins/hugepages.py"
    original = plugin.read_text()
    plugin.write_text(original + "# the next version\n")
    try:
        install()
    finally:
        plugin.write_text(original)
    second_domain.hugepages, second_domain.nodeset = "<hugepages/>", "0"
    enable(second_domain, "hugepages").start()
    assert kernel.pages(0) == 64
    running.stop()
    given_back(running)
    assert kernel.pages(0) == 32
    second_domain.stop()
    given_back(second_domain)
    assert kernel.pages(0) == 0


@pytest.mark.usefixtures("installed_again")
def test_removal(running: Domain) -> None:
    """Refused while a domain holds something; complete afterwards."""
    refusal = install("--uninstall", check=False)
    assert running.name in refusal
    assert journal(running).exists()
    running.stop()
    given_back(running)
    install("--uninstall")
    left = run("sh", "-c", f"ls -d {HOOKS}/qemu /usr/local/lib/virt-usher {RUN} || true").stdout
    assert not left
    assert CONFIG.is_dir()
    # And libvirt does without it.
    (kernel.pool(0) / "nr_hugepages").write_text("32")
    running.start()
    running.stop()
    assert kernel.pages(0) == 32
