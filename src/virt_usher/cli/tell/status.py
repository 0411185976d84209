"""What a domain holds, as data: original and present values, and what is not as it should be."""

from __future__ import annotations

from typing import Any

from virt_usher.cli.tell.holds import tell as tell_of
from virt_usher.host import LiveHost
from virt_usher.journal import Journal
from virt_usher.locks import Locks


def tell(host: LiveHost, journal: Journal, everything: list[Journal]) -> dict[str, Any]:
    """Tell all about one domain, as data."""
    claims = sorted((s for j in everything for s in j.live()), key=lambda s: s.at)
    holds = [tell_of(host, s, [c for c in claims if c.key == s.key]) for s in journal.live()]
    qemu = host.qemu(journal.name, journal.uuid)
    busy = Locks(host, 0).holder(f"domain {journal.name}")
    workers = [_worker(host, *r["abandoned"]) for r in journal.records if "abandoned" in r]
    trouble = [f"{s.data.get('plugin')}: {s.data['why']}" for s in journal.steps.values() if s.failed]
    trouble += [str(r["problem"]) for r in journal.records if "problem" in r and r["problem"] not in trouble]
    trouble += [f"left behind: {h['what']}: {h['left_behind']}" for h in holds if h["left_behind"]]
    unreadable = ((h["what"], h["unreadable"]) for h in holds if "unreadable" in h)
    trouble += [f"cannot be looked at: {what}: {why}" for what, why in unreadable]
    trouble += [f"changed by somebody else: {h['what']}" for h in holds if h["drift"]]
    trouble += [f"pid {w['pid']} was not ready in time; it waits in {w['waits_in']}" for w in workers if w]
    if not journal.readable:
        trouble.append("the journal was written by a newer virt-usher: install that again")
    working = not busy.startswith("nobody")
    if qemu is None and not working:
        trouble.append("no QEMU of it runs: virt-usher recover, unless it is starting just now")
    return {
        "domain": journal.name,
        "uuid": journal.uuid,
        "id": journal.start_id,
        "since": journal.header.get("at"),
        "qemu": qemu,
        "working": busy if working else None,
        "holds": holds,
        "abandoned": [w for w in workers if w],
        "trouble": trouble,
    }


def _worker(host: LiveHost, pid: int, started: int | None) -> dict[str, Any] | None:
    """Tell what an abandoned worker waits for; None if it has ended."""
    if started is None or host.started_at(pid) != started:
        return None
    stack = host.get(f"/proc/{pid}/stack").splitlines()
    return {"pid": pid, "waits_in": host.waits_in(pid) or "no system call", "stack": stack}
