"""What libvirt does by itself: the ground on which all other tests here stand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.libvirt.domain import Domain
from tests.libvirt.private import HOOKS, PrivateLibvirt, wait_for

HOOK_LOG = "/run/hook.log"

# One line per call; refuses the operation that /run/refuse names.
RECORDER = f"""#!/bin/sh
echo "$*" >>{HOOK_LOG}
if grep -qsx "$2" /run/refuse; then
    echo "refused by the recorder" >&2
    exit 1
fi
"""


@pytest.fixture
def recorder(bare: PrivateLibvirt) -> PrivateLibvirt:
    bare.write(f"{HOOKS}/qemu", RECORDER, 0o755)
    bare.run("rm", "-f", HOOK_LOG, "/run/refuse", check=True)
    bare.restart_daemon()  # it looks for hooks once, at its start
    return bare


def calls(lv: PrivateLibvirt, domain: Domain) -> list[str]:
    """Return the operations that libvirt called the hook for, having checked all its arguments."""
    operations = []
    for line in lv.lines(HOOK_LOG):
        operation, sub_operation, extra = line.removeprefix(f"{domain.name} ").split()
        assert sub_operation == ("end" if operation in ("stopped", "release") else "begin")
        assert extra == "-" or operation == "release"  # the reason, since libvirt 10.5
        operations.append(operation)
    return operations


def test_a_domain_with_huge_pages_does_not_start_on_an_empty_pool(bare: PrivateLibvirt) -> None:
    result = bare.start(Domain("bare"))
    assert result.returncode == 1
    assert "unable to map backing store for guest RAM: Cannot allocate memory" in result.stderr


def destroyed(lv: PrivateLibvirt, domain: Domain) -> None:
    lv.destroy(domain)


def crashed(lv: PrivateLibvirt, domain: Domain) -> None:
    lv.run("kill", "-KILL", str(lv.qemu_pid(domain)), check=True)


def restarted(lv: PrivateLibvirt, domain: Domain) -> None:
    lv.restart_daemon()


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (destroyed, ["prepare", "start", "started", "stopped", "release"]),
        (crashed, ["prepare", "start", "started", "stopped", "release"]),
        (restarted, ["prepare", "start", "started", "reconnect"]),
    ],
)
def test_the_hook_is_called_in_the_documented_order(
    recorder: PrivateLibvirt, event: Callable[[PrivateLibvirt, Domain], None], expected: list[str]
) -> None:
    domain = Domain("a name", memory="")
    assert recorder.start(domain).returncode == 0
    event(recorder, domain)
    wait_for(f"hook calls {expected}", lambda: calls(recorder, domain) == expected)


@pytest.mark.parametrize(
    ("refuse", "domain", "expected"),
    [
        ("prepare", Domain("refused", memory=""), ["prepare", "stopped", "release"]),
        ("start", Domain("refused-late", memory=""), ["prepare", "start", "stopped", "release"]),
        ("-", Domain("no-pages"), ["prepare", "start", "stopped", "release"]),
    ],
    ids=["prepare refuses", "start refuses", "QEMU fails"],
)
def test_a_start_that_fails_is_released(
    recorder: PrivateLibvirt, refuse: str, domain: Domain, expected: list[str]
) -> None:
    recorder.write("/run/refuse", f"{refuse}\n")
    result = recorder.start(domain)
    assert result.returncode == 1
    assert calls(recorder, domain) == expected
    assert ("refused by the recorder" in result.stderr) == (refuse != "-")
