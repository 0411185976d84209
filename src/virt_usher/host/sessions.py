"""Which units' stop ends a process: its own, and the display manager for the sessions that it started.

These sessions end with it, and what runs in them is in scopes and in services of the users.
"""

from __future__ import annotations

TYPE_CHECKING = False  # importing typing would cost release more than all its work
if TYPE_CHECKING:
    from collections.abc import Iterator

    from virt_usher.host import Host

LOGIND, INIT = "systemd-logind.service", "init.scope"
# logind opens a card for the compositor (TakeDevice), and PID 1 keeps it for logind (FDSTORE=1). Both let go
# of it with the session's controller (session_device_free), and neither can be stopped.
_KEEPERS = (f"/system.slice/{LOGIND}", f"/{INIT}")


def ending(host: Host, pid: str) -> frozenset[str]:
    """Return the units whose stop ends a process, or makes it let go of its graphics card."""
    path = _cgroup(host, pid)
    names: list[str] = []
    for part in path.split("/"):
        if part.endswith((".service", ".scope")):
            names.append(part)
        if part.startswith("user@"):
            break  # what follows are units of the user's own manager
    return frozenset((*names, *_managers(host, path, names)))


def kept(units: frozenset[str]) -> bool:
    """Tell whether these are of a process that cannot be stopped, and no display manager's end helps."""
    return units in ({LOGIND}, {INIT})


def system_unit(units: frozenset[str]) -> str:
    """Return the one of a process's units that root can best stop to end it, or ''."""
    services = [n for n in units if n.endswith(".service") and n != LOGIND]
    # What ends a user's manager, ends with it all that he runs: first the display manager.
    services = [n for n in services if not n.startswith("user@")] or services
    return services[0] if len(services) == 1 else ""


def _managers(host: Host, path: str, names: list[str]) -> set[str]:
    """Return the display managers with whose sessions a process ends."""
    sessions = list(_sessions(host)) if names else []
    if path in _KEEPERS:
        return {m for *_, m in sessions if m}
    if own := {m for number, _, _, m in sessions if m and f"session-{number}.scope" in names}:
        return own
    # logind stops the user's manager after the last of his sessions (UserStopDelaySec=10), unless he lingers.
    theirs = [(user, m) for _, uid, user, m in sessions if f"user@{uid}.service" in names]
    lingering = host.entries("/var/lib/systemd/linger") if theirs else []
    managers = {"" if user in lingering else m for user, m in theirs}
    return managers - {""} if len(managers) == 1 else set()


def _sessions(host: Host) -> Iterator[tuple[str, str, str, str]]:
    """Return (number, uid, user, display manager or '') of each session that keeps a user's manager."""
    for number in host.entries("/run/systemd/sessions"):
        if not number.isalnum():  # 2.ref is a FIFO, which cannot be read
            continue
        lines = host.known(f"/run/systemd/sessions/{number}").split("\n")
        about = dict(line.partition("=")[::2] for line in lines)
        # From systemd 256 on a user's manager has a session of its own, which ends with the others.
        if "UID" in about and not about.get("CLASS", "").startswith("manager"):
            manager = _started_by(host, about) if about.get("SEAT") else ""
            yield number, about["UID"], about.get("USER", ""), manager


def _started_by(host: Host, about: dict[str, str]) -> str:
    """Return the service that started a session at a seat, or '': somebody who logs in on a console has none.

    The leader is the display manager's child that asked PAM for the session (gdm-session-worker, sddm-helper,
    lightdm --session-child, greetd --session-worker), and is in the session's scope. The session's TYPE
    does not tell: greetd's are `tty`, whatever compositor runs in them.
    """
    leader = about.get("LEADER", "")
    stat = host.known(f"/proc/{leader}/stat") if leader.isdecimal() else ""
    fields = stat[stat.rfind(")") + 2 :].split()
    parent = fields[1] if len(fields) > 1 else ""
    if parent == "1" and host.get(f"/proc/{leader}/comm") != "login":  # a getty's
        return _invoked(host, leader)
    path = _cgroup(host, parent) if parent else ""
    unit = path.rpartition("/")[2]
    return unit if unit.endswith(".service") and not path.startswith("/user.slice/") else ""


def _invoked(host: Host, pid: str) -> str:
    """Return the service that a process is the first of, though PAM moved it to its session's scope.

    Such are ly's, in older versions, and units with PAMName=. systemd gives each an id (INVOCATION_ID).
    """
    units = "/run/systemd/units"
    for word in host.get(f"/proc/{pid}/environ").split("\0"):
        if word.startswith("INVOCATION_ID="):
            for name in host.entries(units):
                if name.endswith(".service") and host.target(f"{units}/{name}") == word[14:]:
                    return name.removeprefix("invocation:")
    return ""


def _cgroup(host: Host, pid: str) -> str:
    lines = host.known(f"/proc/{pid}/cgroup").splitlines()
    return next((line[3:] for line in lines if line.startswith("0::")), "")
