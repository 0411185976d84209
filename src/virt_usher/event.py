"""What libvirt calls its qemu hook for, and what each call may do."""

from __future__ import annotations

NOTHING, PLAN, PLAN_START, PLAN_STARTED, GIVE_BACK = range(5)

# operation -> (what to do, may exit non-zero). Everything else libvirt calls, or will call one
# day, is answered with success: a failing `reconnect` kills the running guest, and a failing
# `started` the guest that just booted (libvirt docs/hooks.rst, qemuProcessFinishStartup).
OPERATIONS: dict[str, tuple[int, bool]] = {
    "prepare": (PLAN, True),
    "start": (PLAN_START, True),
    "started": (PLAN_STARTED, False),
    "release": (GIVE_BACK, False),
    "stopped": (NOTHING, False),
    "reconnect": (NOTHING, False),
    "migrate": (NOTHING, False),
    "restore": (NOTHING, False),
    "attach": (NOTHING, False),
}


class Event:
    """One call of the hook: NAME OPERATION SUB-OPERATION EXTRA.

    Read by position: a domain's name may begin with a dash. Not a dataclass, because release
    imports this module and dataclasses cost more than all the rest of it.
    """

    __slots__ = ("extra", "may_refuse", "name", "operation", "task")

    def __init__(self, name: str, operation: str, extra: str = "-") -> None:
        self.name = name
        self.operation = operation
        self.extra = extra
        self.task, self.may_refuse = OPERATIONS.get(operation, (NOTHING, False))

    @classmethod
    def from_argv(cls, argv: list[str]) -> Event:
        """Read libvirt's four arguments; fewer are an operation unknown to us."""
        name, operation, _, extra = [*argv, "-", "-", "-", "-"][:4]
        return cls(name, operation, extra)
