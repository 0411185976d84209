"""All tests use the checkout they lie in, and a host of their own below a temporary directory."""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

# Only now can these be found.
from virt_usher.actions import Action  # noqa: E402
from virt_usher.dispatch import close  # noqa: E402
from virt_usher.journal import Journal, Journals  # noqa: E402
from virt_usher.locks import Locks  # noqa: E402
from virt_usher.testing import UUID, FakeHost  # noqa: E402

# No deadline: tests share their CPUs. No database: nothing is written into the checkout.
hypothesis.settings.register_profile("usher", deadline=None, database=None)
hypothesis.settings.load_profile("usher")


@pytest.fixture
def host(tmp_path: Path) -> FakeHost:
    """An empty host: no memory, no CPUs, nothing configured."""
    return FakeHost(tmp_path / "host")


@pytest.fixture
def new_host(tmp_path: Path) -> Callable[[], FakeHost]:
    """Make empty hosts, a new one with each call."""
    numbers = itertools.count()
    return lambda: FakeHost(tmp_path / f"host{next(numbers)}")


@pytest.fixture
def pc(host: FakeHost) -> FakeHost:
    """A host with two nodes of 1 GiB, 2 MiB pages mounted, and four CPUs in two policies."""
    return furnish(host)


def furnish(host: FakeHost) -> FakeHost:
    """Give an empty host what most tests want."""
    host.node(0, free_kib=1 << 20).node(1, free_kib=1 << 20).hugetlbfs()
    return host.policy(0, cpus=[0, 1]).policy(2, cpus=[2, 3])


_locks: list[Locks] = []


@pytest.fixture(autouse=True)
def _no_locks_left() -> Iterator[None]:
    """Close what `journals` opened: a hook's process keeps its locks for life, and a test is many hooks."""
    yield
    _close_locks()


def _close_locks() -> None:
    while _locks:
        os.close(_locks.pop()._fd)


def journals(host: FakeHost, seconds: float = 5) -> Journals:
    """Open the journals as a new process would, with this long to wait for locks."""
    _close_locks()
    _locks.append(Locks(host, time.monotonic() + seconds))
    return Journals(host, _locks[-1])


def hold(host: FakeHost, name: str, *actions: Action, uuid: str = UUID) -> Journal:
    """Do a start's actions in this process, through the real journal: UsherError and Killed get out."""
    known = journals(host)
    journal = known.of(name)
    close(known, journal, "left over")
    journal.begin(uuid, 0, 15.0)
    for action in actions:
        known.do(journal, "test", action.describe(host), action.record())
    return journal


def let_go(host: FakeHost, name: str) -> list[str]:
    """Do a release in this process; returns what could not be given back."""
    known = journals(host)
    return close(known, known.of(name), "test")


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Wait for what another process is about to do; far longer than it can take."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, f"never happened: {what}"
        time.sleep(0.01)
