"""The effect kind 'unit': a systemd unit started or stopped while domains run.

Any claim will do: the first remembers the unit's state, the last one puts it back. Whether a unit is
enabled at boot is never touched.
"""

from __future__ import annotations

import os
import time

from virt_usher import children, systemctl
from virt_usher.effects import KINDS, Kind
from virt_usher.errors import UsherError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from virt_usher.host import Host, LiveHost
    from virt_usher.journal import Step

ACTIVE, INACTIVE, FAILED = "active", "inactive", "failed"
_SETTLES = {"activating": ACTIVE, "reloading": ACTIVE, "refreshing": ACTIVE, "deactivating": INACTIVE}
BACK = 5.0  # seconds that a release waits for a unit
# Where systemd looks for units, in this order (systemd.unit); a link may call /usr/lib by its old name.
_FOLDERS = (
    "/etc/systemd/system",
    "/run/systemd/system",
    "/run/systemd/generator",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
    "/lib/systemd/system",
    "/run/systemd/generator.late",
)
_LINKS = 8  # from one alias to the next


class Unit(Kind):
    """A unit that is to be active or inactive."""

    @staticmethod
    def before(host: LiveHost, fields: dict[str, Any], others: list[Step]) -> dict[str, Any]:
        for other in others:
            if other.data["want"] != fields["want"] and not other.left:
                raise UsherError(
                    f"{fields['unit']} is kept {other.data['want']} for the domain {other.domain!r}"
                )
        systemctl.settle(host, time.monotonic() + BACK)
        now = state(host, fields["unit"])
        now = _SETTLES.get(now, now)
        # As it is, unless domains made it so: the last who came knows what it was.
        if ours := [s for s in others if now in (s.data["want"], s.data.get("reached"))]:
            return {"old": ours[-1].data["old"]}
        return {"old": INACTIVE if now == FAILED and fields["want"] == ACTIVE else now}

    @staticmethod
    def do(host: LiveHost, step: Step, others: list[Step], deadline: float) -> dict[str, Any]:
        if stopping(host):
            return {"skipped": "the system is stopping"}
        reached = _bring(host, step.data["unit"], step.data["want"], deadline)
        return {"reached": reached} if reached != step.data["want"] else {}

    @staticmethod
    def undo(host: LiveHost, step: Step, others: list[Step]) -> str:
        unit, old = step.data["unit"], step.data["old"]
        if live := [s for s in others if not s.left]:
            live[-1].inherit(step)
            return ""
        if old not in (ACTIVE, INACTIVE) or old == step.data["want"]:
            return ""
        if stopping(host):
            return f"{unit} is left as it is: the system is stopping"
        systemctl.settle(host, time.monotonic() + BACK)
        now = state(host, unit)
        now = _SETTLES.get(now, now)
        if now == old:
            return ""
        tried = FAILED if step.left else None  # an undo before this one may have left it so
        if now not in (step.data["want"], step.data.get("reached"), tried) and step.done:
            return f"{unit} is {now} and not as we left it: left alone"
        # A unit that was restarted often has used up its start limit (systemd.unit, StartLimitBurst=).
        _systemctl(host, ["reset-failed", "--", unit], time.monotonic() + BACK)
        _bring(host, unit, old, time.monotonic() + BACK)
        return ""


def state(host: Host, unit: str) -> str:
    """Return a unit's ActiveState: active, inactive, failed, activating, …; UsherError if there is none."""
    show = ["show", "--property=LoadState", "--property=ActiveState", "--", unit]
    lines = dict(
        x.split("=", 1) for x in _systemctl(host, show, time.monotonic() + BACK).splitlines() if "=" in x
    )
    if lines.get("LoadState") == "not-found":
        raise UsherError(f"there is no unit {unit}", "systemctl list-unit-files shows them")
    return lines.get("ActiveState", "unknown")


def own_name(host: Host, unit: str, links: int = _LINKS) -> str:
    """Return a unit's own name where an alias was given: a link to another unit, as display-manager is."""
    for folder in _FOLDERS:
        if target := host.target(f"{folder}/{unit}"):
            where, name = os.path.split(os.path.normpath(os.path.join(folder, target)))
            # One to the same name, to /dev/null or out of these folders is no alias.
            alias = links > 0 and name != unit and where in _FOLDERS
            return own_name(host, name, links - 1) if alias else unit
        if host.exists(f"{folder}/{unit}"):
            break
    return unit


def stopping(host: Host) -> bool:
    """Whether the system goes down: a job that we queued now could hold it up, or be refused."""
    return _systemctl(host, ["is-system-running"], time.monotonic() + BACK) == "stopping"


def _bring(host: LiveHost, unit: str, want: str, deadline: float) -> str:
    """Queue the job and wait for it, boundedly; return the state reached: a stop may end in `failed`.

    --no-block, because a job that is ordered after libvirt waits for libvirt, which waits for us
    (a start at boot, before the daemon is ready).
    """
    verb = "start" if want == ACTIVE else "stop"
    now = state(host, unit)
    if now == want or (now == FAILED and want == INACTIVE):
        return now
    if now == FAILED:  # until the job runs it would look as if the job had failed
        _systemctl(host, ["reset-failed", "--", unit], deadline)
    _systemctl(host, ["--no-block", verb, "--", unit], deadline)
    pause = 0.02
    while (now := state(host, unit)) != want and time.monotonic() + pause < deadline:
        if now == FAILED and want == INACTIVE:
            return now
        if now == FAILED:
            raise UsherError(f"{unit} failed to {verb}", f"systemctl status {unit}")
        time.sleep(pause)
        pause = min(pause * 2, 0.5)
    if now != want:
        raise UsherError(f"{unit} is {now}, not {want}, in time", f"systemctl status {unit}")
    return now


def _systemctl(host: Host, arguments: list[str], deadline: float) -> str:
    try:
        if arguments[0] in ("show", "is-system-running"):
            status, output = children.run(host, [systemctl.PROGRAM, *arguments], deadline)
        else:
            status, output = systemctl.run(host, arguments, deadline)
    except OSError as error:
        raise UsherError(f"{systemctl.PROGRAM} cannot be run: {error.strerror}") from None
    # is-system-running exits non-zero for all but 'running', reset-failed where nothing had failed
    if status and arguments[0] not in ("is-system-running", "reset-failed"):
        raise UsherError(f"systemctl {' '.join(arguments)}: {output or f'exit status {status}'}")
    return output


KINDS["unit"] = Unit
