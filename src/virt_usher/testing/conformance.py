"""Ready checks that a plugin's author points at a plugin."""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial

from virt_usher.config import Enabled, Settings
from virt_usher.domain import Domain
from virt_usher.host import RUN_DIR
from virt_usher.prepare import Plan, make_plan
from virt_usher.testing.fake import FakeHost
from virt_usher.testing.run import run_hook


def ask(
    host: FakeHost,
    plugin: str,
    xml: bytes,
    options: dict[str, object] | None = None,
    operation: str = "prepare",
) -> Plan:
    """Return what one plugin wants for a domain, and its problems: the plan that the hook would make."""
    settings = Settings(plugins=(Enabled(plugin, options or {}),))
    return make_plan(host, Domain.from_xml(xml), settings, operation)


def check_nothing_stays(
    make_host: Callable[[], FakeHost], name: str, xml: bytes, stride: int = 1
) -> dict[str, int]:
    """Attack a start and a stop of a domain at every write; returns how many cases of what were tried.

    `make_host` gives a fresh host each time, configured for the domain. Each write in turn is where
    the worker is killed, with the release that libvirt then sends; where the whole hook and its
    daemon are killed, so that the next thing is another start; and what fails with EIO. Then
    the host must be as it was, byte for byte, and a start that failed must have been refused. A
    `stride` above 1 tries only every so many writes.
    """

    def attack(operation: str, how: str, point: int) -> bool:
        return _attacked(make_host(), name, xml, operation, how, point)

    attacks = {
        f"{operation}: {how}": partial(attack, operation, how)
        for operation in ("prepare", "release")
        for how in ("killed", "killed with its daemon", "EIO")
    }
    return {what: _until_missed(attack, stride) for what, attack in attacks.items()}


def _until_missed(attack: Callable[[int], bool], stride: int) -> int:
    cases = 0
    while attack(1 + cases * stride):
        cases += 1
    return cases


def _attacked(host: FakeHost, name: str, xml: bytes, operation: str, how: str, point: int) -> bool:
    """Start and stop a domain with one attack; tell whether it hit, or there was no such point any more."""
    before = host.snapshot()
    if operation == "release":
        assert run_hook(host, name, "prepare", xml).status == 0
    if how == "EIO":
        host.fail("*", errno.EIO, point)
        result = run_hook(host, name, operation, xml)
        host.heal()
    else:
        kill = "process" if how == "killed" else "family"
        result = run_hook(host, name, operation, xml, kill_at=point, kill=kill)
    hit = result.killed or result.struck
    case = f"{operation}: {how} at point {point} ({hit})"
    assert hit or result.status == 0, f"{case}: {result.stderr}"
    if how == "EIO" and result.status != 0:
        changed = differences(before, host.snapshot())
        assert not changed, f"{case}: refused, and left behind:\n{changed}"
    if (operation == "release" and hit) or how == "killed with its daemon":
        again = run_hook(host, name, "prepare", xml)
        assert again.status == 0, f"{case}: no start any more: {again.stderr}"
    assert run_hook(host, name, "release", xml).status == 0
    changed = differences(before, host.snapshot())
    assert not changed, f"{case}: left behind:\n{changed}"
    return bool(hit)


def differences(before: dict[str, str], after: dict[str, str]) -> str:
    """Say in lines how two snapshots differ, '' if they do not; an empty run directory is nothing."""
    lines = []
    for path in sorted(before.keys() | after.keys()):
        old, new = before.get(path, "absent"), after.get(path, "absent")
        if old != new:
            lines.append(f"{path}: {old.strip()!r} before, {new.strip()!r} now")
    return "\n".join(lines)


def left(host: FakeHost) -> list[str]:
    """Return what virt-usher keeps in its run directory besides its locks."""
    return [n for n in host.entries(RUN_DIR) if n not in (".locks", ".called")]
