"""The command line: one module per verb, loaded when that verb is asked for.

`main` is the entry, and the one place that turns an error into text and an exit status: 0 good, 1
refused or problems found, 2 wrong usage.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

import click

from virt_usher import __version__
from virt_usher.errors import UsherError, printable

if TYPE_CHECKING:
    from virt_usher.host import LiveHost

# One line each, as `--help` shows them: reading them from the modules would load every module.
VERBS = {
    "plan": "Show what a start would do now, and what would refuse it.",
    "status": "Show what domains hold now, drift and leftovers.",
    "last": "Show a domain's last start and stop, step by step.",
    "enable": "Switch a plugin on for a domain, or set its options.",
    "disable": "Switch a plugin off for a domain.",
    "waive": "Write down an exception to one problem of one device.",
    "plugins": "List the plugins, their options, and where they are on.",
    "devices": "Show what can be passed through, and what stands in the way.",
    "cpus": "Show the machine's CPUs and who has them.",
    "pins": "Propose CPUs to pin a domain to, as XML.",
    "doctor": "Check that libvirt will call the hook and it can work.",
    "report": "Write what virt-usher reads of this host to FILE.",
    "recover": "Give back what domains that no longer run still hold.",
}


class Verbs(click.Group):
    """The group of all verbs: known by name, loaded one at a time."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        from importlib import import_module

        if cmd_name not in VERBS:
            return None
        command = import_module(f"virt_usher.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


@click.command(cls=Verbs, name="virt-usher", context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="%(prog)s %(version)s")
def command() -> None:
    """Prepare this host for each libvirt domain, and give everything back.

    libvirt itself calls virt-usher at every start and stop. These commands show what it does,
    configure it, and repair.
    """


def run(argv: Sequence[str], host: LiveHost, uri: str) -> int:
    """Run one command line and return its exit status."""
    from virt_usher.cli.base import Usher

    try:
        status = command.main(
            list(argv),
            "virt-usher",
            standalone_mode=False,
            obj=Usher(host, uri),
            color=False if os.environ.get("NO_COLOR") else None,
        )
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        return 130  # as a shell reports Ctrl-C
    except UsherError as error:
        _say(error)
        return 1
    except OSError as error:
        if error.errno == errno.EPIPE:
            # Whoever read us has seen enough; the interpreter's own flush at the end must not complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        _say(UsherError(f"{error.filename or 'error'}: {error.strerror or error}"))
        return 1
    except Exception as error:  # a bug must not look like an answer, and nobody here wants its trace
        _say(UsherError(f"an error in virt-usher: {type(error).__name__}: {error}", _place(error)))
        return 1
    return int(status or 0)


def _place(error: Exception) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code if trace is not None else None
    return f"please report it with this place: {code.co_filename}:{trace.tb_lineno}" if code and trace else ""


def _say(error: UsherError) -> None:
    click.echo(f"virt-usher: {printable(error.message)}", err=True)
    if error.hint:
        click.echo(f"  {printable(error.hint)}", err=True)


def main(
    argv: Sequence[str] | None = None, host: LiveHost | None = None, uri: str = "qemu:///system"
) -> NoReturn:
    """Run virt-usher on this machine; tests give a host and a libvirt of their own."""
    from virt_usher.host import LiveHost

    streams = (sys.stdin, sys.stdout, sys.stderr)
    if None in streams:
        # The caller closed it (`>&-`), and its number would go to the next file that is opened.
        while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
            os.set_inheritable(number, True)
        null = os.fdopen(number, "r+")
        sys.stdin, sys.stdout, sys.stderr = (stream or null for stream in streams)
    sys.exit(run(sys.argv[1:] if argv is None else argv, host or LiveHost("/"), uri))
