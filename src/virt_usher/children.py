"""Run a program: stdio of its own, a deadline, and no signal to it ever.

No pipe is involved, so a background process it leaves behind holds up nobody. It is not killed at
the deadline: it may be in the middle of something that must not be interrupted.
"""

from __future__ import annotations

import os
import select
import time

from virt_usher.errors import UsherError, printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from virt_usher.host import Host

_RESET_SIGNALS = (13, 25)  # SIGPIPE and SIGXFSZ: Python ignores them, and a child would inherit that
_TAIL = 4096  # bytes of output worth keeping


def run(
    host: Host,
    argv: list[str],
    deadline: float,
    stdin: bytes = b"",
    started: Callable[[int], None] | None = None,
) -> tuple[int, str]:
    """Run a program below the host's root; return its exit status (negative: a signal) and last output.

    Raises OSError if it cannot be started, and UsherError naming its pid if it still runs at the deadline
    (seconds of time.monotonic()). `started` is told the pid.
    """
    given, output = os.memfd_create("stdin"), os.memfd_create("output")
    try:
        os.write(given, stdin)
        os.lseek(given, 0, os.SEEK_SET)
        program = host.path(argv[0])
        pid = os.posix_spawn(
            program,
            [program, *argv[1:]],
            {"LC_ALL": "C", "PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")},
            file_actions=[
                (os.POSIX_SPAWN_DUP2, given, 0),
                (os.POSIX_SPAWN_DUP2, output, 1),
                (os.POSIX_SPAWN_DUP2, output, 2),
            ],
            setsid=True,
            setsigdef=_RESET_SIGNALS,
        )
        if started:
            started(pid)
        waiter = os.pidfd_open(pid)
        try:
            poller = select.poll()
            poller.register(waiter, select.POLLIN)
            if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
                hint = libvirt_client(host, pid) or "it is left to its work"
                raise UsherError(f"{printable(argv[0])} still runs as pid {pid}", hint)
        finally:
            os.close(waiter)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        size = os.fstat(output).st_size
        return status, os.pread(output, _TAIL, max(0, size - _TAIL)).decode("utf-8", "replace").strip()
    finally:
        os.close(given)
        os.close(output)


def libvirt_client(host: Host, pid: int) -> str:
    """Say which program of libvirt's a process is or has below it, '' if there is none.

    By its name alone: to read more of a process may take a lock that a stuck one holds.
    """
    comm = host.get(f"/proc/{pid}/comm")
    if comm == "virsh" or comm.startswith("virt-"):
        return f"{printable(comm)} (pid {pid}) calls libvirt, which waits for this hook"
    below = host.get(f"/proc/{pid}/task/{pid}/children").split()
    return next((told for child in below if (told := libvirt_client(host, int(child)))), "")
