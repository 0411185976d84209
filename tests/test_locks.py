"""Locks end with their process, never wait past the deadline, and name their holder."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from tests.conftest import ROOT

from virt_usher import UsherError
from virt_usher.locks import Locks
from virt_usher.testing import FakeHost

HOLDER = """
import sys
sys.path.insert(0, sys.argv[1])
from virt_usher.host import LiveHost
from virt_usher.locks import Locks
with Locks(LiveHost(sys.argv[2]), float("inf")).hold(sys.argv[3]):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def holder(host: FakeHost, key: str) -> Iterator[subprocess.Popen[str]]:
    """Have another process, called like a hook, hold a lock until its stdin ends."""
    command = [sys.executable, "-I", "-B", "-c", HOLDER, str(ROOT / "src"), host.root, key]
    hook = ["it's a guest", "prepare", "begin", "-"]
    with subprocess.Popen([*command, *hook], stdin=-1, stdout=-1, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def locks(host: FakeHost, seconds: float) -> Locks:
    return Locks(host, time.monotonic() + seconds)


def test_a_lock_is_waited_for_until_the_deadline_and_its_holder_named(host: FakeHost) -> None:
    with holder(host, "domain x") as process:
        with pytest.raises(UsherError) as caught, locks(host, 0.2).hold("domain x"):
            raise AssertionError("both hold it")
        assert caught.value.message == f"""domain x is held by pid {process.pid} ("it's a guest" prepare)"""


def test_a_lock_that_need_not_be_waited_for_is_refused_soon(host: FakeHost) -> None:
    with (
        holder(host, "domain x"),
        pytest.raises(UsherError, match="is held by"),
        locks(host, 600).hold("domain x", wait=False),
    ):
        raise AssertionError("both hold it")


def test_a_hook_that_has_answered_and_ends_is_waited_for_all_the_same(host: FakeHost) -> None:
    with holder(host, "domain x") as process:
        threading.Timer(0.05, process.kill).start()
        with locks(host, 600).hold("domain x", wait=False):
            pass


def test_other_locks_are_free_meanwhile(host: FakeHost) -> None:
    with holder(host, "domain x"), locks(host, 0).hold("domain y", wait=False):
        pass


@pytest.mark.parametrize("how", ["killed", "ends"])
def test_a_lock_is_free_when_its_process_ends(host: FakeHost, how: str) -> None:
    mine = locks(host, 60)
    with holder(host, "domain x") as process:
        if how == "killed":
            process.kill()
        else:
            assert process.stdin is not None
            process.stdin.close()
        with mine.hold("domain x"):
            assert mine.holder("domain x") == "nobody any more"


def test_a_lock_is_given_back_after_an_error(host: FakeHost) -> None:
    mine = locks(host, 1)
    with contextlib.suppress(KeyError), mine.hold("k"):
        raise KeyError
    with holder(host, "k"):
        pass


def test_keys_of_any_bytes_are_different_locks(host: FakeHost) -> None:
    keys = ["domain x", "domain X", "domain \udcff", "domain " + "é" * 125, "domain ", "/sys/a", ""]
    with contextlib.ExitStack() as stack:
        for key in keys:
            stack.enter_context(holder(host, key))
        for key in keys:
            with pytest.raises(UsherError, match="is held by"), locks(host, 0).hold(key):
                raise AssertionError(f"both hold {key!r}")
