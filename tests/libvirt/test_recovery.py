"""Daemons that restart and die, an interpreter that broke: guests live on, and nothing stays taken."""

from __future__ import annotations

import signal

import pytest
from tests.libvirt.domain import Domain
from tests.libvirt.pool import nr_pages
from tests.libvirt.private import PrivateLibvirt, pool_becomes, wait_for
from tests.libvirt.product import (
    BROKEN_PYTHONS,
    CONFIG,
    broken_python,
    cli,
    enable,
    enable_stuck,
    journal,
    unstick,
    wait_until_stuck,
)


@pytest.mark.parametrize("how", ["TERM", "KILL"])
@pytest.mark.parametrize("python", [None, *BROKEN_PYTHONS])
def test_a_running_domain_survives_a_restart_of_the_daemon(
    usher: PrivateLibvirt, python: str | None, how: str
) -> None:
    before = nr_pages()
    domain = enable(usher, Domain("guest"))
    assert usher.start(domain).returncode == 0
    qemu = usher.qemu_pid(domain)
    usher.stop_daemon(how)
    with broken_python(usher, python):
        usher.start_daemon()
        assert usher.state(domain) == "running"
        assert usher.qemu_pid(domain) == qemu
        assert nr_pages() == before + domain.pages
    assert usher.destroy(domain).returncode == 0
    pool_becomes(before)


def test_what_a_broken_python_could_not_give_back_recover_does(usher: PrivateLibvirt) -> None:
    before = nr_pages()
    domain = enable(usher, Domain("guest"))
    assert usher.start(domain).returncode == 0
    with broken_python(usher, "fails"):
        assert usher.destroy(domain).returncode == 0
        assert usher.state(domain) == "shut off"
        assert nr_pages() == before + domain.pages
    result = cli(usher, "recover")
    assert result.returncode == 0, result.stderr
    assert nr_pages() == before
    assert not journal(usher, domain)


@pytest.mark.parametrize("name", ["plain", "it's", 'say "please"', "back\\slash;&|<x>"])
def test_recover_leaves_a_running_domain_alone(usher: PrivateLibvirt, name: str) -> None:
    """The daemon being down, nothing but the domain's QEMU says that it runs."""
    before = nr_pages()
    domain = enable(usher, Domain(name))
    assert usher.start(domain).returncode == 0
    usher.kill_daemon()
    cli(usher, "recover")
    held = journal(usher, domain)
    usher.start_daemon()
    assert held
    assert nr_pages() == before + domain.pages
    assert usher.destroy(domain).returncode == 0
    pool_becomes(before)


def killed_in_a_start(lv: PrivateLibvirt, domain: Domain) -> None:
    """Kill the daemon, and nothing else, while its hook hangs."""
    lv.define(domain)
    start = lv.spawn("virsh", "-c", "qemu:///system", "start", domain.uuid)
    wait_until_stuck(lv, domain)
    lv.kill_daemon()
    assert lv.finish(start).returncode == 1


@pytest.mark.parametrize("operation", ["prepare", "start"])
def test_a_domain_whose_daemon_was_killed_in_its_start_starts_again(
    usher: PrivateLibvirt, operation: str
) -> None:
    before = nr_pages()
    domain = enable_stuck(usher, Domain("guest"), hook=operation)
    killed_in_a_start(usher, domain)
    usher.start_daemon()
    unstick(usher)
    starts_and_stops(usher, domain, before)


def test_a_start_names_the_prepare_that_outlived_its_daemon(usher: PrivateLibvirt) -> None:
    before = nr_pages()
    domain = enable_stuck(usher, Domain("guest"), start=4, stop=1)
    killed_in_a_start(usher, domain)
    usher.start_daemon()
    result = usher.virsh("start", domain.uuid, timeout=8)
    assert result.returncode == 1
    assert "held by pid " in result.stderr
    unstick(usher)
    starts_and_stops(usher, domain, before)


def starts_and_stops(lv: PrivateLibvirt, domain: Domain, before: int) -> None:
    result = lv.virsh("start", domain.uuid)
    assert result.returncode == 0, result.stderr
    assert nr_pages() == before + domain.pages
    assert lv.destroy(domain).returncode == 0
    pool_becomes(before)


@pytest.mark.parametrize("who", ["recover", "the next daemon"])
def test_what_a_killed_daemon_left_is_given_back_by(usher: PrivateLibvirt, who: str) -> None:
    before = nr_pages()
    domain = enable_stuck(usher, Domain("guest"))
    killed_in_a_start(usher, domain)
    unstick(usher)
    wait_for("the end of the hook", lambda: not usher.pids("python3"))
    assert nr_pages() == before + domain.pages
    if who == "recover":
        assert cli(usher, "recover").returncode == 0
    usher.start_daemon()
    assert nr_pages() == before


@pytest.mark.parametrize("victim", [signal.SIGKILL, signal.SIGTERM])
def test_a_hook_killed_in_the_middle_leaves_nothing(usher: PrivateLibvirt, victim: signal.Signals) -> None:
    """Every process of the hook dies at once, while the pages are taken: libvirt refuses and releases."""
    before = nr_pages()
    domain = enable_stuck(usher, Domain("guest"))
    usher.define(domain)
    start = usher.spawn("virsh", "-c", "qemu:///system", "start", domain.uuid)
    wait_until_stuck(usher, domain)
    hook = usher.pids("python3") + usher.pids("qemu")  # the gate's name is that of its file
    usher.run("kill", f"-{victim.value}", *map(str, hook))  # with one, another may end by itself
    assert usher.finish(start).returncode == 1
    pool_becomes(before)
    wait_for("no journal", lambda: not journal(usher, domain))


def test_a_guest_survives_a_daemon_killed_in_started(usher: PrivateLibvirt) -> None:
    before = nr_pages()
    domain = enable_stuck(usher, Domain("guest"), hook="started", stop=1)
    killed_in_a_start(usher, domain)
    usher.start_daemon()
    assert usher.state(domain) == "running"
    unstick(usher)
    assert usher.destroy(domain).returncode == 0
    pool_becomes(before)
    wait_for("no journal", lambda: not journal(usher, domain))


def test_a_hung_started_keeps_neither_the_guest_from_running_nor_its_pages(usher: PrivateLibvirt) -> None:
    before = nr_pages()
    domain = enable_stuck(usher, Domain("guest"), start=1, stop=1, hook="started")
    result = usher.start(domain, timeout=5)
    assert result.returncode == 0, result.stderr
    assert usher.state(domain) == "running"
    assert usher.virsh("destroy", domain.uuid, timeout=5).returncode == 0
    unstick(usher)
    pool_becomes(before)
    wait_for("no journal", lambda: not journal(usher, domain))


def test_release_needs_no_configuration_and_no_library(usher: PrivateLibvirt) -> None:
    before = nr_pages()
    domain = enable(usher, Domain("guest"))
    assert usher.start(domain).returncode == 0
    usher.remove(CONFIG)
    usher.run("mkdir", "-p", "/run/private/empty", check=True)
    with usher.covered("/usr/lib/python3/dist-packages", "/run/private/empty"):
        assert usher.destroy(domain).returncode == 0
        pool_becomes(before)


def test_a_missing_library_is_named(usher: PrivateLibvirt) -> None:
    usher.run("mkdir", "-p", "/run/private/empty", check=True)
    with usher.covered("/usr/lib/python3/dist-packages", "/run/private/empty"):
        result = usher.start(enable(usher, Domain("guest")))
    assert result.returncode == 1
    assert "lxml" in result.stderr or "pluggy" in result.stderr
