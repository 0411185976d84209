"""While a hook hangs, is killed, or has no Python or disk, libvirt answers for every other domain."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from tests.attacks import tally
from tests.libvirt.domain import Domain
from tests.libvirt.pool import nr_pages
from tests.libvirt.private import PrivateLibvirt, pool_becomes, wait_for
from tests.libvirt.product import (
    CONFIG,
    HUGEPAGES,
    JOURNALS,
    STUCK,
    cli,
    enable,
    enable_stuck,
    held_lock,
    journal,
    unstick,
    wait_until_stuck,
    wrapped_python,
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


# What befalls a call of the hook, as lines of a shell in place of its Python.
BROKEN = {
    "no python": "kill -KILL $$",
    "full disk": f"cat /dev/zero >{JOURNALS}/.zeroes 2>/dev/null",
}
# When start comes, the last page of the journal still has room for what it adds.
REFUSED = {("no python", "prepare"), ("no python", "start"), ("full disk", "prepare")}


@contextmanager
def broken(lv: PrivateLibvirt, operation: str, line: str) -> Iterator[None]:
    """Break one operation's calls of the hook for the guest; at the end, there was one."""
    with wrapped_python(
        lv, f'case "$*" in *"hook.py guest {operation} "*) : >/run/private/struck; {line} ;; esac'
    ):
        yield
    assert lv.path("/run/private/struck").exists()
    lv.remove("/run/private/struck")


@pytest.fixture
def small_run(usher: PrivateLibvirt) -> Iterator[None]:
    """Journals lie on a disk that is full soon."""
    usher.run("mkdir", "-p", JOURNALS, check=True)
    mount = ("mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "small", JOURNALS)
    usher.run(*mount, check=True)
    yield
    usher.run("umount", "--lazy", JOURNALS)


@pytest.mark.usefixtures("small_run")
@pytest.mark.parametrize("operation", ["prepare", "start", "started", "release"])
@pytest.mark.parametrize("how", BROKEN)
def test_what_is_broken_holds_nobody(usher: PrivateLibvirt, other: Domain, how: str, operation: str) -> None:
    before = nr_pages()
    # Something to do in each operation: what hangs elsewhere, with a file to write to.
    usher.write("/run/private/busy", "")
    hook = "prepare" if operation == "release" else operation
    busy = STUCK.replace("FIFO", "/run/private/busy").replace("HOOK", hook)
    usher.write(f"{CONFIG}/plugins/busy.py", busy)
    domain = enable(usher, Domain("guest"), f"{HUGEPAGES}[plugins.busy]\n")
    usher.define(domain)
    with broken(usher, operation, BROKEN[how]):
        if operation == "release":
            assert usher.virsh("start", domain.uuid).returncode == 0
        call = virsh(usher, "destroy" if operation == "release" else "start", domain)
        refused = held(usher, other, call, f"{how} at {operation}")
        assert bool(refused) == ((how, operation) in REFUSED)
    usher.remove(f"{JOURNALS}/.zeroes")
    if not refused and operation != "release":
        assert usher.state(domain) == "running"
        assert usher.destroy(domain).returncode == 0
    assert cli(usher, "recover").returncode == 0
    assert not journal(usher, domain)
    pool_becomes(before)


def test_a_refusal_holds_nobody(usher: PrivateLibvirt, other: Domain) -> None:
    before = nr_pages()
    domain = enable(usher, Domain("guest"), "[plugins.nonsense]\n")
    usher.define(domain)
    assert held(usher, other, virsh(usher, "start", domain), "refused at prepare") == 1
    pool_becomes(before)
