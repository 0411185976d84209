"""virt-usher plugins: what is installed, its options, and for which domains it is on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from virt_usher.cli import base
from virt_usher.cli.packages import packaged
from virt_usher.cli.tell.plugins import switches_of, tell
from virt_usher.config import ALWAYS_ON
from virt_usher.errors import printable
from virt_usher.plugins import find, installed

USAGE = "[NAME | new NAME | test FILE]"


@click.command(name="plugins")
@click.argument("words", nargs=-1, metavar=USAGE, shell_complete=base.complete_plugin)
@base.json_option
@click.pass_obj
def command(usher: base.Usher, words: tuple[str, ...], as_json: bool) -> int:
    """List the plugins, their options, and where they are on.

    With NAME, one plugin and all its options. `new NAME` writes a plugin and its test into the
    current directory; `test FILE` runs that test, and attacks the plugin at every write, on fake
    hosts. Ends with status 1 if a plugin cannot be loaded, or a test fails.
    """
    if len(words) == 2 and words[0] in ("new", "test"):
        from virt_usher.cli import author

        return author.new(words[1]) if words[0] == "new" else author.test(Path(words[1]))
    if len(words) > 1:
        raise click.UsageError(f"takes {USAGE}")
    name = words[0] if words else None
    switches = switches_of(usher.host)
    homes = [*((n, "") for n in sorted(installed(usher.host))), *packaged(usher.host).items()]
    if name:
        homes = [(n, home) for n, home in homes if n == name]
    if name and not homes:
        find(usher.host, name)
    found = [tell(usher.host, n, switches, home) for n, home in homes]
    if as_json:
        base.say_json(found)
    for one in [] if as_json else found:
        _show(one, full=name is not None)
    return base.finish(any(one["error"] for one in found))


def _show(one: dict[str, Any], full: bool) -> None:
    click.secho(printable(one["name"]), bold=True, nl=False)
    click.echo(f"  {printable(one['summary'])}" if one["summary"] else "")
    base.command_line(one["file"], 2)
    if one["from"]:
        base.command_line(f'from = "{one["from"]}"', 2)
        if not one["on"] and not one["every_domain"]:
            base.command_line(f"virt-usher enable DOMAIN {one['name']}", 2)
    if one["error"]:
        base.say(one["error"], 2, "problem")
    where = (["every domain"] if one["every_domain"] else []) + one["on"]
    may = "cannot switch it on" if one["files_only"] else "may ask for it, if config.toml lets it"
    nobody = f"no domain by a file; metadata {may}"
    if one["name"] == ALWAYS_ON:
        nobody = "every domain that is given a PCI device; config.toml can say enabled = false"
    base.say(f"on for: {', '.join(where) or nobody}", 2)
    if one["off"]:
        base.say(f"off for: {', '.join(one['off'])}", 2)
    for option in one["options"]:
        base.say(f"{option['name']} = {_toml(option['default'])}  {option['help']}", 4)
        if full:
            who = "may be set in <metadata>" if option["metadata"] else "not from <metadata>"
            base.say(f"{option['type']}; {who}", 8)
            if option["choices"]:
                base.say(f"one of: {', '.join(map(str, option['choices']))}", 8)


def _toml(value: Any) -> str:
    """Write a default as one would in TOML; an option without one has None."""
    import tomlkit

    return (
        "?" if value is None else tomlkit.item(list(value) if isinstance(value, tuple) else value).as_string()
    )
