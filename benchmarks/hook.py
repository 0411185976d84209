"""How long the hook takes, as ratios of what cannot be avoided, in one run.

    sudo /usr/bin/python3 benchmarks/hook.py [ROUNDS]

The gate, the entry point and the plugins are the real ones. The huge pages are real; cpufreq is a few
plain files, since many machines (and all virtual ones) have none.
"""

from __future__ import annotations

import compileall
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
PYTHON = "/usr/bin/python3"
UUID = "2790a6d9-2867-42eb-8141-0c12b501ef31"
PLAIN = f"<domain type='qemu' id='1'><name>plain</name><uuid>{UUID}</uuid>{'<x/>' * 1200}</domain>"
TUNED = (
    f"<domain type='qemu' id='1'><name>tuned</name><uuid>{UUID}</uuid><memory>65536</memory><memoryBacking>"
    "<hugepages/><source type='memfd'/></memoryBacking><vcpu>2</vcpu></domain>"
)


@dataclass(frozen=True)
class Case:
    """One command to time, its stdin, what it is compared with, and the most it may be of that."""

    name: str
    command: list[str]
    stdin: str = ""
    against: str = ""
    most: float = 0.0


def lay_out(root: Path) -> Path:
    """Make a host below root with the real gate and package; return the gate."""
    lib = root / "lib"
    shutil.copytree(
        REPO / "src" / "virt_usher", lib / "virt_usher", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copytree(REPO / "plugins", lib / "plugins", ignore=shutil.ignore_patterns("__pycache__"))
    hook = lib / "virt_usher" / "hook.py"
    hook.write_text(hook.read_text().replace('LiveHost("/")', f"LiveHost({str(root)!r})"))
    compileall.compile_dir(lib, quiet=1)
    (root / "sys/devices/system").mkdir(parents=True)
    (root / "proc").mkdir()
    for real in ("sys/devices/system/node", "sys/kernel", "proc/meminfo"):
        (root / real).symlink_to(f"/{real}")
    # libvirt's own sign that it knows the mount; the pages themselves need none
    (root / "proc/mounts").write_text("none /mnt hugetlbfs rw,pagesize=2M 0 0\n")
    (root / "mnt/libvirt/qemu").mkdir(parents=True)
    (root / "sys/devices/system/cpu").mkdir()
    (root / "sys/devices/system/cpu/online").write_text("0-7\n")
    for n in range(8):
        policy = root / f"sys/devices/system/cpu/cpufreq/policy{n}"
        policy.mkdir(parents=True)
        (policy / "affected_cpus").write_text(f"{n}\n")
        (policy / "scaling_governor").write_text("powersave\n")
        (policy / "scaling_available_governors").write_text("performance powersave\n")
    (root / "etc/virt-usher/domains").mkdir(parents=True)
    (root / "etc/virt-usher/domains/tuned.toml").write_text("[plugins.hugepages]\n[plugins.governor]\n")
    (root / "run/virt-usher").mkdir(parents=True)
    gate = root / "qemu"
    text = (REPO / "hooks.d" / "qemu").read_text()
    for name, path in (("etc", "etc/virt-usher"), ("run", "run/virt-usher"), ("lib", "lib")):
        text = text.replace(_default(text, name), f"{name}={root}/{path}")
    gate.write_text(text)
    gate.chmod(0o755)
    return gate


def _default(text: str, name: str) -> str:
    line = next(line for line in text.splitlines() if line.startswith("etc="))
    return next(word for word in line.split() if word.startswith(f"{name}="))


def took(case: Case) -> float:
    """Run a case once and return milliseconds; SystemExit if it fails."""
    began = time.perf_counter()
    done = subprocess.run(case.command, input=case.stdin.encode(), capture_output=True, check=False)
    spent = (time.perf_counter() - began) * 1000
    if done.returncode:
        sys.exit(f"{case.name}: exit status {done.returncode}: {done.stderr.decode()}")
    return spent


def main() -> None:
    """Time all cases in turn, round by round, and print medians and ratios."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 40
    if os.geteuid() != 0:
        sys.exit("benchmarks/hook.py: run me as root: the gate leaves at once for anybody else")
    with tempfile.TemporaryDirectory() as tmp:
        gate = str(lay_out(Path(tmp, "one")))
        crowded = str(lay_out(Path(tmp, "crowded")))
        own = Path(tmp, "crowded/etc/virt-usher/plugins")
        own.mkdir()
        for n in range(10):
            shutil.copy(REPO / "plugins" / "governor.py", own / f"own{n}.py")
        imports = "import lxml.etree, pluggy"
        cases = [
            Case("sh -c true", ["/bin/sh", "-c", "true"]),
            Case("python3 -I -c pass", [PYTHON, "-I", "-c", "pass"]),
            Case("python3, lxml and pluggy", [PYTHON, "-I", "-c", imports]),
            Case("gate: file tests alone", [gate, "plain", "release", "end", "-"], "", "sh -c true", 1.3),
            Case("gate: XML to look at", [gate, "plain", "prepare", "begin", "-"], PLAIN, "sh -c true", 3),
            Case("prepare", [gate, "tuned", "prepare", "begin", "-"], TUNED, "python3, lxml and pluggy", 2),
            Case("start", [gate, "tuned", "start", "begin", "-"], TUNED),
            Case("started", [gate, "tuned", "started", "begin", "-"], TUNED),
            Case("stopped", [gate, "tuned", "stopped", "end", "-"], TUNED),
            Case("release", [gate, "tuned", "release", "end", "-"], TUNED, "python3 -I -c pass", 2.5),
            # 1 ms of a prepare is a hundredth; the rest is noise
            Case(
                "prepare, ten plugins off",
                [crowded, "tuned", "prepare", "begin", "-"],
                TUNED,
                "prepare",
                1.05,
            ),
            Case(
                "release, ten plugins off", [crowded, "tuned", "release", "end", "-"], TUNED, "release", 1.05
            ),
        ]
        times: dict[str, list[float]] = {case.name: [] for case in cases}
        for case in [*cases, *[c for _ in range(rounds) for c in cases]]:  # the first round warms up
            times[case.name].append(took(case))
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    for case in cases:
        ratio = medians[case.name] / medians[case.against] if case.against else 0.0
        verdict = "" if not ratio else f"  {ratio:5.2f} x {case.against} (at most {case.most})"
        print(
            f"{case.name:28} {medians[case.name]:8.2f} ms{verdict}{'  MISSED' if ratio > case.most else ''}"
        )
    whole = sum(medians[n] for n in ("prepare", "start", "started", "stopped", "release"))
    print(f"{'a whole start and stop':28} {whole:8.2f} ms{'  MISSED' if whole > 250 else ''} (at most 250)")


if __name__ == "__main__":
    main()
