"""The effect kind 'isolation': keep one part of the host off CPUs that domains are pinned to.

A part (see `masks`) is a set of named masks of CPUs. Each is held to what it was less all CPUs that live
steps isolate. Every step carries the masks' originals: the first reads them, a later one copies them
and adds what is new, and whoever leaves hands on what only he knew; the last one restores. A mask that
these steps cannot have left as it is, is somebody else's by now: it stays, and is reported.
"""

from __future__ import annotations

import time

from virt_usher import cpulist
from virt_usher.effects import KINDS, Kind
from virt_usher.errors import UsherError
from virt_usher.host import RUN_DIR
from virt_usher.masks import PARTS, every_cpu

TYPE_CHECKING = False  # importing typing would cost release more than all its work
if TYPE_CHECKING:
    from typing import Any

    from virt_usher.host import Host, LiveHost
    from virt_usher.journal import Step
    from virt_usher.masks import Cpus, Originals

MOST = 5  # masks that a remark names
SECONDS = 30.0  # for programs, where no deadline of a start counts


class Isolation(Kind):
    """Hold one part of the host to the CPUs that no domain isolates."""

    @staticmethod
    def before(host: LiveHost, fields: dict[str, Any], others: list[Step]) -> dict[str, Any]:
        part, mates, every = PARTS[fields["part"]], _mates(fields, others), every_cpu(host)
        deadline = time.monotonic() + SECONDS
        for mate in (m for m in mates if not m.left):  # another start may have come between our plan and this
            if not fields["share"] and (both := _cpus(mate) & cpulist.parse(fields["cpus"])):
                raise UsherError(f"CPU {cpulist.show(both)} is isolated for the domain {mate.domain!r}")
        part.settle(host, deadline)
        was, now = _originals(mates), part.look(host)
        spared = {n for data in (fields, *(s.data for s in mates)) for n in data["spare"]}
        known = _inherited(host, fields["part"], now, was, mates) | was
        new = [n for n in now if n not in known or not _ours(now[n], known[n], mates, every)]
        firsts = {n: now[n] for n in new if n not in spared}
        return {"was": known | part.originals(host, firsts, deadline)}

    @staticmethod
    def do(host: LiveHost, step: Step, others: list[Step], deadline: float) -> dict[str, Any]:
        part, steps = PARTS[step.data["part"]], [*_mates(step.data, others), step]
        moves, _ = _moves(host, steps, steps, untouched=True)
        stays = part.write(host, moves, _originals(steps), deadline)
        return {"stays": stays} if stays else {}

    @staticmethod
    def undo(host: LiveHost, step: Step, others: list[Step]) -> str:
        part, mates = PARTS[step.data["part"]], _mates(step.data, others)
        steps = sorted([*mates, step], key=lambda s: s.at)
        was, deadline = _originals(steps), time.monotonic() + SECONDS
        part.settle(host, deadline)
        if mates and _originals(mates) != was:
            mates[-1].log("ok", was=was)
        # One that is as it was at first has never moved: its driver does not let it.
        moves, foreign = _moves(host, steps, mates, untouched=False)
        stays = part.write(host, moves, was, deadline)
        if stays:
            name, why = next(iter(stays.items()))
            raise OSError(5, f"{why}, and {len(stays) - 1} more" if len(stays) > 1 else why, name)
        if not mates:
            part.tidy(host, was)
        told = [f"{part.short(n)} ({cpulist.show(c)})" for n, c in list(foreign.items())[:MOST]]
        more = f" and {len(foreign) - MOST} more" if len(foreign) > MOST else ""
        return f"not ours any more, left alone: {', '.join(told)}{more}" if foreign else ""


def claims(host: Host) -> dict[str, Cpus]:
    """Return domain -> CPUs it isolates, from all journals; takes no lock."""
    return {s.domain: _cpus(s) for s in _steps(host) if not s.left}


def preview(host: Host, part: str, cpus: Cpus, spare: frozenset[str]) -> dict[tuple[Cpus, Cpus], list[str]]:
    """Return (CPUs of now, CPUs to come) -> masks, for what another domain's isolation would change."""
    isolated = cpus.union(*claims(host).values())
    found: dict[tuple[Cpus, Cpus], list[str]] = {}
    for name, now in PARTS[part].look(host).items():
        new = confined(now, isolated, every_cpu(host))
        if new != now and name not in spare:
            found.setdefault((now, new), []).append(PARTS[part].short(name))
    return found


