"""The parts of a host that can be kept off CPUs: each a set of named masks, read and written here.

Which mask shall become what is decided in `isolate`. All values are sets of CPUs that may be used.
"""

from __future__ import annotations

import contextlib
import os
import time

from virt_usher import cpulist, systemctl
from virt_usher.errors import UsherError
from virt_usher.host import cgroup, irq, irqbalance

TYPE_CHECKING = False  # importing typing would cost release more than all its work
if TYPE_CHECKING:
    from collections.abc import Collection
    from typing import Any

    from virt_usher.host import Host, LiveHost

    Cpus = frozenset[int]
    Originals = dict[str, list[Any]]

ARRIVAL = 15.0  # seconds from systemd's answer to the kernel's: it has more to do when many units start


def every_cpu(host: Host) -> Cpus:
    """Return all CPUs that this machine can ever have: a mask with all of them confines nothing."""
    return cpulist.parse(host.known("/sys/devices/system/cpu/possible", "0"))


class Masks:
    """The masks of unbound kernel work and of writeback; a name is a path."""

    model = ""  # the mask that new ones begin with
    lags = False  # whether a mask may not show yet what was written

    @classmethod
    def there(cls, host: Host) -> bool:
        """Whether the host has this part, and it can be changed."""
        return bool(cls.paths(host))

    @classmethod
    def paths(cls, host: Host) -> list[str]:
        return irq.masks(host)

    @classmethod
    def look(cls, host: Host) -> dict[str, Cpus]:
        """Return name -> CPUs of now; nothing where the host has no such part.

        OSError where a mask is there and cannot be read.
        """
        found = {}
        for path in cls.paths(host):
            try:
                found[path] = irq.read(host, path)
            except OSError:
                if host.exists(path):  # else an interrupt that was freed since it was listed
                    raise
        return found

    @classmethod
    def away(cls, host: Host, names: Collection[str]) -> dict[str, Cpus]:
        """Return name -> CPUs of those masks that are not there, and would come back as we left them."""
        return {}

    @classmethod
    def settle(cls, host: LiveHost, deadline: float) -> None:
        """Wait for what a killed hook may have left under way."""

    @classmethod
    def originals(cls, host: LiveHost, now: dict[str, Cpus], deadline: float) -> Originals:
        """Return what the undo needs of masks that are met for the first time."""
        return {name: [cpulist.show(cpus)] for name, cpus in now.items()}

    @classmethod
    def write(cls, host: LiveHost, moves: dict[str, Cpus], was: Originals, deadline: float) -> dict[str, str]:
        """Set masks; return those that stay as they were, with the reason."""
        for path, cpus in moves.items():
            host.write(path, irq.spell(path, cpus))
        return {}

    @classmethod
    def takes(cls, host: Host, cpus: Cpus) -> bool:
        """Whether a mask can be these CPUs."""
        return True

    @classmethod
    def tidy(cls, host: LiveHost, was: Originals) -> None:
        """Remove what else we left, after the last domain."""

    @classmethod
    def short(cls, name: str) -> str:
        """Return what people call a mask."""
        return name.removeprefix(f"{irq.WORKQUEUES}/")


class Irqs(Masks):
    """Each interrupt's affinity, and that of interrupts to come."""

    model = irq.DEFAULT

    @classmethod
    def paths(cls, host: Host) -> list[str]:
        return irq.affinities(host)

    @classmethod
    def takes(cls, host: Host, cpus: Cpus) -> bool:
        # Only offline CPUs: EINVAL; the kernel itself moves an interrupt that has no other.
        return bool(cpus & host.online_cpus)

    @classmethod
    def write(cls, host: LiveHost, moves: dict[str, Cpus], was: Originals, deadline: float) -> dict[str, str]:
        stays = {}
        for path, cpus in moves.items():
            try:
                host.write(path, irq.spell(path, cpus))
            except FileNotFoundError:
                continue
            except OSError as error:
                if path == irq.DEFAULT:
                    raise
                # Managed by its driver (EPERM, before 6.3 EIO), a timer, or no vector left there (ENOSPC).
                stays[path] = str(error.strerror)
        return stays

    @classmethod
    def short(cls, name: str) -> str:
        return "default" if name == irq.DEFAULT else name.split("/")[3]


class Irqbalance(Masks):
    """What irqbalance may use, which otherwise moves interrupts back every ten seconds."""

    lags = True

    @classmethod
    def there(cls, host: Host) -> bool:
        return irqbalance.runs(host)

    @classmethod
    def look(cls, host: Host) -> dict[str, Cpus]:
        banned = irqbalance.banned(host)
        return {} if banned is None else {"irqbalance": every_cpu(host) - banned}

    @classmethod
    def write(cls, host: LiveHost, moves: dict[str, Cpus], was: Originals, deadline: float) -> dict[str, str]:
        for name, cpus in moves.items():
            # Back to its settings, not to the list of then: that may be of a domain that had just stopped.
            back = cpulist.show(cpus) == was[name][0]
            irqbalance.ban(host, None if back else every_cpu(host) - cpus)
        return {}


