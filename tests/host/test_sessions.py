"""Which units' stop ends a process, the display manager's among them, and what a refusal says of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from virt_usher.host import sessions, users
from virt_usher.testing.pci import PciHost

CARD = "0000:01:00.0"
USER = "/user.slice/user-1000.slice"
SERVICE = f"{USER}/user@1000.service/session.slice/org.gnome.Shell@wayland.service"
LOGIND, INIT = "/system.slice/systemd-logind.service", "/init.scope"
GDM, SDDM = "/system.slice/gdm.service", "/system.slice/sddm.service"
Session = dict[str, str]
DESKTOP: Session = {"starter": GDM, "TYPE": "wayland"}
GREETD: Session = {"starter": GDM, "TYPE": "tty"}  # as is its compositor's
STARTX: Session = {"TYPE": "wayland"}  # with XDG_SESSION_TYPE set by hand
SSH: Session = {"starter": "/system.slice/ssh.service", "SEAT": "", "TYPE": "tty"}
GREETER: Session = {"starter": GDM, "UID": "42", "USER": "gdm", "CLASS": "greeter"}
OTHERS_SSH: Session = SSH | {"UID": "1001", "USER": "al"}
OWN_MANAGER: Session = {"SEAT": "", "CLASS": "manager"}
AT_NIGHT: Session = {"starter": "/system.slice/cron.service", "SEAT": "", "CLASS": "background"}


def host_with(root: Path, *logged_in: Session, lingers: str = "") -> PciHost:
    """A graphics card, and sessions from number 2 on."""
    host = PciHost(root).device(CARD, driver="amdgpu", kind="030000").hangs_on(CARD, "drm", "card0")
    for number, about in enumerate(logged_in, 2):
        host.logs_in(number, **about)
    return host.file(f"/var/lib/systemd/linger/{lingers}") if lingers else host


ENDS = {
    "a service": ("/system.slice/nvidia-persistenced.service", [DESKTOP], "", False),
    "a graphical session": (f"{USER}/session-2.scope", [DESKTOP], "", True),
    "a session of greetd": (f"{USER}/session-2.scope", [GREETD], "", True),
    "a session that somebody started on a console": (f"{USER}/session-2.scope", [STARTX], "", False),
    "a session on a console": (f"{USER}/session-2.scope", [SSH], "", False),
    "a graphical session of somebody with an ssh session": (
        f"{USER}/session-2.scope",
        [DESKTOP, SSH],
        "",
        True,
    ),
    "an ssh session of somebody with a desktop": (f"{USER}/session-3.scope", [DESKTOP, SSH], "", False),
    "a user's service": (SERVICE, [DESKTOP, OTHERS_SSH], "", True),
    "a user's service, the manager being a session": (SERVICE, [GREETD, OWN_MANAGER], "", True),
    "a user's service that cron keeps": (SERVICE, [GREETD, OWN_MANAGER, AT_NIGHT], "", False),
    "a user's service with two desktops": (SERVICE, [DESKTOP, DESKTOP | {"starter": SDDM}], "", False),
    "a session of a user's own gdm": (
        f"{USER}/session-2.scope",
        [DESKTOP | {"starter": f"{USER}/user@1000.service/gdm.service"}],
        "",
        False,
    ),
    "a leader that is none": (f"{USER}/session-2.scope", [DESKTOP | {"LEADER": "../1"}], "", False),
    "a leader that has gone": (f"{USER}/session-2.scope", [DESKTOP | {"LEADER": "99999"}], "", False),
    "a hostile leader": (f"{USER}/session-2.scope", [DESKTOP | {"LEADER": "1\0"}], "", False),
    "a hostile desktop": (
        f"{USER}/session-2.scope",
        [DESKTOP | {"DESKTOP": "x\u2028CLASS=manager"}],
        "",
        True,
    ),
    "a user's service without a desktop": (SERVICE, [SSH, GREETER], "", False),
    "a user's service that ssh keeps": (SERVICE, [DESKTOP, SSH], "", False),
    "a user's service that lingers": (SERVICE, [DESKTOP], "jo", False),
    "a user's service, others linger": (SERVICE, [DESKTOP], "al", True),
    "logind": (LOGIND, [DESKTOP, SSH], "", True),
    "logind for a greeter": (LOGIND, [GREETER], "", True),
    "PID 1": (INIT, [GREETD], "", True),
    "logind without a desktop": (LOGIND, [SSH, OWN_MANAGER], "", False),
    "PID 1 without anybody": (INIT, [], "", False),
    "a container's PID 1": (f"/machine.slice/a.scope{INIT}", [DESKTOP], "", False),
    "the user's own PID 1": (f"{USER}/user@1000.service{INIT}", [SSH, GREETER], "", False),
}


@pytest.mark.parametrize("case", ENDS)
def test_what_ends_with_the_display_manager(tmp_path: Path, case: str) -> None:
    cgroup, logged_in, lingers, ends = ENDS[case]
    host = host_with(tmp_path, *logged_in, lingers=lingers)
    pid = host.runs("a-program", cgroup=cgroup)
    assert ("gdm.service" in sessions.ending(host, str(pid))) == ends


@pytest.mark.parametrize(
    ("leads", "known", "ends"),
    [("cage", "cage@tty1.service", True), ("cage", "", False), ("login", "getty@tty1.service", False)],
)
def test_a_unit_that_logs_in_by_itself(tmp_path: Path, leads: str, known: str, ends: bool) -> None:
    """With PAMName=, or as ly: the leader is its first process, whose parent is PID 1."""
    host = host_with(tmp_path)
    leader = host.runs(leads, "/dev/dri/card0", cgroup=f"{USER}/session-2.scope")
    host.file(f"/proc/{leader}/environ", "HOME=/home/jo\0INVOCATION_ID=00f1\0")
    host.logs_in(2, LEADER=str(leader), SERVICE="login")
    for name, id_ in {"other.service": "00f2", known: "00f1"}.items():
        host.link_to(f"/run/systemd/units/invocation:{name}", id_)
    (user,) = users.find(host, [CARD])
    assert user.hint == (f"systemctl stop {known}" if ends else f"end it: kill {leader}")


def test_the_fifo_of_a_session_is_none(tmp_path: Path) -> None:
    """As PAM has it open for the session's time: a read that does not block would be EAGAIN."""
    host = host_with(tmp_path, DESKTOP)
    os.mkfifo(fifo := host.path("/run/systemd/sessions/2.ref"))
    end = os.open(fifo, os.O_RDWR)
    try:
        pid = host.runs("a-program", cgroup=SERVICE)
        assert "gdm.service" in sessions.ending(host, str(pid))
    finally:
        os.close(end)


