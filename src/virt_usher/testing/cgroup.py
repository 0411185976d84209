"""Topology, interrupts, workqueues, cpusets and systemd, as far as isolation sees them.

    host = CpuHost(tmp_path).cores([0, 1], [2, 3]).systemd().irq(24, "0-3").workqueues()

systemd switches the cpuset controller off when no unit needs it any more. A guest does (libvirt's scopes are
delegated all controllers): as long as there is one, a cpuset cannot be emptied. Processes of a unit that is
still confined when the controller goes may keep what they had (cpuset_attach() in Linux): cpuset.stuck.
"""

from __future__ import annotations

import errno
import os
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from virt_usher import cpulist
from virt_usher.host import cgroup, irq, topology
from virt_usher.testing.fake import FakeHost
from virt_usher.testing.tree import Tree

_IRQ = re.compile(r"/proc/irq/(\d+)/smp_affinity_list")
_CPUSET = re.compile(rf"{cgroup.CGROUP}/([^/]+)/cpuset\.cpus")
_EFFECTIVE = re.compile(rf"{cgroup.CGROUP}/(?:([^/]+)/)?cpuset\.cpus\.effective")
_UNITS = ("init.scope", "system.slice", "user.slice", "machine.slice")

# systemd's side: a property in memory for each unit (.kernel/units), a drop-in, the cgroup.
_SYSTEMCTL = """#!/bin/sh
root=${0%/usr/bin/systemctl} units=${0%/usr/bin/systemctl}/.kernel/units
cgroups=$root/sys/fs/cgroup
echo "$*" >>"$units/.calls"
with() { IFS=$1; shift; echo "$*"; IFS=' '; }
has() { value=; [ ! -e "$units/$1" ] || read -r value <"$units/$1" || :; }
realize() {
    has "$1"
    [ -d "$cgroups/$1" ] || return 0
    if [ -n "$value" ]; then
        for other in "$cgroups"/*/; do
            [ -e "${other}cpuset.cpus" ] || { : >"${other}cpuset.cpus"; : >"${other}cpuset.cpus.effective"; }
        done
        echo "$value" >"$cgroups/$1/cpuset.cpus"
        return
    fi
    [ ! -e "$units/.guests" ] || return 0 # ENOSPC, and a line in the log
    for other in "$units"/*; do
        read -r value <"$other" || :
        [ -z "$value" ] || return 0
    done
    read -r every <"$root/sys/devices/system/cpu/possible"
    for other in "$cgroups"/*/; do
        value=
        [ ! -e "${other}cpuset.cpus" ] || read -r value <"${other}cpuset.cpus" || :
        [ -z "$value" ] || [ "$value" = "$every" ] || echo "$value" >"${other}cpuset.stuck"
    done
    rm -f "$cgroups"/*/cpuset.cpus "$cgroups"/*/cpuset.cpus.effective
}
drop_in() {
    folder=$root/run/systemd/system.control/$1.d
    [ "$1" != init.scope ] || folder=$root/run/systemd/transient/$1.d
}
case $1 in
    show)
        case $* in *LoadState*)
            for unit; do :; done
            if [ -e "$units/.lost.$unit" ]; then echo LoadState=not-found; else echo LoadState=loaded; fi
            exit ;;
        esac
        while [ "$1" != -- ]; do shift; done
        shift
        for unit; do
            has "$unit"
            IFS=,; set -f; set -- $value; IFS=' '
            printf 'AllowedCPUs=%s\\nId=%s\\n\\n' "$*" "$unit"
        done ;;
    --runtime)
        unit=$4 value=${5#AllowedCPUs=}
        [ ! -e "$units/.slow" ] || sleep 1
        if [ -e "$units/.lost.$unit" ]; then echo "Failed: Unit $unit not found."; exit 1; fi
        if [ -e "$units/.refuses" ]; then echo "Failed to set unit properties"; exit 1; fi
        drop_in "$unit"
        mkdir -p "$folder"
        printf '[Slice]\\nAllowedCPUs=\\n' >"$folder/50-AllowedCPUs.conf"
        [ -z "$value" ] || echo "AllowedCPUs=$value" >>"$folder/50-AllowedCPUs.conf"
        echo "$value" >"$units/$unit"
        [ -e "$units/.ignores" ] || realize "$unit" ;;
    daemon-reload)
        for unit in "$cgroups"/*/; do
            unit=${unit%/} unit=${unit##*/}
            drop_in "$unit"
            value=
            for file in "$root/etc/systemd/system/$unit.d/cpus.conf" "$folder/50-AllowedCPUs.conf"; do
                [ ! -e "$file" ] || while read -r line; do
                    case $line in AllowedCPUs=*) value=${line#AllowedCPUs=} ;; esac
                done <"$file"
            done
            echo "$value" >"$units/$unit"
            realize "$unit"
        done ;;
esac
"""


