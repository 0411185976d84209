"""irqbalance's socket: ask which CPUs it leaves out, and tell it to leave out others.

Imported by release, so nothing heavy here; `socket` is imported only where irqbalance runs.
"""

from __future__ import annotations

import errno

from virt_usher import cpulist
from virt_usher.host import irq

TYPE_CHECKING = False  # importing typing would cost release more than all its work
if TYPE_CHECKING:
    from virt_usher.host import Host, LiveHost

SOCKETS = "/run/irqbalance"
SILENT = "irqbalance does not answer (systemctl restart irqbalance)"
# It answers between two looks at all interrupts, which take long on a busy host; and it dies of SIGPIPE if
# who asked is gone by then (1.9.2).
SECONDS = 30.0


def runs(host: Host) -> bool:
    """Whether there is an irqbalance that can be asked, to judge from its socket."""
    return bool(host.entries(SOCKETS))


def banned(host: Host) -> frozenset[int] | None:
    """Return the CPUs that irqbalance leaves out; None if none runs that can be asked.

    What it is told shows here only after its next look, ten seconds later. Raises OSError if it does not
    answer: a step that was skipped for that would count as done.
    """
    if (answer := _talk(host, "setup", answers=True)) is None:
        return None
    words = answer.split()
    if "BANNED" not in words[:-1]:
        raise OSError(errno.EPROTO, SILENT, SOCKETS)
    return irq.unmask(words[words.index("BANNED") + 1])


def ban(host: LiveHost, cpus: frozenset[int] | None) -> None:
    """Have irqbalance leave out just these CPUs; None: what its own settings and the boot options say."""
    _talk(host, f"settings cpus {'NULL' if cpus is None else cpulist.show(cpus)}")


def _talk(host: Host, text: str, answers: bool = False) -> str | None:
    """Send a line to the irqbalance that runs (sock_handle() in irqbalance.c), and return its reply.

    None if none runs. It wants the credentials of root; the kernel adds them for a socket that asks for them.
    """
    for name in host.entries(SOCKETS):
        import socket

        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
                line.settimeout(SECONDS)
                line.connect(host.path(f"{SOCKETS}/{name}"))
                line.sendall(text.encode())
                return line.recv(65536).decode("ascii", "replace") if answers else ""
        except (FileNotFoundError, ConnectionError):
            continue  # a socket that an irqbalance left behind when it was killed
        except OSError as error:
            raise OSError(error.errno or errno.ETIMEDOUT, SILENT, f"{SOCKETS}/{name}") from None
    return None
