"""Change a configuration file for enable, disable and waive: comments stay, and the change is shown."""

from __future__ import annotations

import difflib
import os
import re
import tempfile
import tomllib
from collections.abc import MutableMapping
from typing import Any

import click
import tomlkit
from tomlkit.exceptions import TOMLKitError

from virt_usher import config
from virt_usher.cli import base
from virt_usher.errors import UsherError, printable
from virt_usher.host import CONFIG_DIR, Host

EVERY = f"{CONFIG_DIR}/every-domain.toml"
BY_HAND = "mend the file by hand first; virt-usher plan shows what is wrong"


class ConfigFile:
    """domains/NAME.toml, or every-domain.toml where the name is None; need not exist yet."""

    def __init__(self, host: Host, name: str | None) -> None:
        if name is not None:
            base.check_name(name)
        self.host = host
        self.path = EVERY if name is None else config.domain_file(name)
        self.before = ""
        try:
            if host.exists(self.path):
                config.vet(host, self.path)
                with open(host.path(self.path), encoding="utf-8") as stream:
                    self.before = stream.read()
            config.parse(self.before.encode())  # the parser of the hook has the last word
            self.content = tomlkit.parse(self.before)
        except (TOMLKitError, ValueError) as error:
            raise UsherError(f"{self.path}: {error}", BY_HAND) from None
        for kind, like in (("plugins", "[plugins.NAME]"), ("waive", '[waive."ADDRESS"]')):
            if not isinstance(self.content.get(kind, {}), MutableMapping):
                raise UsherError(f"{self.path}: {kind}: must hold tables: {like}", BY_HAND)

    def table(self, kind: str, name: str) -> MutableMapping[str, Any]:
        """Return the table [kind.name] for changing; it is made where it is missing."""
        parent = self.content.setdefault(kind, tomlkit.table(is_super_table=True))
        found = parent.setdefault(name, tomlkit.table()) if isinstance(parent, MutableMapping) else None
        if not isinstance(found, MutableMapping):
            raise UsherError(f"{self.path}: {kind}.{name} is no table", BY_HAND)
        table: MutableMapping[str, Any] = parent[name]  # what setdefault returned need not be the one kept
        return table

    def put_before(self, kind: str, name: str, other: str) -> None:
        """Make the table [kind.name] in front of [kind.other], if only the latter is there."""
        if name in self.content.get(kind, {}):
            return
        at = re.search(rf"(^#.*\n)*^\[{kind}\.{other}\]", tomlkit.dumps(self.content), re.MULTILINE)
        if at:
            self.content = tomlkit.parse(
                f"{at.string[: at.start()]}[{kind}.{name}]\n\n{at.string[at.start() :]}"
            )

    def entry(self, kind: str, name: str, key: str, value: str) -> MutableMapping[str, Any]:
        """Return the table [kind.name] whose key has a value; beside another, [[kind.name]] of both."""
        found = self.content.get(kind, {}).get(name)
        tables = list(found) if isinstance(found, list) else [found] if found else []
        for table in tables:
            if not isinstance(table, MutableMapping):
                raise UsherError(f'{self.path}: {kind}."{name}" holds {table!r}, which is no table', BY_HAND)
            if table.get(key, value) == value:
                return table
        if not tables:
            return self.table(kind, name)
        several = tomlkit.aot()
        for table in (*tables, tomlkit.table()):
            several.append(table)
        parent = self.content[kind]
        assert isinstance(parent, MutableMapping)
        parent[name] = several
        last: MutableMapping[str, Any] = several[-1]
        return last

    def drop(self, kind: str, name: str) -> None:
        """Remove the table [kind.name], and [kind] with the last of its tables."""
        parent = self.content[kind]
        assert isinstance(parent, MutableMapping)
        del parent[name]
        if not parent:
            del self.content[kind]

    def write(self) -> None:
        """Put the change into the file in one step, and show it; an empty file goes."""
        after = tomlkit.dumps(self.content)
        if after == self.before:
            base.say(f"{self.path} says so already: nothing to change.")
            return
        try:
            same = tomllib.loads(after) == self.content.unwrap()
        except ValueError:  # tomlkit puts a table with a header of its own into an inline one
            same = False
        if not same:
            raise UsherError(f"{self.path} cannot be edited without harm", "edit it by hand")
        real = self.host.path(self.path)
        if after.strip():
            _replace(real, after)
        else:  # the gate takes the file alone for a sign that there is work
            os.unlink(real)
        for line in difflib.unified_diff(
            self.before.splitlines(), after.splitlines(), self.path, self.path, lineterm=""
        ):
            colour = {"+": "green", "-": "red"}.get(line[:1])
            click.secho(printable(line), fg=colour)


def _replace(real: str, text: str) -> None:
    """Write a file that is whole at any time."""
    folder = os.path.dirname(real)
    os.makedirs(folder, mode=0o755, exist_ok=True)
    fd, spare = tempfile.mkstemp(prefix=".new-", dir=folder)
    try:
        with open(fd, "w", encoding="utf-8") as stream:
            stream.write(text)
            os.fchmod(fd, 0o644)
            stream.flush()
            os.fsync(fd)
        os.rename(spare, real)
    except BaseException:
        os.unlink(spare)
        raise


def who(words: list[str], every: bool, usage: str) -> str | None:
    """Take the domain off the words of a command line; None is every domain."""
    if every:
        return None
    if not words:
        raise click.UsageError(f"needs {usage}")
    return words.pop(0)


def warn_if_unknown(usher: base.Usher, name: str | None) -> bytes | None:
    """Warn of a domain that libvirt does not know, since a typing error looks like one; return its XML."""
    if name is None:
        return None
    from virt_usher.cli.guests import Guests

    try:
        xml = Guests(usher.uri).xml(name)
    except UsherError as error:
        click.echo(f"warning: {printable(error.message)}", err=True)
        return None
    if xml is None:
        click.echo(f"warning: libvirt knows no domain {printable(repr(name))} yet", err=True)
    return xml
