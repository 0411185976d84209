"""Keep the host from swapping while the domain runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from virt_usher import Action, Domain, Host, Write, hookimpl, option


@dataclass(frozen=True, eq=False)
class Swappiness:
    value: int = option(1, help="vm.swappiness while the domain runs")

    @hookimpl
    def usher_prepare(self, domain: Domain, host: Host) -> Iterator[Action]:
        yield Write("/proc/sys/vm/swappiness", str(self.value), "swappiness")
