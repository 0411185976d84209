"""What the verbs share: their context, their parameters, and how they print."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from collections.abc import Callable
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from virt_usher.errors import UsherError, printable
from virt_usher.host import CONFIG_DIR, RUN_DIR, LiveHost
from virt_usher.journal import Journal

_F = TypeVar("_F", bound=Callable[..., Any])
COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}
WIDTH = 80


class Usher:
    """What every verb gets: the host, and the libvirt to ask about its domains."""

    def __init__(self, host: LiveHost, uri: str) -> None:
        self.host = host
        self.uri = uri

    def need_root(self) -> None:
        """Refuse where an answer would be wrong, because only root may read journals."""
        if not self.host.root and os.geteuid() != 0:
            raise UsherError("only root can see what domains hold", "use sudo, or become root")

    def journals(self, name: str | None = None) -> list[Journal]:
        """Return the journals of all domains, or of one, for reading; none of those without."""
        names = [n[:-4] for n in self.host.entries(RUN_DIR) if n.endswith(".jnl")]
        found = [Journal(self.host, n) for n in ([name] if name else names)]
        return [j for j in found if j.exists]


def check_name(name: str) -> None:
    """Refuse what no domain of libvirt can be called, before it is asked or a file made."""
    try:
        good = bool(name.encode()) and not {"/", "\0", "\n"} & set(name)
    except UnicodeEncodeError:  # a byte of the command line that is no UTF-8
        good = False
    if not good:
        hint = "virsh list --all shows what libvirt knows: UTF-8 without a slash or a newline"
        raise UsherError(f"{name!r} cannot be the name of a domain", hint)


def complete_domain(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[str | CompletionItem]:
    """Complete a domain's name from files, since libvirt may be slow, or not there."""
    return [n for n in names_on_disk(ctx.find_root().obj.host) if n.startswith(incomplete)]


def complete_plugin(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[str | CompletionItem]:
    """Complete the name of an installed plugin."""
    from virt_usher.cli.packages import packaged
    from virt_usher.plugins import installed

    host = ctx.find_root().obj.host
    return sorted(n for n in {*installed(host), *packaged(host)} if n.startswith(incomplete))


def complete_words(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str | CompletionItem]:
    """Complete DOMAIN, then PLUGIN, where both are words of one argument."""
    # --every-domain takes the place of DOMAIN.
    given = len(ctx.params.get("words") or ()) + bool(ctx.params.get("every_domain"))
    if given == 0:
        return complete_domain(ctx, param, incomplete)
    return complete_plugin(ctx, param, incomplete) if given == 1 and ctx.info_name != "waive" else []


def names_on_disk(host: LiveHost) -> list[str]:
    """Return the domain names that libvirt's and our own files carry, as far as a shell can take them.

    The shells' completion splits at blanks, so a name that would need quotes is left to be typed.
    """
    folders = (("/etc/libvirt/qemu", ".xml"), (f"{CONFIG_DIR}/domains", ".toml"), (RUN_DIR, ".jnl"))
    names = {n.removesuffix(end) for folder, end in folders for n in host.entries(folder) if n.endswith(end)}
    return sorted(n for n in names if n and not n.startswith("-") and set(n) <= _PLAIN)


_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.+@")


def json_option(function: _F) -> _F:
    """Add --json to a verb that reads."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")(function)


def domain_argument(required: bool = False) -> Callable[[_F], _F]:
    """Add the argument DOMAIN to a verb."""
    return click.argument("domain", required=required, shell_complete=complete_domain)


def say(text: str, indent: int = 0, mark: str = "", hang: int = 4) -> None:
    """Print foreign or own text; on a terminal in lines of at most 80 columns, coloured by `mark`.

    Every line but the first is `hang` columns further in. Whoever reads it through a pipe wants whole
    sentences to search for.
    """
    lines = textwrap.wrap(
        printable(text),
        WIDTH if sys.stdout.isatty() else 1 << 20,
        initial_indent=" " * indent,
        subsequent_indent=" " * (indent + hang),
        break_long_words=False,
        break_on_hyphens=False,
    )
    click.secho("\n".join(lines), fg=COLOURS.get(mark))


def command_line(text: str, indent: int) -> None:
    """Print a next step as it is: a command broken into lines could not be copied."""
    click.echo(" " * indent + printable(text))


def show_problem(message: str, hint: str, indent: int = 2) -> None:
    """Print a problem and what to do about it."""
    say(f"- {message}", indent, "problem")
    if hint:
        command_line(hint, indent + 4)


def say_json(data: Any) -> None:
    """Print what a verb found, for programs."""
    click.echo(json.dumps(data, indent=2, default=str))


def finish(bad: bool) -> int:
    """Return a verb's exit status."""
    return 1 if bad else 0
