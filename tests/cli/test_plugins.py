"""plugins lists what is installed, without libvirt, and whatever state it is in."""

from __future__ import annotations

import pytest
from tests.cli.conftest import Cli

from virt_usher.testing import FakeHost

OWN = '''"""Say hello."""
from dataclasses import dataclass
from virt_usher import hookimpl, option

@dataclass(frozen=True, eq=False)
class Plugin:
    greeting: str = option("hello", help="what to say", choices=("hello", "bye"))
    often: int = option(1, help="how many times", harmless=True)
    names: tuple[str, ...] = option((), help="whom to greet")

    @hookimpl
    def usher_prepare(self, domain, host):
        return []
'''


def test_each_option_is_told_with_type_default_help_and_choices(cli: Cli, pc: FakeHost) -> None:
    pc.plugin("greet", OWN)
    (told,) = cli("plugins", "greet", "--json").json
    assert told["summary"] == "Say hello."
    assert told["file"] == pc.path("/etc/virt-usher/plugins/greet.py")
    assert [(o["name"], o["default"]) for o in told["options"]] == [
        ("greeting", "hello"),
        ("often", 1),
        ("names", []),
    ]
    text = cli("plugins", "greet").out
    for part in (
        'greeting = "hello"  what to say',
        "one of: hello, bye",
        "may be set in <metadata>",
        "names = []",
    ):
        assert part in text


def test_shipped_and_own_plugins_are_listed_with_where_they_are_on(cli: Cli, pc: FakeHost) -> None:
    pc.plugin("greet", OWN).every_domain("[plugins.governor]\n")
    pc.domain("a", "[plugins.greet]\n").domain("b", "[plugins.governor]\nenabled = false\n")
    pc.domain("broken", "[plugins")
    told = {p["name"]: p for p in cli("plugins", "--json").json}
    assert {"greet", "governor", "hugepages"} <= told.keys()
    assert (told["greet"]["on"], told["governor"]["off"]) == (["a"], ["b"])
    assert (told["governor"]["every_domain"], told["hugepages"]["every_domain"]) == (True, False)


@pytest.mark.parametrize(
    ("name", "files_only"),
    [("services", True), ("consoles", True), ("modules", True), ("governor", False), ("greet", True)],
)
def test_what_metadata_cannot_switch_on_is_not_said_to_be_its_to_ask_for(
    cli: Cli, pc: FakeHost, name: str, files_only: bool
) -> None:
    pc.plugin("greet", OWN.replace("    greeting", "    FILES_ONLY = True\n    greeting"))
    text = " ".join(cli("plugins", name).out.split())
    assert ("metadata cannot switch it on" in text) == files_only
    assert ("metadata may ask for it, if config.toml lets it" in text) != files_only
    assert ("may be set in <metadata>" in text) != files_only
    (told,) = cli("plugins", name, "--json").json
    assert told["files_only"] == files_only
    pc.domain("guest", f"[plugins.{name}]\n")
    assert ("<metadata> ask for it" in cli("disable", "guest", name).out) != files_only


@pytest.mark.parametrize(
    ("policy", "every", "on"),
    [
        ("", "", False),
        ("[plugins.reset_check]\nenabled = true\n", "", True),
        ("[plugins.reset_check]\nenabled = true\n", "[plugins.reset_check]\nenabled = false\n", False),
    ],
)
def test_policy_switches_on_the_one_plugin_it_may(
    cli: Cli, pc: FakeHost, policy: str, every: str, on: bool
) -> None:
    pc.config(f"{policy}[plugins.governor]\nepp = 'keep'\n").every_domain(every)
    told = {p["name"]: p["every_domain"] for p in cli("plugins", "--json").json}
    assert (told["reset_check"], told["governor"]) == (on, False)


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("nonsense(", "SyntaxError"),
        ("raise SystemExit(0)", "SystemExit"),
        ("import nothing_of_that_name", "nothing_of_that_name"),
        ("x = 1", "no dataclass called Plugin"),
    ],
)
def test_a_broken_plugin_is_listed_with_its_error(cli: Cli, pc: FakeHost, source: str, error: str) -> None:
    pc.plugin("broken", source)
    ran = cli("plugins")
    assert (ran.status, error in ran.out) == (1, True)
    assert "hugepages" in ran.out


def test_an_unknown_name_gets_the_nearest(cli: Cli) -> None:
    ran = cli("plugins", "hugepage")
    assert (ran.status, "did you mean 'hugepages'?" in ran.err) == (1, True)
