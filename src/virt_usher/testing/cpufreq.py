"""CPUs and their cpufreq policies, as drivers/cpufreq keeps them."""

from __future__ import annotations

import errno
import re
from typing import TYPE_CHECKING, Self

from virt_usher import cpulist
from virt_usher.host.cpu import CPUFREQ
from virt_usher.testing.tree import Tree

if TYPE_CHECKING:
    from collections.abc import Iterable

CLASSIC = ("performance", "schedutil")
OWN = ("performance", "powersave")  # drivers that set policies themselves have just these two
LOADABLE = ("ondemand", "conservative", "userspace", "powersave")  # modules on the fake's disk
PREFERENCES = ("default", "performance", "balance_performance", "balance_power", "power")
_NUMBERS = {0: "performance", 128: "balance_performance", 192: "balance_power", 255: "power"}
_CPUS = "/sys/devices/system/cpu"
_FILE = re.compile(rf"({CPUFREQ}/policy\d+)/(\w+)")


class CpufreqKernel(Tree):
    """CPUs, and the governor and preference of each policy."""

    # -- building

    def cpus(self, count: int) -> Self:
        """Add CPUs 0 to count - 1, all online."""
        for name in ("online", "present", "possible"):
            self.file(f"{_CPUS}/{name}", cpulist.show(range(count)), 0o444)
        return self

    def policy(
        self,
        number: int,
        cpus: Iterable[int],
        governor: str = "schedutil",
        driver: str = "acpi-cpufreq",
        epp: str = "",
        governors: Iterable[str] = (),
    ) -> Self:
        """Add a cpufreq policy.

        `driver`: acpi-cpufreq (and others with the kernel's governors), intel_pstate or amd-pstate-epp. The
        latter two have an energy-performance preference: `epp`, balance_performance where not given.
        """
        base, members = f"{CPUFREQ}/policy{number}", sorted(cpus)
        own = driver in ("intel_pstate", "amd-pstate-epp")
        numbers = " ".join(map(str, members))
        self.file(f"{base}/affected_cpus", numbers, 0o444)
        self.file(f"{base}/related_cpus", numbers, 0o444)
        self.file(f"{base}/scaling_driver", driver, 0o444)
        listed = tuple(governors) or (OWN if own else CLASSIC)
        self.file(f"{base}/scaling_available_governors", " ".join(listed), 0o444)
        self.file(f"{base}/scaling_governor", "powersave" if own and governor == "schedutil" else governor)
        self.file(f"{base}/scaling_min_freq", "800000")
        self.file(f"{base}/scaling_max_freq", "3200000")
        if own:
            usual = "performance" if governor == "performance" else "balance_performance"
            self.file(f"{base}/energy_performance_preference", epp or usual)
            self.file(f"{base}/energy_performance_available_preferences", " ".join(PREFERENCES), 0o444)
        if not self.exists(f"{_CPUS}/online"):
            self.cpus(0)
        known = cpulist.parse(self.read(f"{_CPUS}/online")) | set(members)
        return self.cpus(max(known) + 1)

    # -- what others do

    def set_online(self, cpu: int, online: bool) -> None:
        """Take a CPU offline or online; a policy with none online answers EBUSY to all."""
        with self.step():
            now = cpulist.parse(self.read(f"{_CPUS}/online"))
            now = now | {cpu} if online else now - {cpu}
            self.put(f"{_CPUS}/online", cpulist.show(now))
            for name in self.entries(CPUFREQ):
                related = self.read(f"{CPUFREQ}/{name}/related_cpus").split()
                self.put(f"{CPUFREQ}/{name}/affected_cpus", " ".join(c for c in related if int(c) in now))

    # -- the kernel

    def load(self, path: str) -> None:
        if m := _FILE.fullmatch(path):
            self._must_be_active(m[1])
        super().load(path)

    def store(self, path: str, value: str) -> None:
        m = _FILE.fullmatch(path)
        if not m:
            super().store(path, value)
            return
        self._must_be_active(m[1])
        with self.step():
            if m[2] == "scaling_governor":
                self._govern(m[1], value.strip())
            elif m[2] == "energy_performance_preference":
                self._prefer(m[1], value.strip())
            else:
                super().store(path, value)

    def _must_be_active(self, policy: str) -> None:
        with self.step():
            if not self.read(f"{policy}/affected_cpus"):
                raise OSError(errno.EBUSY, "all CPUs of this policy are offline")

    def _govern(self, policy: str, governor: str) -> None:
        driver = self.read(f"{policy}/scaling_driver")
        known = self.read(f"{policy}/scaling_available_governors").split()
        if governor not in known:
            if driver in ("intel_pstate", "amd-pstate-epp") or governor not in LOADABLE:
                raise OSError(errno.EINVAL, f"no governor {governor!r}")
            for name in self.entries(CPUFREQ):  # request_module(): all policies have it from now on
                listed = f"{CPUFREQ}/{name}/scaling_available_governors"
                if governor not in self.read(listed).split():
                    self.put(listed, f"{self.read(listed)} {governor}")
        before = self.read(f"{policy}/scaling_governor")
        self.put(f"{policy}/scaling_governor", governor)
        if before == governor or not self.exists(f"{policy}/energy_performance_preference"):
            return
        epp, saved = f"{policy}/energy_performance_preference", f"{policy.rsplit('/', 1)[1]}.epp"
        if governor == "performance":
            self.hide(saved, self.read(epp))
            self.put(epp, "performance")
        elif before == "performance" and driver == "intel_pstate":
            # intel_pstate remembers; amd-pstate-epp leaves the preference where it was put.
            self.put(epp, self.hidden(saved) or self.read(epp))

    def _prefer(self, policy: str, value: str) -> None:
        if value.isdigit() and int(value) < 256:
            value = _NUMBERS.get(int(value), str(int(value)))
        elif value not in PREFERENCES:
            raise OSError(errno.EINVAL, f"no preference {value!r}")
        if value != "performance" and self.read(f"{policy}/scaling_governor") == "performance":
            raise OSError(errno.EBUSY, "the governor performance allows no other preference")
        self.put(f"{policy}/energy_performance_preference", value)
