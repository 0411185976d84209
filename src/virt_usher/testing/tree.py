"""A host made of files below a temporary directory, with faults and kill points.

What every fake kernel part builds on. All state is in files, so any number of processes share one host;
what a write changes they see whole or not at all, also when the writer is killed in the middle.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import resource
import signal
import stat
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Self

from virt_usher.host import RUN_DIR, LiveHost

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_PATH_EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.chmod")
_EVENTS = ("open", "os.posix_spawn", *_PATH_EVENTS)
_watching: list[Tree] = []
_hooked: list[bool] = []


class Killed(BaseException):
    """What a kill point raises in the test's own process: nothing but `finally` may see it."""


@dataclass
class Fault:
    """An answer of the kernel to come: `errno` for a path, at the nth time (0: always, -n: from then on)."""

    glob: str
    errno: int
    nth: int
    on: str
    seen: int = 0

    def strikes(self, on: str, path: str) -> bool:
        if self.on != on or not fnmatchcase(path, self.glob):
            return False
        self.seen += 1
        return self.nth in (0, self.seen) or -self.seen <= self.nth < 0


class Tree(LiveHost):
    """Files with the modes and the atomicity of sysfs; parts of the kernel are mixed in.

    A part overrides `store` (what a write does) and `load` (what a read gives), and passes what is not
    its own on to super().
    """

    def __init__(self, root: str | Path) -> None:
        super().__init__(str(root))
        self._kernel = os.path.join(self.root, ".kernel")  # beside the tree: what no file of sysfs shows
        os.makedirs(self._kernel, exist_ok=True)
        self._pending: dict[str, str] | None = None
        self._in_kernel = False
        self._faults: list[Fault] = []
        self._kill_at = 0
        self._kill_how = "raise"
        self.points = 0  # how many places to be killed at this process has passed

    # -- building

    def file(self, path: str, text: str = "", mode: int = 0o644) -> Self:
        """Make a file; text other than '' ends with one newline, as in sysfs."""
        real = self.path(path)
        self._folders(path)
        with open(real, "w", encoding="utf-8", errors="surrogateescape") as stream:
            stream.write(text if not text or text.endswith("\n") else f"{text}\n")
        os.chmod(real, mode)
        return self

    def link_to(self, path: str, target: str) -> Self:
        """Make a symbolic link."""
        self._folders(path)
        os.symlink(target, self.path(path))
        return self

    def _folders(self, path: str) -> None:
        """Make the directories on the way, writable by their owner alone whatever the umask is."""
        folder = os.path.dirname(path)
        if folder not in ("", "/") and not os.path.isdir(self.path(folder)):
            self._folders(folder)
            os.mkdir(self.path(folder))
            os.chmod(self.path(folder), 0o755)  # noqa: S103  # as /sys and /etc are

    # -- faults and kill points

    def fail(self, glob: str, number: int, nth: int = 0, on: str = "write") -> Self:
        """Answer the nth write of paths that match with an errno; 0 is all, -n from the nth on.

        `on`: 'write', 'read' or 'list', of a directory.

        A write is a value stored in /sys or /proc, any file below this root that is opened for
        writing, made, renamed or removed, such as the journal, and any program there that is started.
        """
        self._faults.append(Fault(glob, number, nth, on))
        return self

    def heal(self) -> Self:
        """Forget all faults."""
        self._faults.clear()
        return self

    def stall(self, glob: str) -> Self:
        """Let writes of paths that match sleep in the kernel until `resume`."""
        Path(self._kernel, "stall").write_text(glob)
        return self

    def resume(self) -> Self:
        """Let what stalls go on."""
        Path(self._kernel, "stall").unlink(missing_ok=True)
        return self

    @property
    def stalled(self) -> bool:
        """Whether a write sleeps now."""
        return os.path.exists(os.path.join(self._kernel, "stalled"))

    def kill_at(self, point: int, how: str = "raise") -> None:
        """Die at the nth point from now; 0 is never. Points are before, within and after each write.

        `how`: 'raise' Killed, 'process' (SIGKILL), 'family' (SIGKILL of the parent as well), or 'parent' (of
        the parent alone: this process goes on). With a point of -1 nobody dies: see `passed`.
        """
        self.points, self._kill_at, self._kill_how = 0, point, how

    def point(self, path: str) -> None:
        """Pass one place where the process may be killed."""
        self.points += 1
        self._pass("passed", path)
        if self.points != self._kill_at:
            return
        Path(self._kernel, "killed").write_text(path)
        if self._kill_how == "raise":
            raise Killed(path)
        if self._kill_how == "family":
            Path(self._kernel, "dying").write_text(str(os.getpid()))
        if self._kill_how in ("family", "parent"):
            os.kill(os.getppid(), signal.SIGKILL)
        if self._kill_how != "parent":
            os.kill(os.getpid(), signal.SIGKILL)

    def passed(self) -> list[str]:
        """Return the paths of all points that were passed since `kill_at(-1)`, and forget them."""
        return self.happened("passed").splitlines()

    def looked(self) -> list[str]:
        """Return the paths of all reads since `kill_at(-1)`, and forget them."""
        return self.happened("looked").splitlines()

    def listed(self) -> list[str]:
        """Return the directories whose names were read since `kill_at(-1)`, and forget them."""
        return self.happened("listed").splitlines()

    def _pass(self, what: str, path: str) -> None:
        if self._kill_at < 0:
            with open(os.path.join(self._kernel, what), "a") as stream:
                stream.write(f"{path}\n")

    def happened(self, what: str) -> str:
        """Return where a kill point ('killed') or a fault ('struck') hit since the last question, or ''."""
        note = Path(self._kernel, what)
        try:
            where = note.read_text()
            note.unlink()
        except FileNotFoundError:
            return ""
        return where

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Make files opened, renamed and removed without this object (the journal) count as writes."""
        if not _hooked:
            sys.addaudithook(_audit)
            _hooked.append(True)
        _watching.append(self)
        try:
            yield
        finally:
            _watching.remove(self)

    def _may_fail(self, on: str, path: str) -> None:
        # every fault counts, whichever strikes first
        struck = [f for f in self._faults if f.strikes(on, path)]
        if struck:
            Path(self._kernel, "struck").write_text(path)
            raise OSError(struck[0].errno, os.strerror(struck[0].errno), self.path(path))

    def _touched(self, real: str) -> None:
        if self._in_kernel:
            return
        path = real.removeprefix(self.root)
        self._may_fail("write", path)
        self.point(path)

    # -- the host's side

    def read(self, path: str) -> str:
        if self._pending is not None:
            text = self._pending.get(path)
            return super().read(path) if text is None else text.rstrip("\n")
        self._pass("looked", path)
        self._may_fail("read", path)
        if self._mode(path) & 0o444 == 0:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), self.path(path))
        self.load(path)
        with self._locked(fcntl.LOCK_SH):
            torn = os.path.exists(os.path.join(self._kernel, "redo"))
            text = super().read(path)
        if torn:
            with self.step():
                text = super().read(path)
        return text

    def entries(self, path: str) -> list[str]:
        if self._pending is None:
            self._pass("listed", path)
            self._may_fail("list", path)
        return super().entries(path)

    def write(self, path: str, value: str) -> None:
        self._sleep(path)
        self._may_fail("write", path)
        self.point(path)
        if self._mode(path) & 0o222 == 0:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), self.path(path))
        try:
            self.store(path, value or "\n")
        except OSError as error:
            raise OSError(error.errno, os.strerror(error.errno or 0), self.path(path)) from None
        self.point(path)

    def load(self, path: str) -> None:
        """Say with an OSError that the kernel refuses to show a file; mixed-in parts override it."""

    def store(self, path: str, value: str) -> None:
        """Do what writing a value to a file does; mixed-in parts override it."""
        if self._mode(path) & 0o444:  # what cannot be read remembers nothing
            with self.step():
                self.put(path, value)

    def _mode(self, path: str) -> int:
        return stat.S_IMODE(os.stat(self.path(path)).st_mode)

    def _sleep(self, path: str) -> None:
        order, sleeps = Path(self._kernel, "stall"), Path(self._kernel, "stalled")
        try:
            while fnmatchcase(path, order.read_text()):
                sleeps.touch()
                time.sleep(0.01)
        except FileNotFoundError:
            sleeps.unlink(missing_ok=True)

    # -- the kernel's side

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """One step of the kernel: what is `put` in it, other processes see all at once.

        Within, reads show what was put already. Nested steps are one.
        """
        if self._pending is not None:
            yield
            return
        with self._locked(fcntl.LOCK_EX):
            self._in_kernel = True
            most = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (most[1], most[1]))  # sysfs is never full
            try:
                self._redo()
                self._pending = {}
                yield
                self._commit(self._pending)
            finally:
                self._pending, self._in_kernel = None, False
                resource.setrlimit(resource.RLIMIT_FSIZE, most)

    @contextlib.contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        lock = os.open(os.path.join(self._kernel, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, how)
            yield
        finally:
            os.close(lock)

    def put(self, path: str, value: object) -> None:
        """Set what a file shows, in the kernel's name: modes, faults and kill points do not count."""
        assert self._pending is not None, "put() belongs into step()"
        self._pending[path] = f"{value}".rstrip("\n") + "\n"

    def count(self, path: str, name: str = "") -> int:
        """Return a file's number, or that of the line of a meminfo that has a name."""
        text = self.read(path)
        if name:
            text = next(line.split(f"{name}:")[1] for line in text.splitlines() if f"{name}:" in line)
        return int(text.split()[0])

    def hidden(self, name: str) -> str:
        """Return what was hidden under a name, '' if nothing was."""
        path = f"/.kernel/{name}"
        if self._pending is not None and path in self._pending:
            return self._pending[path].rstrip("\n")
        try:
            return Path(self.path(path)).read_text().rstrip("\n")
        except FileNotFoundError:
            return ""

    def hide(self, name: str, value: object) -> None:
        """Remember what no file of sysfs shows; '' forgets it."""
        with self.step():
            self.put(f"/.kernel/{name}", value)

    def _commit(self, changes: dict[str, str]) -> None:
        redo = {}
        for path, text in changes.items():
            try:
                mode, old = self._mode(path), Path(self.path(path)).read_text()
            except FileNotFoundError:
                mode, old = 0o600, ""
            if old != text:
                redo[path] = [mode, text]
        if redo:
            Path(self._kernel, "redo.new").write_text(json.dumps(redo))
            os.rename(os.path.join(self._kernel, "redo.new"), os.path.join(self._kernel, "redo"))
            self._redo()

    def _redo(self) -> None:
        """Write down a step, also one whose process was killed in the middle of it.

        Files are made anew: to write over them costs a flush of the disk on ext4.
        """
        redo = Path(self._kernel, "redo")
        if not redo.exists():
            return
        for path, (mode, text) in json.loads(redo.read_text()).items():
            real = Path(self.path(path))
            real.unlink(missing_ok=True)
            real.write_text(text)
            real.chmod(mode)
        redo.unlink()

    # -- looking at it

    def snapshot(self) -> dict[str, str]:
        """Return all that a test may compare: /sys, /proc and /etc, and what /run/virt-usher holds.

        Names with kind, mode and content. Locks and the gate's time stamp may stay: they are nobody's state.
        """
        found: dict[str, str] = {}
        for top in ("/sys", "/proc", "/etc", RUN_DIR):
            for folder, folders, files in os.walk(self.path(top)):
                for name in (*folders, *files):
                    real = os.path.join(folder, name)
                    path = real.removeprefix(self.root)
                    if path not in (f"{RUN_DIR}/.locks", f"{RUN_DIR}/.called"):
                        found[path] = _look(real)
        return found


def _look(real: str) -> str:
    if os.path.islink(real):
        return f"-> {os.readlink(real)}"
    mode = f"{stat.S_IMODE(os.stat(real).st_mode):o} "
    if os.path.isdir(real):
        return mode + "directory"
    return mode + Path(real).read_bytes().decode("utf-8", "surrogateescape")


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching or event not in _EVENTS:
        return
    if event == "open" and not int(arguments[2] or 0) & _WRITING:
        return
    if isinstance(arguments[0], str | bytes):
        real = os.fsdecode(arguments[0])
        if event == "os.remove" and not os.path.lexists(real):
            return  # ENOENT, whatever else is wrong
        for host in list(_watching):
            if real.startswith(f"{host.root}/") and not real.startswith(f"{host.root}/.kernel"):
                host._touched(real)
