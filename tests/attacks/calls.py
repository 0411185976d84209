"""Calls of the hook by a daemon that is gone afterwards, and `virt-usher recover`."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import Any

from virt_usher.cli import main
from virt_usher.testing import FakeHost, Result
from virt_usher.testing.conformance import call


def gone_daemon(host: FakeHost, *arguments: Any) -> Result:
    """Call the hook as a child of a gate of a daemon that ends: so recover finds its domain stale."""
    out, into = os.pipe()
    daemon = os.fork()
    if daemon == 0:
        if os.fork() == 0:
            os.write(into, json.dumps(asdict(call(host, *arguments))).encode())
            os._exit(0)
        os.wait()
        os._exit(0)
    os.close(into)
    with open(out, "rb") as stream:
        result = Result(**json.load(stream))
    os.waitpid(daemon, 0)
    return result


def recover(host: FakeHost) -> None:
    """Run `virt-usher recover` as at boot; it must leave nothing of domains that do not run."""
    assert recovery(host) == 0, host.journal("guest")


def recovery(host: FakeHost) -> int:
    """Run `virt-usher recover` as at boot; return its exit status, which says whether anything is left."""
    pid = os.fork()
    if pid == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        try:
            main(("recover", "--boot"), host)
        except SystemExit as ended:
            os._exit(int(ended.code or 0))
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
