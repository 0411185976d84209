"""virt-usher in the namespace: installed by its own installer, used as an admin would."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.libvirt.domain import Domain
from tests.libvirt.private import PrivateLibvirt, Result, wait_for

CONFIG = "/etc/virt-usher"
JOURNALS = "/run/virt-usher"
NO_PAGES = "unable to map backing store"  # QEMU's own words
OFF = f"{CONFIG}/off"
HUGEPAGES = "[plugins.hugepages]\n"


CHECKOUT = "/run/checkout"


def install(lv: PrivateLibvirt, *options: str, checkout: str = CHECKOUT) -> Result:
    return lv.run(f"{checkout}/install.sh", *options, timeout=20, check=True)


def other_version(lv: PrivateLibvirt) -> str:
    """Return another checkout, whose every module differs."""
    other = "/run/private/other"
    lv.remove(other)
    lv.run("mkdir", other, check=True)
    needed = [p.name for p in lv.path(CHECKOUT).iterdir() if p.name[0] != "." and p.name != "tests"]
    lv.run("cp", "-R", *(f"{CHECKOUT}/{name}" for name in needed), other, check=True)
    find = ("find", other, "-name", "*.py")
    lv.run(*find, "-exec", "sh", "-c", 'for f; do echo "# other" >>"$f"; done', "-", "{}", "+", check=True)
    return other


def cli(lv: PrivateLibvirt, *args: str) -> Result:
    return lv.run("virt-usher", *args)


def enable(lv: PrivateLibvirt, domain: Domain, toml: str = HUGEPAGES) -> Domain:
    lv.write(f"{CONFIG}/domains/{domain.name}.toml", toml)
    return domain


def journal(lv: PrivateLibvirt, domain: Domain) -> list[str]:
    return lv.lines(f"{JOURNALS}/{domain.name}.jnl")


# A plugin that sticks in the middle of a start, once hugepages before it has taken its pages: writing
# to a FIFO blocks until somebody reads.
FIFO = "/run/stuck"
STUCK = '''
from dataclasses import dataclass
from virt_usher import OneWay, hookimpl

@dataclass(frozen=True, eq=False)
class Plugin:
    """Wait for a reader."""

    @hookimpl
    def usher_HOOK(self, domain, host):
        yield OneWay("FIFO", "x", "a test")
'''


def enable_stuck(
    lv: PrivateLibvirt, domain: Domain, start: int = 30, stop: int = 5, hook: str = "prepare"
) -> Domain:
    """Give a domain its pages, and then a step that hangs until `unstick`."""
    lv.remove(FIFO)
    lv.run("mkfifo", FIFO, check=True)
    lv.write(f"{CONFIG}/plugins/stuck.py", STUCK.replace("FIFO", FIFO).replace("HOOK", hook))
    lv.write(f"{CONFIG}/config.toml", f"[deadlines]\nstart = {start}\nstop = {stop}\n")
    return enable(lv, domain, f"{HUGEPAGES}[plugins.stuck]\n")


def wait_until_stuck(lv: PrivateLibvirt, domain: Domain) -> None:
    wait_for("a step that hangs", lambda: any(FIFO in line for line in journal(lv, domain)))


def unstick(lv: PrivateLibvirt) -> None:
    """Let the step that hangs end, and every one after it pass at once."""
    lv.run("sh", "-c", f"cat <{FIFO} && rm {FIFO} && : >{FIFO}", check=True)


# Ways in which the interpreter, or what it needs, can be broken: the file that stands in its place.
BROKEN_PYTHONS = {
    "cannot run": ("no program\n", 0o644),
    "fails": ("#!/bin/sh\nexit 1\n", 0o755),
    "dies": ("#!/bin/sh\nkill -KILL $$\n", 0o755),
}


@contextmanager
def broken_python(lv: PrivateLibvirt, how: str | None) -> Iterator[None]:
    """Break /usr/bin/python3 in one of these ways; None breaks nothing."""
    if how is None:
        yield
        return
    lv.write("/run/private/python", *BROKEN_PYTHONS[how])
    with lv.covered("/usr/bin/python3", "/run/private/python"):
        yield


@contextmanager
def wrapped_python(lv: PrivateLibvirt, line: str) -> Iterator[None]:
    """Have the shell run a line before each start of /usr/bin/python3, with its arguments."""
    lv.run("cp", "/usr/bin/python3", "/run/private/real-python", check=True)
    wrapper = f'#!/bin/sh\n{line}\nexec /run/private/real-python "$@"\n'
    lv.write("/run/private/python", wrapper, 0o755)
    with lv.covered("/usr/bin/python3", "/run/private/python"):
        yield


@contextmanager
def counted_python(lv: PrivateLibvirt) -> Iterator[Callable[[], int]]:
    """Count how often the hook starts /usr/bin/python3; yields what returns the count since the last call."""
    log = "/run/private/python.log"
    lv.write(log, "")

    def starts() -> int:
        count = sum("hook.py" in line for line in lv.lines(log))  # not recover, once per daemon
        lv.path(log).write_text("")
        return count

    with wrapped_python(lv, f'echo "$*" >>{log}'):
        yield starts


# Holds one lock of virt-usher's until its stdin ends.
LOCKER = """
import sys
sys.path.insert(0, "/run/checkout/src")
from virt_usher.host import LiveHost
from virt_usher.locks import Locks
with Locks(LiveHost("/"), float("inf")).hold(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held_lock(lv: PrivateLibvirt, key: str) -> Iterator[None]:
    """Have another process hold what a hook will wait for."""
    with lv.spawn("python3", "-I", "-B", "-c", LOCKER, key) as locker:
        assert locker.stdin
        assert locker.stdout
        assert locker.stdout.readline() == "held\n"
        try:
            yield
        finally:
            locker.stdin.close()
