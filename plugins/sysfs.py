"""Set values below /sys and /proc/sys while the domain runs."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from virt_usher import Action, Domain, Host, Plan, Problem, Write, hookimpl, option
from virt_usher.errors import typed

# Not one value that can be read, remembered and put back: they belong to those who keep account of them.
ELSEWHERE = {
    "/sys/fs/cgroup/": "systemd's; see the plugin cpu_isolation",
    "nr_hugepages": "see the plugin hugepages",
    "driver_override": "see the plugin pci",
}


@dataclass(frozen=True, eq=False)
class Plugin:
    set: tuple[str, ...] = option(
        (),
        help="PATH=VALUE; PATH may have wildcards, {cpu} for each CPU of the vCPUs, and -: may be missing",
    )

    @hookimpl
    def usher_prepare(self, domain: Domain, host: Host) -> Iterator[Action]:
        for line in self.set:
            _, value, files = _find(line, domain, host)
            yield from (Write(f, value) for f in files if not _wrong(f, host))

    @hookimpl
    def usher_check(self, domain: Domain, host: Host, plan: Plan) -> Iterator[Problem]:
        if not self.set:
            yield Problem(
                "nothing is set", f"virt-usher enable {typed(domain.name)} sysfs 'set=PATH=VALUE,…'"
            )
        for line in self.set:
            path, value, files = _find(line, domain, host)
            if not path.startswith("/") or not value:
                yield Problem(f"{line!r} is not PATH=VALUE", "for example: /proc/sys/vm/stat_interval=10")
            elif "{cpu}" in path and not domain.pins("vcpu"):
                yield Problem(f"{path}: the domain's vCPUs are pinned to no CPUs", "see: virt-usher pins")
            elif not files and not line.startswith("-"):
                yield Problem(f"there is no {path}", f"-{path} lets it be missing")
            yield from (Problem(f"{f}: {why}") for f in files if (why := _wrong(f, host)))


def _find(line: str, domain: Domain, host: Host) -> tuple[str, str, list[str]]:
    """Return path, value and the files, each by its real name: two domains may take different ways to it."""
    path, _, value = (part.strip() for part in line.removeprefix("-").partition("="))
    cpus = sorted(domain.pins("vcpu")) if "{cpu}" in path else [0]
    paths = dict.fromkeys(host.path(path.replace("{cpu}", str(cpu))) for cpu in cpus)
    found = {os.path.realpath(f) for p in paths if path.startswith("/") for f in glob.glob(p)}
    root = os.path.realpath(host.path("/")).rstrip("/")
    return path, value, sorted(f.removeprefix(root) for f in found)


def _wrong(file: str, host: Host) -> str:
    """Say why a file cannot be set and put back, or ''."""
    if not file.startswith(("/sys/", "/proc/sys/")):
        return "only what is below /sys and /proc/sys can be set"
    for part, why in ELSEWHERE.items():
        if part in file:
            return why
    mode = os.stat(host.path(file)).st_mode
    if not stat.S_ISREG(mode) or not mode & 0o200:
        return "cannot be written"
    return "" if mode & 0o400 else "cannot be read, so nobody could put it back"
