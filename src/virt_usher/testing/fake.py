"""The fake host: all parts of the kernel that there are, the configuration, and libvirt's side."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Sequence
from typing import Self

from virt_usher.host import CONFIG_DIR, RUN_DIR
from virt_usher.testing.cpufreq import CpufreqKernel
from virt_usher.testing.hugepages import HugepageKernel

UUID = "5dd6a1c8-6e5b-4c0e-9f43-000000000001"
_REAL_PROCESS = re.compile(r"/proc/(\d+)(/.*)?")
_PID_MAX = 1 << 22  # no real process has a number above (include/linux/threads.h)


class FakeHost(HugepageKernel, CpufreqKernel):
    """A host below a temporary directory that behaves as the kernel does.

        host = FakeHost(tmp_path).node(0, free_kib=4 << 20).policy(0, cpus=[0, 1], governor="schedutil")

    Real processes show through /proc, so that pids in journals and locks mean what they do on a real host;
    fake ones (QEMUs) have numbers that no real one can have.
    """

    def path(self, path: str) -> str:
        m = _REAL_PROCESS.match(path)
        return path if m and 0 < int(m[1]) <= _PID_MAX else super().path(path)

    # -- the admin's side

    def config(self, toml: str) -> Self:
        """Write config.toml."""
        return self.file(f"{CONFIG_DIR}/config.toml", toml)

    def every_domain(self, toml: str) -> Self:
        """Write every-domain.toml."""
        return self.file(f"{CONFIG_DIR}/every-domain.toml", toml)

    def domain(self, name: str, toml: str) -> Self:
        """Write a domain's own file."""
        return self.file(f"{CONFIG_DIR}/domains/{name}.toml", toml)

    def plugin(self, name: str, source: str) -> Self:
        """Drop a plugin into /etc/virt-usher/plugins."""
        return self.file(f"{CONFIG_DIR}/plugins/{name}.py", source)

    def journal(self, name: str) -> str:
        """Return the text of a domain's journal, '' if there is none."""
        path = self.path(f"{RUN_DIR}/{name}.jnl")
        if not os.path.exists(path):
            return ""
        with open(path, encoding="utf-8") as stream:
            return stream.read()

    # -- libvirt's side

    def qemu_runs(
        self,
        name: str,
        uuid: str = UUID,
        pages: dict[tuple[int, int], int] | None = None,
        threads: Sequence[str] = (),
    ) -> int:
        """Let a domain's QEMU run, having taken pages: {(node, size in KiB): count}. Returns its pid.

        `threads` are the names of those beside the first; their ids follow the pid.
        """
        taken = pages or {}
        for (node, size), count in taken.items():
            self.take(node, count, size)
        numbers = [int(e) for e in self.entries("/proc") if e.isdigit()]
        pid = max([_PID_MAX, *numbers]) + 1
        held = sum(size * count for (_, size), count in taken.items())
        self.file(f"/proc/{pid}/stat", f"{pid} (qemu-system-x86) S 1 " + " ".join(["0"] * 17) + f" {pid} 0")
        self.file(f"/proc/{pid}/cmdline", "\0".join(("qemu-system-x86_64", "-uuid", uuid, "-S", "")))
        self.file(f"/proc/{pid}/status", f"Name:\tqemu-system-x86\nHugetlbPages:\t{held:8} kB")
        for tid, thread in enumerate(("qemu-system-x86", *threads), pid):
            self.file(f"/proc/{pid}/task/{tid}/comm", thread[:15] + "\n")
        self.file(_pid_file(name), str(pid))
        self.hide(f"{pid}.pages", " ".join(f"{n}:{s}:{c}" for (n, s), c in taken.items()))
        return pid

    def qemu_ends(self, name: str, pid_file_stays: bool = False) -> None:
        """Let a domain's QEMU end, however: its pages are free again."""
        pid = self.number(_pid_file(name))
        for taken in self.hidden(f"{pid}.pages").split():
            node, size, count = map(int, taken.split(":"))
            self.give(node, count, size)
        self.hide(f"{pid}.pages", "")
        shutil.rmtree(self.path(f"/proc/{pid}"))
        if not pid_file_stays:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path(_pid_file(name)))


def _pid_file(name: str) -> str:
    """Return where libvirt keeps a domain's pid: it escapes the name for XML (virPidFileBuildPath)."""
    for char, code in (("&", "amp"), ("<", "lt"), (">", "gt"), ('"', "quot"), ("'", "apos")):
        name = name.replace(char, f"&{code};")
    return f"/run/libvirt/qemu/{name}.pid"