UNITS = {
    "/system.slice/nvidia-persistenced.service": {"nvidia-persistenced.service"},
    f"{USER}/session-2.scope": {"session-2.scope"},
    SERVICE: {"user@1000.service"},  # systemctl has another of the name it runs as there, or none
    "/system.slice/docker-4242.scope": {"docker-4242.scope"},
    "/": set[str](),
}


@pytest.mark.parametrize("cgroup", UNITS)
def test_the_units_of_a_process(tmp_path: Path, cgroup: str) -> None:
    host = host_with(tmp_path)
    assert sessions.ending(host, str(host.runs("a-program", cgroup=cgroup))) == UNITS[cgroup]


STOP, SHOW = "systemctl stop", "end the session that has it: loginctl list-sessions"
HINTS = {
    "a service": (["/system.slice/a.service"], [], f"{STOP} a.service"),
    "a desktop that logind has the card for": (
        [INIT, LOGIND, SERVICE],
        [DESKTOP],
        f"{STOP} gdm.service",
    ),
    "and ssh": (
        [INIT, LOGIND, SERVICE],
        [DESKTOP, SSH],
        f"{STOP} gdm.service user@1000.service",
    ),
    "nobody that logind has it for": ([INIT, LOGIND], [], SHOW),
    "logind and a service": ([LOGIND, "/system.slice/a.service"], [], SHOW),
    "startx": ([INIT, LOGIND, f"{USER}/session-2.scope"], [STARTX], "end it: kill PID"),
    "a container": (["/system.slice/docker-4242.scope"], [], "end it: kill PID"),
}


@pytest.mark.parametrize("case", HINTS)
def test_no_hint_stops_logind_or_kills_pid_1(tmp_path: Path, case: str) -> None:
    cgroups, logged_in, hint = HINTS[case]
    host = host_with(tmp_path, *logged_in)
    pids = [host.runs("a-program", "/dev/dri/card0", cgroup=c) for c in cgroups]
    (user,) = users.find(host, [CARD])
    assert user.hint == hint.replace("PID", str(pids[-1]))
