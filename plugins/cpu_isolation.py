"""Keep the host off the CPUs that the domain is pinned to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from virt_usher import Action, Domain, Host, Note, Plan, Problem, hookimpl, option
from virt_usher.actions import Isolate
from virt_usher.cpulist import parse, show
from virt_usher.host import cgroup
from virt_usher.host.topology import Topology
from virt_usher.isolate import claims
from virt_usher.masks import PARTS, every_cpu

ORDER = ("irqbalance", "irqs", "workqueues", "units")
THREADS = ("vcpu", "iothread", "emulator")


@dataclass(frozen=True, eq=False)
class Plugin:
    cpus: str = option("", help="CPUs to isolate, as 2-5,8; if not given, those the domain is pinned to")
    pins: tuple[str, ...] = option(("vcpu",), help="whose pins count: vcpu, iothread, emulator")
    whole_cores: bool = option(True, help="isolate all threads of a core, also where only one is pinned to")
    keep: str = option("", help="CPUs that the host keeps in any case; if not given, its first core")
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
        pinned = frozenset[int]().union(*map(domain.pins, THREADS))
        if wrong := [p for p in self.pins if p not in THREADS]:
            yield Problem(f"no threads are called {', '.join(wrong)}", f"pins may name {', '.join(THREADS)}")
        if self.units and (why := cgroup.unsupported(host)):
            yield Problem(why, f"virt-usher enable '{domain.name}' cpu_isolation units=false does without")
        if not cpus:
            yield Problem("the domain is pinned to no CPUs, and none are named", "see: virt-usher pins")
        for names, what in ((pinned - cpus, "pinned to"), (cpus, "to be alone on")):
            if missing := names - topology.online:
                why = "is offline" if missing <= topology.present else "this machine does not have"
                yield Problem(f"the domain is {what} CPU {show(missing)}, which {why}", "lscpu --extended")
        others = {name: theirs for name, theirs in claims(host).items() if name != domain.name}
        for name, theirs in others.items():
            if (both := theirs & (cpus | pinned)) and not self.share:
                hint = f"pin elsewhere, or: virt-usher enable '{domain.name}' cpu_isolation share=true"
                yield Problem(f"CPU {show(both)} is isolated for the domain {name!r}", hint)
        keep = parse(self.keep) if self.keep else topology.first_core
        if missing := keep - topology.online:
            yield Problem(f"the host keeps CPU {show(missing)}, which is not online", "lscpu --extended")
        if cpus & keep:
            hint = "pin whole cores to other CPUs, or set keep; virt-usher cpus shows the cores"
            yield Problem(f"the host keeps CPU {show(keep)}, and would lose {show(cpus & keep)}", hint)
        isolated = cpus.union(*others.values())
        confined = set(cgroup.units(host)) - _with_guests(domain, host) if cpus and self.units else set()
        for unit in sorted(confined):
            allowed = cgroup.allowed(host, unit) or every_cpu(host)
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
