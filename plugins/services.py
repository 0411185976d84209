"""Start or stop systemd units while the domain runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from virt_usher import Action, Domain, Host, KeepUnit, Plan, Problem, UsherError, hookimpl, option
from virt_usher.units import own_name, state

SLEEP_UNIT = "virt-usher-nosleep.service"


@dataclass(frozen=True, eq=False)
class Plugin:
    BEFORE = ("pci",)  # where `enable` puts it
    FILES_ONLY = True  # it ends what pci refuses for

    start: list[str] = option((), help="units that are active while the domain runs")
    stop: list[str] = option((), help="units that are inactive while the domain runs")
    inhibit_sleep: bool = option(False, help="keep the host from sleeping while the domain runs")

    @hookimpl
    def usher_prepare(self, domain: Domain, host: Host) -> Iterator[Action]:
        for unit in _units(host, self.stop):
            yield KeepUnit(unit, active=False)
        for unit in _units(host, self.start):
            yield KeepUnit(unit, active=True)
        if self.inhibit_sleep:
            yield KeepUnit(SLEEP_UNIT, active=True)

    @hookimpl
    def usher_check(self, domain: Domain, host: Host, plan: Plan) -> Iterator[Problem]:
        if not host.exists("/run/systemd/system"):
            yield Problem("systemd does not run here, so there are no units to start or stop")
            return
        stop = _units(host, self.stop)
        for unit in (u for u in _units(host, self.start) if u in stop):
            yield Problem(f"{unit} is to be both started and stopped")
        for action in plan.actions:
            if isinstance(action, KeepUnit):
                try:
                    state(host, action.unit)
                except UsherError as error:
                    yield Problem(error.message, error.hint)


def _units(host: Host, names: list[str]) -> list[str]:
    """Return each unit once, by its own name: domains may call one unit by two."""
    whole = (name if "." in name else f"{name}.service" for name in names)
    return list(dict.fromkeys(own_name(host, name) for name in whole))
