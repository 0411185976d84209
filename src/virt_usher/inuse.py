"""Whether a device is still in use, right before it is taken: what a step and its journal say may be.

What an admin waived may be there. What the plan was to end must be gone: the check let it pass only for that.
"""

from __future__ import annotations

import time

from virt_usher.errors import UsherError
from virt_usher.host import console

TYPE_CHECKING = False  # importing typing would cost release more than all its work
if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from virt_usher.host import Host
    from virt_usher.journal import Step

# Seconds that programs get to end after their unit did. Those of a user's manager are only told to when his
# last session has been over for ten (logind's UserStopDelaySec).
PATIENCE = 30.0


def by(host: Host, addresses: Collection[str], waived: Collection[str] = ()) -> UsherError | None:
    """Return who uses devices now in a way that is not waived; a mounted disk never is."""
    from virt_usher.host import users

    for user in users.find(host, addresses):
        if user.problem not in waived or user.problem == users.DATA:
            return UsherError(f"{user.address} {user.what}", user.hint)
    return None


def released(host: Host, step: Step) -> bool:
    """Whether this start took the text console away, and nobody brought it back.

    Its card is still the firmware's display then (boot_vga).
    """
    ours = any(s.key.startswith(console.CONSOLES) for s in step.journal.live())
    return ours and not console.bound(host)


def settled(step: Step, look: Callable[[], UsherError | None], deadline: float) -> UsherError | None:
    """Return what `look` finds; if this start stopped a unit, what it still finds after a while."""
    stops = (s.data.get("want") == "inactive" for s in step.journal.live() if s.kind == "unit")
    end = min(deadline, time.monotonic() + (PATIENCE if any(stops) else 0))
    while (found := look()) and time.monotonic() < end:
        time.sleep(0.1)
    return found
