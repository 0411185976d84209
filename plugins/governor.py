"""Set the CPU frequency governor while the domain runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from virt_usher import Action, Domain, Host, Note, Plan, Problem, Write, hookimpl, option

# Governors the kernel can load when asked; a driver that sets policies itself has just two.
LOADABLE = ("performance", "powersave", "ondemand", "conservative", "userspace", "schedutil")
MANAGERS = ("power-profiles-daemon", "tuned", "tuned-ppd")


@dataclass(frozen=True, eq=False)
class Plugin:
    governor: str = option("performance", help="governor of the domain's CPUs", harmless=True)
    epp: str = option(
        "auto",
        help="energy_performance_preference; auto is performance along with that governor, keep leaves it",
        harmless=True,
    )

    @hookimpl
    def usher_prepare(self, domain: Domain, host: Host) -> Iterator[Action | Note]:
        policies = host.cpufreq_policies(domain.pinned_cpus or host.online_cpus)
        if not policies:
            yield Note("no cpufreq on this host, or not for these CPUs: left alone")
        for name in MANAGERS if policies else ():
            if host.exists(f"/sys/fs/cgroup/system.slice/{name}.service"):
                yield Note(f"{name} runs, and may set governors again whenever the power profile changes")
        for policy in policies:
            writes = [Write(f"{policy.dir}/scaling_governor", self.governor, f"{policy.name} governor")]
            if (epp := self._epp()) and policy.epp is not None:
                path = f"{policy.dir}/energy_performance_preference"
                writes.append(Write(path, epp, f"{policy.name} preference"))
            # Under 'performance' the kernel refuses any other preference: there the preference comes
            # first and goes back last, elsewhere the governor.
            yield from reversed(writes) if self.governor == "performance" else writes

    @hookimpl
    def usher_check(self, domain: Domain, host: Host, plan: Plan) -> Iterable[Problem]:
        if self.governor == "performance" and self.epp not in ("auto", "keep", "performance"):
            hint = "leave out epp, or choose another governor"
            return [Problem(f"the governor 'performance' allows no preference {self.epp!r}", hint)]
        for policy in host.cpufreq_policies(domain.pinned_cpus or host.online_cpus):
            known = policy.governors if policy.sets_policy_itself else [*policy.governors, *LOADABLE]
            if self.governor not in known:
                hint = f"it has: {', '.join(policy.governors)}"
                return [Problem(f"{policy.name} cannot have the governor {self.governor!r}", hint)]
            epp = self._epp()
            if (
                epp
                and policy.epp is not None
                and policy.epps
                and not epp.isdigit()
                and epp not in policy.epps
            ):
                return [
                    Problem(
                        f"{policy.name} cannot have the preference {epp!r}",
                        f"it has: {', '.join(policy.epps)}",
                    )
                ]
        return []

    def _epp(self) -> str:
        if self.governor == "performance":
            return "performance"  # the kernel sets it by itself, and amd-pstate does not take it back
        return "" if self.epp in ("auto", "keep") else self.epp
