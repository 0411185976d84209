"""The linters are tests: what they find is found before a review."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import ROOT

PYTHON = ("src", "plugins", "tests", "benchmarks")


def run(*command: str) -> None:
    """Run a linter on the checkout; without it, fail in CI and skip elsewhere."""
    tool = command[2] if command[1:2] == ("-m",) else command[0]
    there = importlib.util.find_spec(tool) if command[1:2] == ("-m",) else shutil.which(tool)
    if not there:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"{tool} is not installed")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


def shell_scripts() -> list[str]:
    """Return every file of the checkout that a POSIX shell or bash runs."""
    found = []
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts
        hidden = any((p[0] == "." and p != ".ci") or p in ("build", "dist", "__pycache__") for p in parts)
        if hidden or not path.is_file() or path.is_symlink():
            continue
        with path.open("rb") as stream:
            first = stream.readline(80)
        if first.startswith(b"#!") and first.split()[-1].rsplit(b"/", 1)[-1] in (b"sh", b"bash", b"dash"):
            found.append(str(Path(*parts)))
    return sorted(found)


def test_ruff_check() -> None:
    run(sys.executable, "-m", "ruff", "check", "--no-cache", *present())


def test_ruff_format() -> None:
    run(sys.executable, "-m", "ruff", "format", "--check", "--no-cache", *present())


@pytest.mark.timeout(600)
def test_mypy_strict() -> None:
    run(sys.executable, "-m", "mypy", "--strict")


def test_shellcheck() -> None:
    scripts = shell_scripts()
    assert "hooks.d/qemu" in scripts
    run("shellcheck", "-x", *scripts)


def present() -> list[str]:
    return [folder for folder in PYTHON if (ROOT / folder).exists()]
