"""A real start takes real pages, and every end of a domain gives them back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.libvirt.domain import Domain
from tests.libvirt.pool import free_pages, nr_pages
from tests.libvirt.private import PrivateLibvirt, pool_becomes, wait_for
from tests.libvirt.product import enable, journal

HOSTILE_NAMES = [
    "two words",
    "it's",
    'say "please"',
    "-dash",
    "--help",
    "[brackets]*",
    "$(kill 0)`kill 0`",
    "back\\slash;&|<x>",
    ".hidden",
    "ünïcødé-名",
    "n" * 200,
]


def run(lv: PrivateLibvirt, *domains: Domain) -> None:
    for domain in domains:
        result = lv.start(enable(lv, domain))
        assert result.returncode == 0, result.stderr


def destroyed(lv: PrivateLibvirt, domain: Domain) -> None:
    assert lv.destroy(domain).returncode == 0


def crashed(lv: PrivateLibvirt, domain: Domain) -> None:
    lv.run("kill", "-KILL", str(lv.qemu_pid(domain)), check=True)


def ended(lv: PrivateLibvirt, domain: Domain) -> None:
    lv.run("kill", "-TERM", str(lv.qemu_pid(domain)), check=True)


def crashed_while_the_daemon_was_down(lv: PrivateLibvirt, domain: Domain) -> None:
    lv.kill_daemon()
    crashed(lv, domain)
    lv.start_daemon()


def destroyed_after_a_restart(lv: PrivateLibvirt, domain: Domain) -> None:
    lv.restart_daemon()
    destroyed(lv, domain)


def saved(lv: PrivateLibvirt, domain: Domain) -> None:
    assert lv.virsh("managedsave", domain.uuid).returncode == 0


def reset_and_destroyed(lv: PrivateLibvirt, domain: Domain) -> None:
    assert lv.virsh("reset", domain.uuid).returncode == 0
    assert journal(lv, domain)
    destroyed(lv, domain)


@pytest.mark.parametrize(
    "end",
    [
        destroyed,
        crashed,
        ended,
        crashed_while_the_daemon_was_down,
        destroyed_after_a_restart,
        saved,
        reset_and_destroyed,
    ],
)
def test_the_domain_runs_and_its_pages_come_back(
    usher: PrivateLibvirt, end: Callable[[PrivateLibvirt, Domain], None]
) -> None:
    before = nr_pages()
    domain = Domain("guest")
    run(usher, domain)
    assert usher.state(domain) == "running"
    assert (nr_pages(), free_pages()) == (before + domain.pages, 0)
    end(usher, domain)
    pool_becomes(before)
    wait_for("no journal", lambda: not journal(usher, domain))


def test_a_start_that_fails_later_gives_the_pages_back(usher: PrivateLibvirt) -> None:
    before = nr_pages()
    result = usher.start(enable(usher, Domain("broken", qemu_args=("-no-such-option",))))
    assert result.returncode == 1
    assert "no-such-option" in result.stderr
    pool_becomes(before)


def test_two_starts_at_the_same_moment_both_run(usher: PrivateLibvirt) -> None:
    before = nr_pages()
    domains = [enable(usher, Domain(f"twin{n}")) for n in range(2)]
    for domain in domains:
        usher.define(domain)
    for verb, pages in (("start", 2 * domains[0].pages), ("destroy", 0)):
        calls = [usher.spawn("virsh", "-c", "qemu:///system", verb, domain.uuid) for domain in domains]
        results = [usher.finish(call) for call in calls]
        assert [result.returncode for result in results] == [0, 0], [result.stderr for result in results]
        pool_becomes(before + pages)


def test_a_saved_domain_is_restored_with_pages_again(usher: PrivateLibvirt) -> None:
    before = nr_pages()
    domain = Domain("saved")
    run(usher, domain)
    for save, restore in (
        (("save", domain.uuid, "/run/saved.img"), ("restore", "/run/saved.img")),
        (("managedsave", domain.uuid), ("start", domain.uuid)),
    ):
        assert usher.virsh(*save).returncode == 0
        pool_becomes(before)
        result = usher.virsh(*restore)
        assert result.returncode == 0, result.stderr
        assert usher.state(domain) == "running"
        assert nr_pages() == before + domain.pages


def test_a_transient_domain_runs(usher: PrivateLibvirt) -> None:
    before = nr_pages()
    domain = enable(usher, Domain("transient"))
    result = usher.create(domain)
    assert result.returncode == 0, result.stderr
    assert nr_pages() == before + domain.pages
    destroyed(usher, domain)
    pool_becomes(before)


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_domain_may_have_any_name_libvirt_allows(usher: PrivateLibvirt, name: str) -> None:
    before = nr_pages()
    domain = Domain(name)
    run(usher, domain)
    assert nr_pages() == before + domain.pages
    destroyed(usher, domain)
    pool_becomes(before)


def test_an_autostarted_domain_runs(usher: PrivateLibvirt) -> None:
    """Its hooks run while the daemon does not answer anybody yet."""
    before = nr_pages()
    domain = enable(usher, Domain("autostarted"))
    usher.define(domain)
    assert usher.virsh("autostart", domain.uuid).returncode == 0
    usher.remove("/run/libvirt/qemu/autostarted")  # libvirt autostarts once per boot
    usher.restart_daemon()
    wait_for("a running domain", lambda: usher.state(domain) == "running")
    assert nr_pages() == before + domain.pages
    destroyed(usher, domain)
    pool_becomes(before)
