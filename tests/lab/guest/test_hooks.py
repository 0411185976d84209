"""What libvirt calls its hooks with: a contract that varies between releases."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.lab.guest.domains import HOOKS, Domain, run, wait_for

# libvirt looks for hooks when it starts: without virt-usher's own it would not call this one.
pytestmark = [pytest.mark.product, pytest.mark.smoke]
CALLS = Path("/run/lab-hook-calls")


@pytest.fixture
def recorder() -> Iterator[None]:
    """A hook beside virt-usher's that writes down how it is called."""
    script = HOOKS / "qemu.d/record"
    script.parent.mkdir(exist_ok=True)
    script.write_text(f'#!/bin/sh\ncat >/dev/null\necho "$2 $3 $4" >>{CALLS}\n')
    script.chmod(0o755)
    yield
    script.unlink()
    CALLS.unlink(missing_ok=True)


def test_the_calls_of_a_life_and_why_it_ended(recorder: None, domain: Domain) -> None:
    domain.start()
    domain.stop()
    wait_for("release", lambda: "release" in CALLS.read_text())
    # "libvirtd (libvirt) 11.3.0"
    version = tuple(int(n) for n in run("libvirtd", "--version").stdout.split()[-1].split("."))
    reason = "destroyed" if version >= (10, 5) else "-"
    starts = ["prepare begin -", "start begin -", "started begin -"]
    assert CALLS.read_text().splitlines() == [*starts, "stopped end -", f"release end {reason}"]
