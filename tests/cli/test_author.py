"""A newcomer's path: one command writes a plugin with its test, one runs both, and both pass at once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.cli.conftest import Cli


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return here


def test_a_new_plugin_and_its_test_pass_at_once_and_are_short(cli: Cli, folder: Path) -> None:
    assert cli("plugins", "new", "calm").status == 0
    lines = sum(len((folder / n).read_text().splitlines()) for n in ("calm.py", "test_calm.py"))
    assert lines < 60
    ran = cli("plugins", "test", "calm.py")
    assert (ran.status, ran.err) == (0, "")
    assert "it sets swappiness: ok" in ran.out
    assert "nothing stays, wherever it is killed or fails: ok" in ran.out


def test_the_attack_is_on_the_domain_and_with_the_options_of_the_test_file(cli: Cli, folder: Path) -> None:
    cli("plugins", "new", "calm")
    plugin, test = folder / "calm.py", folder / "test_calm.py"
    only_big = plugin.read_text().replace(
        "        yield", "        if domain.vcpus > 1 and self.value == 7:\n            yield"
    )
    plugin.write_text(only_big)
    test.write_text(test.read_text().partition("def test_")[0])
    assert "not tried, it has nothing to do" in cli("plugins", "test", "calm.py").out
    given = 'DOMAIN = domain_xml("big", body="<vcpu>2</vcpu>")\nOPTIONS = {"value": 7}\n'
    test.write_text(test.read_text() + given)
    assert re.search(r"ok \(\d\d+ kills and errors\)", cli("plugins", "test", "calm.py").out)


@pytest.mark.parametrize(
    ("good", "bad", "verdict"),
    [
        (
            "usher_prepare",
            "usher_prepair",
            "it does not fit: FAILED: plugin calm: unknown hook 'usher_prepair'",
        ),
        ("@hookimpl", "", "it does not fit: FAILED: plugin calm: usher_prepare is not marked; put @hookimpl"),
        ("@dataclass(frozen=True, eq=False)", "", "/etc/virt-usher/plugins/calm.py has no dataclass"),
        ("option(1,", "option('one',", "the default of value: 'one' is not a whole number"),
        ("yield", "1 / 0\n        yield", "ZeroDivisionError: division by zero (calm.py:18)"),
        ("/swappiness", "/swappines", "calm: /proc/sys/vm/swappines: No such file or directory"),
        ("str(self.value)", "self.value", "the value 1 is not a text"),
        (
            "yield",
            "open(host.path('/proc/sys/vm/swappiness'), 'w').close()\n        yield",
            "it changes the host by itself: /proc/sys/vm/swappiness",
        ),
    ],
)
def test_what_is_wrong_with_a_plugin_is_said_in_its_own_words(
    cli: Cli, folder: Path, good: str, bad: str, verdict: str
) -> None:
    cli("plugins", "new", "calm")
    plugin = folder / "calm.py"
    plugin.write_text(plugin.read_text().replace(good, bad))
    ran = cli("plugins", "test", "calm.py")
    assert (ran.status, verdict in ran.out) == (1, True), ran.out
    assert "/tmp/" not in ran.out


def test_a_failing_test_is_named_with_its_place(cli: Cli, folder: Path) -> None:
    cli("plugins", "new", "calm")
    test = folder / "test_calm.py"
    test.write_text(test.read_text().replace("60 → 5", "60 → 7"))
    ran = cli("plugins", "test", "calm.py")
    assert ran.status == 1
    assert "it sets swappiness: FAILED: AssertionError" in ran.out
    assert "test_calm.py:" in ran.out


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["new", "../evil"], "cannot be the name of a plugin"),
        (["new", "Upper"], "cannot be the name of a plugin"),
        (["test", "absent.py"], "there is no file absent.py"),
    ],
)
def test_what_cannot_be_is_refused(cli: Cli, folder: Path, words: list[str], complaint: str) -> None:
    ran = cli("plugins", *words)
    assert (ran.status, complaint in ran.err) == (1, True)
    assert not list(folder.iterdir())


def test_nothing_is_overwritten(cli: Cli, folder: Path) -> None:
    (folder / "test_calm.py").write_text("mine")
    ran = cli("plugins", "new", "calm")
    assert (ran.status, "is there already" in ran.err) == (1, True)
    assert [p.name for p in folder.iterdir()] == ["test_calm.py"]