class CgroupKernel(Tree):
    """Masks of CPUs with the kernel's answers, and a systemctl."""

    # -- building

    def cores(self, *cores: Iterable[int], nodes: int = 1, caches: int = 1) -> Self:
        """Add the machine's CPUs core by core; nodes and last-level caches get equal shares of the cores."""
        sets = [frozenset(c) for c in cores]
        every = frozenset[int]().union(*sets)
        for name in ("online", "present", "possible"):
            self.file(f"{topology.CPUS}/{name}", cpulist.show(every), 0o444)
        for kind, count in (("node", nodes), ("cache", caches)):
            share = -(-len(sets) // count)
            for i in range(count):
                group = frozenset[int]().union(*sets[i * share : (i + 1) * share])
                if kind == "node":
                    self.file(f"{topology.NODES}/node{i}/cpulist", cpulist.show(group), 0o444)
                for cpu in group if kind == "cache" else ():
                    base = f"{topology.CPUS}/cpu{cpu}/cache/index3"
                    self.file(f"{base}/level", "3", 0o444)
                    self.file(f"{base}/shared_cpu_list", cpulist.show(group), 0o444)
        for core in sets:
            for cpu in core:
                base = f"{topology.CPUS}/cpu{cpu}/topology"
                self.file(f"{base}/thread_siblings_list", cpulist.show(core), 0o444)
                self.file(f"{base}/physical_package_id", "0", 0o444)
        return self

    def systemd(self, guests: bool = False, **allowed: str) -> Self:
        """Add systemd with its usual top-level units; custom="0-3" is a slice the admin keeps to those.

        `guests`: there is always one that needs the cpuset controller.
        """
        self.file("/run/systemd/system/.keep").file("/usr/bin/systemctl", _SYSTEMCTL, 0o755)
        self.file("/.kernel/units/.calls")
        if guests:
            self.file("/.kernel/units/.guests")
        self.file(f"{cgroup.CGROUP}/cgroup.controllers", "cpuset cpu io memory pids", 0o444)
        self.file(f"{cgroup.CGROUP}/cpuset.cpus.effective", "", 0o444)
        for unit in _UNITS:
            self.unit(unit)
        for name, cpus in allowed.items():
            unit = f"{name}.slice"
            self.unit(unit).file(f"/etc/systemd/system/{unit}.d/cpus.conf", f"[Slice]\nAllowedCPUs={cpus}")
        return self.systemctl("daemon-reload") if allowed else self

    def unit(self, name: str, populated: bool = True) -> Self:
        """Add a top-level cgroup."""
        base = f"{cgroup.CGROUP}/{name}"
        self.file(f"{base}/cgroup.events", f"populated {populated:d}\nfrozen 0", 0o444)
        if self.exists(f"{cgroup.CGROUP}/system.slice/cpuset.cpus"):
            self.file(f"{base}/cpuset.cpus").file(f"{base}/cpuset.cpus.effective")
        return self

    def irq(self, number: int, cpus: str, managed: bool = False, answer: int = errno.EPERM) -> Self:
        """Add an interrupt; one that its driver manages cannot be moved (EIO before Linux 6.3)."""
        if managed:
            self.hide(f"managed.{number}", str(answer))
        if not self.exists(irq.DEFAULT):
            self.file(irq.DEFAULT, irq.mask(self._online()))
        return self.file(f"{irq.IRQS}/{number}/smp_affinity_list", cpus)

    def workqueues(self) -> Self:
        """Add the masks of unbound work."""
        for path in (f"{irq.WORKQUEUES}/cpumask", f"{irq.WORKQUEUES}/writeback/cpumask"):
            self.file(path, irq.mask(self._online()))
        return self.file(f"{irq.WORKQUEUES}/cpumask_requested", irq.mask(self._online()), 0o444)

    # -- what others do

    def systemctl(self, *arguments: str) -> Self:
        """Run systemctl as the admin would."""
        program = self.path("/usr/bin/systemctl")
        subprocess.run([program, *arguments], check=True, stdout=subprocess.DEVNULL)
        return self

    def systemctl_calls(self, word: str = "") -> list[str]:
        """Return the command lines of systemctl with a word in them."""
        return [c for c in Path(self.path("/.kernel/units/.calls")).read_text().splitlines() if word in c]

    def property(self, unit: str) -> str:
        """Return a unit's AllowedCPUs= as systemd has it in memory."""
        file = Path(self.path(f"/.kernel/units/{unit}"))
        return file.read_text().strip() if file.exists() else ""

    def set_online(self, cpu: int, online: bool) -> None:
        """Take a CPU offline or online; an interrupt that could only go there may then go everywhere."""
        with self.step():
            now = self._online() | {cpu} if online else self._online() - {cpu}
            self.put(f"{topology.CPUS}/online", cpulist.show(now))
            for path in self._groups():  # who shares a core, a cache or a node: of those online
                known = f"whole{path.replace('/', '.')}"
                if not self.hidden(known):
                    self.hide(known, self.read(path))
                self.put(path, cpulist.show(cpulist.parse(self.hidden(known)) & now))
            for number in self.entries(irq.IRQS):
                path = f"{irq.IRQS}/{number}/smp_affinity_list"
                if self.exists(path) and not cpulist.parse(self.read(path)) & now:
                    self.put(path, cpulist.show(now))

    # -- the kernel

    def load(self, path: str) -> None:
        if m := _EFFECTIVE.fullmatch(path):
            self._compute(m[1])
        super().load(path)

    def store(self, path: str, value: str) -> None:
        if m := _IRQ.fullmatch(path):
            if answer := self.hidden(f"managed.{m[1]}"):
                raise OSError(int(answer), os.strerror(int(answer)))
            self._set_mask(path, cpulist.parse(value), value)
        elif path == irq.DEFAULT:
            self._set_mask(path, irq.unmask(value.strip()), value)
        elif path.startswith(irq.WORKQUEUES):
            with self.step():
                self._set_mask(path, irq.unmask(value.strip()), value)
                if path == f"{irq.WORKQUEUES}/cpumask":
                    self.put(f"{path}_requested", value)
        elif m := _CPUSET.fullmatch(path):
            cpus = cpulist.parse(value)
            if not cpus and self.read(path) and cgroup.populated(self, m[1]):
                raise OSError(errno.ENOSPC, "a cpuset with processes cannot be emptied")
            if not cpus <= cpulist.parse(self.read(f"{topology.CPUS}/possible")):
                raise OSError(errno.EINVAL, "no such CPU")
            with self.step():
                self.put(path, cpulist.show(cpus))
        else:
            super().store(path, value)

    def snapshot(self) -> dict[str, str]:
        for name in ("", *self.entries(cgroup.CGROUP)):
            if self.exists(f"{cgroup.CGROUP}/{name}/cpuset.cpus.effective"):
                self._compute(name)
        return super().snapshot()

    def _set_mask(self, path: str, cpus: frozenset[int], value: str) -> None:
        if not cpus & self._online():
            raise OSError(errno.EINVAL, f"no CPU of {value!r} is online")
        with self.step():
            self.put(path, cpulist.show(cpus) if path.endswith("_list") else irq.mask(cpus))

    def _compute(self, name: str | None) -> None:
        """Bring an effective set up to date; where nothing asked for can be had, it is the parent's."""
        base = f"{cgroup.CGROUP}/{name}" if name else cgroup.CGROUP
        online = self._online()
        own = cpulist.parse(self.get(f"{base}/cpuset.cpus")) if name else online
        text = cpulist.show(own & online or online)
        if Path(self.path(f"{base}/cpuset.cpus.effective")).read_text() != text + "\n":
            with self.step():
                self.put(f"{base}/cpuset.cpus.effective", text)

    def _groups(self) -> list[str]:
        """Return the files that say which CPUs belong together."""
        cpus = [f"{topology.CPUS}/{n}" for n in self.entries(topology.CPUS) if n[3:].isdigit()]
        nodes = [f"{topology.NODES}/{n}/cpulist" for n in self.entries(topology.NODES) if n[4:].isdigit()]
        inside = ("topology/thread_siblings_list", "cache/index3/shared_cpu_list")
        return [f for f in (*nodes, *(f"{c}/{i}" for c in cpus for i in inside)) if self.exists(f)]

    def _online(self) -> frozenset[int]:
        return cpulist.parse(self.get(f"{topology.CPUS}/online"))


class CpuHost(CgroupKernel, FakeHost):
    """A fake host whose CPUs can be isolated."""
