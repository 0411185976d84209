"""What each kind of action does to the host, and how it is undone.

The release side of virt-usher: it knows steps as the journal has them (plain dicts), no plugin, no
XML and no configuration, and imports next to nothing. A kind answers four questions: which lock,
what must be on disk before the deed, the deed, and its undo. `others` are the live steps of
all domains (this one's included) on the same key, earliest first.
"""

from __future__ import annotations

import time

from virt_usher.errors import UsherError, typed
from virt_usher.host.pool import Pool

TYPE_CHECKING = False  # importing typing would cost release more than all its work
if TYPE_CHECKING:
    from typing import Any

    from virt_usher.host import Host, LiveHost
    from virt_usher.journal import Journal, Step


class Kind:
    """How one kind of action is done and undone; the base does nothing and has nothing to undo."""

    @staticmethod
    def before(host: LiveHost, fields: dict[str, Any], others: list[Step]) -> dict[str, Any]:
        """Return what the undo will need; it is on disk before `do` runs."""
        return {}

    @staticmethod
    def do(host: LiveHost, step: Step, others: list[Step], deadline: float) -> dict[str, Any]:
        """Do the deed and return what was seen of it; OSError or UsherError refuse the start."""
        return {}

    @staticmethod
    def undo(host: LiveHost, step: Step, others: list[Step]) -> str:
        """Undo the deed, done or half done or not at all; return a remark, or ''.

        An object that vanished counts as undone. OSError keeps the step for `recover`.
        """
        return ""


class Knob(Kind):
    """A value in sysfs or /proc that several domains may want: the earliest claim rules."""

    @staticmethod
    def before(host: LiveHost, fields: dict[str, Any], others: list[Step]) -> dict[str, Any]:
        # Whoever comes later copies the true original, so that the last to go can restore it. What a stopped
        # domain left knows it too, unless the value is somebody else's by now.
        now = chosen(host, fields["path"])
        before = [s for s in others if not s.left][:1] or [s for s in others if now in _values(s)][-1:]
        old = before[0].data["old"] if before else now
        born = _born(host, fields["path"])
        return {"old": old, "born": born} if born else {"old": old}

    @staticmethod
    def do(host: LiveHost, step: Step, others: list[Step], deadline: float) -> dict[str, Any]:
        path, new = step.data["path"], step.data["new"]
        ruling = [s for s in others if not (s.failed or s.left)]
        if ruling:
            return {} if ruling[0].data["new"] == new else {"ruled": ruling[0].domain}
        return _set(host, path, new) if chosen(host, path) != new else {}

    @staticmethod
    def undo(host: LiveHost, step: Step, others: list[Step]) -> str:
        path, old = step.data["path"], step.data["old"]
        later = [s for s in others if not (s.failed or s.left)]
        if later and later[0].at < step.at:
            return ""  # the value of an earlier domain rules
        target = later[0].data["new"] if later else old
        if "born" in step.data and _born(host, path) != step.data["born"]:
            return f"{path} is gone"  # and its number may be another process's
        try:
            now = chosen(host, path)
            if now == target or (later and now == later[0].data.get("is")):
                return ""
            passed = step.data.get("values", [])  # values of others, set by an undo that was killed
            left = [s for s in others if s.left and now in _values(s)]
            if not later and any(s.at > step.at and s.data["old"] != old for s in left):
                return ""  # one who came later, and found another value, has it to put back
            ours = (
                now in _values(step)
                or any(s.data["old"] == old for s in left)
                or (not step.done and now == old)
            )
            # Killed after a write, and before it was noted how the kernel spells the value.
            unnoted = passed if step.done else [step.data["new"], *passed]
            if not ours and not any(_spelt(host, path, value, now) for value in unnoted):
                return f"{path} is {now!r} and not ours any more: left alone"
            if later:
                step.log("passed", values=[*passed, target])
            seen = _set(host, path, target)
        except (FileNotFoundError, NotADirectoryError):
            return f"{path} is gone"
        if later and seen:
            later[0].log("ok", **seen)  # it is the later domain's value that was just set
        return ""


def _values(step: Step) -> list[str]:
    """Return the values that a step can have left a knob with, but for its original."""
    return [v for v in (step.data["new"], step.data.get("is"), *step.data.get("values", [])) if v is not None]


