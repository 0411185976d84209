"""Where the tests of the installer install."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from tests.install.house import House, copy_checkout


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One copy of the checkout for all tests that do not change it."""
    return copy_checkout(tmp_path_factory.mktemp("checkout") / "source")


@pytest.fixture
def package(tmp_path: Path, source: Path) -> House:
    """Install as a packager does: below DESTDIR."""
    return House(tmp_path, source)


@pytest.fixture
def house(tmp_path: Path, source: Path) -> House:
    """Install as an admin does, but into folders of the test's own, and with a /run of its own."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        missing = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        missing("a live install needs root, and a mount namespace of its own")
    return House(tmp_path, source, live=True)
