"""See all that happens in a folder, however briefly: inotify(7)."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_EVENTS = {
    0x2: "modified",
    0x4: "mode",
    0x40: "moved out",
    0x80: "moved in",
    0x100: "created",
    0x200: "deleted",
}


@contextmanager
def watched(folder: Path) -> Iterator[list[tuple[str, str]]]:
    """Yield a list that at the end holds (what happened, name) for each event in the folder."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    assert fd >= 0
    assert libc.inotify_add_watch(fd, os.fsencode(folder), sum(_EVENTS)) > 0
    seen: list[tuple[str, str]] = []
    try:
        yield seen
        seen += _read(fd)
    finally:
        os.close(fd)


def _read(fd: int) -> Iterator[tuple[str, str]]:
    try:
        data = os.read(fd, 1 << 20)
    except BlockingIOError:
        return
    while data:
        _, mask, _, length = struct.unpack_from("iIII", data)
        name = data[16 : 16 + length].rstrip(b"\0").decode()
        yield _EVENTS[mask & 0xFFF], name
        data = data[16 + length :]
