"""Every shell script of the project is clean, and POSIX."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from tests.install.house import CHECKOUT

SKIP = {".git", ".venv", "__pycache__", ".mypy_cache", ".ruff_cache"}


def is_shell(path: Path) -> bool:
    if not path.is_file() or path.suffix in {".py", ".md", ".toml"}:
        return False
    with path.open("rb") as file:
        first = file.readline(80)
    return first.startswith((b"#!/bin/sh", b"# shellcheck shell=sh"))


SCRIPTS = sorted(
    str(path.relative_to(CHECKOUT))
    for top in CHECKOUT.iterdir()
    if top.name not in SKIP
    for path in (top.rglob("*") if top.is_dir() else [top])
    if is_shell(path)
)


def test_all_are_found() -> None:
    assert {"install.sh", "hooks.d/qemu", "data/daemon", "demo/demo.sh", "tests/run"} <= set(SCRIPTS)


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck: apt-get install shellcheck")
def test_shellcheck() -> None:
    result = subprocess.run(
        ["shellcheck", "--external-sources", *SCRIPTS], cwd=CHECKOUT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("shell", ["dash", "bash --posix", "busybox sh"])
def test_syntax(shell: str) -> None:
    for script in SCRIPTS:
        subprocess.run([*shell.split(), "-n", script], cwd=CHECKOUT, check=True)
