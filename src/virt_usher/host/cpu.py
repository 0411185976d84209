"""CPU frequency policies: the unit the kernel scales by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from virt_usher import cpulist

if TYPE_CHECKING:
    from virt_usher.host import Host

CPUFREQ = "/sys/devices/system/cpu/cpufreq"


@dataclass(frozen=True)
class CpufreqPolicy:
    """One cpufreq policy: the CPUs that change their frequency together."""

    host: Host
    name: str

    @property
    def dir(self) -> str:
        """The policy's directory in sysfs."""
        return f"{CPUFREQ}/{self.name}"

    @property
    def cpus(self) -> frozenset[int]:
        """The policy's CPUs that are online (affected_cpus)."""
        return cpulist.parse(self.host.get(f"{self.dir}/affected_cpus").replace(" ", ","))

    @property
    def governor(self) -> str:
        """The governor of now."""
        return self.host.get(f"{self.dir}/scaling_governor")

    @property
    def governors(self) -> list[str]:
        """The governors that can be chosen without loading a module."""
        return self.host.get(f"{self.dir}/scaling_available_governors").split()

    @property
    def sets_policy_itself(self) -> bool:
        """Whether the driver has governors of its own: just performance and powersave.

        intel_pstate and amd-pstate in active mode; no module can add a governor to those.
        """
        return sorted(self.governors) == ["performance", "powersave"]

    @property
    def epp(self) -> str | None:
        """The energy-performance preference, None where the driver has none."""
        path = f"{self.dir}/energy_performance_preference"
        return self.host.get(path) if self.host.exists(path) else None

    @property
    def epps(self) -> list[str]:
        """The preferences that can be chosen by name."""
        return self.host.get(f"{self.dir}/energy_performance_available_preferences").split()


def policies(host: Host, cpus: frozenset[int]) -> list[CpufreqPolicy]:
    """Return the policies with one of these CPUs online, by number.

    A policy whose CPUs are all offline answers EBUSY to reads and writes alike, so it is left out.
    """
    names = [n for n in host.entries(CPUFREQ) if n.startswith("policy")]
    found = [CpufreqPolicy(host, n) for n in sorted(names, key=lambda n: int(n[6:]))]
    return [p for p in found if p.cpus & cpus]