class Units(Masks):
    """The host's top-level units, by way of systemd's AllowedCPUs=; a name is a unit.

    An original is [the property, whether there was a runtime drop-in for it].
    """

    @classmethod
    def there(cls, host: Host) -> bool:
        return not cgroup.unsupported(host)

    @classmethod
    def look(cls, host: Host) -> dict[str, Cpus]:
        every = every_cpu(host)
        return {unit: cgroup.allowed(host, unit, every) for unit in cgroup.units(host)}

    @classmethod
    def away(cls, host: Host, names: Collection[str]) -> dict[str, Cpus]:
        every = every_cpu(host)
        return {u: cgroup.allowed(host, u, every) for u in names if any(map(host.exists, cgroup.drop_ins(u)))}

    @classmethod
    def settle(cls, host: LiveHost, deadline: float) -> None:
        systemctl.settle(host, deadline)

    @classmethod
    def originals(cls, host: LiveHost, now: dict[str, Cpus], deadline: float) -> Originals:
        if not now:
            return {}
        found = {}
        shown = _systemctl(host, ["show", "-p", "Id", "-p", "AllowedCPUs", "--", *now], deadline)
        for block in shown.split("\n\n"):
            told = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
            unit, cpus = told.get("Id", ""), told.get("AllowedCPUs", "").replace(" ", ",")
            had_one = any(map(host.exists, cgroup.drop_ins(unit)))
            if had_one and cpulist.parse(cpus) >= every_cpu(host):
                cpus, had_one = "", False  # left by us while a CPU was offline; it confines nothing
            found[unit] = [cpus, had_one]
        if missing := now.keys() - found.keys():
            raise UsherError(f"systemd does not know {', '.join(missing)}")
        return found

    @classmethod
    def write(cls, host: LiveHost, moves: dict[str, Cpus], was: Originals, deadline: float) -> dict[str, str]:
        every = every_cpu(host)
        for unit in (u for u, cpus in moves.items() if cpus == every):
            _open_up(host, unit, every)
        for unit, cpus in moves.items():
            back = cpus == (cpulist.parse(was[unit][0]) or every)
            text = was[unit][0] if back and (was[unit][0] or _complete(host)) else cpulist.show(cpus)
            try:
                _systemctl(host, ["--runtime", "set-property", "--", unit, f"AllowedCPUs={text}"], deadline)
            except UsherError:
                if was[unit][1] or not _lost(host, unit, deadline):
                    raise
                _remove_drop_ins(host, unit)
        for unit, cpus in moves.items():
            _arrive(host, unit, cpus, deadline)
        return {}

    @classmethod
    def tidy(cls, host: LiveHost, was: Originals) -> None:
        now, every, complete = cls.look(host), every_cpu(host), _complete(host)
        now |= cls.away(host, was.keys() - now.keys())
        for unit, (cpus, had_one) in was.items():
            if complete and not had_one and now.get(unit, every) == (cpulist.parse(cpus) or every):
                # systemd's own idea of it is what it was, and forgets the file at its next reload.
                _remove_drop_ins(host, unit)

    @classmethod
    def short(cls, name: str) -> str:
        return name


def _remove_drop_ins(host: LiveHost, unit: str) -> None:
    for path in map(host.path, cgroup.drop_ins(unit)):
        with contextlib.suppress(OSError):
            os.unlink(path)
            os.rmdir(os.path.dirname(path))


def _lost(host: LiveHost, unit: str, deadline: float) -> bool:
    """Whether a unit does not run and systemd has no file of it, or a masked one: it takes no property."""
    if host.exists(f"{cgroup.CGROUP}/{unit}"):
        return False
    return _systemctl(host, ["show", "-p", "LoadState", "--", unit], deadline) != "LoadState=loaded"


def _open_up(host: LiveHost, unit: str, every: Cpus) -> None:
    """Give a unit's processes every CPU, past systemd, which is told of it next or knows it already.

    A cpuset with processes cannot be emptied (ENOSPC, validate_change() in the kernel), so of an empty
    AllowedCPUs= systemd can only tell its log, unless no other unit needs the controller and it is
    switched off. Then all processes move to the root's cpuset at once, and Linux looks at the first of them
    only (cpuset_attach(); seen on 6.12 and 7.2, not on 6.1): if that one had every CPU already, all others
    keep the CPUs that they had, for ever. So none may be confined by then.
    """
    path = f"{cgroup.CGROUP}/{unit}/cpuset.cpus"
    if cgroup.own(host, unit) not in (every, frozenset()):
        try:
            host.write(path, cpulist.show(every))
        except OSError:
            if host.exists(path):  # else it was switched off just now
                raise


def _complete(host: Host) -> bool:
    """Whether each CPU of the machine is online.

    Else the units keep their cpusets, with all CPUs: Linux gives a process in the root's cpuset no CPU that
    comes back (cpuset_handle_hotplug()), and there it would be.
    """
    return cpulist.parse(host.known("/sys/devices/system/cpu/present")) <= cgroup.effective(host)


def _arrive(host: LiveHost, unit: str, cpus: Cpus, deadline: float) -> None:
    """Wait until the kernel has what systemd was told: it answers first, and writes later."""
    base, every, pause = f"{cgroup.CGROUP}/{unit}", every_cpu(host), 0.002
    deadline = min(deadline, time.monotonic() + ARRIVAL)
    while host.exists(base):
        if cpus == every:
            _open_up(host, unit, every)
        has, wanted = cgroup.effective(host, unit), cpus & cgroup.effective(host)
        if has == wanted:
            return
        if time.monotonic() > deadline:
            raise UsherError(
                f"{unit} may run on CPUs {cpulist.show(has)}, though systemd was told {cpulist.show(wanted)}",
                f"systemctl status {unit}",
            )
        time.sleep(pause)
        pause = min(pause * 2, 0.2)


def _systemctl(host: LiveHost, arguments: list[str], deadline: float) -> str:
    status, output = systemctl.run(host, arguments, deadline)
    if status:
        raise UsherError(f"systemctl {' '.join(arguments)}: {output or f'exit status {status}'}")
    return output


PARTS: dict[str, type[Masks]] = {"units": Units, "irqs": Irqs, "irqbalance": Irqbalance, "workqueues": Masks}
