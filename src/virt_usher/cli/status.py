"""virt-usher status: what domains hold, original and present values, drift and leftovers."""

from __future__ import annotations

import time
from typing import Any

import click

from virt_usher.cli import base
from virt_usher.cli.tell.status import tell
from virt_usher.errors import printable


@click.command(name="status")
@base.domain_argument()
@base.json_option
@click.pass_obj
def command(usher: base.Usher, domain: str | None, as_json: bool) -> int:
    """Show what domains hold now, drift and leftovers.

    For each change the original and the present value, and whether somebody else changed it meanwhile.
    Ends with status 1 if anything is not as it should be.
    """
    usher.need_root()
    everything = usher.journals()
    found = [tell(usher.host, j, everything) for j in everything if domain in (None, j.name)]
    if as_json:
        base.say_json(found)
    elif not found:
        base.say(f"{domain}: holds nothing." if domain else "No domain holds anything.")
    for one in [] if as_json else found:
        _show(one)
    return base.finish(any(one["trouble"] for one in found))


def _show(one: dict[str, Any]) -> None:
    click.secho(printable(one["domain"]), bold=True)
    runs = f"QEMU runs as pid {one['qemu']}" if one["qemu"] else "no QEMU runs"
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one["since"])) if one["since"] else "?"
    base.say(f"{runs}; prepared {since}, start id {one['id']}", 2)
    if one["working"]:
        base.say(f"being worked on: lock held by {one['working']}", 2)
    for held in one["holds"]:
        base.say(f"{held.get('plugin')}: {held.get('what')}", 2)
        if "present" in held:
            base.say(f"was {held['original']!s}, is {_now(held['present'])}", 6)
        for pool in held.get("pools", []):
            count = f"{pool['ours']} pages are ours of {pool['present']}, {pool['free']} free"
            base.say(f"node {pool['node']}: {count}", 6)
        if held.get("astray"):
            base.say(f"not as the domains' claims want them: {', '.join(held['astray'])}", 6)
        if held["overruled_by"]:
            base.say(f"wants {held['wanted']}; the earlier claim of {held['overruled_by']} rules", 6)
    for text in one["trouble"]:
        base.say(f"- {text}", 2, "problem")
    for worker in one["abandoned"]:
        for line in worker["stack"]:
            base.command_line(line, 6)


def _now(value: str | None) -> str:
    return "gone" if value is None else value
