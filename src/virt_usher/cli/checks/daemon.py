"""Does a libvirt daemon run, does it know of the hook, and may it run it?

A daemon looks for hooks when it starts and at SIGHUP, and never in between.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from virt_usher.cli.checks import Check, ok, problem, warning
from virt_usher.cli.checks.hook import ours
from virt_usher.host import RUN_DIR, Host

DAEMONS = ("libvirtd", "virtqemud")
TOLD = f"{RUN_DIR}/.told"  # pid and start time of each daemon that the installer knows to know
CALLED = f"{RUN_DIR}/.called"  # the gate touches it


def check(host: Host) -> Iterator[Check]:
    """Look at each daemon that may have the QEMU driver, and at the last call of the hook."""
    found = [(name, pid) for name in DAEMONS for pid in _pids(host, name)]
    if not found:
        text = "no libvirtd or virtqemud runs now; the next to start will look for the hook"
        yield warning("daemon", text, "systemctl start libvirtd (or virtqemud), where sockets do not do it")
    for name, pid in found:
        yield _knows(host, name, pid)
        yield from _confined(host, name, pid)
    called = _mtime(host, CALLED)
    if called is None:
        yield warning("last call", "libvirt has not called the hook since boot", "start a domain, look again")
    else:
        yield ok("last call", f"libvirt called the hook at {_clock(called)}")


def _pids(host: Host, name: str) -> list[int]:
    """Return the daemon's pid from its pid file, else all processes of that name."""
    pid = host.number(f"/run/{name}.pid")
    if pid and host.get(f"/proc/{pid}/comm") == name:
        return [pid]
    return [int(p) for p in host.entries("/proc") if p.isdigit() and host.get(f"/proc/{p}/comm") == name]


def _knows(host: Host, name: str, pid: int) -> Check:
    """Tell whether the daemon looked for hooks after ours appeared."""
    began, ticks, hooks = _began(host, pid), host.started_at(pid), ours(host)
    if began is None or not hooks:
        return warning("daemon", f"{name} runs as pid {pid}; whether it knows the hook cannot be told")
    appeared = os.stat(host.path(hooks[0])).st_ctime
    who = f"{name} (pid {pid})"
    if began > appeared:
        return ok("daemon", f"{who} started after the hook appeared, and so calls it")
    if f"{pid} {ticks}" in host.get(TOLD).splitlines():
        return ok("daemon", f"{who} was told of the hook, and so calls it")
    if (_mtime(host, CALLED) or 0) > began:
        return ok("daemon", f"{who} has called the hook")
    return problem(
        "daemon",
        f"{who} started before the hook appeared, and may not know of it: starts would pass without us",
        f"systemctl reload {name}, or without systemd: kill -HUP {pid}",
    )


def _began(host: Host, pid: int) -> float | None:
    """Return when a process started, in seconds since 1970."""
    ticks, uptime = host.started_at(pid), host.get("/proc/uptime").split()
    if ticks is None or not uptime:
        return None
    return time.time() - float(uptime[0]) + ticks / os.sysconf("SC_CLK_TCK")


def _confined(host: Host, name: str, pid: int) -> Iterator[Check]:
    """Tell what AppArmor or SELinux do with the daemon, and so with the hook."""
    label = host.get(f"/proc/{pid}/attr/current").rstrip("\0")
    if label.endswith("(enforce)"):
        text = f"AppArmor confines {name} as {label}; Debian's profile lets the hook do its work"
        yield ok("confinement", text)
    elif ":" in label and host.get("/sys/fs/selinux/enforce") == "1":
        yield warning(
            "confinement",
            f"SELinux confines {name} as {label}; the usual policy forbids virtqemud to run hooks at all",
            "ausearch -m avc -ts recent shows what was denied; a policy module must allow it",
        )
    else:
        yield ok("confinement", f"{name} is not confined ({label or 'no AppArmor or SELinux'})")


def _mtime(host: Host, path: str) -> float | None:
    try:
        return os.stat(host.path(path)).st_mtime
    except OSError:
        return None


def _clock(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
