"""Run the real hook on a fake host, as libvirt runs it: a process of its own, with pipes."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from virt_usher import dispatch
from virt_usher.testing.xml import domain_xml

if TYPE_CHECKING:
    from virt_usher.testing.fake import FakeHost

_SUB_OPERATIONS = {"stopped": "end", "release": "end"}
_CLONE_NEWUSER = 0x10000000
BROKEN = 99  # exit status of a child that never came to the hook


@dataclass(frozen=True)
class Result:
    """How a call of the hook ended."""

    status: int
    stdout: str
    stderr: str
    killed: str  # where a kill point of the host hit, or ''
    struck: str  # where a fault of the host hit last, or ''


class Hook:
    """A call of the hook under way."""

    def __init__(self, host: FakeHost, pid: int, stdout: int, stderr: int) -> None:
        self.host = host
        self.pid = pid
        self._pipes = {stdout: b"", stderr: b""}
        self._result: Result | None = None

    def wait(self, seconds: float = 60) -> Result:
        """Wait as libvirt does, until the pipes are closed and the process has ended."""
        if self._result is not None:
            return self._result
        end, poll = time.monotonic() + seconds, select.poll()
        open_ones = set(self._pipes)
        for fd in open_ones:
            poll.register(fd, select.POLLIN)
        while open_ones:
            ready = poll.poll(max(0.0, end - time.monotonic()) * 1000)
            if not ready:
                self.kill()
                raise TimeoutError(f"the hook, or a child of it, keeps libvirt waiting after {seconds} s")
            for fd, _ in ready:
                chunk = os.read(fd, 65536)
                self._pipes[fd] += chunk
                if not chunk:
                    open_ones.remove(fd)
                    poll.unregister(fd)
        _, status = os.waitpid(self.pid, 0)
        # The worker dies after its parent, and would still have its locks.
        dying = int(self.host.happened("dying") or 0)
        while dying and self.host.started_at(dying) is not None:
            time.sleep(0.001)
        stdout, stderr = (text.decode("utf-8", "replace") for text in self._pipes.values())
        for fd in self._pipes:
            os.close(fd)
        hits = [self.host.happened(what) for what in ("killed", "struck")]
        self._result = Result(os.waitstatus_to_exitcode(status), stdout, stderr, *hits)
        return self._result

    def kill(self) -> None:
        """Kill the hook's first process, the one libvirt knows."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


def start_hook(
    host: FakeHost,
    name: str,
    operation: str,
    xml: bytes | None = None,
    *,
    extra: str = "-",
    kill_at: int = 0,
    kill: str = "process",
    prepare: Callable[[], object] | None = None,
) -> Hook:
    """Call the hook and do not wait for it.

    `kill_at`: the kill point at which the worker dies (`kill`: 'process' itself, 'family' the waiting parent
    too, 'parent' that one alone). `prepare` is called in the child first. Without XML a small
    domain's is given.
    """
    if xml is None:
        xml = domain_xml(name)
    stdout, stdout_in = os.pipe()
    stderr, stderr_in = os.pipe()
    with tempfile.TemporaryFile() as stdin:
        stdin.write(xml)
        stdin.seek(0)
        pid = os.fork()
        if pid == 0:
            for source, fd in ((stdin.fileno(), 0), (stdout_in, 1), (stderr_in, 2)):
                os.dup2(source, fd)
            # A test runner's stand-ins write somewhere else, into what is closed below.
            sys.stdout, sys.stderr = (os.fdopen(fd, "w", closefd=False) for fd in (1, 2))
            arguments = [name, operation, _SUB_OPERATIONS.get(operation, "begin"), extra]
            _be_the_hook(host, arguments, kill_at, kill, prepare)
    os.close(stdout_in)
    os.close(stderr_in)
    return Hook(host, pid, stdout, stderr)


def run_hook(
    host: FakeHost,
    name: str,
    operation: str,
    xml: bytes | None = None,
    *,
    extra: str = "-",
    kill_at: int = 0,
    kill: str = "process",
    prepare: Callable[[], object] | None = None,
) -> Result:
    """Call the hook on a fake host, and wait for it as libvirt does: see start_hook."""
    hook = start_hook(host, name, operation, xml, extra=extra, kill_at=kill_at, kill=kill, prepare=prepare)
    return hook.wait()


def _be_the_hook(
    host: FakeHost, arguments: list[str], kill_at: int, kill: str, prepare: Callable[[], object] | None
) -> NoReturn:
    """Become what the gate starts; must not come back into the test."""
    try:
        os.closerange(3, 256)
        if os.geteuid() != 0:
            _become_root()
        if prepare is not None:
            prepare()
        host.kill_at(kill_at, kill)
        with host.watched():
            dispatch.main(arguments, host)
    except BaseException:  # whatever it is, it belongs to this process and not to the test's
        traceback.print_exc(file=sys.__stderr__)
    finally:
        os._exit(BROKEN)


def _become_root() -> None:
    """Be root of a user namespace of one's own: the hook works for root only."""
    uid, gid = os.getuid(), os.getgid()
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWUSER) != 0:
        raise OSError(ctypes.get_errno(), "these tests need root, or a user namespace")
    for file, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{file}", "w") as stream:
            stream.write(text)
