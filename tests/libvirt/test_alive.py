"""While a hook hangs, is killed, or has no Python or disk, libvirt answers for every other domain."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from tests.attacks import tally
from tests.libvirt.domain import Domain
from tests.libvirt.pool import nr_pages
from tests.libvirt.private import PrivateLibvirt, pool_becomes, wait_for
from tests.libvirt.product import (
    CONFIG,
    JOURNALS,
    broken_python,
    cli,
    enable,
    enable_stuck,
    held_lock,
    journal,
    unstick,
    wait_until_stuck,
)

DEADLINE = 4  # seconds, of a start and of a stop


@pytest.fixture
def other(usher: PrivateLibvirt) -> Iterator[Domain]:
    """Another domain, which runs before and must run after, in the same QEMU."""
    domain = Domain("other", memory="")
    assert usher.start(domain).returncode == 0
    pid = usher.qemu_pid(domain)
    yield domain
    assert usher.state(domain) == "running"
    assert usher.qemu_pid(domain) == pid


def held(lv: PrivateLibvirt, other: Domain, call: subprocess.Popen[str], what: str) -> int:
    """Ask libvirt for the other domain until a call has ended; note how long that and the answers took."""
    began, slowest = time.monotonic(), 0.0
    while call.poll() is None or not slowest:
        for question in (("domstate", other.uuid), ("list", "--all")):
            asked = time.monotonic()
            answer = lv.virsh(*question, timeout=DEADLINE + 20)
            assert answer.returncode == 0, answer.stderr
            assert "running" in answer.stdout
            slowest = max(slowest, time.monotonic() - asked)
    result = lv.finish(call)
    tally.note("alive", 1)
    tally.measured(what, time.monotonic() - began, slowest)
    return result.returncode


def virsh(lv: PrivateLibvirt, verb: str, domain: Domain) -> subprocess.Popen[str]:
    return lv.spawn("virsh", "-c", "qemu:///system", verb, domain.uuid)


def kill_hook(lv: PrivateLibvirt) -> None:
    lv.run("kill", "-KILL", *map(str, lv.pids("python3")))


def let_be(lv: PrivateLibvirt) -> None:
    """Leave the hook to its deadline."""


@pytest.mark.parametrize("operation", ["prepare", "start", "started"])
@pytest.mark.parametrize(("how", "act"), [("hung", let_be), ("killed", kill_hook)])
def test_a_start_holds_nobody_else(
    usher: PrivateLibvirt, other: Domain, how: str, act: Callable[[PrivateLibvirt], None], operation: str
) -> None:
    before = nr_pages()
    domain = enable_stuck(usher, Domain("guest"), start=DEADLINE, stop=DEADLINE, hook=operation)
    usher.define(domain)
    call = virsh(usher, "start", domain)
    wait_until_stuck(usher, domain)
    act(usher)
    status = held(usher, other, call, f"{how} at {operation}")
    assert bool(status) == (operation != "started"), "a guest that runs already is not refused"
    unstick(usher) if how == "hung" else None
    if operation == "started":
        assert usher.state(domain) == "running"
        assert usher.destroy(domain).returncode == 0
    pool_becomes(before)
    wait_for("no journal", lambda: not journal(usher, domain))


@pytest.mark.parametrize(("how", "act"), [("hung", let_be), ("killed", kill_hook)])
def test_a_stop_holds_nobody_else(
    usher: PrivateLibvirt, other: Domain, how: str, act: Callable[[PrivateLibvirt], None]
) -> None:
    before = nr_pages()
    usher.write(f"{CONFIG}/config.toml", f"[deadlines]\nstop = {DEADLINE}\n")
    domain = enable(usher, Domain("guest"))
    assert usher.start(domain).returncode == 0
    with held_lock(usher, "hugepages-2048kB"):
        call = virsh(usher, "destroy", domain)
        wait_for("the hook", lambda: len(usher.pids("python3")) > 2)
        if how == "killed":  # not the one that holds the lock
            usher.run("pkill", "-KILL", "-f", "hook.py guest release")
        assert held(usher, other, call, f"{how} at release") == 0
    if how == "killed":
        assert cli(usher, "recover").returncode == 0
    pool_becomes(before)
    wait_for("no journal", lambda: not journal(usher, domain))


def refused(lv: PrivateLibvirt, stack: ExitStack) -> None:
    enable(lv, Domain("guest"), "[plugins.nonsense]\n")


def no_python(lv: PrivateLibvirt, stack: ExitStack) -> None:
    stack.enter_context(broken_python(lv, "dies"))


def full_disk(lv: PrivateLibvirt, stack: ExitStack) -> None:
    lv.run("sh", "-c", f"cat /dev/zero >{JOURNALS}/.zeroes 2>/dev/null || :", check=True)


@pytest.mark.parametrize("operation", ["prepare", "release"])
@pytest.mark.parametrize("how", [refused, no_python, full_disk])
def test_what_is_broken_holds_nobody(
    usher: PrivateLibvirt, other: Domain, how: Callable[[PrivateLibvirt, ExitStack], None], operation: str
) -> None:
    before = nr_pages()
    domain = enable(usher, Domain("guest"))
    usher.run("mkdir", "-p", JOURNALS, check=True)
    with ExitStack() as stack:
        mount = ("mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "small", JOURNALS)
        usher.run(*mount, check=True)
        stack.callback(usher.run, "umount", "--lazy", JOURNALS)
        usher.define(domain)
        if operation == "release":
            assert usher.virsh("start", domain.uuid).returncode == 0
        with ExitStack() as broken:
            how(usher, broken)
            call = virsh(usher, "start" if operation == "prepare" else "destroy", domain)
            what = f"{how.__name__.replace('_', ' ')} at {operation}"
            assert held(usher, other, call, what) == (1 if operation == "prepare" else 0)
        usher.remove(f"{JOURNALS}/.zeroes")
        assert cli(usher, "recover").returncode == 0
        assert not journal(usher, domain)
    pool_becomes(before)
