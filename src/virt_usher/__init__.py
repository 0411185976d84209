"""virt-usher: prepares the host for each libvirt domain, and gives everything back.

All that a plugin may import is here, and is loaded when first asked for: the release side imports this
package too, and must stay cheap.
"""

from __future__ import annotations

TYPE_CHECKING = False  # importing typing would cost release more than all its work
if TYPE_CHECKING:
    from typing import Any

    from virt_usher.actions import Action as Action
    from virt_usher.actions import AddPages as AddPages
    from virt_usher.actions import BindDriver as BindDriver
    from virt_usher.actions import KeepUnit as KeepUnit
    from virt_usher.actions import Note as Note
    from virt_usher.actions import OneWay as OneWay
    from virt_usher.actions import Problem as Problem
    from virt_usher.actions import RunScripts as RunScripts
    from virt_usher.actions import UnloadModule as UnloadModule
    from virt_usher.actions import Write as Write
    from virt_usher.domain import Domain as Domain
    from virt_usher.errors import UsherError as UsherError
    from virt_usher.guest import Guest as Guest
    from virt_usher.hookspecs import hookimpl as hookimpl
    from virt_usher.host import Host as Host
    from virt_usher.options import option as option
    from virt_usher.prepare import Plan as Plan

__version__ = "0.1.0"
_HOMES = {
    "actions": (
        "Action",
        "AddPages",
        "BindDriver",
        "KeepUnit",
        "Note",
        "OneWay",
        "Problem",
        "RunScripts",
        "UnloadModule",
        "Write",
    ),
    "domain": ("Domain",),
    "errors": ("UsherError",),
    "guest": ("Guest",),
    "hookspecs": ("hookimpl",),
    "host": ("Host",),
    "options": ("option",),
    "prepare": ("Plan",),
}
__all__ = sorted(name for names in _HOMES.values() for name in names)


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            from importlib import import_module  # here: Python asks for each of our modules too

            return getattr(import_module(f"virt_usher.{home}"), name)
    raise AttributeError(f"module 'virt_usher' has no attribute {name!r}")
