"""Keep the host off the CPUs that the domain is pinned to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from virt_usher import Action, Domain, Host, Note, Plan, Problem, hookimpl, option
from virt_usher.actions import Isolate
from virt_usher.cpulist import parse, show
from virt_usher.errors import typed
from virt_usher.host import cgroup
from virt_usher.host.topology import Topology
from virt_usher.isolate import claims
from virt_usher.masks import PARTS, every_cpu

ORDER = ("irqbalance", "irqs", "workqueues", "units")
THREADS = ("vcpu", "iothread", "emulator")


@dataclass(frozen=True, eq=False)
class Plugin:
    cpus: str = option("", help="CPUs to isolate, as 2-5,8; if not given, those of pins", check=parse)
    pins: tuple[str, ...] = option(("vcpu",), help="whose pins count", choices=THREADS)
    whole_cores: bool = option(True, help="isolate all threads of a core, also where only one is pinned to")
    keep: str = option("", help="CPUs that the host keeps in any case, or its first core", check=parse)
    share: bool = option(False, help="start even if another domain isolates one of the same CPUs")
    units: bool = option(True, help="confine the host's slices to the other CPUs (AllowedCPUs=)")
    irqs: bool = option(True, help="move interrupts away, where their drivers let them")
    irqbalance: bool = option(True, help="tell irqbalance to leave these CPUs out")
    workqueues: bool = option(True, help="keep unbound work of the kernel, and writeback, away")

    @hookimpl
    def usher_prepare(self, domain: Domain, host: Host) -> Iterator[Action | Note]:
        cpus, spare = self._isolated(domain, host), _with_guests(domain, host)
        for part in ORDER if cpus else ():
            if getattr(self, part) and PARTS[part].there(host):
                yield Isolate(part, cpus, spare, self.share)
        if cpus and self.units and (names := cgroup.strangers(host)):
            yield Note(f"not systemd's, so not confined: {', '.join(names)}")
        if cpus and not domain.pins("emulator"):
            yield Note("no <emulatorpin>: QEMU's own threads may run on isolated CPUs too")

    def _isolated(self, domain: Domain, host: Host) -> frozenset[int]:
        pinned = (domain.pins(kind) for kind in self.pins)
        cpus = parse(self.cpus) if self.cpus else frozenset[int]().union(*pinned)
        return Topology(host).whole_cores(cpus) if self.whole_cores else cpus

    @hookimpl
    def usher_check(self, domain: Domain, host: Host, plan: Plan) -> Iterator[Problem]:
        cpus, topology = self._isolated(domain, host), Topology(host)
        name = typed(domain.name)
        propose, enable = f"virt-usher pins {name}", f"virt-usher enable {name} cpu_isolation"
        pinned = frozenset[int]().union(*map(domain.pins, THREADS))
        if self.units and (why := cgroup.unsupported(host)):
            yield Problem(why, f"do without it: {enable} units=false")
        if not cpus:
            yield Problem("the domain is pinned to no CPUs, and none are named", propose)
        for names, what in ((pinned - cpus, "pinned to"), (cpus, "to be alone on")):
            if missing := names - topology.online:
                why = "is offline" if missing <= topology.present else "this machine does not have"
                yield Problem(f"the domain is {what} CPU {show(missing)}, which {why}", propose)
        others = {other: theirs for other, theirs in claims(host).items() if other != domain.name}
        for other, theirs in others.items():
            if (both := theirs & (cpus | pinned)) and not self.share:
                hint = f"pin elsewhere, or: {enable} share=true"
                yield Problem(f"CPU {show(both)} is isolated for the domain {other!r}", hint)
        keep = parse(self.keep) if self.keep else topology.first_core
        if missing := keep - topology.online:
            yield Problem(f"the host keeps CPU {show(missing)}, which is not online", "virt-usher cpus")
        if cpus & keep:
            hint = f"{propose} proposes whole cores; virt-usher cpus shows them; or set keep"
            yield Problem(f"the host keeps CPU {show(keep)}, and would lose {show(cpus & keep)}", hint)
        isolated = cpus.union(*others.values())
        confined = set(cgroup.units(host)) - _with_guests(domain, host) if cpus and self.units else set()
        for unit in sorted(confined):
            allowed = cgroup.allowed(host, unit, every_cpu(host))
            if not (allowed - isolated) & topology.online:
                hint = f"systemctl set-property {unit} AllowedCPUs={show(topology.online - isolated)}"
                yield Problem(f"{unit} may use CPU {show(allowed)} only, and all would be isolated", hint)
        unit = cgroup.slice_of(domain.partition)
        if outside := pinned & topology.online - cgroup.effective(host, unit):
            # libvirt would fail with "cannot set CPU affinity on process …: Invalid argument".
            hint = f"systemctl show -p AllowedCPUs {unit}"
            yield Problem(f"the domain is pinned to CPU {show(outside)}, where {unit} may not run", hint)


def _with_guests(domain: Domain, host: Host) -> frozenset[str]:
    """Return the top-level slices that this domain and those that run are in."""
    return cgroup.machines(host) | {cgroup.slice_of(domain.partition)}
