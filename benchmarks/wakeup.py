"""How late a thread wakes up on a busy host, with and without isolation, in one run.

    sudo /usr/bin/python3 benchmarks/wakeup.py [SECONDS [CPU]]

A vCPU is a thread like any other (SCHED_OTHER) that is pinned to a CPU: so is cyclictest's, from the package
rt-tests, run in machine.slice where guests are. The host is busy with two loops for each CPU in
system.slice. Isolation is the plugin's own, through the same journal; needs a host with systemd.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO / "src"))

from virt_usher import cpulist  # noqa: E402  # only now can it be found
from virt_usher.actions import Isolate  # noqa: E402
from virt_usher.host import LiveHost, cgroup  # noqa: E402
from virt_usher.host.topology import Topology  # noqa: E402
from virt_usher.journal import Journals  # noqa: E402
from virt_usher.locks import Locks  # noqa: E402
from virt_usher.masks import PARTS  # noqa: E402

NAME = "benchmark-wakeup"
LOAD = f"{NAME}-load.service"
MOST_US = 200_000  # later than that is counted as that


def main() -> int:
    """Measure before, during and after; 0 only if isolation made it better."""
    seconds = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    host = LiveHost()
    topology = Topology(host)
    cpu = int(sys.argv[2]) if len(sys.argv) > 2 else max(topology.online)
    if why := cgroup.unsupported(host) or ("" if shutil.which("cyclictest") else "apt install rt-tests"):
        print(f"cannot run here: {why}", file=sys.stderr)
        return 2
    loops = 2 * len(topology.online)
    load = f"for i in $(seq {loops}); do while :; do :; done & done; wait"
    run("systemd-run", "--quiet", f"--unit={LOAD}", "--slice=system.slice", "sh", "-c", load)
    try:
        print(f"CPU {cpu}, {loops} busy loops on {len(topology.online)} CPUs, {seconds} s each")
        shared = latencies(cpu, seconds)
        report("shared", shared)
        journals = Journals(host, Locks(host, time.monotonic() + 3600))
        journal = journals.of(NAME)
        journal.begin("", os.getpid(), 15)
        try:
            began = time.monotonic()
            cpus = topology.whole_cores([cpu])
            for part in ("irqbalance", "irqs", "workqueues", "units"):
                if PARTS[part].there(host):
                    action = Isolate(part, cpus, cgroup.machines(host))
                    journals.do(journal, "benchmark", f"{part} off {cpulist.show(cpus)}", action.record())
            isolating = time.monotonic() - began
            alone = latencies(cpu, seconds)
            report("isolated", alone)
        finally:
            began = time.monotonic()
            if not journals.roll_back(journal):
                journal.remove()
        print(f"isolating took {isolating:.2f} s, giving back {time.monotonic() - began:.2f} s")
    finally:
        run("systemctl", "stop", LOAD)
    for what, percent in (("median", 50.0), ("99 %", 99.0), ("worst", 100.0)):
        was, now = at(shared, percent), max(1, at(alone, percent))
        print(f"{what}: {was / now:.1f} times as late when shared")
    return 0 if at(alone, 99.0) < at(shared, 99.0) else 1


def latencies(cpu: int, seconds: int) -> list[int]:
    """Return how many wake-ups were so many microseconds late."""
    command = [
        "cyclictest",
        "--policy=other",
        "--threads=1",
        f"--affinity={cpu}",
        "--interval=1000",
        "--quiet",
    ]
    command += [f"--duration={seconds}", f"--histogram={MOST_US}"]
    scope = ["systemd-run", "--quiet", "--scope", "--slice=machine.slice"]
    counts = [0] * (MOST_US + 1)
    for line in run(*scope, *command).splitlines():
        words = line.split()
        if len(words) == 2 and words[0].isdigit() and words[1].isdigit():
            counts[int(words[0])] = int(words[1])
        elif line.startswith("# Histogram Overflows:"):
            counts[MOST_US] = int(words[-1])
    return counts


def at(counts: list[int], percent: float) -> int:
    """Return how late the given share of the wake-ups was at most."""
    left = sum(counts) * percent / 100
    for late, count in enumerate(counts):
        left -= count
        if left <= 0:
            return late
    return len(counts) - 1


def report(name: str, counts: list[int]) -> None:
    """Print one line."""
    values = ", ".join(
        f"{what} {at(counts, p)} µs" for what, p in (("median", 50), ("99 %", 99), ("worst", 100))
    )
    print(f"{name:>9}: {sum(counts)} wake-ups, {values}", flush=True)


def run(*command: str) -> str:
    """Run a command and return what it says."""
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
