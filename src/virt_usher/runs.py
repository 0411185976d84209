"""The effect kind 'scripts': the executables of one operation, and at the end those of the way back.

They are the admin's own: what they do is theirs to undo, in the scripts of stopped/end and release/end.
Those run even if the start was refused half-way, as libvirt would have called them.
"""

from __future__ import annotations

import contextlib
import os
import time

from virt_usher import children, log
from virt_usher.effects import KINDS, Kind
from virt_usher.errors import UsherError, printable
from virt_usher.vetting import vet

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from virt_usher.host import Host, LiveHost
    from virt_usher.journal import Step

BACK = 600.0  # seconds a script of the way back may take; libvirt is answered at its own deadline


class Scripts(Kind):
    """The scripts of one operation of one domain."""

    @staticmethod
    def do(host: LiveHost, step: Step, others: list[Step], deadline: float) -> dict[str, Any]:
        for script in step.data["scripts"]:
            status, output = _run(host, step, script, step.data["operation"], deadline)
            if status:
                lines = printable(" | ".join(output.splitlines()[-3:]))
                raise UsherError(f"{script} ended with status {status}" + (f": {lines}" if lines else ""))
        return {}

    @staticmethod
    def undo(host: LiveHost, step: Step, others: list[Step]) -> str:
        _wait_for_the_last(host, step)
        failed = []
        for operation in step.data["back"]:
            for script in find(host, step.data["roots"], step.domain, operation):
                status, _ = _run(host, step, script, operation, time.monotonic() + BACK)
                if status:
                    failed.append(f"{script} ended with status {status}")
        return "; ".join(failed)


def find(host: Host, roots: list[str], name: str, operation: str) -> list[str]:
    """Return the executables of one operation, sorted by name: ROOT/DOMAIN/OPERATION/SUB-OPERATION/*.

    A single executable in the place of the last directory serves as well, as with VFIO-Tools.
    """
    found = []
    for root in roots:
        folder = f"{root}/{name}/{operation}"
        places = [f"{folder}/{e}" for e in host.entries(folder)] or [folder]
        found += [p for p in places if _executable(host.path(p))]
    return found


def _executable(path: str) -> bool:
    return os.path.isfile(path) and os.access(path, os.X_OK)


def _run(host: LiveHost, step: Step, script: str, operation: str, deadline: float) -> tuple[int, str]:
    """Run one script as libvirt would: its four arguments, the domain's XML on stdin."""
    vet(host, script)
    status, output = children.run(
        host,
        [script, step.domain, *operation.split("/"), step.journal.reason],
        deadline,
        step.journal.kept_xml(),
        lambda pid: _remember(host, step, pid),
    )
    for line in output.splitlines():
        log.say(log.INFO, step.domain, step.journal.start_id, f"{os.path.basename(script)}: {line}")
    return status, output


def _remember(host: LiveHost, step: Step, pid: int) -> None:
    """Note which script runs; it does already, so a full /run is no reason to lose sight of its end."""
    with contextlib.suppress(OSError):
        step.log("passed", runs=[pid, host.started_at(pid)])


def _wait_for_the_last(host: LiveHost, step: Step) -> None:
    """Wait for a script that outlived its hook, or what it does would come after the way back.

    Not in the start that has just given it up: libvirt waits for that one's answer, and calls release next.
    """
    pid, began = step.data.get("runs", (0, 0))
    end = time.monotonic() + (0 if step.state == "bad" else BACK)
    while pid and began and host.started_at(pid) == began:
        if time.monotonic() >= end:
            raise UsherError(f"a script still runs as pid {pid}", f"ps -fp {pid}; then: virt-usher recover")
        time.sleep(0.05)


KINDS["scripts"] = Scripts
