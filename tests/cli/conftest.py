"""Runs the command line as its entry does, on a fake host."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from virt_usher.cli import main
from virt_usher.testing import FakeHost, run_hook

NOWHERE = "test:///there/is/no/such/file.xml"
GATE = Path(__file__).resolve().parents[2] / "hooks.d/qemu"


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What it printed for programs."""
        return json.loads(self.out)


Cli = Callable[..., Ran]


@pytest.fixture
def cli(pc: FakeHost, capfd: pytest.CaptureFixture[str]) -> Cli:
    """Run one command line on the host; `uri` is the libvirt it asks, none unless told."""

    def run(*argv: str, host: FakeHost = pc, uri: str = NOWHERE) -> Ran:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(argv, host, uri)
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        assert isinstance(ended.value.code, int)
        return Ran(ended.value.code, out, err)

    return run


@pytest.fixture
def libvirt() -> str:
    """Return the address of libvirt's own test driver: one domain, 'test', which runs."""
    pytest.importorskip("libvirt", reason="Python's libvirt module: apt-get install python3-libvirt")
    return "test:///default"


def hook(host: FakeHost, name: str, operation: str, xml: bytes | None = None) -> str:
    """Call the hook; it must let the domain be, or start."""
    result = run_hook(host, name, operation, xml)
    assert result.status == 0, result.stderr
    return result.stderr


def hook_of_gone_daemon(host: FakeHost, name: str, operation: str, xml: bytes | None = None) -> None:
    """Call the hook from a daemon that has ended since: its child calls, as the gate's shell would."""
    daemon = os.fork()
    if daemon == 0:
        gate = os.fork()
        if gate == 0:
            os._exit(run_hook(host, name, operation, xml).status)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(gate, 0)[1]))
    assert os.waitpid(daemon, 0)[1] == 0
