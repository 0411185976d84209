"""Locks between hooks: one byte of one file for each thing that can be locked.

fcntl record locks fit better than a lock file each: nothing has to be created or deleted, the kernel
drops them when their process ends however it ends, a forked child does not inherit them, and
F_GETLK names the holder.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import time

from virt_usher.errors import UsherError, printable
from virt_usher.host import RUN_DIR, LiveHost

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

BRIEF = 0.5  # seconds
_FLOCK = "hhqqi4x"  # struct flock on 64-bit Linux: type, whence, start, len, pid


class Locks:
    """The locks this process may take, until a deadline (seconds of time.monotonic())."""

    def __init__(self, host: LiveHost, deadline: float) -> None:
        self._host = host
        self.deadline = deadline
        path = os.path.join(host.private_dir(RUN_DIR), ".locks")
        # Kept open for the process's life: closing any descriptor of the file drops all its locks.
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    @contextlib.contextmanager
    def hold(self, key: str, wait: bool = True) -> Iterator[None]:
        """Hold the lock named `key`; UsherError naming the holder when the deadline comes first.

        Without `wait` it is not waited for longer than for a hook that has answered and ends.
        """
        where = _offset(key)
        pause = 0.001
        end = self.deadline if wait else min(self.deadline, time.monotonic() + BRIEF)
        while True:
            try:
                fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, where)
                break
            except (BlockingIOError, PermissionError):
                if time.monotonic() + pause >= end:
                    raise UsherError(f"{key} is held by {self.holder(key)}") from None
            time.sleep(pause)
            pause = min(pause * 2, 0.05)
        try:
            yield
        finally:
            fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, where)

    def holder(self, key: str) -> str:
        """Say who holds a lock: pid, and the domain and operation its hook was called for."""
        ask = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, _offset(key), 1, 0)
        kind, _, _, _, pid = struct.unpack(_FLOCK, fcntl.fcntl(self._fd, fcntl.F_GETLK, ask))
        if kind == fcntl.F_UNLCK:
            return "nobody any more"
        argv = self._host.get(f"/proc/{pid}/cmdline").split("\0")
        what = next((f" ({argv[i - 1]!r} {argv[i]})" for i in (-5, -4) if _is_hook(argv, i)), "")
        return printable(f"pid {pid}{what}")


def _is_hook(argv: list[str], i: int) -> bool:
    return len(argv) > -i and argv[i] in ("prepare", "start", "started", "release")


def _offset(key: str) -> int:
    """Hash a key to an offset (64-bit FNV-1a, top bit off); hashlib costs more than the lock."""
    value = 0xCBF29CE484222325
    for byte in key.encode("utf-8", "surrogateescape"):
        value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return value >> 2
