"""Counts what is tried, and writes the table of docs/attacks.md where it is asked to."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.attacks import tally

Tally = Callable[[str, int], None]


@pytest.fixture
def tried() -> Tally:
    """Note that so many cases of an attack, a key of tally.ATTACKS, were tried and none went wrong."""
    return tally.note


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Path]:
    """A directory for many hosts: in memory where programs may run there, since a disk makes all wait."""
    memory = "/dev/shm"
    if not os.access(memory, os.W_OK) or os.statvfs(memory).f_flag & os.ST_NOEXEC:
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory, prefix="virt-usher-") as folder:
        yield Path(folder)
