"""The host's pool of 2 MiB pages: shared by the whole machine, so held under a lock and given back."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
LOCK = Path("/run/lock/virt-usher-tests.hugepages")


def nr_pages() -> int:
    return int((POOL / "nr_hugepages").read_text())


def free_pages() -> int:
    return int((POOL / "free_hugepages").read_text())


@contextmanager
def held_pool(patience: float = 90) -> Iterator[int]:
    """Hold the pool against other test runs; yield its size, and verify at the end that it has it again."""
    with LOCK.open("a+") as lock:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                assert time.monotonic() < deadline, f"another run of these tests holds {LOCK}"
                time.sleep(0.2)
        # A run that was killed left here what it had found; what it took is still missing to the host.
        lock.seek(0)
        if left := lock.read():
            (POOL / "nr_hugepages").write_text(left)
        before = nr_pages()
        lock.truncate(0)
        lock.write(str(before))
        lock.flush()
        try:
            yield before
        finally:
            after = nr_pages()
            (POOL / "nr_hugepages").write_text(str(before))
            lock.truncate(0)
        assert after == before, f"the pool had {before} huge pages, and {after} at the end"
