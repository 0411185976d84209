"""The machine: the only door to /sys, /proc, /run and /etc.

Imports nothing but os: release runs through here, and each import costs it milliseconds.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False  # importing typing would cost release more than all its work
if TYPE_CHECKING:
    from collections.abc import Iterable

    from virt_usher.host.cpu import CpufreqPolicy
    from virt_usher.host.memory import Memory
    from virt_usher.host.pci import Pci

CONFIG_DIR = "/etc/virt-usher"
RUN_DIR = "/run/virt-usher"
LAST_DIR = "/var/lib/virt-usher/last"


class Host:
    """A host to read from, below a root directory ('/' but in tests).

    All paths are given as the real machine has them: `host.read("/proc/meminfo")`.
    """

    def __init__(self, root: str = "/") -> None:
        self.root = root.rstrip("/")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.root or '/'!r})"

    def path(self, path: str) -> str:
        """Return where a path of the machine lies below this root."""
        return self.root + path

    def read(self, path: str) -> str:
        """Return a file's text without its last newline; OSError as the kernel gives it.

        All of it: mounts and routes may be megabytes, and modules.alias of Debian is.
        """
        return self.read_bytes(path).decode("utf-8", "surrogateescape").rstrip("\n")

    def read_bytes(self, path: str, limit: int = 1 << 62) -> bytes:
        """Return what a file begins with, as it is, in as many reads as that takes: /proc gives pages."""
        fd = os.open(self.path(path), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            chunks = []
            while limit > 0 and (chunk := os.read(fd, min(limit, 65536))):
                chunks.append(chunk)
                limit -= len(chunk)
        except OSError as error:  # read(2) knows no names
            raise OSError(error.errno, error.strerror, self.path(path)) from None
        finally:
            os.close(fd)
        return b"".join(chunks)

    def get(self, path: str, default: str = "") -> str:
        """Return a file's text, or the default where it cannot be read."""
        try:
            return self.read(path)
        except OSError:
            return default

    def known(self, path: str, default: str = "") -> str:
        """Return a file's text, or the default where there is none; OSError if it cannot be read.

        For what an undo goes by, or "nobody uses it": a file that is only unreadable must not pass for one
        that is gone.
        """
        try:
            return self.read(path)
        except (FileNotFoundError, NotADirectoryError):
            return default
        except PermissionError:
            if os.geteuid() == 0:
                raise
            return default  # somebody who only looks
        except OSError:
            # One that vanishes while it is open says ENODEV in sysfs, EIO in /proc.
            if self.exists(path):
                raise
            return default

    def number(self, path: str, default: int = 0) -> int:
        """Return a file's whole number, or the default where there is none."""
        try:
            return int(self.read(path))
        except (OSError, ValueError):
            return default

    def exists(self, path: str) -> bool:
        """Tell whether a path is there; a dangling link counts as absent."""
        return os.path.exists(self.path(path))

    def entries(self, path: str) -> list[str]:
        """Return a directory's names, sorted; none where there is no directory.

        OSError if it cannot be read: "nobody uses it" and "no other domain" are told by such a list.
        """
        try:
            return sorted(os.listdir(self.path(path)))
        except (FileNotFoundError, NotADirectoryError, ProcessLookupError):
            return []
        except PermissionError:
            if os.geteuid() == 0:
                raise
            return []  # somebody who only looks

    def link(self, path: str) -> str:
        """Return the last name of what a link points to (a device's driver, its group), or ''."""
        return os.path.basename(self.target(path))

    def target(self, path: str) -> str:
        """Return what a link says, as it says it, or ''."""
        try:
            return os.readlink(self.path(path))
        except OSError:
            return ""

    # -- processes

    def started_at(self, pid: int) -> int | None:
        """Return a process's start time in clock ticks since boot, None where it is gone.

        With the pid it names one process for the whole boot (proc(5), field 22 of stat). A zombie
        is gone: it holds nothing any more. OSError where nobody can tell.
        """
        stat = self.known(f"/proc/{pid}/stat")
        fields = stat[stat.rfind(")") + 2 :].split()
        return None if len(fields) < 20 or fields[0] in "ZX" else int(fields[19])

    def waits_in(self, pid: int) -> str:
        """Return the kernel's function that a process sleeps in, '' if it runs or nobody knows."""
        where = self.get(f"/proc/{pid}/wchan")
        return "" if where == "0" else where

    def calling_daemon(self) -> int:
        """Return the pid that started the shell that started this hook: libvirt's daemon; 0 if gone.

        The worker's parent is the hook's own process, whose parent is the gate.
        """
        pid = os.getpid()
        for _ in range(3):
            stat = self.get(f"/proc/{pid}/stat")
            fields = stat[stat.rfind(")") + 2 :].split()
            pid = int(fields[1]) if len(fields) > 1 else 0
        return pid

    def qemu(self, name: str, uuid: str) -> int | None:
        """Return the pid of a domain's QEMU if it lives, None if not; OSError where nobody can tell.

        libvirt's pid file may outlive the process, so its command line must carry the UUID too
        (qemuBuildCommandLine gives '-uuid' to every guest).
        """
        # virPidFileBuildPath escapes the name as if for XML (seen with libvirt 9.0: it&apos;s.pid).
        escaped = name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        escaped = escaped.replace('"', "&quot;").replace("'", "&apos;")
        for file in dict.fromkeys((escaped, name)) if uuid else ():
            said = self.known(f"/run/libvirt/qemu/{file}.pid")
            pid = int(said) if said.isdecimal() else 0
            if pid and self.started_at(pid) and uuid in self.known(f"/proc/{pid}/cmdline").split("\0"):
                return pid
        return None

    # -- views for plugins, imported when first used

    @property
    def memory(self) -> Memory:
        """NUMA nodes, their memory and their pools of huge pages."""
        from virt_usher.host.memory import Memory

        return Memory(self)

    @property
    def pci(self) -> Pci:
        """PCI functions and IOMMU groups; keep the view for a while, it knows where all of them sit."""
        from virt_usher.host.pci import Pci

        return Pci(self)

    @property
    def online_cpus(self) -> frozenset[int]:
        """The CPUs that are online."""
        from virt_usher import cpulist

        return cpulist.parse(self.known("/sys/devices/system/cpu/online", "0"))

    def cpufreq_policies(self, cpus: Iterable[int]) -> list[CpufreqPolicy]:
        """Return the cpufreq policies that have one of these CPUs online, in order."""
        from virt_usher.host.cpu import policies

        return policies(self, frozenset(cpus))


class LiveHost(Host):
    """A host that can be changed as well: only actions, the journal and dispatch get one."""

    def write(self, path: str, value: str) -> None:
        """Write a value with one write(2), as sysfs wants it; OSError as the kernel gives it.

        An empty value is written as a newline: sysfs never sees a write of zero bytes.
        """
        fd = os.open(self.path(path), os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, (value or "\n").encode("utf-8", "surrogateescape"))
        finally:
            os.close(fd)

    def private_dir(self, path: str) -> str:
        """Make a directory that only root can enter, and return where it lies."""
        real = self.path(path)
        os.makedirs(real, mode=0o700, exist_ok=True)
        return real
