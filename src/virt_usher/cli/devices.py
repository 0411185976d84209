"""virt-usher devices: what can be passed through, and what stands in the way."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import click

from virt_usher.cli import base
from virt_usher.domain import Domain
from virt_usher.errors import UsherError, printable
from virt_usher.host import Host, reset, users, vfio
from virt_usher.host.pci import Device, Pci, claim_key
from virt_usher.host.quirks import Quirks
from virt_usher.hostdev import PciHostdev

# What people call a class; the rest go by their base class (include/linux/pci_ids.h).
_CLASSES = {
    "0106": "SATA",
    "0108": "NVMe",
    "0300": "VGA",
    "0302": "3D",
    "0600": "host",
    "0601": "ISA",
    "0604": "bridge",
    "0c03": "USB",
    "0c05": "SMBus",
    "01": "storage",
    "02": "network",
    "03": "display",
    "04": "sound",
    "05": "memory",
    "06": "bridge",
    "07": "serial",
    "08": "system",
    "0c": "bus",
    "0d": "wireless",
    "10": "crypto",
    "12": "compute",
}
_GIVEN = dict[str, list[PciHostdev]]


@click.command(name="devices")
@click.option("--group", metavar="N", help="Only this IOMMU group.")
@click.option(
    "--domain",
    metavar="NAME",
    shell_complete=base.complete_domain,
    help="Only what a domain is given, and what shares its groups; how it would be reset with that domain.",
)
@base.json_option
@click.pass_obj
def command(usher: base.Usher, group: str | None, domain: str | None, as_json: bool) -> int:
    """Show what can be passed through, and what stands in the way.

    By IOMMU group: each device with its driver, how it can be reset when its domain stops, and who uses it
    now. Nothing is changed. With --domain, ends with status 1 if it has a device that cannot be reset.
    """
    given, silence = _given(usher, domain)
    pci = usher.host.pci
    theirs = given.get(domain, []) if domain else None
    found = _devices(pci, Quirks(usher.host), theirs)
    if theirs is not None:
        groups = {pci.device(d.address).group for d in theirs} - {""}
        own = {d.address for d in theirs}
        found = [d for d in found if d["address"] in own or d["group"] in groups]
    found = [d for d in found if group is None or d["group"] == group]
    if group is not None and not found:
        raise UsherError(f"there is no IOMMU group {group!r}", "virt-usher devices shows all of them")
    _add_names(usher.host, found)
    _add_holders(usher, found, given)
    _add_users(usher.host, pci, found)
    if as_json:
        base.say_json(found)
    else:
        if group is None and domain is None:
            _show_table(found)
            _show_obstacles(found)
            _show_users(found)
        else:
            for one in found:
                _show_one(one)
        if not any(d["group"] for d in found):
            base.say("Without an IOMMU nothing can be passed through: virt-usher doctor", mark="warning")
        if every := vfio.interrupts(usher.host):
            base.say(f"Each device {every.what}: {every.hint}", mark="warning")
        if not usher.host.root and os.geteuid() != 0:
            base.say("Only root sees which programs use a device, and whether MSI is on.", mark="warning")
        if silence:
            base.say(f"Who is configured to get a device is not known: {silence}", mark="warning")
    return base.finish(any(d["given"] and not d["reset"]["good"] for d in found))


def _given(usher: base.Usher, only: str | None) -> tuple[_GIVEN, str]:
    """Return domain -> devices as libvirt has them configured, and why libvirt could not be asked."""
    from virt_usher.cli.guests import Guests

    given: _GIVEN = {}
    try:
        guests = Guests(usher.uri)
        for name in [only] if only else guests.names():
            xml = guests.xml(name)
            if xml is None and only:
                raise UsherError(f"libvirt knows no domain {name!r}", "virsh list --all shows what it knows")
            given[name] = list(Domain.from_xml(xml).pci_devices) if xml else []
    except UsherError as error:
        if only:
            raise
        return given, error.message
    return given, ""


def _devices(pci: Pci, quirks: Quirks, theirs: list[PciHostdev] | None) -> list[dict[str, Any]]:
    """Tell of every device, with a verdict for that domain, or else for one that is given what it takes."""
    absent = [pci.device(d.address) for d in theirs or () if not pci.device(d.address).exists]
    given = reset.Given.to(theirs or ())
    found = []
    for device in [*pci.devices, *absent]:
        verdict = reset.verdict(device, given if theirs else _only(device), quirks)
        with_all = reset.verdict(device, _only(device, *verdict.companions), quirks)
        if theirs is None and verdict.companions and with_all.good:
            verdict = with_all
        ours = device.address in given.devices
        found.append(_device(device) | {"given": ours, "reset": _reset(verdict)})
    return sorted(found, key=lambda d: (not d["group"], int(d["group"] or 0), d["address"]))


def _only(device: Device, *others: str) -> reset.Given:
    """Return what a domain has that is given a device and some others, and binds them all."""
    every = frozenset((device.address, *others))
    return reset.Given(every, every)


def _device(device: Device) -> dict[str, Any]:
    code = device.class_code
    return {
        "address": device.address,
        "id": device.id,
        "class": code,
        "kind": _CLASSES.get(code[:4]) or _CLASSES.get(code[:2], "other"),
        "driver": device.driver,
        "driver_override": device.driver_override,
        "group": device.group,
        "numa_node": device.numa_node,
        "msi": device.msi,
        "boot_vga": device.boot_vga,
    }


def _reset(verdict: reset.Verdict) -> dict[str, Any]:
    return {
        "verdict": verdict.kind,
        "good": verdict.kind in (reset.FUNCTION, reset.HOT, reset.PM),
        "methods": verdict.methods,
        "with": verdict.partners,
        "why": verdict.why,
    }


def _add_names(host: Host, found: Iterable[dict[str, Any]]) -> None:
    """Add the names that udev has from hwdb; '' where it does not run, or for a host that is not this one."""
    names: dict[str, tuple[str, str]] = {}
    if not host.root:
        try:
            import pyudev

            for device in pyudev.Context().list_devices(subsystem="pci"):
                vendor, model = (f"ID_{part}_FROM_DATABASE" for part in ("VENDOR", "MODEL"))
                known = device.properties
                names[device.sys_name] = (known.get(vendor, ""), known.get(model, ""))
        except (ImportError, OSError):
            names = {}
    for one in found:
        one["vendor"], one["name"] = names.get(one["address"], ("", ""))


def _add_holders(usher: base.Usher, found: Iterable[dict[str, Any]], given: _GIVEN) -> None:
    """Add who holds a device, by the journals, and which domains are configured to get it."""
    held = {step.key: journal.name for journal in usher.journals() for step in journal.live()}
    for one in found:
        one["held_by"] = held.get(claim_key(one["address"]), "")
        one["domains"] = sorted(n for n, ds in given.items() if one["address"] in {d.address for d in ds})


def _add_users(host: Host, pci: Pci, found: Iterable[dict[str, Any]]) -> None:
    """Add what keeps each device from a domain now, as the plugin pci would say; one walk over /proc."""
    quirks, everywhere = Quirks(host), vfio.interrupts(host)
    asked = [one for one in found if not _stays(one) and one["id"]]
    using = users.find(host, [one["address"] for one in asked], together=False)
    for one in found:
        one["in_the_way"] = []
    for one in asked:
        device = pci.device(one["address"])
        driver = device.driver if device.on_vfio else "vfio-pci"
        standing: list[users.User | vfio.Obstacle] = [
            u
            for u in using
            if u.address == device.address or (u.group and pci.device(u.address).group == device.group)
        ]
        own = (o for o in vfio.obstacles(host, device, driver, quirks) if o.problem == vfio.WAIVABLE)
        standing += [o for o in own if o != everywhere]
        one["in_the_way"] = [{"problem": f.problem, "what": f.what, "hint": f.hint} for f in standing]


def _show_table(found: list[dict[str, Any]]) -> None:
    """Print a line for each device; on a terminal it is cut at 80 columns, never in a pipe."""
    heads = ["GROUP", "ADDRESS", "DRIVER", "RESET", "USE", "NODE", "MSI", "DEVICE"]
    rows = [_row(d) for d in found]
    shown = [i for i in range(len(heads)) if any(row[i] for row in rows)]  # no room for what says nothing
    heads, *rows = ([row[i] for i in shown] for row in (heads, *rows))
    widths = [max(len(r[i]) for r in (heads, *rows)) for i in range(len(heads) - 1)]
    width = base.WIDTH if sys.stdout.isatty() else 1 << 20
    for row, mark in [(heads, ""), *zip(rows, (_mark(d) for d in found), strict=True)]:
        cells = [text.ljust(w) for text, w in zip(row, widths, strict=False)]
        click.secho(printable(" ".join((*cells, row[-1])))[:width].rstrip(), fg=base.COLOURS.get(mark))


def _row(one: dict[str, Any]) -> list[str]:
    node = "" if one["numa_node"] is None else str(one["numa_node"])
    word = "-" if _stays(one) else _word(one["reset"])
    about = f"{'boot ' * one['boot_vga']}{one['kind']} {one['id']} {one['name']}"
    use = next((f["problem"] for f in one["in_the_way"]), "")
    return [one["group"] or "-", one["address"], one["driver"], word, use, node, one["msi"], about]


def _show_obstacles(found: list[dict[str, Any]]) -> None:
    """Say who uses devices, and why they cannot be reset; each reason once."""
    reasons: dict[str, list[str]] = {}
    for one in found:
        for standing in one["in_the_way"]:
            reasons.setdefault(standing["what"], []).append(one["address"])
        if not _stays(one) and one["reset"]["verdict"] not in (reset.FUNCTION, reset.HOT):
            reasons.setdefault(one["reset"]["why"], []).append(one["address"])
    for why, addresses in reasons.items():
        base.say(f"{', '.join(addresses)}: {why}", hang=2)


def _show_users(found: list[dict[str, Any]]) -> None:
    names = sorted({n for d in found for n in (*d["domains"], d["held_by"]) if n})
    for name in names:
        theirs = [d for d in found if name in (*d["domains"], d["held_by"])]
        listed = (f"{d['address']}{' (held now)' * (d['held_by'] == name)}" for d in theirs)
        base.say(f"domain {name}: {', '.join(listed)}", hang=2)


def _show_one(one: dict[str, Any]) -> None:
    """Print all about a device."""
    line = f"{one['address']} {one['kind']}, group {one['group'] or '-'}: {_word(one['reset'])}"
    click.secho(printable(line), fg=base.COLOURS.get(_mark(one)))
    for text in _facts(one):
        base.say(text, 4)


def _facts(one: dict[str, Any]) -> Iterator[str]:
    if one["id"]:
        boot = ", the display the firmware chose" if one["boot_vga"] else ""
        yield f"{one['vendor']} {one['name']} [{one['id']}]{boot}".lstrip()
        node = "" if one["numa_node"] is None else f", NUMA node {one['numa_node']}"
        override = f" (only {one['driver_override']} may bind)" if one["driver_override"] else ""
        msi = f", MSI {one['msi']}" if one["msi"] else ""
        yield f"driver {one['driver'] or 'none'}{override}{node}{msi}"
    yield one["reset"]["why"]
    yield from (f"{f['what']}: {f['hint']}" for f in one["in_the_way"])
    if one["held_by"]:
        yield f"held by domain {one['held_by']}"
    if one["domains"]:
        yield f"configured for domain {', '.join(one['domains'])}"


def _stays(one: dict[str, Any]) -> bool:
    """Whether nobody would give it to a domain: bridges, and what the board itself is made of."""
    return bool(one["class"].startswith("06")) and not one["given"]


def _mark(one: dict[str, Any]) -> str:
    if _stays(one):
        return ""
    if not one["reset"]["good"] or users.DATA in {f["problem"] for f in one["in_the_way"]}:
        return "problem"
    return "warning" if one["in_the_way"] or one["reset"]["verdict"] == reset.PM else "ok"


def _word(verdict: dict[str, Any]) -> str:
    """Say a verdict in a word or two, for the eye."""
    along = [a.removeprefix("0000:") for a in verdict["with"]]
    words = {
        reset.FUNCTION: next(iter(verdict["methods"]), "").replace("?", "yes"),
        reset.HOT: f"with {along[0]}" if len(along) == 1 else f"with {len(along)} more" if along else "bus",
        reset.PM: "weak (pm)",
        reset.NONE: "no",
        reset.BAD: "known bad",
        reset.SILENT: "does not answer",
        reset.ABSENT: "not there",
        reset.BRIDGE: "-",
    }
    return words[str(verdict["verdict"])]
