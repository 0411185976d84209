"""virt-usher plan: what a start would do now, from the same code as the hook."""

from __future__ import annotations

from typing import Any

import click

from virt_usher.cli import base
from virt_usher.cli.tell.plan import tell
from virt_usher.errors import UsherError, printable


@click.command(name="plan")
@base.domain_argument()
@click.option("--xml", type=click.File("rb"), metavar="FILE", help="Read the domain's XML here; - is stdin.")
@click.option("--trace", is_flag=True, help="Show each call of a plugin's hook too.")
@base.json_option
@click.pass_obj
def command(usher: base.Usher, domain: str | None, xml: Any, trace: bool, as_json: bool) -> int:
    """Show what a start would do now, and what would refuse it.

    Nothing is changed. Without DOMAIN, all domains that libvirt knows. Ends with status 1 if
    a start would be refused.
    """
    if domain and xml:
        raise click.UsageError("DOMAIN or --xml, not both")
    usher.need_root()
    plans = [tell(usher.host, name, text, trace) for name, text in _domains(usher, domain, xml)]
    if as_json:
        base.say_json(plans)
    elif not plans:
        base.say("libvirt knows no domain.")
    for plan in [] if as_json else plans:
        _show(plan)
    return base.finish(any(p["refused"] for p in plans))


def _domains(usher: base.Usher, name: str | None, xml: Any) -> list[tuple[str, bytes]]:
    """Return (name, XML) of the domains asked for; with a file, the name is in there."""
    if xml:
        return [("", xml.read())]
    from virt_usher.cli.guests import Guests

    guests = Guests(usher.uri)
    found = [(n, guests.xml(n)) for n in ([name] if name else guests.names())]
    if name and found[0][1] is None:
        raise UsherError(f"libvirt knows no domain {name!r}", "virsh list --all shows what it knows")
    return [(n, text) for n, text in found if text is not None]  # one may go while we ask


def _show(plan: dict[str, Any]) -> None:
    click.secho(printable(plan["domain"]), bold=True)
    for call in plan.get("trace", []):
        base.say(f"trace: {call}", 2)
    for step in plan["steps"]:
        at = "" if step["operation"] == "prepare" else f" (at {step['operation']})"
        text = step["action"] if "action" in step else f"left out: {step['note']}"
        base.say(f"{step['plugin']}{at}: {text}", 2)
    for text in plan["waived"]:
        base.say(f"waived: {text}", 2, "warning")
    if plan["problems"]:
        verdict = "a start would be refused:" if plan["refused"] else "problems, though no start meets them:"
        base.say(verdict, 2, "problem")
    for problem in plan["problems"]:
        base.show_problem(problem["message"], problem["hint"], 4)
    for note in plan["notes"]:
        base.say(note, 2)
    if not plan["steps"] and not plan["problems"] and not plan["notes"]:
        base.say("nothing to do", 2)
