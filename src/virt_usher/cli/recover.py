"""virt-usher recover: give back what domains that no longer run still hold."""

from __future__ import annotations

import time

import click

from virt_usher.cli import base
from virt_usher.dispatch import close
from virt_usher.errors import UsherError
from virt_usher.host import LiveHost
from virt_usher.journal import Journal, Journals
from virt_usher.locks import Locks

PATIENCE = 60  # seconds for a lock that another domain's hook holds


@click.command(name="recover")
@base.domain_argument()
@click.option("--boot", is_flag=True, help="Do not ask libvirt, which is not up yet.")
@click.pass_obj
def command(usher: base.Usher, domain: str | None, boot: bool) -> int:
    """Give back what domains that no longer run still hold.

    A domain that runs, starts or stops is left alone. Ends with status 1 if anything is left to give back.
    """
    usher.need_root()
    if not usher.journals(domain):
        if not boot:
            base.say(f"{domain}: holds nothing." if domain else "No domain holds anything.")
        return 0
    journals = Journals(usher.host, Locks(usher.host, time.monotonic() + PATIENCE))
    names = [n for n in journals.names() if domain in (None, n)]
    left = [n for n in names if not _recover(usher, journals, journals.of(n), boot)]
    return base.finish(bool(left))


def _recover(usher: base.Usher, journals: Journals, journal: Journal, boot: bool) -> bool:
    """Recover one domain if it is stale; tell whether nothing of it is left."""
    name, start_id = journal.name, journal.start_id
    try:
        # libvirt is asked without the lock: it may be waiting itself for a hook that waits for the lock.
        with journals.locks.hold(f"domain {name}", wait=False):
            journal.refresh()
        if usher.host.qemu(name, journal.uuid) is not None:
            base.say(f"{name}: runs, left alone")
            return True
        if journal.exists and not _daemon_gone(usher.host, journal):
            _must_be_inactive(usher, name, boot)
        with journals.locks.hold(f"domain {name}", wait=False):
            journal.refresh()
            if journal.start_id != start_id and journal.exists:
                raise UsherError("is starting")
            return _give_back(journals, journal)
    except OSError as error:  # what nobody can tell of one domain holds up no other
        base.say(f"{name}: left alone: {error.filename}: {error.strerror}", mark="warning")
        return False
    except UsherError as error:
        base.say(f"{name}: left alone: {error.message}", mark="warning")
        if error.hint:
            base.command_line(error.hint, 4)
        return False


def _daemon_gone(host: LiveHost, journal: Journal) -> bool:
    """Tell whether the daemon that started the domain has ended, and its start with it."""
    pid, started = journal.header.get("daemon") or (0, None)
    return bool(pid) and host.started_at(pid) != started


def _must_be_inactive(usher: base.Usher, name: str, boot: bool) -> None:
    """Raise UsherError unless libvirt says that the domain does not run."""
    if boot:
        raise UsherError("the libvirt daemon that started it still runs", "virt-usher recover asks libvirt")
    from virt_usher.cli.guests import Guests

    if Guests(usher.uri).active(name):
        raise UsherError("libvirt says that it is active")


def _give_back(journals: Journals, journal: Journal) -> bool:
    """Undo all that one journal holds, and say so; the domain's lock is held."""
    held = journal.live()
    left = close(journals, journal, "recover")
    for step in held:
        text = f"{step.data.get('plugin')}: {step.data.get('what')}"
        if step.state == "undone":
            remark = step.data.get("remark")
            base.say(f"{journal.name}: given back: {text}" + (f" ({remark})" if remark else ""), mark="ok")
        else:
            base.say(f"{journal.name}: left: {text}: {step.data.get('cause', '')}", mark="problem")
    if not held:
        base.say(f"{journal.name}: held nothing any more")
    return not left
