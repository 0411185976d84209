"""Unload a stack of driver modules while the domain runs."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from virt_usher import (
    BindDriver,
    Domain,
    Host,
    Plan,
    Problem,
    UnloadModule,
    UsherError,
    children,
    ending,
    hookimpl,
    option,
    unload,
)
from virt_usher.errors import typed
from virt_usher.host import users

MODPROBE = "/sbin/modprobe"
_NAME = re.compile(r"[A-Za-z0-9_-]+")


def modules(names: Iterable[str]) -> list[str]:
    """Return modules as the kernel calls them; UsherError for what cannot be one, since it becomes a path."""
    for name in names:
        if not _NAME.fullmatch(name):
            raise UsherError(f"{name!r} cannot be the name of a module")
    return [name.replace("-", "_") for name in names]


@dataclass(frozen=True, eq=False)
class Plugin:
    BEFORE = ("pci",)  # where `enable` puts it
    FILES_ONLY = True  # it acts on the whole host

    unload: tuple[str, ...] = option(
        (), help="modules, in the order in which they are unloaded", check=modules
    )

    @hookimpl
    def usher_prepare(self, domain: Domain, host: Host) -> Iterator[UnloadModule]:
        own = tuple(d.address for d in domain.pci_devices)
        yield from (UnloadModule(name, own) for name in modules(self.unload))

    @hookimpl
    def usher_check(self, domain: Domain, host: Host, plan: Plan) -> Iterator[Problem]:
        if not self.unload:
            yield Problem("nothing is to be unloaded", f"{_enable(domain)}NAME,…")
        bound = {a.address for a in plan.actions if isinstance(a, BindDriver)}
        for action in (a for a in plan.actions if isinstance(a, UnloadModule)):
            yield from self._module(domain, host, plan, action)
            mine = (a for a in unload.mine(host, action.module, action.devices) if a not in bound)
            using = users.find(host, mine, host.qemu(domain.name, domain.uuid))
            yield from ending.problems(domain, host, plan, action, using)

    def _module(self, domain: Domain, host: Host, plan: Plan, action: UnloadModule) -> Iterator[Problem]:
        name, base = action.module, f"/sys/module/{action.module}"
        earlier = plan.actions[: plan.actions.index(action)]
        status, _ = children.run(host, [MODPROBE, "-n", "-q", "--", name], time.monotonic() + 30)
        if status:
            what = "could not be loaded again: it is not" if host.exists(base) else "is not"
            yield Problem(f"the module {name} {what} on the disk", f"modprobe -n -v {name}")
        if not unload.loaded(host, name):
            if host.exists(base):
                yield Problem(f"{name} is built into the kernel, and cannot be unloaded")
            return
        gone = [a.module for a in earlier if isinstance(a, UnloadModule)]
        if holders := [h for h in host.entries(f"{base}/holders") if h not in gone]:
            names = dict.fromkeys([*gone, *holders, *modules(self.unload)])
            hint = f"{_enable(domain)}{','.join(names)}"
            yield Problem(f"{name} is used by {', '.join(holders)}, not unloaded before it", hint)
        if others := unload.foreign(host, name, action.devices):
            hint = f"give the domain {others[0]} too, or leave {name} where it is"
            yield Problem(f"{name} drives {', '.join(others)} too, which would have no driver", hint)
        # A reference may be of what is stopped before, or of a device that goes with the one it is on.
        above = [f"{p}/" for m in gone for _, p in unload.bound(host, m)]
        goes = any(path.startswith(parent) for _, path in unload.bound(host, name) for parent in above)
        frees = goes or ending.releases(earlier) or ending.stopped(earlier)
        if (count := unload.references(host, name)) > 0 and not frees:
            what = f"{name} is in use ({count} references besides those of other modules)"
            yield Problem(what, "end what uses it: virt-usher devices, lsmod")


def _enable(domain: Domain) -> str:
    return f"virt-usher enable {typed(domain.name)} modules unload="