def drift(host: Host, part: str) -> list[str]:
    """Return the masks of a part that are not as the domains' claims want them."""
    steps = _mates({"part": part}, _steps(host))
    if not steps or PARTS[part].lags:
        return []
    moves, foreign = _moves(host, steps, steps, untouched=True)
    stays = {n for s in steps for n in s.data.get("stays", {})}
    isolated = frozenset[int]().union(*(_cpus(s) for s in steps if not s.left))
    # irqbalance and drivers move interrupts all the time: astray are those on isolated CPUs.
    astray = [n for n, cpus in foreign.items() if part != "irqs" or cpus & isolated]
    return [PARTS[part].short(n) for n in (*astray, *moves) if n not in stays]


def confined(was: Cpus, isolated: Cpus, every: Cpus) -> Cpus:
    """Return what a mask becomes: its own less the isolated, or if nothing is left all that are not."""
    return was - isolated or every - isolated


def _steps(host: Host) -> list[Step]:
    from virt_usher.journal import Journal

    names = [n[:-4] for n in host.entries(RUN_DIR) if n.endswith(".jnl")]
    steps = [s for n in names for s in Journal(host, n).live() if s.kind == "isolation" and not s.failed]
    return sorted(steps, key=lambda s: s.at)


def _mates(fields: dict[str, Any], others: list[Step]) -> list[Step]:
    return [s for s in others if s.data.get("part") == fields["part"]]


def _cpus(step: Step) -> Cpus:
    return cpulist.parse(step.data["cpus"])


def _originals(steps: list[Step]) -> Originals:
    """Return name -> [CPUs as text, more]; the latest step's word counts."""
    known: Originals = {}
    for step in steps:
        known |= step.data["was"]
    return known


def _ours(now: Cpus, was: list[Any], steps: list[Step], every: Cpus) -> bool:
    """Tell whether these steps, done, half done or half undone, can have left a mask like this."""
    own = cpulist.parse(was[0]) or every
    gone = [_cpus(s) for s in steps]
    taken = frozenset[int]().union(*(c for c in gone if c & own <= own - now))
    left_out = frozenset[int]().union(*(c for c in gone if c <= every - now))
    return now in (own, own - taken) or (own <= left_out and now == every - left_out)


def _inherited(host: Host, part: str, now: dict[str, Cpus], was: Originals, steps: list[Step]) -> Originals:
    """Return the originals of masks that appeared meanwhile and began with what we had set for new ones."""
    model = was.get(PARTS[part].model)
    new = [n for n in now if n not in was] if model else []
    return {n: model for n in new if model and _ours(now[n], model, steps, every_cpu(host))}


def _moves(
    host: Host, live: list[Step], holding: list[Step], untouched: bool
) -> tuple[dict[str, Cpus], dict[str, Cpus]]:
    """Return which masks must become what for those that hold on, and those that are not ours any more.

    `untouched`: those that are still what they were at first, too.
    """
    part, every, was = live[0].data["part"], every_cpu(host), _originals(live)
    isolated = frozenset[int]().union(*(_cpus(s) for s in holding if not (s.failed or s.left)))
    spared, now = {n for s in holding for n in s.data["spare"]}, PARTS[part].look(host)
    now |= PARTS[part].away(host, was.keys() - now.keys())
    moves: dict[str, Cpus] = {}
    foreign: dict[str, Cpus] = {}
    for name, original in (was | _inherited(host, part, now, was, live)).items():
        own = cpulist.parse(original[0]) or every
        wanted = own if name in spared else confined(own, isolated, every)
        if name not in now:
            continue
        if PARTS[part].lags:
            moves[name] = wanted
        elif now[name] == wanted or (now[name] == own and not untouched):
            continue
        elif _ours(now[name], original, live, every) and PARTS[part].takes(host, wanted):
            moves[name] = wanted
        else:
            foreign[name] = now[name]
    return moves, foreign


KINDS["isolation"] = Isolation
