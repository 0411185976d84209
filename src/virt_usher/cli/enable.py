"""virt-usher enable: switch a plugin on for a domain, or set its options."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import click

from virt_usher import options
from virt_usher.cli import base
from virt_usher.cli.edit import ConfigFile, warn_if_unknown, who
from virt_usher.cli.packages import packaged
from virt_usher.errors import UsherError, nearest, typed
from virt_usher.host import Host
from virt_usher.plugins import installed, load

USAGE = "DOMAIN PLUGIN [KEY=VALUE]..."


@click.command(name="enable")
@click.argument("words", nargs=-1, metavar=USAGE, shell_complete=base.complete_words)
@click.option("--every-domain", is_flag=True, help="For every domain; give no DOMAIN then.")
@click.pass_obj
def command(usher: base.Usher, words: tuple[str, ...], every_domain: bool) -> None:
    """Switch a plugin on for a domain, or set its options.

    Writes /etc/virt-usher/domains/DOMAIN.toml and shows the difference. Options that are not given
    stay as they are. A plugin out of a package is found by its name, or given as from=MODULE:CLASS.
    What frees a device comes before the plugin that takes it. It counts from the next start on.
    """
    usher.need_root()
    rest = list(words)
    name = who(rest, every_domain, USAGE)
    if not rest:
        raise click.UsageError(f"needs {USAGE}")
    plugin_name = rest.pop(0)
    file = ConfigFile(usher.host, name)
    given = [word.removeprefix("from=") for word in rest if word.startswith("from=")]
    home = given[-1] if given else _home(usher.host, file, plugin_name)
    plugin = load(usher.host, plugin_name, home)
    values = dict(_value(plugin, word) for word in rest if not word.startswith("from="))
    for other in getattr(plugin, "BEFORE", ()):
        file.put_before("plugins", plugin_name, other)
    table = file.table("plugins", plugin_name)
    table.pop("enabled", None)  # it is on unless its table says otherwise
    if home:
        table["from"] = home
    for key, value in values.items():
        table[key] = value
    wrong = options.problems(plugin, {k: v for k, v in table.items() if k != "from"})
    if wrong:
        text = "; ".join(f"plugins.{plugin_name}.{k}: {t}" for k, t in wrong.items())
        raise UsherError(f"{file.path}: {text}", f"virt-usher plugins {plugin_name} shows its options")
    warn_if_unknown(usher, name)
    file.write()
    base.say("It counts from the next start on; what that would do:")
    base.command_line(f"virt-usher plan {typed(name)}" if name else "virt-usher plan", 4)


def _home(host: Host, file: ConfigFile, name: str) -> str:
    """Return the "module:Class" of a plugin whose table says so, or that only a package has; or ''."""
    table = file.content.get("plugins", {}).get(name)
    if isinstance(table, MutableMapping) and "from" in table:
        return str(table["from"])
    return "" if name in installed(host) else packaged(host).get(name, "")


def _value(plugin: type[Any], word: str) -> tuple[str, object]:
    """Read KEY=VALUE as the option's type has it."""
    key, equals, text = word.partition("=")
    if not equals:
        raise click.UsageError(f"{word!r} is not KEY=VALUE")
    known = options.options_of(plugin)
    if key not in known:
        raise UsherError(f"no such option: {key}{nearest(key, list(known))}", f"it has: {', '.join(known)}")
    try:
        value = known[key].parse(text)
    except (ValueError, LookupError):
        value = text  # and the check says what would be right
    if problem := known[key].problem(value):
        raise UsherError(f"{key}: {problem}")
    return key, value
