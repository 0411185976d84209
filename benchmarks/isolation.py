"""What isolation adds to a domain's start and stop, as ratios within one run.

    sudo /usr/bin/python3 benchmarks/isolation.py [ROUNDS]

Real starts by way of libvirt, of domains without a system in them, with virt-usher installed: one that has
no plugin, one with a plugin that does next to nothing, and one whose CPUs are isolated.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO / "src"))

from virt_usher import cpulist  # noqa: E402  # only now can it be found
from virt_usher.host import LiveHost  # noqa: E402
from virt_usher.host.topology import Topology  # noqa: E402

DOMAIN = """<domain type='qemu'><name>{name}</name><memory unit='MiB'>32</memory><vcpu>1</vcpu>
<cputune><vcpupin vcpu='0' cpuset='{cpus}'/><emulatorpin cpuset='{rest}'/></cputune>
<os><type arch='x86_64'>hvm</type></os><devices><memballoon model='none'/></devices></domain>"""
PLUGINS = {
    "plain": [],
    "knob": ["sysfs", "set=/proc/sys/vm/stat_interval=10"],
    "isolated": ["cpu_isolation"],
}


def main() -> None:
    """Start and stop the domains in turn, round by round, and print medians and ratios."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    topology = Topology(LiveHost())
    if len(topology.cores) < 2:
        sys.exit("benchmarks/isolation.py: with one core there is nothing to isolate")
    core = topology.cores[-1]
    times: dict[tuple[str, str], list[float]] = {(n, w): [] for n in PLUGINS for w in ("start", "destroy")}
    try:
        for name, words in PLUGINS.items():
            define(name, cpulist.show(core), cpulist.show(topology.online - core))
            if words:
                run("virt-usher", "enable", f"benchmark-{name}", *words)
        for _ in range(rounds + 1):  # the first round warms up
            for (name, what), taken in times.items():
                began = time.perf_counter()
                run("virsh", "--quiet", what, f"benchmark-{name}")
                taken.append(time.perf_counter() - began)
    finally:
        for name in PLUGINS:
            subprocess.run(["virsh", "destroy", f"benchmark-{name}"], capture_output=True, check=False)
            subprocess.run(["virsh", "undefine", f"benchmark-{name}"], capture_output=True, check=False)
            Path(f"/etc/virt-usher/domains/benchmark-{name}.toml").unlink(missing_ok=True)
    medians = {case: statistics.median(taken[1:]) for case, taken in times.items()}
    for (name, what), seconds in medians.items():
        ratio = seconds / medians["plain", what]
        print(f"{what:8} {name:9} {seconds:6.2f} s {ratio:5.2f} x plain")


def define(name: str, cpus: str, rest: str) -> None:
    """Make one of the domains known to libvirt."""
    xml = DOMAIN.format(name=f"benchmark-{name}", cpus=cpus, rest=rest)
    subprocess.run(
        ["virsh", "--quiet", "define", "/dev/stdin"], input=xml, text=True, check=True, capture_output=True
    )


def run(*command: str) -> None:
    """Run a command; SystemExit with its own words if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr}")


if __name__ == "__main__":
    main()
