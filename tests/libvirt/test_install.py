"""The installer: beside other people's hooks, and while domains run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.libvirt.domain import Domain
from tests.libvirt.pool import nr_pages
from tests.libvirt.private import HOOKS, PrivateLibvirt, pool_becomes
from tests.libvirt.product import (
    CHECKOUT,
    CONFIG,
    NO_PAGES,
    OFF,
    enable,
    enable_stuck,
    install,
    other_version,
    unstick,
    wait_until_stuck,
)

FOREIGN_LOG = "/run/foreign.log"
FOREIGN = f'#!/bin/sh\necho "$2" >>{FOREIGN_LOG}\n'


def hooks(lv: PrivateLibvirt) -> dict[str, str]:
    """Return all that libvirt would run, or try to, with its content."""
    paths = lv.run("find", HOOKS, "-type", "f", "-printf", "%P\n").stdout.splitlines()
    return {path: lv.path(f"{HOOKS}/{path}").read_text() for path in paths}


@pytest.fixture(autouse=True)
def own_installation(lv: PrivateLibvirt) -> Iterator[None]:
    """Leave no other version to the tests that follow: they install anew where they find no hook."""
    yield
    lv.remove_domains()
    lv.remove(HOOKS)


def test_a_running_daemon_is_told(bare: PrivateLibvirt) -> None:
    """It looks for hooks once, at its start, and found none."""
    bare.restart_daemon()
    install(bare)
    domain = enable(bare, Domain("guest"))
    result = bare.start(domain)
    assert result.returncode == 0, result.stderr
    assert nr_pages() == domain.pages


def test_nothing_else_lies_in_the_hooks_folder_and_twice_is_once(usher: PrivateLibvirt) -> None:
    """Whatever is executable there runs, backups and dotfiles too."""
    before = hooks(usher)
    assert before.keys() == {"qemu", "daemon"}
    install(usher)
    assert hooks(usher) == before


def test_a_foreign_hook_stays_and_keeps_being_called(bare: PrivateLibvirt) -> None:
    before = nr_pages()
    bare.remove(FOREIGN_LOG)
    bare.write(f"{HOOKS}/qemu", FOREIGN, 0o755)
    install(bare)
    bare.restart_daemon()
    assert hooks(bare).keys() == {"qemu", "qemu.d/50-virt-usher", "daemon"}

    domain = enable(bare, Domain("guest"))
    result = bare.start(domain)
    assert result.returncode == 0, result.stderr
    assert nr_pages() == before + domain.pages
    assert bare.destroy(domain).returncode == 0
    pool_becomes(before)
    assert bare.lines(FOREIGN_LOG) == ["prepare", "start", "started", "stopped", "release"]

    install(bare, "--uninstall")
    assert hooks(bare) == {"qemu": FOREIGN}


def test_an_upgrade_leaves_a_running_domain_alone_and_still_gives_back(usher: PrivateLibvirt) -> None:
    before = nr_pages()
    domain = enable(usher, Domain("guest"))
    assert usher.start(domain).returncode == 0
    qemu = usher.qemu_pid(domain)
    install(usher, checkout=other_version(usher))
    assert usher.state(domain) == "running"
    assert usher.qemu_pid(domain) == qemu
    assert nr_pages() == before + domain.pages
    assert usher.destroy(domain).returncode == 0
    pool_becomes(before)


def test_starts_during_upgrades_see_one_version_or_the_other(usher: PrivateLibvirt) -> None:
    before = nr_pages()
    domain = enable(usher, Domain("guest"))
    usher.define(domain)
    versions = f"{other_version(usher)} {CHECKOUT}"
    loop = f"for v in {versions} {versions} {versions}; do $v/install.sh || exit 1; done"
    upgrades = usher.spawn("sh", "-c", loop, timeout=60)
    while upgrades.poll() is None:
        result = usher.virsh("start", domain.uuid)
        assert result.returncode == 0, result.stderr
        assert usher.destroy(domain).returncode == 0
        pool_becomes(before)
    assert usher.finish(upgrades).returncode == 0


def test_a_hook_in_the_middle_of_its_work_outlives_an_upgrade(usher: PrivateLibvirt) -> None:
    before = nr_pages()
    domain = enable_stuck(usher, Domain("guest"))
    usher.define(domain)
    start = usher.spawn("virsh", "-c", "qemu:///system", "start", domain.uuid)
    wait_until_stuck(usher, domain)
    install(usher, checkout=other_version(usher))
    unstick(usher)
    result = usher.finish(start)
    assert result.returncode == 0, result.stderr
    assert nr_pages() == before + domain.pages
    assert usher.destroy(domain).returncode == 0
    pool_becomes(before)


def test_uninstalling_waits_for_domains_that_hold_something(usher: PrivateLibvirt) -> None:
    before = nr_pages()
    holder, other = enable(usher, Domain("holder")), Domain("other", memory="")
    for domain in (holder, other):
        assert usher.start(domain).returncode == 0
    installed = hooks(usher)

    refused = usher.run(f"{CHECKOUT}/install.sh", "--uninstall")
    assert refused.returncode == 1
    assert "holder" in refused.stderr
    assert hooks(usher) == installed
    assert not usher.path(OFF).exists()
    assert usher.state(holder) == "running"

    assert usher.destroy(holder).returncode == 0
    pool_becomes(before)
    install(usher, "--uninstall")
    assert hooks(usher) == {}
    assert usher.state(other) == "running"
    assert usher.path(CONFIG).exists()
    assert NO_PAGES in usher.virsh("start", holder.uuid).stderr


def test_purged_nothing_of_it_is_left(bare: PrivateLibvirt) -> None:
    bare.remove(CONFIG, "/usr/local/lib/virt-usher", "/var/lib/virt-usher", "/run/virt-usher")
    before = everything(bare)
    install(bare)
    assert bare.start(enable(bare, Domain("guest"))).returncode == 0
    bare.remove_domains()
    install(bare, "--uninstall", "--purge")
    assert everything(bare) - before == set()


def everything(lv: PrivateLibvirt) -> set[str]:
    """Return all files an installer could have written: nothing else is writable here."""
    places = ("/etc", "/usr/local", "/var/lib", "/run")
    noise = (
        "/run/private/",
        "/run/libvirt/",
        "/var/lib/libvirt/",
        "/run/checkout/",
        "/run/virtlogd",
        "/run/libvirtd",
    )
    found = lv.run("find", *places, "-xdev", "-type", "f").stdout.splitlines()
    return {path for path in found if not path.startswith(noise)}


def test_installing_names_the_domains_that_would_be_refused(bare: PrivateLibvirt) -> None:
    bare.define(Domain("sound", memory=""))
    bare.define(enable(bare, Domain("greedy", mib=64 << 20)))
    said = install(bare).stdout
    assert "greedy" in said
    assert "sound" not in said
