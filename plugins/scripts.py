"""Run the domain's hook scripts, laid out as VFIO-Tools has them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from virt_usher import Action, Domain, Host, Note, Plan, Problem, RunScripts, UsherError, hookimpl
from virt_usher.runs import find
from virt_usher.vetting import vet

# libvirt's AppArmor profile lets a hook execute what lies below /etc/libvirt/hooks, and nothing else in /etc.
HOOKS = "/etc/libvirt/hooks"
ROOTS = (f"{HOOKS}/qemu.d", f"{HOOKS}/usher.d")
BACK = ("stopped/end", "release/end")


@dataclass(frozen=True, eq=False)
class Plugin:
    @hookimpl
    def usher_prepare(self, domain: Domain, host: Host) -> Iterator[Action | Note]:
        back = tuple(o for o in BACK if find(host, list(ROOTS), domain.name, o))
        action = self._action(domain, host, "prepare/begin", back)
        if action.scripts or back:
            yield action
        elif not any(host.exists(f"{root}/{domain.name}") for root in ROOTS):
            yield Note(f"no scripts: there is no {ROOTS[1]}/{domain.name}/")
        for script in (*action.scripts, *(s for o in back for s in find(host, list(ROOTS), domain.name, o))):
            if "virsh" in host.get(script):
                yield Note(f"{script} calls virsh, which waits for libvirt, which waits for this script")
        if host.exists(f"{HOOKS}/qemu") and "virt-usher's" not in host.get(f"{HOOKS}/qemu", ""):
            yield Note(f"{HOOKS}/qemu is a hook of your own; if it runs these scripts too, they run twice")

    @hookimpl
    def usher_start(self, domain: Domain, host: Host) -> Iterator[Action]:
        yield from self._other(domain, host, "start/begin")

    @hookimpl
    def usher_started(self, domain: Domain, host: Host) -> Iterator[Action]:
        yield from self._other(domain, host, "started/begin")

    @hookimpl
    def usher_check(self, domain: Domain, host: Host, plan: Plan) -> Iterator[Problem]:
        for action in plan.actions:
            if isinstance(action, RunScripts):
                back = (s for o in action.back for s in find(host, list(ROOTS), domain.name, o))
                for script in (*action.scripts, *back):
                    yield from _vetted(host, script)

    def _other(self, domain: Domain, host: Host, operation: str) -> Iterator[Action]:
        action = self._action(domain, host, operation, ())
        if action.scripts:
            yield action

    def _action(self, domain: Domain, host: Host, operation: str, back: tuple[str, ...]) -> RunScripts:
        scripts = tuple(find(host, list(ROOTS), domain.name, operation))
        return RunScripts(domain.name, operation, ROOTS, scripts, back)


def _vetted(host: Host, script: str) -> list[Problem]:
    """libvirt waits for the hook, and virsh in it waits for libvirt (docs/hooks.rst: do not)."""
    try:
        vet(host, script)
    except UsherError as error:
        return [Problem(error.message, error.hint)]
    return []
