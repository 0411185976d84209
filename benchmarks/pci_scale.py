"""What PCI functions cost: a hook's look at its domain's devices, and a verdict for every device.

    /usr/bin/python3 benchmarks/pci_scale.py [ROUNDS]

On generated trees of files, so sysfs's own slowness is not in it; both must stay linear.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO / "src"), str(REPO)]

from tests.host import machines  # noqa: E402  # only now can they be found

from virt_usher.config import settings  # noqa: E402
from virt_usher.domain import Domain  # noqa: E402
from virt_usher.host import Host, reset  # noqa: E402
from virt_usher.host.quirks import Quirks  # noqa: E402
from virt_usher.prepare import make_plan  # noqa: E402

SMALL, LARGE = 8, 256
MOST_MS = 20  # that a start may cost more on the large host


def tree(root: Path, functions: int) -> Host:
    """Make a host of root ports with a card of four functions behind each; none resets on its own."""
    lines = []
    for number in range(functions // 4):
        bridge = f"{number // 32:02x}:{number % 32:02x}.0"
        lines.append(f"{bridge} 1022:1633 060400 pcieport {number} - - x x")
        for f in range(4):
            card = f"{bridge}/{number + 0x40:02x}:00.{f}"
            lines.append(f"{card} 10de:13c2 030000 nouveau {number + 1000} bus multifunction x x")
    return machines.build(root, machines.parse("\n".join(lines)))


def card() -> Domain:
    """Return a domain that is given the four functions of one card."""
    devices = "".join(
        f"<hostdev type='pci' managed='yes'><source><address bus='0x40' function='{f}'/></source></hostdev>"
        for f in range(4)
    )
    return Domain.from_xml(f"<domain><name>guest</name><devices>{devices}</devices></domain>".encode())


def start(host: Host) -> None:
    """Plan a start, as the hook does: nothing is remembered from the round before."""
    domain = card()
    plan = make_plan(host, domain, settings(host, domain))
    assert not plan.problems, plan.problems


def all_verdicts(host: Host) -> None:
    """Judge each device, as `virt-usher devices` does."""
    pci, quirks = host.pci, Quirks(host)
    for device in pci.devices:
        only = frozenset((device.address,))
        assert not reset.verdict(device, reset.Given(only, only), quirks).good


def milliseconds(work: Callable[[], None], rounds: int) -> float:
    times = []  # of this process alone: what else runs here does not count
    for _ in range(rounds):
        began = time.process_time()
        work()
        times.append((time.process_time() - began) * 1000)
    return statistics.median(times)


def main() -> int:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    with tempfile.TemporaryDirectory() as folder:
        hosts = {n: tree(Path(folder, str(n)), n) for n in (SMALL, LARGE)}
        works = {"start": start, "all verdicts": all_verdicts}
        cost = {
            (name, n): milliseconds(partial(work, host), rounds)
            for name, work in works.items()
            for n, host in hosts.items()
        }
    for (name, n), ms in cost.items():
        print(f"{name:12} {n:4} functions {ms:8.2f} ms")
    more = cost["start", LARGE] - cost["start", SMALL]
    ratio = cost["all verdicts", LARGE] / cost["all verdicts", SMALL]
    print(f"a start costs {more:.1f} ms more on the large host (at most {MOST_MS})")
    print(f"all verdicts: {ratio:.1f} times the time for {LARGE // SMALL} times the functions")
    return int(more > MOST_MS or ratio > 2 * LARGE / SMALL)


if __name__ == "__main__":
    sys.exit(main())
