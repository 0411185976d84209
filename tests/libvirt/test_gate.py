"""What does not concern virt-usher passes; what does is refused in words, and in time."""

from __future__ import annotations

import pytest
from tests.libvirt.domain import Domain
from tests.libvirt.pool import nr_pages
from tests.libvirt.private import PrivateLibvirt, pool_becomes, wait_for
from tests.libvirt.product import (
    BROKEN_PYTHONS,
    CONFIG,
    NO_PAGES,
    OFF,
    broken_python,
    counted_python,
    enable,
    enable_stuck,
    held_lock,
    journal,
    unstick,
)


def test_the_off_switch_lets_starts_pass_untouched_and_stops_give_back(usher: PrivateLibvirt) -> None:
    before = nr_pages()
    domain = enable(usher, Domain("guest"))
    assert usher.start(domain).returncode == 0
    usher.write(OFF, "")
    assert usher.destroy(domain).returncode == 0
    pool_becomes(before)
    assert NO_PAGES in usher.virsh("start", domain.uuid).stderr
    usher.remove(OFF)
    assert usher.virsh("start", domain.uuid).returncode == 0


@pytest.mark.parametrize("how", BROKEN_PYTHONS)
def test_a_broken_python_refuses_only_who_needs_it(usher: PrivateLibvirt, how: str) -> None:
    needs_it, other = enable(usher, Domain("guest")), Domain("other", memory="")
    with broken_python(usher, how):
        result = usher.start(needs_it)
        assert result.returncode == 1
        what, repair, switch_off = result.stderr.rstrip().splitlines()[-3:]
        assert "virt-usher" in what
        assert "broken" in what
        assert repair.strip().startswith("repair:")
        assert f"touch {OFF}" in switch_off
        assert usher.start(other).returncode == 0
        usher.write(OFF, "")
        assert NO_PAGES in usher.virsh("start", needs_it.uuid).stderr


def test_a_domain_with_nothing_to_do_never_starts_python(usher: PrivateLibvirt) -> None:
    nothing, something = Domain("nothing", memory=""), enable(usher, Domain("something"))
    usher.define(nothing)
    usher.define(something)
    with counted_python(usher) as starts:
        for domain, expected in ((nothing, 0), (something, 2)):
            # All operations of a life: prepare, start, started, reconnect, stopped, release.
            assert usher.virsh("start", domain.uuid).returncode == 0
            usher.restart_daemon()
            assert usher.destroy(domain).returncode == 0
            assert starts() == expected, (
                domain.name
            )  # prepare and release; start and started have nothing to do


def test_a_hung_start_is_refused_at_the_deadline(usher: PrivateLibvirt) -> None:
    before = nr_pages()
    domain = enable_stuck(usher, Domain("guest"), start=2, stop=1)
    usher.define(domain)
    result = usher.virsh("start", domain.uuid, timeout=5)
    assert result.returncode == 1
    assert "virt-usher" in result.stderr
    assert "in time" in result.stderr
    # libvirt is free again, and what was taken comes back once the step ends.
    assert usher.start(Domain("other", memory="")).returncode == 0
    unstick(usher)
    pool_becomes(before)
    wait_for("no journal", lambda: not journal(usher, domain))


def test_a_hung_stop_holds_libvirt_no_longer_than_its_deadline(usher: PrivateLibvirt) -> None:
    before = nr_pages()
    usher.write(f"{CONFIG}/config.toml", "[deadlines]\nstop = 1\n")
    domain = enable(usher, Domain("guest"))
    assert usher.start(domain).returncode == 0
    with held_lock(usher, "hugepages-2048kB"):
        assert usher.virsh("destroy", domain.uuid, timeout=3).returncode == 0
        assert nr_pages() == before + domain.pages
        again = usher.spawn("virsh", "-c", "qemu:///system", "start", domain.uuid)
    result = usher.finish(again)
    assert result.returncode == 0, result.stderr
    assert nr_pages() == before + domain.pages
    assert usher.destroy(domain).returncode == 0
    pool_becomes(before)