def _born(host: Host, path: str) -> int | None:
    """Return when the process began whose file in /proc this is, None of any other file."""
    pid = path.split("/")[2] if path.startswith("/proc/") else ""
    return host.started_at(int(pid)) if pid.isdecimal() else None


def chosen(host: Host, path: str) -> str:
    """Read a knob; of a choice shown as 'always [madvise] never' the chosen word."""
    text = host.read(path)
    words = text.split()
    marked = [w[1:-1] for w in words if w.startswith("[") and w.endswith("]")]
    return marked[0] if len(marked) == 1 and len(words) > 1 else text


def _set(host: LiveHost, path: str, value: str) -> dict[str, str]:
    """Write a knob, and return how the kernel spells it where that differs (masks, lists)."""
    host.write(path, value)
    seen = chosen(host, path)
    return {} if seen == value else {"is": seen}


def _spelt(host: LiveHost, path: str, value: str, now: str) -> bool:
    """Tell by writing it whether the kernel shows `value` as `now`; if not, `now` is put back."""
    try:
        host.write(path, value)
    except OSError as error:
        if error.errno != 22:  # EINVAL: no value of this knob
            raise
        return False
    if chosen(host, path) == now:
        return True
    host.write(path, now)
    return False


class OneWay(Kind):
    """A write that nothing can undo, such as compacting memory."""

    @staticmethod
    def do(host: LiveHost, step: Step, others: list[Step], deadline: float) -> dict[str, Any]:
        host.write(step.data["path"], step.data["new"])
        return {}


class Pages(Kind):
    """Huge pages of one size on one node or one of several: a sum, kept as deltas.

    The kernel has no compare-and-swap for pools and may give less than asked while reporting
    success. So each change of a pool is announced (`pool`: node, pages before, pages wanted) and then
    its observed size noted (`got`). A change without its `got` belongs to a process that died: the next
    to hold the pool's lock settles it from what the pool shows.
    """

    CHUNK_KIB = 1 << 20  # one write allocates at most 1 GiB, so that a deadline is noticed

    @staticmethod
    def do(host: LiveHost, step: Step, others: list[Step], deadline: float) -> dict[str, Any]:
        for other in [*others, step]:
            _settle(host, other)
        helps = [_compact, _compact, _drop_caches if step.data.get("drop_caches") else _compact]
        pools = [Pool(host, step.data["size"], n) for n in step.data["nodes"]]
        while (missing := step.data["pages"] - available(host, pools, others)) > 0:
            wanted = missing
            for pool in pools:
                while wanted > 0 and (grown := _grow(host, step, pool, wanted, deadline)) > 0:
                    wanted -= grown
            if wanted == missing:  # not one page came: make room, and give up when nothing helps
                if not helps or time.monotonic() > deadline:
                    raise _short(step, pools, missing)
                helps.pop(0)(host, pools)
        return {"added": {str(n): c for n, c in _ours(step).items() if c}}

    @staticmethod
    def undo(host: LiveHost, step: Step, others: list[Step]) -> str:
        remarks = []
        for other in [*others, step]:
            _settle(host, other)
        for node, count in _ours(step).items():
            pool = Pool(host, step.data["size"], node)
            if count <= 0 or not pool.exists:
                continue
            now = pool.persistent
            if now < count:
                remarks.append(f"node {node} had {now} pages left of our {count}: taken away meanwhile")
            _change(host, step, pool, -min(now, count))
        return "; ".join(remarks)


def available(host: LiveHost, pools: list[Pool], others: list[Step]) -> int:
    """Return the pages a domain may count on: free, less reserved, less others' needs.

    Others' needs are what their QEMU has not taken yet (it does between `start` and `started`), or all
    where it has gone and its pages are not given back yet. Of what it lacks a QEMU that takes its pages
    has reserved most itself, which must not count twice.
    """
    nodes, promised, mapped = {p.node for p in pools}, 0, 0
    # Before `free` is looked at, or what is taken meanwhile counts as free.
    for journal in dict.fromkeys(s.journal for s in others):
        due = [s for s in others if s.journal is journal]
        lacks, begun = _lacks(host, journal, pools[0].size_kib)
        promised += min(lacks, sum(_due(s) for s in due if nodes & set(s.data["nodes"])))
        mapped += min(lacks, sum(map(_due, due))) if begun else 0
    return sum(p.free for p in pools) - max(0, pools[0].reserved - mapped) - promised


