"""Which tests belong to this boot, and whether there is another."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.lab.guest.agent import MORE
from tests.lab.guest.domains import Domain

BOOT = int(os.environ["LAB_BOOT"])


def _boot(item: pytest.Item) -> int:
    marker = item.get_closest_marker("boot")
    return int(marker.args[0]) if marker else 0


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out other boots' tests, after -k and -m had their say."""
    if os.environ["LAB_BARE"]:
        for item in items:
            if item.get_closest_marker("product"):
                item.add_marker(pytest.mark.skip(reason="virt-usher is not installed in a bare lab"))
    # What passed before the emulator gave out.
    done = set(json.loads(os.environ.get("LAB_DONE", "[]")))
    items[:] = [item for item in items if item.nodeid not in done]
    later = [_boot(item) for item in items if _boot(item) > BOOT]
    MORE.unlink(missing_ok=True)
    if later:
        MORE.write_text(str(min(later)))
    elsewhere = [item for item in items if _boot(item) != BOOT]
    if elsewhere:
        config.hook.pytest_deselected(items=elsewhere)
        items[:] = [item for item in items if _boot(item) == BOOT]
    # A stable sort: what a boot ends with comes last, whatever its file is called.
    items.sort(key=lambda item: item.get_closest_marker("last") is not None)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Say at once why a test failed: the rest may take minutes."""
    if report.failed:
        print(f"\n{report.longreprtext}")


@pytest.fixture
def domain(request: pytest.FixtureRequest) -> Iterator[Domain]:
    """A small domain of the test's own name, gone afterwards."""
    made = Domain(request.node.name.partition("[")[0].removeprefix("test_")[:40])
    yield made
    made.remove()


@pytest.fixture
def second_domain() -> Iterator[Domain]:
    """Another one."""
    made = Domain("second")
    yield made
    made.remove()


@pytest.fixture
def empty_pools() -> Iterator[None]:
    """Start and end a test with no huge page in any pool."""
    pools = list(Path("/sys/devices/system/node").glob("node*/hugepages/hugepages-*/nr_hugepages"))
    for pool in pools:
        pool.write_text("0")
    yield
    for pool in pools:
        pool.write_text("0")
