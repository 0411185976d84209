"""What a start of a domain would do, as data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lxml import etree

from virt_usher import config
from virt_usher.actions import Note
from virt_usher.domain import Domain
from virt_usher.errors import UsherError
from virt_usher.host import CONFIG_DIR, RUN_DIR, Host
from virt_usher.prepare import Plan, make_plan


def tell(host: Host, name: str, xml: bytes, trace: bool = False) -> dict[str, Any]:
    """Plan one domain's start: all that `plan` shows, as data; with `trace` each hook call too."""
    try:
        domain = Domain.from_xml(xml)
    except UsherError as error:
        problems = [{"message": error.message, "hint": error.hint}]
        return {"domain": name, "refused": True, "steps": [], "problems": problems, "waived": [], "notes": []}
    domain = replace(domain, name=name or domain.name)
    settings = config.settings(host, domain)
    calls: list[str] = []
    first = make_plan(host, domain, settings, trace=calls.append)
    plans = {"prepare": first}
    plans |= {o: make_plan(host, domain, settings, o, calls.append) for o in first.later}
    concerned = _concerned(host, domain)
    reasons = {p.message: p for o, plan in plans.items() if o != "started" for p in plan.problems}
    refused = bool(reasons) and concerned and not host.exists(f"{CONFIG_DIR}/off")
    return {
        "domain": domain.name,
        "refused": refused,
        "steps": [step for o, plan in plans.items() for step in _steps(host, o, plan)],
        "waived": list(dict.fromkeys(text for plan in plans.values() for text in plan.waived)),
        "problems": [{"message": p.message, "hint": p.hint} for p in reasons.values()],
        "notes": [*_notes(host, domain, concerned), *_at_start(host, domain, settings)],
        **({"trace": calls} if trace else {}),
    }


def _concerned(host: Host, domain: Domain) -> bool:
    """Tell whether the gate (hooks.d/qemu) lets the start of this domain through to Python.

    The gate looks for signs in what libvirt writes. A file of a person's own has other quotes, and what comes
    out of a pool is in the XML of `start` alone.
    """
    marks = (
        config.domain_file(domain.name),
        f"{CONFIG_DIR}/every-domain.toml",
        f"{RUN_DIR}/{domain.name}.jnl",
    )
    text = etree.tostring(domain.element)
    return (
        any(host.exists(m) for m in marks)
        or any(sign in text for sign in (b"<hostdev", b"vfio-pci", b"urn:virt-usher:"))
        or any(e.get("type") in ("hostdev", "nvme") for e in domain.element.iter("*"))
        or bool(config.pools(host, domain))
    )


def _at_start(host: Host, domain: Domain, settings: config.Settings) -> list[str]:
    """Name what nobody can know before libvirt has taken a device out of a pool."""
    checks = {config.ALWAYS_ON, "pci"} & {p.name for p in settings.plugins}
    return [f"a device out of network {n} is checked at start" for n in config.pools(host, domain) if checks]


def _notes(host: Host, domain: Domain, concerned: bool) -> list[str]:
    """Say what else bears on the next start."""
    notes = []
    if host.exists(f"{CONFIG_DIR}/off"):
        notes.append(f"{CONFIG_DIR}/off is there: every start passes untouched")
    if not concerned:
        notes.append("nothing is enabled for this domain: virt-usher does not even look at its start")
    pid = host.qemu(domain.name, domain.uuid)
    if pid is not None:
        notes.append(f"it runs now (pid {pid}), with all it holds already taken: virt-usher status")
    return notes


def _steps(host: Host, operation: str, plan: Plan) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = []
    for planned in plan.items:
        item = planned.item
        step: dict[str, Any] = {"operation": operation, "plugin": planned.plugin}
        if isinstance(item, Note):
            steps.append(step | {"note": item.text})
        else:
            steps.append(step | {"action": item.describe(host), **item.record()})
    return steps
