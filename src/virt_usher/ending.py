"""Who uses a device that a plan takes, and is not ended by the plan itself: for the plugins that take one.

What the plan ends lets the start pass its check. Right before the device is taken it is looked at again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from virt_usher.actions import Action, KeepUnit, Problem, Write
from virt_usher.domain import Domain
from virt_usher.errors import typed
from virt_usher.host import Host, console, sessions, users, vfio
from virt_usher.host.pci import Device
from virt_usher.prepare import Plan
from virt_usher.units import own_name

WAIVABLE = (users.USE, users.DISPLAY, vfio.WAIVABLE, "group")
NAMES = (*WAIVABLE, "reset", "silent")  # with those of reset_check: all of ours that a waiver can name
NEVER = (users.DATA, users.GUEST, users.VFS, vfio.FINAL)


def problems(
    domain: Domain, host: Host, plan: Plan, action: Action, using: Collection[users.User]
) -> Iterator[Problem]:
    """Return a problem for each use of a device that does not end before the action, which takes it."""
    actions = plan.actions
    before = actions[: actions.index(action)]
    for user in using:
        if _ends(host, before, user):
            continue
        what, hint = user.what, user.hint
        if _ends(host, actions, user):
            what += ", which the plan ends only after it takes the device"
            hint = f"in /etc/virt-usher/domains/, put the plugin that ends it before {_plugin(plan, action)}"
        elif user.console:
            hint = f"virt-usher enable {typed(domain.name)} consoles"
        elif user.units and all(services := [sessions.system_unit(names) for names in user.units]):
            units = ",".join(sorted({*stopped(actions), *services}))
            hint = f"virt-usher enable {typed(domain.name)} services stop={units}"
        yield problem(domain, host.pci.device(user.address), user.problem, what, hint)


def stopped(actions: Collection[Action]) -> set[str]:
    """Return the units that actions stop."""
    return {a.unit for a in actions if isinstance(a, KeepUnit) and not a.active}


def releases(actions: Collection[Action]) -> bool:
    """Tell whether actions take the text console away."""
    writes = (a for a in actions if isinstance(a, Write) and a.path.startswith(console.CONSOLES))
    return any(w.value == "0" for w in writes)


def _ends(host: Host, actions: Collection[Action], user: users.User) -> bool:
    if user.console:
        return releases(actions)
    units = {own_name(host, unit) for unit in stopped(actions)}
    return bool(user.units) and all(units & {own_name(host, n) for n in names} for names in user.units)


def _plugin(plan: Plan, action: Action) -> str:
    return next(p.plugin for p in plan.items if p.item is action)


def problem(domain: Domain, device: Device, kind: str, what: str, hint: str) -> Problem:
    """Make a problem of a device, with the waiver of it as the other way out where there is one."""
    text = f"{device.address} ({device.id}) {what}"
    if kind not in WAIVABLE:
        return Problem(text, hint)
    waive = f"virt-usher waive {typed(domain.name)} {device.address} {kind} 'REASON'"
    return Problem(text, f"{hint}; or: {waive}", (device.address, device.id, kind))
