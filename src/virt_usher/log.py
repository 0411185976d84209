"""Lines for the system's log: domain, start id, plugin, text."""

from __future__ import annotations

import syslog

from virt_usher.errors import printable

INFO, WARNING, ERROR = syslog.LOG_INFO, syslog.LOG_WARNING, syslog.LOG_ERR
_opened: list[bool] = []


def say(level: int, name: str, start_id: str, text: str) -> None:
    """Log one line to syslog, and so to journald where that listens on /dev/log.

    `journalctl -t virt-usher` shows them; the start id is the same from prepare to release.
    """
    if not _opened:
        syslog.openlog("virt-usher", syslog.LOG_PID, syslog.LOG_DAEMON)
        _opened.append(True)
    syslog.syslog(level, printable(f"{name} [{start_id}] {text}").encode("utf-8", "replace").decode())