def _lacks(host: LiveHost, journal: Journal, size: int) -> tuple[int, bool]:
    """Return how many pages a domain's QEMU has still to take, at most, and whether it has begun to."""
    due: int = sum(_due(s) * s.data["size"] for s in journal.live() if s.kind == "pages")
    pid, held = host.qemu(journal.name, journal.uuid), 0
    for line in host.get(f"/proc/{pid}/status").splitlines() if pid else []:
        if line.startswith("HugetlbPages:"):
            held = int(line.split()[1])
    return -(-max(0, due - held) // size), held > 0


def _due(step: Step) -> int:
    """Return the pages that a domain's QEMU is to find: of a start that was killed here, what it had got.

    It will not go on, and all of them are given back.
    """
    return int(step.data["pages"]) if step.done else sum(_ours(step).values())


def _grow(host: LiveHost, step: Step, pool: Pool, wanted: int, deadline: float) -> int:
    if time.monotonic() > deadline:
        return 0
    return _change(host, step, pool, min(wanted, max(1, Pages.CHUNK_KIB // pool.size_kib)))


def _change(host: LiveHost, step: Step, pool: Pool, by: int) -> int:
    """Change a pool by some pages, on record before and after; return what the kernel did."""
    before = pool.persistent
    step.log("pool", node=pool.node, before=before, by=by)
    pool.resize(host, before + by)
    return _settle(host, step)


def _settle(host: LiveHost, step: Step) -> int:
    """Note what became of a step's last announced change, if that is not known yet."""
    changes = step.data.get("pool", [])
    if not changes or "got" in changes[-1]:
        return 0
    last = changes[-1]
    seen = Pool(host, step.data["size"], last["node"]).persistent - last["before"]
    low, high = sorted((0, last["by"]))
    step.log("got", by=max(low, min(high, seen)))
    return int(last["got"])


def _ours(step: Step) -> dict[int, int]:
    """Return how many pages a step holds on each node."""
    ours: dict[int, int] = {}
    for change in step.data.get("pool", []):
        ours[change["node"]] = ours.get(change["node"], 0) + change.get("got", 0)
    return ours


def _compact(host: LiveHost, pools: list[Pool]) -> None:
    for pool in pools:
        _try_write(host, f"/sys/devices/system/node/node{pool.node}/compact", "1")


def _drop_caches(host: LiveHost, pools: list[Pool]) -> None:
    _try_write(host, "/proc/sys/vm/drop_caches", "3")
    _compact(host, pools)


def _try_write(host: LiveHost, path: str, value: str) -> None:
    """Write what may help and need not exist (CONFIG_COMPACTION, a container without /proc/sys)."""
    try:
        host.write(path, value)
    except OSError:
        return


def _short(step: Step, pools: list[Pool], missing: int) -> UsherError:
    size, pages = step.data["size"], step.data["pages"]
    where = "node " + " and ".join(str(p.node) for p in pools)
    had = pages - missing
    tip = (
        ""
        if step.data.get("drop_caches")
        else f"virt-usher enable {typed(step.domain)} hugepages drop_caches=true, "
    )
    return UsherError(
        f"{pages} pages of {size} KiB are needed on {where}, and only {had} could be had: "
        f"{missing * size // 1024} MiB more cannot be found in one piece",
        f"stop other domains or programs, {tip}or reserve them at boot with hugepages=",
    )


KINDS: dict[str, type[Kind]] = {"knob": Knob, "oneway": OneWay, "pages": Pages}

# Loaded when a step asks for it, so that a release pays only for what its domain had: kind -> module.
ELSEWHERE = {
    "driver": "virt_usher.rebind",
    "isolation": "virt_usher.isolate",
    "module": "virt_usher.unload",
    "scripts": "virt_usher.runs",
    "unit": "virt_usher.units",
}


def kind_of(name: str) -> type[Kind]:
    """Return how a kind of action is done and undone; LookupError where this version has no such kind.

    A module of ELSEWHERE puts its kind into KINDS when it is imported.
    """
    if name not in KINDS and name in ELSEWHERE:
        __import__(ELSEWHERE[name])
    return KINDS[name]
