"""Which units' stop ends a process: its own, and the display manager for graphical sessions.

The display manager's sessions end with it, and what runs in them is in scopes and in services of the users.
"""

from __future__ import annotations

TYPE_CHECKING = False  # importing typing would cost release more than all its work
if TYPE_CHECKING:
    from collections.abc import Iterator

    from virt_usher.host import Host

MANAGER = "display-manager.service"  # an alias: gdm.service, sddm.service, …
LOGIND, INIT = "systemd-logind.service", "init.scope"
# logind opens a card for the compositor (TakeDevice), and PID 1 keeps it for logind (FDSTORE=1). Both let go
# of it with the session's controller (session_device_free), and neither can be stopped.
_KEEPERS = (f"/system.slice/{LOGIND}", f"/{INIT}")


def ending(host: Host, pid: str) -> frozenset[str]:
    """Return the units whose stop ends a process, or makes it let go of its graphics card."""
    lines = host.known(f"/proc/{pid}/cgroup").splitlines()
    path = next((line[3:] for line in lines if line.startswith("0::")), "")
    names: list[str] = []
    for part in path.split("/"):
        if part.endswith((".service", ".scope")):
            names.append(part)
        if part.startswith("user@"):
            break  # what follows are units of the user's own manager
    if names and _with_the_manager(host, path, names):
        names.append(MANAGER)
    return frozenset(names)


def kept(units: frozenset[str]) -> bool:
    """Tell whether these are of a process that cannot be stopped, and no display manager's end helps."""
    return units in ({LOGIND}, {INIT})


def _with_the_manager(host: Host, path: str, names: list[str]) -> bool:
    sessions = list(_sessions(host))
    if path in _KEEPERS:
        return any(graphical for *_, graphical in sessions)
    if any(graphical and f"session-{number}.scope" in names for number, _, _, graphical in sessions):
        return True
    # logind stops the user's manager after the last of his sessions (UserStopDelaySec=10), unless he lingers.
    theirs = [(user, graphical) for _, uid, user, graphical in sessions if f"user@{uid}.service" in names]
    lingering = host.entries("/var/lib/systemd/linger") if theirs else []
    return bool(theirs) and all(graphical and user not in lingering for user, graphical in theirs)


def _sessions(host: Host) -> Iterator[tuple[str, str, str, bool]]:
    """Return (number, uid, user, whether it is graphical) of each session that somebody logged in to."""
    for number in host.entries("/run/systemd/sessions"):
        if not number.isalnum():  # 2.ref is a FIFO, which cannot be read
            continue
        text = host.known(f"/run/systemd/sessions/{number}")
        about = dict(line.partition("=")[::2] for line in text.splitlines())
        # A user's manager has a session of its own from systemd 256 on, which ends with the others.
        if about and not about.get("CLASS", "").startswith(("manager", "background")):
            graphical = about.get("TYPE") in ("x11", "wayland")
            yield number, about.get("UID", ""), about.get("USER", ""), graphical
