"""Run systemctl so that whoever comes after a hook that was killed can wait for what it left running.

The word of a systemctl that outlives its hook would come after the undo, and be the last.
"""

from __future__ import annotations

import fcntl
import os
import time

from virt_usher import children
from virt_usher.errors import UsherError
from virt_usher.host import RUN_DIR

TYPE_CHECKING = False
if TYPE_CHECKING:
    from virt_usher.host import Host

PROGRAM = "/usr/bin/systemctl"


def run(host: Host, arguments: list[str], deadline: float) -> tuple[int, str]:
    """Run systemctl, after any that an earlier hook left; return its exit status and output."""
    guard = _guard(host, deadline)
    try:
        os.set_inheritable(guard, True)
        return children.run(host, [PROGRAM, *arguments], deadline)
    finally:
        os.close(guard)


def settle(host: Host, deadline: float) -> None:
    """Wait for what a killed hook may have left under way; UsherError at the deadline."""
    os.close(_guard(host, deadline))


def _guard(host: Host, deadline: float) -> int:
    """Return a descriptor with a lock that a systemctl inherits: it is free again when that has ended."""
    guard = os.open(host.path(RUN_DIR), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    while True:
        try:
            fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return guard
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(guard)
                raise UsherError("a systemctl that an earlier hook started still runs") from None
            time.sleep(0.01)
