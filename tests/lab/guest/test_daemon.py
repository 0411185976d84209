"""The daemon comes and goes under systemd; what domains hold stays right."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest
from tests.lab.guest import kernel
from tests.lab.guest.domains import Domain, run, virsh, wait_for
from tests.lab.guest.usher import enable, given_back, journal

pytestmark = [pytest.mark.product, pytest.mark.usefixtures("empty_pools")]


def restart() -> None:
    run("systemctl", "restart", "libvirtd")


def stop_and_let_the_socket_start_it() -> None:
    run("systemctl", "stop", "libvirtd.service")
    assert run("systemctl", "is-active", "libvirtd.socket").stdout.strip() == "active"
    assert run("systemctl", "is-active", "libvirtd.service", check=False).returncode != 0


def kill() -> None:
    pid = int(run("systemctl", "show", "--property=MainPID", "--value", "libvirtd").stdout)
    os.kill(pid, signal.SIGKILL)
    wait_for("another libvirtd", lambda: "running" in virsh("list", check=False).stdout)


@pytest.fixture
def running(domain: Domain) -> Domain:
    """A domain that holds pages and governors.

    The machine's libvirtd ran before install.sh: it was told that there is a hook.
    """
    domain.hugepages, domain.nodeset = "<hugepages/>", "0"
    enable(domain, "hugepages", "governor").start()
    return domain


@pytest.mark.parametrize(
    "how", [restart, stop_and_let_the_socket_start_it, kill], ids=lambda how: how.__name__
)
def test_a_domain_lives_through_its_daemon(running: Domain, how: Callable[[], None]) -> None:
    pid = running.pid
    how()
    running.wait_for_daemon()
    assert running.pid == pid
    assert kernel.pages(0) == 32
    assert set(kernel.governors().values()) == {"performance"}
    running.stop()
    given_back(running)
    assert kernel.pages(0) == 0
    assert "performance" not in kernel.governors().values()


def test_a_domain_that_dies_without_its_daemon(running: Domain) -> None:
    pid = running.pid
    run(
        "systemctl",
        "stop",
        "libvirtd.service",
        "libvirtd.socket",
        "libvirtd-ro.socket",
        "libvirtd-admin.socket",
    )
    os.kill(pid, signal.SIGKILL)
    assert journal(running).exists()
    run("systemctl", "start", "libvirtd.service")
    given_back(running)
    assert kernel.pages(0) == 0
    assert "performance" not in kernel.governors().values()
