"""The manual page and the completions know every verb and option there is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from virt_usher import cli
from virt_usher.host import CONFIG_DIR, LAST_DIR, RUN_DIR

ROOT = Path(__file__).resolve().parents[2]
MAN = ROOT / "docs/man/virt-usher.8"
SECTIONS = re.split(r"(?m)^\.S[HS] ", MAN.read_text(encoding="utf-8").replace("\\-", "-"))


def verbs() -> list[tuple[str, click.Command]]:
    assert isinstance(cli.command, click.Group)
    context = click.Context(cli.command)
    names = cli.command.list_commands(context)
    return [(n, command) for n in names if (command := cli.command.get_command(context, n)) is not None]


def section(start: str) -> str:
    """Return the one section of the manual page with this heading."""
    (found,) = [s for s in SECTIONS if re.match(rf"{re.escape(start)}(\s|$)", s)]
    return found


@pytest.mark.parametrize(("name", "command"), verbs())
def test_the_manual_has_each_verb_with_all_its_options(name: str, command: click.Command) -> None:
    text = section(f"virt-usher {name}")
    usage = section("SYNOPSIS").partition(f".B virt-usher {name}\n")[2].partition("\n.br")[0]
    options = [o for p in command.params if isinstance(p, click.Option) for o in p.opts]
    for option in options:
        assert re.search(rf"(?m)^\.BI? {option}( |$)", text), f"{name} {option} is not described"
        assert option in usage, f"{name} {option} is not in the synopsis"
    documented = re.findall(r"(?m)^\.BI? (--[a-z-]+)", text)
    assert sorted(documented) == sorted(options), f"{name}: the manual has options that are none"


def test_the_manual_has_no_verb_that_is_none() -> None:
    documented = [s.split()[1] for s in SECTIONS if s.startswith("virt-usher ")]
    assert documented == [name for name, _ in verbs()]


@pytest.mark.parametrize("option", ["--help", "-h", "--version"])
def test_the_manual_has_the_common_options(option: str) -> None:
    assert option in section("OPTIONS")


@pytest.mark.parametrize("status", ["0", "1", "2", "130"])
def test_the_manual_has_each_exit_status(status: str) -> None:
    assert f"\n.B {status}\n" in section("EXIT STATUS")


@pytest.mark.parametrize("folder", [CONFIG_DIR, RUN_DIR, LAST_DIR, f"{CONFIG_DIR}/off"])
def test_the_manual_has_the_files(folder: str) -> None:
    assert f".I {folder}" in section("FILES")


@pytest.mark.skipif(not shutil.which("groff"), reason="groff is not installed")
def test_the_manual_is_sound_roff() -> None:
    run = subprocess.run(
        ["groff", "-man", "-Tutf8", "-ww", "-z", str(MAN)], capture_output=True, text=True, check=True
    )
    assert run.stderr == ""


@pytest.mark.parametrize(("name", "command"), verbs())
def test_the_list_of_verbs_says_what_each_verb_says(name: str, command: click.Command) -> None:
    assert command.name == name
    assert (command.help or "").partition("\n")[0] == cli.VERBS[name]
    assert len(cli.VERBS[name]) <= 72


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["virt-usher", "dis"], ["disable"]),
        (["virt-usher", "status", "g"], ["guest", "guest2"]),
        (["virt-usher", "enable", "guest", "hu"], ["hugepages"]),
        (["virt-usher", "enable", "--every-domain", "hu"], ["hugepages"]),
        (["virt-usher", "plugins", "gov"], ["governor"]),
        (["virt-usher", "recover", "--b"], ["--boot"]),
        (["virt-usher", "last", "needs"], []),
    ],
)
def test_bash_completes_verbs_domains_plugins_and_options(
    tmp_path: Path, line: list[str], expected: list[str]
) -> None:
    """Through the file that is installed, without a libvirt."""
    domains = tmp_path / "host/etc/libvirt/qemu"
    domains.mkdir(parents=True)
    for name in ("guest.xml", "guest2.xml", "needs quotes.xml", "other.xml"):
        (domains / name).touch()
    program = tmp_path / "virt-usher"
    program.write_text(
        f"#!{sys.executable} -B\nimport sys\nsys.path.insert(0, {str(ROOT / 'src')!r})\n"
        f"from virt_usher.cli import main\nfrom virt_usher.host import LiveHost\n"
        f"main(host=LiveHost({str(tmp_path / 'host')!r}), uri='test:///nowhere')\n"
    )
    program.chmod(0o755)
    script = (
        f'. {ROOT}/completions/virt-usher.bash; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))\n'
        '_virt_usher_completion virt-usher; for word in "${COMPREPLY[@]}"; do echo "$word"; done'
    )
    run = subprocess.run(
        ["bash", "-c", script, "bash", *line],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    assert (run.stdout.split(), run.stderr) == (expected, "")
