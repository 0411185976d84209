"""Verdicts on random machines, against a model of what the kernel does when it resets."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.host import machines

from virt_usher.host import reset
from virt_usher.host.quirks import Quirks

METHODS = ("flr", "pm")  # in the kernel's order; `bus` comes last


@dataclass
class Function:
    """A piece of hardware: what it can do, who drives it, and what the kernel wrote down when it found it."""

    address: str
    can: frozenset[str]
    driver: str
    group: str
    is_bridge: bool = False
    below: list[Function] = field(default_factory=list)
    listed: list[str] = field(default_factory=list)


@dataclass
class Port:
    """A root port with one card behind it."""

    address: str
    pciehp: bool
    multifunction: bool
    card: list[Function]

    def found(self) -> None:
        """Do what pci_init_reset_methods does: each function sees only those found before it."""
        for level in (self.card, *(f.below for f in self.card)):
            for number, function in enumerate(level):
                alone_so_far = number == 0
                function.listed = [m for m in METHODS if m in function.can] + ["bus"] * alone_so_far

    def function_reset(self, function: Function) -> str:
        """Return the method that works: ENOTTY makes the kernel try the next one."""
        near = next(level for level in (self.card, *(f.below for f in self.card)) if function in level)
        slot = self.pciehp and near is self.card and not self.multifunction
        works = [m for m in function.listed if m != "bus" or len(near) == 1 or slot]
        return works[0] if works else ""

    def hot_reset(self, function: Function, given: set[str], groups: set[str]) -> bool:
        """Follow vfio_pci_dev_set_hot_reset: all that is reset must be on vfio, and in a group of ours."""
        top = function in self.card
        affected = [*self.card, *(b for f in self.card for b in f.below)] if top else self._with(function)
        return not any(f.is_bridge for f in affected) and all(
            (f.driver == "vfio-pci" or f.address in given) and f.group in groups for f in affected
        )

    def _with(self, function: Function) -> list[Function]:
        return next(f.below for f in self.card if function in f.below)


@st.composite
def ports(draw: st.DrawFn) -> list[Port]:
    found = []
    for number in range(draw(st.integers(1, 2))):
        bus = 1 + 2 * number
        card = [_function(draw, f"{bus:02x}:00.{f}", number) for f in range(draw(st.integers(1, 3)))]
        if draw(st.booleans()):
            bridge = card[-1]
            bridge.is_bridge, bridge.driver = True, "pcieport"
            bridge.below = [
                _function(draw, f"{bus + 1:02x}:{s:02x}.0", number) for s in range(draw(st.integers(1, 2)))
            ]
        found.append(Port(f"00:{bus:02x}.0", draw(st.booleans()), draw(st.booleans()), card))
        found[-1].found()
    return found


def _function(draw: st.DrawFn, address: str, port: int) -> Function:
    can = draw(st.frozensets(st.sampled_from(METHODS)))
    driver = draw(st.sampled_from(["nouveau", "vfio-pci", "-"]))
    return Function(machines.full(address), can, driver, str(10 * port + draw(st.integers(1, 2))))


def lines(machine: list[Port]) -> str:
    """Write the machine as a fixture has it."""
    text = []
    for port in machine:
        text.append(f"{port.address} 8086:1901 060400 pcieport 0 - {'pciehp' if port.pciehp else '-'} x x")
        flag = "multifunction" if port.multifunction else "-"
        for function in port.card:
            text.append(_line(f"{port.address}/{function.address}", function, flag))
            text += [_line(f"{port.address}/{function.address}/{b.address}", b, "-") for b in function.below]
    return "\n".join(text)


def _line(chain: str, function: Function, flag: str) -> str:
    code = "060400" if function.is_bridge else "030200"
    methods = "+".join(function.listed) or "-"
    return f"{chain} 10de:13c2 {code} {function.driver} {function.group} {methods} {flag} x x"


@given(st.data())
@settings(max_examples=40)
def test_the_verdict_is_what_the_kernel_would_do(data: st.DataObject) -> None:
    machine = data.draw(ports())
    every = [(p, f) for p in machine for c in p.card for f in (c, *c.below)]
    chosen = {f.address for _, f in every if not f.is_bridge and data.draw(st.booleans())}
    with tempfile.TemporaryDirectory() as folder:
        host = machines.build(Path(folder), machines.parse(lines(machine)))
        pci, quirks = host.pci, Quirks(host)
        for port, function in every:
            given_too = chosen | {function.address}
            domain = reset.Given(frozenset(given_too), frozenset(given_too))
            found = reset.verdict(pci.device(function.address), domain, quirks)
            if function.is_bridge:
                assert found.kind == "bridge"
                continue
            works = port.function_reset(function)
            groups = {f.group for _, f in every if f.address in given_too}
            hot = port.hot_reset(function, given_too, groups)
            best = "function" if works not in ("", "pm") else "hot" if hot else "pm" if works else "none"
            assert (found.kind, found.methods[:1]) == (best, (works,) if works else ()), function
            if found.companions:
                both = frozenset(given_too | set(found.companions))
                better = reset.verdict(pci.device(function.address), reset.Given(both, both), quirks)
                assert better.good, (found, better)
