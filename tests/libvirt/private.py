"""A real libvirt daemon of the tests' own, in its own mount, PID, network and IPC namespaces."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from xml.sax.saxutils import escape

from tests.libvirt.domain import Domain
from tests.libvirt.pool import nr_pages

CHECKOUT = Path(__file__).resolve().parents[2]
HOOKS = "/etc/libvirt/hooks"  # compiled into libvirt
DAEMON_LOG = "/var/log/libvirt/libvirtd.log"

# What a system's daemon has, and not what the shell of whoever runs the tests has.
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LC_ALL": "C.UTF-8",
}

Result = subprocess.CompletedProcess[str]


class HangError(AssertionError):
    """Something did not end in time: a failure of its own, not to be waited out."""


def wait_for(what: str, condition: Callable[[], object], timeout: float = 10) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise HangError(f"after {timeout:g} s still not: {what}")
        time.sleep(0.02)


def pool_becomes(pages: int) -> None:
    """Wait for the host's pool to have that many pages: virsh's answer may come before the hook's end."""
    wait_for(f"{pages} huge pages in the pool", lambda: nr_pages() == pages)


class PrivateLibvirt:
    """What tests do with the daemon; every call that could block has a deadline."""

    def __init__(self) -> None:
        self._spawned: list[subprocess.Popen[str]] = []
        self._unshare = subprocess.Popen(
            [
                *("unshare", "--mount", "--pid", "--net", "--ipc", "--fork", "--mount-proc", "--kill-child"),
                *("sh", str(Path(__file__).with_name("namespace.sh")), str(CHECKOUT)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )
        assert self._unshare.stdout
        # Ends also when the script fails: its stderr, not captured, says why.
        if self._unshare.stdout.readline() != "ready\n":
            self.close()
            raise RuntimeError("the private namespace could not be set up")
        children = Path(f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children")
        self._pid = int(children.read_text())

    def close(self) -> None:
        """End PID 1, and with it all that runs in the namespace."""
        assert self._unshare.stdin
        assert self._unshare.stdout
        self._unshare.stdin.close()
        try:
            self._unshare.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._unshare.kill()
            self._unshare.wait(timeout=10)
        self._unshare.stdout.close()

    # The namespace: its files and its processes.

    def path(self, path: str) -> Path:
        """Return the way from out here to a file in there."""
        return Path(f"/proc/{self._pid}/root{path}")

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Put a file in place as an installer should: complete, with its mode, by rename."""
        target = self.path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        new = self.path("/run/private/new")
        new.write_text(text)
        new.chmod(mode)
        self.run("mv", "-f", "/run/private/new", path, check=True)

    def remove(self, *paths: str) -> None:
        self.run("rm", "-rf", *paths, check=True)

    @contextmanager
    def covered(self, path: str, cover: str) -> Iterator[None]:
        """Let another file, or folder, stand in the place of one that must not be changed."""
        self.run("mount", "--bind", cover, path, check=True)
        try:
            yield
        finally:
            self.run("umount", "--lazy", path, check=True)

    def lines(self, path: str) -> list[str]:
        file = self.path(path)
        return file.read_text().splitlines() if file.exists() else []

    def spawn(self, *command: str, timeout: float = 30) -> subprocess.Popen[str]:
        # timeout(1) sits inside: killing nsenter out here would leave the command alive in there.
        process = subprocess.Popen(
            [
                *("nsenter", f"--target={self._pid}", "--mount", "--pid", "--net", "--ipc", "--wd=/"),
                *("timeout", "--kill-after=1", f"{timeout:g}", *command),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )
        self._spawned.append(process)
        return process

    def end_spawned(self) -> None:
        """Let go of what a failed test left running."""
        for process in self._spawned:
            process.kill()
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe:
                    with suppress(BrokenPipeError):
                        pipe.close()
            process.wait(timeout=10)
        self._spawned.clear()

    def finish(self, process: subprocess.Popen[str], input_: str = "", timeout: float = 30) -> Result:
        with process:
            try:
                out, err = process.communicate(input_, timeout=timeout + 3)
            except subprocess.TimeoutExpired:
                process.kill()
                # A grandchild may hold the pipes: do not wait for their end as well.
                for pipe in (process.stdout, process.stderr):
                    if pipe:
                        pipe.close()
                raise HangError(f"no end of {process.args!r}") from None
        if process.returncode in (124, 137):
            raise HangError(f"after {timeout:g} s still running: {process.args!r}\n{out}{err}")
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def run(self, *command: str, input_: str = "", timeout: float = 30, check: bool = False) -> Result:
        result = self.finish(self.spawn(*command, timeout=timeout), input_, timeout)
        assert not check or result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result

    def pids(self, name: str) -> list[int]:
        """Return the living processes of that name, as numbered inside."""
        found = []
        for process in self.path("/proc").glob("[0-9]*"):
            try:
                comm, state = (process / "comm").read_text().strip(), (process / "stat").read_text()
            except OSError:  # it has just ended
                continue
            if comm == name[:15] and state.rpartition(")")[2].split()[0] != "Z":
                found.append(int(process.name))
        return found

    # The daemon.

    def start_daemon(self) -> None:
        self.run("libvirtd", "--daemon", check=True)
        # Answers only when all drivers are up; the first start probes QEMU.
        ready = self.virsh("list", "--uuid", timeout=60)
        assert ready.returncode == 0, ready.stderr
        # Each domain is reconnected to in a thread of its own, as a job: any other job waits for it. A
        # destroy would not: it kills QEMU under the reconnection, and then says that nothing runs.
        for uuid in ready.stdout.split():
            self.virsh("dommemstat", uuid)

    def restart_daemon(self) -> None:
        self.stop_daemon("TERM")
        self.start_daemon()

    def kill_daemon(self) -> None:
        self.stop_daemon("KILL")

    def stop_daemon(self, signal: str) -> None:
        if daemon := self.pids("libvirtd"):
            self.run("kill", f"-{signal}", *map(str, daemon), check=True)
            wait_for("the end of libvirtd", lambda: not self.pids("libvirtd"))

    # Domains.

    def virsh(self, *args: str, input_: str = "", timeout: float = 30) -> Result:
        return self.run("virsh", "--connect=qemu:///system", *args, input_=input_, timeout=timeout)

    def define(self, domain: Domain) -> None:
        result = self.virsh("define", "/dev/stdin", input_=domain.xml)
        assert result.returncode == 0, result.stderr

    def create(self, domain: Domain) -> Result:
        """Start a transient domain."""
        return self.virsh("create", "/dev/stdin", input_=domain.xml)

    def start(self, domain: Domain, timeout: float = 30) -> Result:
        """Define and start; the result is that of the start."""
        self.define(domain)
        return self.virsh("start", domain.uuid, timeout=timeout)

    def destroy(self, domain: Domain) -> Result:
        return self.virsh("destroy", domain.uuid)

    def state(self, domain: Domain) -> str:
        return self.virsh("domstate", domain.uuid).stdout.strip()

    def qemu_pid(self, domain: Domain) -> int:
        """Return the PID of the domain's QEMU, as it is called inside."""
        # libvirt escapes the name of this file, and of no other, as if it were XML.
        name = escape(domain.name, {"'": "&apos;", '"': "&quot;"})
        return int(self.path(f"/run/libvirt/qemu/{name}.pid").read_text())

    def remove_domains(self) -> None:
        for uuid in self.virsh("list", "--all", "--uuid").stdout.split():
            self.virsh(f"destroy {uuid}; undefine {uuid} --managed-save")

    def clear(self) -> list[str]:
        """Stop all that runs, whatever a test that failed left; say what should have been gone by itself."""
        self.end_spawned()
        left = self._kill("python3")  # a hook that hangs holds up the daemon
        if not self.pids("libvirtd"):
            left.append("no daemon")
            self.start_daemon()
        self.remove_domains()
        left += self._kill("python3") + self._kill("qemu-system-x86_64")
        if journals := [path.name for path in self.path("/run/virt-usher").glob("*.jnl")]:
            left += journals
            self.remove("/run/virt-usher")
        return left

    def _kill(self, name: str) -> list[str]:
        """Give the processes of a name a moment to end, then end them and return which they were."""
        with suppress(HangError):
            wait_for(f"the end of {name}", lambda: not self.pids(name), timeout=3)
        if pids := self.pids(name):
            self.run("kill", "-KILL", *map(str, pids))
        return [f"{name} {pid}" for pid in pids]
