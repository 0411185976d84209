"""All shipped plugins: for each a domain with something to do, on one host that has everything.

A new plugin needs a row here (a test says so), and its part of the kernel as a mixin of WholeHost.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from virt_usher.testing import domain_xml
from virt_usher.testing.cgroup import CgroupKernel
from virt_usher.testing.modules import ModuleHost

NIC, GPU = "0000:01:00.0", "0000:02:00.0"
SCRIPTS = "/etc/libvirt/hooks/qemu.d"
SYSTEMCTL = "/usr/bin/systemctl"
TOOLS = ("/sbin/modprobe", "/sbin/rmmod")
KNOBS = ("/proc/sys/vm/stat_interval", "/sys/kernel/mm/transparent_hugepage/enabled")
# What may vanish while a domain runs: a freed interrupt, an unplugged device, a value of an unloaded module.
_MORTAL = re.compile("/sys/bus/pci/devices/([^/]+)|/proc/irq/[0-9]+(?=/)|" + "|".join(KNOBS))
# Units that have a state; of CPUs the kernel part's own systemctl knows, which lies beside.
_SYSTEMCTL = """#!/bin/sh
states=${0%/usr/bin/systemctl}/.kernel/states
for unit; do :; done
become() { echo "$1" >"$states/.new.$$"; mv "$states/.new.$$" "$states/$unit"; exit; }
case "$*" in
    is-system-running) echo running; exit ;;
    reset-failed*) exit ;;
    "--no-block start"*) become active ;;
    "--no-block stop"*) become inactive ;;
    *LoadState*) echo LoadState=loaded; echo "ActiveState=$(cat "$states/$unit")"; exit ;;
esac
. "$0.cpus"
"""
_SCRIPT = """#!/bin/sh
states=${0%%/etc/libvirt/*}/.kernel/states
echo %s >"$states/.new.$$" && mv "$states/.new.$$" "$states/script"
"""
_TROUBLE = """#!/bin/sh
real() { %s "$0.real" "$@"; }
root=%s
if [ -e "$root/.kernel/trouble" ]; then
    printf x >>"$root/.kernel/children"
    if [ "$(wc -c <"$root/.kernel/children")" -eq %d ]; then
        %s
    fi
fi
real "$@"
"""
_TROUBLES = {
    "fails": "echo no luck; exit 7",
    "hangs": 'while [ -e "$root/.kernel/trouble" ]; do sleep 0.05; done',
    # It goes on alone, and is to be seen in /proc until it ends.
    "kills first": """trap 'rm -rf "$root/proc/$$"' EXIT
        mkdir "$root/proc/$$"
        printf '%s\\0' "$0" "$@" >"$root/proc/$$/cmdline"
        echo "${0##*/}" >"$root/proc/$$/comm"
        kill -KILL $PPID""",
    "kills last": '( real "$@" ); kill -KILL $PPID; exit',
}


class WholeHost(CgroupKernel, ModuleHost):
    """The fake host with all parts of the kernel that there are, furnished for every plugin."""

    def snapshot(self) -> dict[str, str]:
        """Add the states of units, and what the scripts did; a cpuset of all CPUs is as good as none."""
        states = Path(self.path("/.kernel/states"))
        shown = super().snapshot() | {f"state of {p.name}": p.read_text() for p in states.glob("[!.]*")}
        return {p: t for p, t in shown.items() if "/cpuset." not in p or t.split()[1:] not in ([], ["0-7"])}

    vanish_at = 0

    def read(self, path: str) -> str:
        self._vanish(path)
        return super().read(path)

    def write(self, path: str, value: str) -> None:
        self._vanish(path)
        super().write(path, value)

    def _vanish(self, path: str) -> None:
        """At the nth access to something that can go, let it go for good, and all that belongs to it."""
        m = _MORTAL.match(path) if self.vanish_at > 0 and self._pending is None else None
        if m is None or not self.exists(m[0]):
            return
        self.vanish_at -= 1
        if self.vanish_at == 0:
            Path(self.path("/.kernel/gone")).write_text(m[1] or m[0])
            if m[1]:
                self.unplug(m[1])
            elif os.path.isdir(self.path(m[0])):
                shutil.rmtree(self.path(m[0]))
            else:
                os.unlink(self.path(m[0]))

    def trouble(self, nth: int, how: str) -> None:
        """Let the nth program that is started fail, hang until `settle`, or kill the hook."""
        self.file("/.kernel/trouble").file("/.kernel/children")
        for program in (SYSTEMCTL, *TOOLS, *self._scripts()):
            real = Path(self.path(program))
            os.rename(real, f"{real}.real")
            if program not in TOOLS:
                os.chmod(f"{real}.real", 0o644)  # or it would be one more script
            call = "" if program in TOOLS else "."
            self.file(program, _TROUBLE % (call, self.root, nth, _TROUBLES[how]), 0o755)

    def settle(self) -> None:
        """Let programs do what they are for."""
        os.unlink(self.path("/.kernel/trouble"))

    def children(self) -> int:
        """Return how many programs were started since `trouble`."""
        return len(Path(self.path("/.kernel/children")).read_text())

    def _scripts(self) -> list[str]:
        return [str(p)[len(self.root) :] for p in sorted(Path(self.path(f"{SCRIPTS}/guest")).glob("*/*/*"))]


def furnish(root: Path) -> WholeHost:
    """Build the host: two nodes, four cores, two policies, a card, units, scripts for `guest` and `other`."""
    host = WholeHost(root)
    host.node(0, free_kib=1 << 20).node(1, free_kib=1 << 20, pages={2048: 3}).hugetlbfs()
    for first in (0, 2):
        host.policy(first, cpus=[first, first + 1, first + 4, first + 5], driver="intel_pstate")
    host.cores([0, 4], [1, 5], [2, 6], [3, 7]).systemd().workqueues()
    host.irq(1, "0-7").irq(2, "2", managed=True)
    for name in ("vfio-pci", "e1000e"):
        host.driver(name, ["8086:10d3"] if name == "e1000e" else [])
    host.device(NIC, "8086:10d3", "e1000e", under="0000:00:01.0", reset="", reset_method="flr")
    host.driver("nvidia", ["10de:13c2"]).driver("i915")
    host.device(GPU, "10de:13c2", "nvidia", kind="030000", under="0000:00:02.0", reset="", reset_method="flr")
    host.device("0000:00:03.0", "8086:0152", "i915", kind="030000", group=9)
    host.framebuffer(GPU, "fb0").framebuffer("0000:00:03.0", "fb1")
    host.module("nvidia", "nvidia").module("nvidia_drm", uses=["nvidia"])
    host.file(KNOBS[0], "1").file(KNOBS[1], "madvise")
    host.file(f"{SYSTEMCTL}.cpus", Path(host.path(SYSTEMCTL)).read_text(), 0o755)
    host.file(SYSTEMCTL, _SYSTEMCTL, 0o755)
    for name, state in {"smb.service": "inactive", "greeter.service": "active", "script": "off"}.items():
        host.file(f"/.kernel/states/{name}", state)
    for operation, state in {"prepare/begin": "on", "started/begin": "run", "release/end": "off"}.items():
        host.file(f"{SCRIPTS}/guest/{operation}/10", _SCRIPT % state, 0o755)
    return host


@dataclass(frozen=True)
class Row:
    """One kind of domain: its options as TOML, and what is in its XML."""

    toml: str
    body: str = ""
    hugepages: bool | str = False
    memory_kib: int = 8 << 10

    def host(self, root: Path, name: str = "guest") -> WholeHost:
        """Return a fresh host on which a domain is configured like this."""
        host = furnish(root)
        if "reset_check" not in self.toml:
            host.config("[plugins.reset_check]\nenabled = false\n")
        return host.domain(name, self.toml)

    def xml(self, name: str = "guest") -> bytes:
        """Return the domain's XML."""
        return domain_xml(name, self.body, self.memory_kib, self.hugepages)


