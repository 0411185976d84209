"""What PCI functions cost: a hook's look at its domain's devices, a verdict and the users of every device.

    /usr/bin/python3 benchmarks/pci_scale.py [ROUNDS]

And the walk over the open files of all processes. On generated trees of files, so the slowness of sysfs and
/proc is not in it; all must stay linear.
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
from virt_usher.host import Host, reset, users  # noqa: E402
from virt_usher.host.quirks import Quirks  # noqa: E402
from virt_usher.prepare import make_plan  # noqa: E402

SMALL, LARGE = 8, 256
MOST_MS = 20  # that a start may cost more on the large host
FEW, MANY = 10_000, 100_000  # open files
WALK_MS = 1000  # that the walk over many of them may take


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


def all_users(host: Host) -> None:
    """Look for who uses each device, as `virt-usher devices` does."""
    assert not users.find(host, [d.address for d in host.pci.devices], together=False)


def processes(root: Path, files: int) -> Host:
    """Make a host where processes have a hundred open files each, and one card is on vfio."""
    host = tree(root, 4)
    node = root / f"dev/vfio/{host.pci.device('0000:40:00.0').group}"
    node.parent.mkdir(parents=True)
    node.touch()
    for pid in range(1000, 1000 + files // 100):
        folder = root / f"proc/{pid}/fd"
        folder.mkdir(parents=True)
        for fd in range(100):
            (folder / str(fd)).symlink_to(f"socket:[{pid}{fd:03}]")
    return host


def walk(host: Host) -> None:
    """Look for who has the card open: nobody, so every file is looked at."""
    assert not users.find(host, ["0000:40:00.0"])


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
        opened = {n: processes(Path(folder, f"files-{n}"), n) for n in (FEW, MANY)}
        works = [
            ("start", start, hosts),
            ("all verdicts", all_verdicts, hosts),
            ("all users", all_users, hosts),
        ]
        cost = {
            (name, n): milliseconds(partial(work, host), rounds)
            for name, work, sizes in (*works, ("walk", walk, opened))
            for n, host in sizes.items()
        }
    for (name, n), ms in cost.items():
        print(f"{name:12} {n:6} {'open files' if name == 'walk' else 'functions '} {ms:8.2f} ms")
    more = cost["start", LARGE] - cost["start", SMALL]
    print(f"a start costs {more:.1f} ms more on the large host (at most {MOST_MS})")
    print(f"the walk takes {cost['walk', MANY]:.0f} ms (at most {WALK_MS})")
    good = more <= MOST_MS and cost["walk", MANY] <= WALK_MS
    for name, small, large in (
        ("all verdicts", SMALL, LARGE),
        ("all users", SMALL, LARGE),
        ("walk", FEW, MANY),
    ):
        ratio = cost[name, large] / cost[name, small]
        good = good and ratio <= 2 * large / small
        print(f"{name}: {ratio:.1f} times the time for {large // small} times as many")
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
