"""Boot the machine once, watch over it, and bring its results out."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from . import acpi, emulator, machine, qemu
from .rootfs import Image

HERE = Path(__file__).parent
CHECKOUT = HERE.parents[1]


# The emulator's fault, and rare: while Linux patches its own text (a static key, such as that of cpusets, is
# switched), it puts a breakpoint there, and TCG with several threads may still run into it afterwards.
TRIPPED = "the guest's kernel panicked: a CPU ran into int3 while text was patched, which is QEMU's doing"
# Not seen since the lab has a newer QEMU (emulator.py).
CRASHED = "QEMU itself crashed"
EMULATORS = (TRIPPED, CRASHED)


@dataclass(frozen=True)
class Options:
    """What a run is asked to do, and how long it may take."""

    cpu: str = "kvm"
    shell: bool = False
    run: str = ""
    bare: bool = False
    pytest: tuple[str, ...] = ()
    done: tuple[str, ...] = ()
    boot_seconds: int = 480
    silent_seconds: int = 480
    total_seconds: int = 2400


@dataclass
class Outcome:
    """What came out of a run. `problem` says why there is no result; `done` passed till then."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    up_after: float = 0.0
    seconds: float = 0.0
    problem: str = ""
    failures: list[str] = field(default_factory=list)
    done: tuple[str, ...] = ()

    @property
    def good(self) -> bool:
        return not self.problem and not self.failed and self.passed > 0


def prepare_share(share: Path, options: Options) -> Path:
    """Fill the folder that the guest mounts; return where it writes."""
    out = share / "out"
    out.mkdir(parents=True)
    shutil.copy(HERE / "guest/agent.py", share)
    parameters = {name: getattr(options, name) for name in ("shell", "run", "bare", "pytest", "done", "cpu")}
    (share / "parameters.json").write_text(json.dumps(parameters))
    names = ["git", "-C", str(CHECKOUT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(names, capture_output=True, text=True, check=True).stdout

    def as_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = 0
        member.uname = member.gname = "root"
        return member

    with tarfile.open(share / "checkout.tar", "w") as archive:
        for name in sorted(filter(None, listed.split("\0"))):
            # Deleted, but not yet in the index.
            if (CHECKOUT / name).is_symlink() or (CHECKOUT / name).exists():
                archive.add(CHECKOUT / name, name, recursive=False, filter=as_root)
    return out


def run(image: Image, options: Options, scratch: Path) -> Outcome:
    """Boot `image`, and return what its tests said. Logs stay in `scratch`."""
    out = prepare_share(scratch / "share", options)
    for name, mib in machine.SCRATCH_IMAGES.items():
        with (scratch / f"{name}.img").open("wb") as disk:
            disk.truncate(mib << 20)
    console = scratch / "console.log"
    where = "mon:stdio" if options.shell else f"file:{console}"
    table = acpi.compile_table(scratch)
    binary = emulator.find()
    command = qemu.command(binary, image.folder, scratch / "share", scratch, options.cpu, table, where)
    (scratch / "qemu.command").write_text(" \\\n  ".join(command) + "\n")
    started = time.monotonic()
    # snapshot=on keeps its changes in a file there.
    environment = {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "TMPDIR": str(scratch)}
    with (scratch / "qemu.log").open("w") as errors:
        guest = subprocess.Popen(
            command,
            stdin=None if options.shell else subprocess.DEVNULL,
            stdout=None if options.shell else errors,
            stderr=errors,
            env=environment,
        )
        try:
            if options.shell:
                guest.wait()
                problem = (scratch / "qemu.log").read_text() if guest.returncode else ""
                return Outcome(seconds=time.monotonic() - started, problem=problem)
            outcome = _watch(guest, out, console, scratch / "monitor", options)
        finally:
            guest.kill()
            guest.wait()
    outcome.seconds = time.monotonic() - started
    if guest.returncode == -signal.SIGSEGV:
        outcome.problem = CRASHED
    _read_results(out, outcome, tests=not options.run and not options.done)
    if not outcome.problem and guest.returncode not in (0, -9):
        outcome.problem = f"QEMU ended with status {guest.returncode}"
    return outcome


def _watch(
    guest: subprocess.Popen[bytes], out: Path, console: Path, monitor: Path, options: Options
) -> Outcome:
    """Show the test log as it grows, until the guest is off or given up."""
    outcome = Outcome()
    started = heard = time.monotonic()
    shown = 0
    log = out / "tests.log"
    while guest.poll() is None:
        time.sleep(0.5)
        now = time.monotonic()
        if not outcome.up_after and (out / "up").exists():
            outcome.up_after = now - started
            heard = now
        text = log.read_bytes() if log.exists() else b""
        if len(text) > shown:
            sys.stdout.write(text[shown:].decode(errors="replace"))
            sys.stdout.flush()
            shown = len(text)
            heard = now
        said = console.read_bytes() if console.exists() else b""
        if b"Kernel panic - not syncing" in said:
            outcome.problem = TRIPPED if b"Oops: int3" in said else "the guest's kernel panicked"
        elif not outcome.up_after and now - started > options.boot_seconds:
            outcome.problem = f"the guest was not up after {options.boot_seconds} s"
        elif now - heard > options.silent_seconds:
            outcome.problem = f"the guest hung: nothing heard for {options.silent_seconds} s"
        elif now - started > options.total_seconds:
            outcome.problem = f"the run took longer than {options.total_seconds} s"
        if outcome.problem:
            _ask_why(monitor)
            break
    sys.stdout.write(log.read_bytes()[shown:].decode(errors="replace") if log.exists() else "")
    return outcome


def _ask_why(monitor: Path) -> None:
    """Have a guest that hangs print its blocked tasks and CPUs' stacks."""
    try:
        with socket.socket(socket.AF_UNIX) as line:
            line.settimeout(5)
            line.connect(str(monitor))
            # 9: show all of it on the console.
            for key in "9wl":
                line.sendall(f"sendkey alt-sysrq-{key}\n".encode())
                # A busy guest takes its time to answer a key.
                time.sleep(5)
    except OSError:
        pass


def _read_results(out: Path, outcome: Outcome, tests: bool = True) -> None:
    """Add up the junit files of all boots."""
    if outcome.problem and (out / "tests.log").exists():
        log = (out / "tests.log").read_text(errors="replace")
        passed = re.findall(r"^(\S+::.+) PASSED", log, re.MULTILINE)
        # Those of a reboot build on each other.
        outcome.done = tuple(name for name in passed if "test_reboot" not in name)
        outcome.failures = re.findall(r"^(\S+::.+) FAILED", log, re.MULTILINE)
    if not outcome.problem and not (out / "done").exists():
        up = "ended before its tests did" if outcome.up_after else "never came up"
        outcome.problem = f"the guest {up}"
    if not outcome.problem:
        outcome.problem = str(json.loads((out / "done").read_text())["problem"])
    for file in sorted(out.glob("junit-*.xml")):
        try:
            cases = list(ElementTree.parse(file).getroot().iter("testcase"))  # noqa: S314 (our own guest's)
        except ElementTree.ParseError:
            continue
        for case in cases:
            if case.find("failure") is not None or case.find("error") is not None:
                outcome.failed += 1
                outcome.failures.append(f"{case.get('classname')}::{case.get('name')}")
            elif case.find("skipped") is not None:
                outcome.skipped += 1
            else:
                outcome.passed += 1
    if tests and not outcome.problem and not outcome.passed + outcome.failed:
        outcome.problem = "no test ran"
