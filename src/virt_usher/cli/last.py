"""virt-usher last: the last start and stop of a domain, step by step with durations."""

from __future__ import annotations

import time
from typing import Any

import click

from virt_usher.cli import base
from virt_usher.cli.tell.last import operations, record_of
from virt_usher.errors import printable


@click.command(name="last")
@base.domain_argument(required=True)
@base.json_option
@click.pass_obj
def command(usher: base.Usher, domain: str, as_json: bool) -> int:
    """Show a domain's last start and stop, step by step.

    How long each step took, which one failed, and why a start was refused. Ends with status 1 if the
    start was refused, something failed, or something could not be given back.
    """
    usher.need_root()
    journal = record_of(usher.host, domain)
    told: dict[str, Any] = {
        "domain": journal.name,
        "uuid": journal.uuid,
        "id": journal.start_id,
        "at": journal.header.get("at"),
        "running": usher.host.qemu(journal.name, journal.uuid) is not None,
        "operations": list(operations(journal)),
    }
    told["bad"] = any(op["bad"] for op in told["operations"])
    if as_json:
        base.say_json(told)
    else:
        _show(told)
    return base.finish(told["bad"])


def _show(told: dict[str, Any]) -> None:
    click.secho(f"{printable(told['domain'])}: start {told['id']} of {_when(told['at'])}", bold=True)
    for op in told["operations"]:
        result = op.get("result", f"{op.get('left')} left behind" if op.get("left") else "ok")
        reason = f" ({op['reason']})" if op.get("reason", "-") != "-" else ""
        took = f", {op['ms']} ms" if "ms" in op else ""
        name = op["op"] or "killed in the middle, or still at work"
        base.say(f"{name}{reason}: {result}{took}", 2, "problem" if op["bad"] else "ok")
        for step in op["steps"]:
            base.say(f"{_time(step.get('ms'))}  {step['plugin']}: {_line(step)}", 4)
        for problem in op["problems"]:
            base.show_problem(problem["message"], problem["hint"], 4)
    if told["running"]:
        base.say("it runs now; what it holds: virt-usher status", 2)


def _line(step: dict[str, Any]) -> str:
    head = "" if step["result"] == "done" else f"{step['result']}: "
    return f"{head}{step['what']}" + (f"; {step['why']}" if step["why"] else "")


def _time(ms: float | None) -> str:
    return "-" if ms is None else f"{ms:.1f} ms"


def _when(at: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at)) if at else "an unknown time"
