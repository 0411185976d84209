"""virt-usher doctor: will libvirt call the hook, and can it work on this host?"""

from __future__ import annotations

from dataclasses import asdict

import click

from virt_usher.cli import base
from virt_usher.cli.checks import Check, configuration, daemon, hook, machine, owners

SUBJECTS = (hook, daemon, configuration, machine, owners)
MARGIN = 9


@click.command(name="doctor")
@base.json_option
@click.pass_obj
def command(usher: base.Usher, as_json: bool) -> int:
    """Check that libvirt will call the hook and it can work.

    Nothing is changed. Each line is ok, a warning, or a problem with what to do about it. Ends with
    status 1 if there is a problem.
    """
    usher.need_root()
    checks = [check for subject in SUBJECTS for check in subject.check(usher.host)]
    if as_json:
        base.say_json([asdict(check) for check in checks])
    for check in [] if as_json else checks:
        _show(check)
    return base.finish(any(check.level == "problem" for check in checks))


def _show(check: Check) -> None:
    base.say(f"{check.level:<{MARGIN}}{check.about}: {check.text}", 0, check.level, MARGIN)
    if check.hint:
        base.command_line(check.hint, MARGIN)
