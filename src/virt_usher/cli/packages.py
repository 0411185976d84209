"""Plugins out of packages, found by their entry points: for the command line alone.

The hook imports what the configuration names, and looks for nothing.
"""

from __future__ import annotations

from importlib.metadata import distributions

from virt_usher.host import Host
from virt_usher.plugins import HOME, NAME, PACKAGES_DIR

GROUP = "virt_usher.plugins"


def packaged(host: Host) -> dict[str, str]:
    """Return name -> "module:Class" of every plugin that a package in PACKAGES_DIR announces."""
    found = {}
    for package in distributions(path=[host.path(PACKAGES_DIR)]) if host.exists(PACKAGES_DIR) else ():
        for entry in package.entry_points.select(group=GROUP):
            if NAME.fullmatch(entry.name) and HOME.fullmatch(entry.value):
                found[entry.name] = entry.value
    return dict(sorted(found.items()))
