"""Ready checks that a plugin's author points at a plugin."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from virt_usher.config import Enabled, Settings
from virt_usher.domain import Domain
from virt_usher.host import RUN_DIR
from virt_usher.prepare import Plan, make_plan
from virt_usher.testing.fake import FakeHost
from virt_usher.testing.run import Result, run_hook


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


# What a write to sysfs, a journal on a full or broken /run, or the start of a program can end with.
# Not ENOENT: what says so is gone, and counts as given back; here it would still be there.
ERRNOS = ("EIO", "EBUSY", "EINVAL", "EPERM", "ENODEV", "ENOSPC", "EAGAIN", "EACCES", "ENOMEM")
LIFE = ("prepare", "start", "started", "release")
_SIGNS = {"start": ".sta", "started": ".std"}
_KILLS = {"killed": "process", "killed with its daemon": "family", "its parent killed": "parent"}


@dataclass(frozen=True)
class Attack:
    """What goes wrong in one call of the hook, and what libvirt calls next.

    `how`: 'killed' (the worker), 'killed with its daemon' (its waiting parent too), 'its parent killed' (so
    that the next call comes while it still works), or an errno's name, with a '+' for all writes from
    there on. `then`: what is called next, 'prepare' meaning another start and a release.
    """

    operation: str
    how: str
    then: str = "release"

    def __str__(self) -> str:
        return f"{self.operation} {self.how}, then {self.then}"


ATTACKS = tuple(
    Attack(operation, how, then)
    for operation in LIFE
    for how, then in (
        ("killed", "release"),
        ("killed with its daemon", "prepare"),
        ("its parent killed", "release"),
        ("errno", "release"),
    )
)


def check_nothing_stays(
    make_host: Callable[[], FakeHost], name: str, xml: bytes, stride: int = 1
) -> dict[str, int]:
    """Attack each call of a domain's life at every write; returns how many cases of what were tried.

    `make_host` gives a fresh host each time, configured for the domain. Each write in turn is where
    the worker is killed, with the release that libvirt then sends; where the whole hook and its
    daemon are killed, so that the next thing is another start; where libvirt's own child is killed and its
    release comes while the worker still works; and what fails, with all errnos in turn. Then
    the host must be as it was, byte for byte, and a start that failed must have been refused. A
    `stride` above 1 tries only every so many writes.
    """
    cases = {}
    for attack in ATTACKS:
        count = 0
        while attacked(make_host(), name, xml, _in_turn(attack, count), 1 + count * stride):
            count += 1
        if count:  # most plugins have nothing to do at start and started
            cases[str(attack)] = count
    return cases


def _in_turn(attack: Attack, count: int) -> Attack:
    return replace(attack, how=ERRNOS[count % len(ERRNOS)]) if attack.how == "errno" else attack


def call(host: FakeHost, name: str, operation: str, xml: bytes, kill_at: int = 0, kill: str = "") -> Result:
    """Call the hook if the gate would: `start` and `started` only where a plugin left word that it cares."""
    if operation in _SIGNS and not host.exists(f"{RUN_DIR}/{name}{_SIGNS[operation]}"):
        return Result(0, "", "", "", "")
    return run_hook(host, name, operation, xml, kill_at=kill_at, kill=kill)


def attacked(
    host: FakeHost,
    name: str,
    xml: bytes,
    attack: Attack,
    point: int,
    call: Callable[..., Result] = call,
    recover: Callable[[FakeHost], None] | None = None,
) -> bool:
    """Let a domain live with one attack; tell whether it hit, or there was no such point any more."""
    before = host.snapshot()
    for earlier in LIFE[: LIFE.index(attack.operation)]:
        result = call(host, name, earlier, xml)
        assert result.status == 0, f"{attack}: {earlier}: {result.stderr}"
    if kill := _KILLS.get(attack.how):
        result = call(host, name, attack.operation, xml, point, kill)
    else:
        code = attack.how.removesuffix("+")
        host.fail("*", getattr(errno, code), -point if attack.how.endswith("+") else point)
        result = call(host, name, attack.operation, xml)
        host.heal()
    hit = result.killed or result.struck
    case = f"{attack} at point {point} ({hit})"
    assert hit or result.status == 0, f"{case}: {result.stderr}"
    assert "Traceback" not in result.stderr, f"{case}: {result.stderr}"
    assert "an error in virt-usher" not in result.stderr, f"{case}: {result.stderr}"
    if result.status and not kill:
        assert attack.operation in ("prepare", "start"), f"{case}: only a start may be refused"
        said = os.strerror(getattr(errno, code)), f"({code})"
        assert any(text in result.stderr for text in said), f"{case}: no reason: {result.stderr}"
        changed = differences(before, host.snapshot()) if attack.operation == "prepare" else ""
        assert not changed or attack.how.endswith("+"), f"{case}: refused, and left behind:\n{changed}"
    if attack.then == "prepare" or (attack.operation == "release" and attack.then != "recover" and hit):
        again = call(host, name, "prepare", xml)
        assert again.status == 0, f"{case}: no start any more: {again.stderr}"
    if attack.then == "recover" and recover:
        recover(host)
    else:
        assert call(host, name, "release", xml).status == 0
    changed = differences(before, settled(host, before))
    assert not changed, f"{case}: left behind:\n{changed}"
    return bool(hit)


def settled(host: FakeHost, wanted: dict[str, str]) -> dict[str, str]:
    """Return what the host is like once a worker that nobody waits for has had time to end."""
    end = time.monotonic() + 20
    while (now := host.snapshot()) != wanted and time.monotonic() < end:
        time.sleep(0.02)
    return now


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