def _source(address: str) -> str:
    domain, bus, rest = address.split(":")
    slot, function = rest.split(".")
    where = f"domain='0x{domain}' bus='0x{bus}' slot='0x{slot}' function='0x{function}'"
    return f"<source><address {where}/></source>"


def given(address: str) -> str:
    return (
        f"<devices><hostdev mode='subsystem' type='pci' managed='yes'>{_source(address)}</hostdev></devices>"
    )


PINS = (
    "<vcpu>2</vcpu><cputune><vcpupin vcpu='0' cpuset='2'/><vcpupin vcpu='1' cpuset='6'/>"
    "<emulatorpin cpuset='0'/></cputune>"
)
SET = f'[plugins.sysfs]\nset = ["{KNOBS[0]} = 120", "{KNOBS[1]} = never"]\n'
UNITS = '[plugins.services]\nstart = ["smb"]\nstop = ["greeter"]\n'

PLUGINS = {
    "consoles": Row("[plugins.consoles]\n", given(GPU)),
    "modules": Row('[plugins.consoles]\n[plugins.modules]\nunload = ["nvidia_drm", "nvidia"]\n', given(GPU)),
    "cpu_isolation": Row("[plugins.cpu_isolation]\n", PINS),
    "governor": Row("[plugins.governor]\n"),
    "hugepages": Row("[plugins.hugepages]\n", hugepages=True, memory_kib=600 * 2048),  # more than a node has
    "pci": Row("[plugins.pci]\nkeep_awake = true\n", given(NIC)),
    "reset_check": Row("[plugins.reset_check]\n", given(NIC)),
    "scripts": Row("[plugins.scripts]\n"),
    "services": Row(UNITS),
    "sysfs": Row(SET),
}
COMBINED = Row(
    "".join(row.toml for name, row in PLUGINS.items() if name != "consoles"),
    given(NIC) + given(GPU) + PINS,
    hugepages=True,
    memory_kib=600 * 2048,
)
ROWS = {**PLUGINS, "combined": COMBINED}
