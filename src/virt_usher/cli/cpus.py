"""virt-usher cpus: a picture of the machine's CPUs, and who has them."""

from __future__ import annotations

import string
from typing import Any

import click

from virt_usher import cpulist
from virt_usher.cli import base
from virt_usher.errors import printable
from virt_usher.host import Host
from virt_usher.host.topology import CPUS, Topology
from virt_usher.isolate import claims

_COLOURS = ("green", "yellow", "magenta", "cyan", "red", "blue")


@click.command(name="cpus")
@base.json_option
@click.pass_obj
def command(usher: base.Usher, as_json: bool) -> int:
    """Show the machine's CPUs and who has them.

    By socket, NUMA node and last-level cache, with governors and frequencies.
    A column is a core, with its threads below each other. A letter stands for a domain: a capital where the
    host stays off, a small one where a running domain is pinned and the host may run as well.
    """
    found = look(usher.host)
    if as_json:
        base.say_json(found)
        return base.finish(False)
    letters = _letters(found)
    for group in found["groups"]:
        place = f"socket {group['socket']}, node {group['node']}, cache of CPUs {group['cache']}"
        click.secho(place, bold=True)
        if group["clocks"]:
            base.say(", ".join(group["clocks"]), 2)
        _draw(group["cores"], found["cpus"], letters)
    if found["offline"]:
        base.say(f"offline: {cpulist.show(found['offline'])}")
    _legend(found["cpus"], letters)
    return base.finish(False)


def look(host: Host) -> dict[str, Any]:
    """Tell of all CPUs, as data."""
    topology, isolated, pinned = Topology(host), claims(host), running(host)
    groups = []
    shared = dict.fromkeys((c.socket, c.node, c.cache) for c in topology.cpus.values())
    for socket, node, cache in shared:
        own = {n: c for n, c in topology.cpus.items() if (c.socket, c.node, c.cache) == (socket, node, cache)}
        cores = [sorted(core) for core in dict.fromkeys(c.core for c in own.values())]
        groups.append(
            {
                "socket": socket,
                "node": node,
                "cache": cpulist.show(cache),
                "cores": cores,
                "clocks": _clocks(host, set(own)),
            }
        )
    cpus = {
        cpu: {
            "isolated": sorted(n for n, theirs in isolated.items() if cpu in theirs),
            "pinned": sorted(n for n, theirs in pinned.items() if cpu in theirs),
            "governor": host.get(f"{CPUS}/cpu{cpu}/cpufreq/scaling_governor") or None,
            "khz": host.number(f"{CPUS}/cpu{cpu}/cpufreq/scaling_cur_freq") or None,
        }
        for cpu in topology.cpus
    }
    return {"groups": groups, "cpus": cpus, "offline": sorted(topology.present - topology.online)}


def running(host: Host) -> dict[str, frozenset[int]]:
    """Return domain -> CPUs that the vCPU threads of its QEMU are pinned to, as the kernel has it."""
    online, found = host.online_cpus, {}
    for file in host.entries("/run/libvirt/qemu"):
        pid = host.number(f"/run/libvirt/qemu/{file}") if file.endswith(".pid") else 0
        tasks = host.entries(f"/proc/{pid}/task") if pid > 0 else []
        cpus = frozenset[int]()
        for task in tasks:
            if host.get(f"/proc/{pid}/task/{task}/comm").startswith("CPU "):
                for line in host.get(f"/proc/{pid}/task/{task}/status").splitlines():
                    if line.startswith("Cpus_allowed_list:"):
                        cpus |= cpulist.parse(line.split()[1])
        if cpus and not cpus >= online:
            found[file.removesuffix(".pid")] = cpus
    return found


def _clocks(host: Host, cpus: set[int]) -> list[str]:
    """Say which governors and frequencies CPUs have: one text for each governor."""
    found: dict[str, dict[int, float]] = {}
    for cpu in sorted(cpus):
        base_dir = f"{CPUS}/cpu{cpu}/cpufreq"
        if governor := host.get(f"{base_dir}/scaling_governor"):
            found.setdefault(governor, {})[cpu] = host.number(f"{base_dir}/scaling_cur_freq") / 1e6
    told = []
    for governor, clocks in found.items():
        low, high = (f"{edge(clocks.values()):.1f}" for edge in (min, max))
        which = f" on {cpulist.show(clocks)}" if len(found) > 1 else ""
        told.append(f"{governor}{which} at {low if low == high else f'{low} to {high}'} GHz")
    return told


def _letters(found: dict[str, Any]) -> dict[str, str]:
    """Return domain -> its letter: its initial if that is free."""
    names = sorted({n for cpu in found["cpus"].values() for n in (*cpu["isolated"], *cpu["pinned"])})
    letters: dict[str, str] = {}
    for name in names:
        wish = name[:1].upper() + string.ascii_uppercase
        free = [c for c in wish if c in string.ascii_uppercase and c not in letters.values() and c != "H"]
        letters[name] = free[0] if free else "?"
    return letters


def _legend(cpus: dict[int, dict[str, Any]], letters: dict[str, str]) -> None:
    """Say what the letters mean: in one line if that fits, and else one by one."""
    names = {name: f"{letters[name]} {printable(name)}" for name in sorted(letters)}
    shared = any(len(cpu["isolated"] or cpu["pinned"]) > 1 for cpu in cpus.values())
    plain = ["h host", *names.values(), *(["+ several"] if shared else [])]
    styled = [click.style(text, fg=_colour(name, letters)) for name, text in names.items()]
    between = ", " if len(", ".join(plain)) <= base.WIDTH else "\n"
    click.echo(between.join([plain[0], *styled, *plain[1 + len(styled) :]]))


def _colour(name: str, letters: dict[str, str]) -> str:
    return _COLOURS[sorted(letters).index(name) % len(_COLOURS)]


def _draw(cores: list[list[int]], cpus: dict[int, dict[str, Any]], letters: dict[str, str]) -> None:
    """Draw cores as columns, as many beside each other as fit."""
    width = max(len(str(cpu)) for core in cores for cpu in core)
    most = max(1, (base.WIDTH - 2) // (width + 4))
    for first in range(0, len(cores), most):
        row = cores[first : first + most]
        for thread in range(max(map(len, row))):
            cells = (_cell(core[thread : thread + 1], width, cpus, letters) for core in row)
            click.echo(("  " + "  ".join(cells)).rstrip())


def _cell(cpu: list[int], width: int, cpus: dict[int, dict[str, Any]], letters: dict[str, str]) -> str:
    if not cpu:
        return " " * (width + 2)
    one = cpus[cpu[0]]
    owners = one["isolated"] or one["pinned"]
    letter = "h" if not owners else "+" if len(owners) > 1 else letters[owners[0]]
    letter = letter if one["isolated"] else letter.lower()
    return click.style(f"{cpu[0]:>{width}} {letter}", fg=_colour(owners[0], letters) if owners else None)
