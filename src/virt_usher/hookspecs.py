"""The hooks a plugin may implement. An implementation takes only the arguments it uses.

A plugin reads and returns; it changes nothing itself. There is no hook for the end of a domain: the
inverse belongs to the action, and is on disk before the deed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from virt_usher.actions import Action, Note, Problem
    from virt_usher.domain import Domain
    from virt_usher.guest import Guest
    from virt_usher.host import Host
    from virt_usher.prepare import Plan

hookspec = pluggy.HookspecMarker("virt_usher")
hookimpl = pluggy.HookimplMarker("virt_usher")


@hookspec
def usher_prepare(domain: Domain, host: Host) -> Iterable[Action | Note]:
    """Return what the domain needs done before libvirt looks at its devices and memory."""
    raise NotImplementedError


@hookspec
def usher_start(domain: Domain, host: Host) -> Iterable[Action | Note]:
    """Return what can be known only now: libvirt has resolved networks, aliases and labels."""
    raise NotImplementedError


@hookspec
def usher_started(domain: Domain, host: Host, guest: Guest) -> Iterable[Action | Note]:
    """Return what needs the running guest. A failure here is undone alone, and never stops it.

    One that takes `guest` is left out of the plan of a domain that does not run.
    """
    raise NotImplementedError


@hookspec
def usher_wants(domain: Domain, operation: str) -> bool:
    """Say whether `start` or `started` will have anything to do for this domain; asked at prepare.

    A plugin without it is called whenever it has the hook. An operation that nobody wants does not
    start Python.
    """
    raise NotImplementedError


@hookspec
def usher_check(domain: Domain, host: Host, plan: Plan) -> Iterable[Problem]:
    """Return the reasons to refuse the start, seeing the whole plan; nothing is touched yet.

    Called after usher_prepare and after usher_start.
    """
    raise NotImplementedError
