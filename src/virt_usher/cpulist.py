"""CPU and node lists as libvirt and the kernel write them."""

from __future__ import annotations

from collections.abc import Iterable

from virt_usher.errors import UsherError

MOST = 1 << 16  # more CPUs than any kernel takes; keeps "0-99999999999" from eating the memory


def parse(text: str) -> frozenset[int]:
    """Read '0-3,^2,8' (libvirt's cpuset, the kernel's lists) as a set of numbers.

    Raises UsherError for anything else.
    """
    chosen: set[int] = set()
    for part in text.strip().split(","):
        item = part.strip()
        if not item:
            continue
        remove = item.startswith("^")
        first, dash, last = item.removeprefix("^").partition("-")
        try:
            low = int(first)
            high = int(last) if dash else low
        except ValueError:
            raise UsherError(f"{text!r} is not a list of numbers such as '0-3,8'") from None
        if not 0 <= low <= high < MOST:
            raise UsherError(f"{text!r} has a range that makes no sense: {item!r}")
        span = range(low, high + 1)
        chosen.difference_update(span) if remove else chosen.update(span)
    return frozenset(chosen)


def show(numbers: Iterable[int]) -> str:
    """Write a set of numbers the kernel's way: '0-3,8'."""
    runs: list[list[int]] = []
    for n in sorted(set(numbers)):
        if runs and runs[-1][1] == n - 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)
