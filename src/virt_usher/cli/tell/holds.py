"""What one change is now, as data: original and present value, and whether it is ours still.

What to compare depends on the kind of the change; a kind without an entry here has nothing to compare.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from virt_usher.effects import chosen
from virt_usher.errors import UsherError
from virt_usher.host import LiveHost
from virt_usher.host.pool import Pool
from virt_usher.journal import Step

Told = dict[str, Any]


def tell(host: LiveHost, step: Step, claims: list[Step]) -> Told:
    """Tell of one change; `claims` are those of all domains on its key, earliest first."""
    told = {k: v for k, v in step.data.items() if k in ("plugin", "what", "kind", "key", "ms")}
    told |= {"left_behind": step.data.get("cause"), "overruled_by": None, "drift": False}
    look = _LOOKS.get(step.kind)
    try:
        return told | look(host, step, claims) if look else told
    except OSError as error:
        return told | {"unreadable": f"{error.filename}: {error.strerror}"}


def _knob(host: LiveHost, step: Step, claims: list[Step]) -> Told:
    """A value: the earliest claim rules."""
    ruler = next((c for c in claims if not (c.failed or c.left)), step)
    old, new = step.data.get("old"), step.data["new"]
    try:
        now = chosen(host, step.data["path"])
    except OSError:
        now = None  # gone, or a CPU that is offline: nothing that anybody set
    ours = {ruler.data["new"], ruler.data.get("is"), None}
    return {
        "original": old,
        "wanted": new,
        "present": now,
        "overruled_by": ruler.domain if ruler.data["new"] != new else None,
        # A change that is only announced may not have happened yet.
        "drift": now not in ours and (ruler.done or now != old),
    }


def _pages(host: LiveHost, step: Step, claims: list[Step]) -> Told:
    """Huge pages: how many are ours on each node."""
    ours: dict[int, int] = {}
    for change in step.data.get("pool", []):
        # A change whose outcome is not on record yet counts as nothing: whoever settles it, notes it.
        ours[change["node"]] = ours.get(change["node"], 0) + int(change.get("got", 0))
    found = [(count, Pool(host, step.data["size"], node)) for node, count in ours.items() if count]
    pools = [{"node": p.node, "ours": n, "present": p.persistent, "free": p.free} for n, p in found]
    return {"pools": pools, "drift": any(p["present"] < p["ours"] for p in pools)}


def _driver(host: LiveHost, step: Step, claims: list[Step]) -> Told:
    """A PCI device on another driver."""
    device = f"/sys/bus/pci/devices/{step.data['address']}"
    now, wanted = host.link(f"{device}/driver") or "no driver", step.data["to"]
    # What libvirt manages it may take on to the vfio driver that was made for the device.
    good = now == wanted or (step.data.get("managed") and host.exists(f"{device}/vfio-dev"))
    original = step.data.get("driver") or "no driver"
    return {"original": original, "wanted": wanted, "present": now, "drift": step.done and not good}


def _unit(host: LiveHost, step: Step, claims: list[Step]) -> Told:
    """A systemd unit that is to be active or inactive."""
    from virt_usher import units

    wanted = step.data["want"]
    try:
        now = units.state(host, step.data["unit"])
    except (OSError, UsherError) as error:
        return {"original": step.data.get("old"), "wanted": wanted, "present": str(error)}
    there = now in (wanted, step.data.get("reached"))
    drift = step.done and not there and "skipped" not in step.data
    return {"original": step.data.get("old"), "wanted": wanted, "present": now, "drift": drift}


def _module(host: LiveHost, step: Step, claims: list[Step]) -> Told:
    """A module that is to be out of the kernel."""
    now = "loaded" if host.exists(f"/sys/module/{step.data['module']}/initstate") else "not loaded"
    original = "loaded" if step.data["old"]["loaded"] else "not loaded"
    return {
        "original": original,
        "wanted": "not loaded",
        "present": now,
        "drift": step.done and now == "loaded",
    }


def _isolation(host: LiveHost, step: Step, claims: list[Step]) -> Told:
    """Masks of CPUs, many at once: only those that are not as the claims want them are told."""
    from virt_usher import isolate

    astray = isolate.drift(host, step.data["part"]) if step.done else []
    return {"masks": len(step.data.get("was", {})), "astray": astray, "drift": bool(astray)}


_LOOKS: dict[str, Callable[[LiveHost, Step, list[Step]], Told]] = {
    "knob": _knob,
    "pages": _pages,
    "driver": _driver,
    "unit": _unit,
    "module": _module,
    "isolation": _isolation,
}
