"""Start or stop systemd units while the domain runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from virt_usher import Action, Domain, Host, KeepUnit, Plan, Problem, UsherError, hookimpl, option
from virt_usher.units import state

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
        for unit in self.stop:
            yield KeepUnit(_whole(unit), active=False)
        for unit in self.start:
            yield KeepUnit(_whole(unit), active=True)
        if self.inhibit_sleep:
            yield KeepUnit(SLEEP_UNIT, active=True)

    @hookimpl
    def usher_check(self, domain: Domain, host: Host, plan: Plan) -> Iterator[Problem]:
        if not host.exists("/run/systemd/system"):
            yield Problem("systemd does not run here, so there are no units to start or stop")
            return
        both = {_whole(u) for u in self.start} & {_whole(u) for u in self.stop}
        for unit in sorted(both):
            yield Problem(f"{unit} is to be both started and stopped")
        for action in plan.actions:
            if isinstance(action, KeepUnit):
                try:
                    state(host, action.unit)
                except UsherError as error:
                    yield Problem(error.message, error.hint)


def _whole(unit: str) -> str:
    return unit if "." in unit else f"{unit}.service"
