"""virt-usher disable: switch a plugin off for a domain."""

from __future__ import annotations

import click

from virt_usher.cli import base
from virt_usher.cli.edit import ConfigFile, warn_if_unknown, who
from virt_usher.cli.tell.plugins import tell
from virt_usher.config import ALWAYS_ON
from virt_usher.domain import Domain
from virt_usher.errors import UsherError
from virt_usher.host import Host
from virt_usher.plugins import find

USAGE = "DOMAIN PLUGIN"


@click.command(name="disable")
@click.argument("words", nargs=-1, metavar=USAGE, shell_complete=base.complete_words)
@click.option("--every-domain", is_flag=True, help="For every domain; give no DOMAIN then.")
@click.pass_obj
def command(usher: base.Usher, words: tuple[str, ...], every_domain: bool) -> None:
    """Switch a plugin off for a domain.

    Removes it from /etc/virt-usher/domains/DOMAIN.toml, or writes enabled = false there if something
    else switches it on. What a running domain holds goes back when it stops.
    """
    usher.need_root()
    rest = list(words)
    name = who(rest, every_domain, USAGE)
    if len(rest) != 1:
        raise click.UsageError(f"needs {USAGE}")
    plugin = rest[0]
    file = ConfigFile(usher.host, name)
    xml = warn_if_unknown(usher, name)
    known = plugin in file.content.get("plugins", {})
    if plugin == ALWAYS_ON or (name is not None and _on_elsewhere(usher.host, plugin, xml)):
        file.table("plugins", plugin)["enabled"] = False
    elif known:
        file.drop("plugins", plugin)
    else:
        find(usher.host, plugin)
        base.say(f"{plugin} is not on for {name or 'every domain'}.")
        return
    file.write()
    if name is not None and xml is None and not tell(usher.host, plugin, {})["files_only"]:
        base.say("Should the domain's <metadata> ask for it, it is on all the same.")


def _on_elsewhere(host: Host, plugin: str, xml: bytes | None) -> bool:
    """Tell whether a plugin would be on without the domain's file, as far as can be known."""
    table = ConfigFile(host, None).content.get("plugins", {}).get(plugin)
    if isinstance(table, dict) and table.get("enabled", True):
        return True
    if xml is None:
        return False
    try:
        return any(element.get("name") == plugin for element in Domain.from_xml(xml).metadata)
    except UsherError:
        return False
