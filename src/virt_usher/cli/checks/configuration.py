"""Can all configuration files be read, and do the plugins take what they say?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from virt_usher import config
from virt_usher.cli.checks import Check, ok, problem, warning
from virt_usher.host import CONFIG_DIR, Host


def check(host: Host) -> Iterator[Check]:
    """Merge the configuration of each domain that has a file, and of one that has none."""
    if host.exists(f"{CONFIG_DIR}/off"):
        text = f"{CONFIG_DIR}/off is there: every start passes untouched; stops still give back"
        yield warning("switch", text, f"rm {CONFIG_DIR}/off")
    try:
        from virt_usher.domain import Domain
        from virt_usher.plugins import Plugins
    except ImportError as error:  # the check of the interpreter says what to do
        yield problem("configuration", f"cannot be checked: {error}")
        return
    stub = Domain.from_xml(b"<domain><name>none</name></domain>")
    folder = f"{CONFIG_DIR}/domains"
    names = [n[:-5] for n in host.entries(folder) if n.endswith(".toml")]
    found: dict[str, str] = {}
    for name in ["/", *names]:  # no domain can have a slash in its name, so this one has no file
        settings = config.settings(host, replace(stub, name=name))
        plugins = Plugins(host, settings.plugins)
        found |= {e.message: e.hint for e in (*settings.problems, *plugins.problems)}
    for message, hint in found.items():
        yield problem("configuration", message, hint)
    if not found:
        yield ok("configuration", f"{CONFIG_DIR} can be read; domains with a file of their own: {len(names)}")
