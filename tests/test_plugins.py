"""Plugins are found, vetted and called in the order of the configuration."""

from __future__ import annotations

import os
import py_compile
import re
import shutil
import sys
from pathlib import Path

import pytest
from tests.conftest import ROOT

from virt_usher import UsherError
from virt_usher.config import Enabled, Settings, settings
from virt_usher.domain import Domain
from virt_usher.plugins import Plugins, installed, load, shipped_dir
from virt_usher.prepare import make_plan
from virt_usher.testing import FakeHost, ask, domain_xml, run_hook

ADMIN = "/etc/virt-usher/plugins"
PICKY = """
from dataclasses import dataclass
from virt_usher import hookimpl

@dataclass(frozen=True, eq=False)
class Plugin:
    @hookimpl
    def usher_start(self):
        return ()

    @hookimpl
    def usher_wants(self, domain):
        return domain.element.find("devices/interface") is not None
"""
NOTE = """
from dataclasses import dataclass
from virt_usher import Note, Problem, hookimpl

@dataclass(frozen=True, eq=False)
class Plugin:
    @hookimpl
    def usher_prepare(self):
        yield Note("{name}")

    @hookimpl
    def usher_check(self):
        yield Problem("{name} objects")
"""


def own(line: str) -> str:
    """Write a plugin whose one member is as given."""
    head = "from dataclasses import dataclass\nfrom virt_usher import Write, hookimpl\n\n"
    return f"{head}@dataclass(frozen=True)\nclass Plugin:\n    {line}\n"


def broken(line: str) -> str:
    """Write a plugin whose one hook is as given."""
    return own(f"@hookimpl\n    {line}\n        return []")


def prepares(answer: str) -> str:
    """Write a plugin that answers so."""
    return own(f"@hookimpl\n    def usher_prepare(self):\n        return {answer}")


@pytest.mark.parametrize("order", ["abc", "cba", "bca"])
def test_plugins_are_asked_in_the_order_of_the_configuration(host: FakeHost, order: str) -> None:
    for name in order:
        host.plugin(name, NOTE.format(name=name))
    host.domain("guest", "".join(f"[plugins.{name}]\n" for name in order))
    domain = Domain.from_xml(domain_xml())
    enabled = settings(host, domain).plugins
    plugins = Plugins(host, enabled)
    assert plugins.problems == []
    for hook, arguments in (("usher_prepare", {}), ("usher_check", {"plan": None})):
        asked = plugins.ask(hook, domain=domain, host=host, **arguments)
        assert [name for name, _ in asked] == list(order)


def test_a_trace_tells_every_hook_call(pc: FakeHost) -> None:
    told: list[str] = []
    settings = Settings(plugins=(Enabled("governor", {}),))
    make_plan(pc, Domain.from_xml(domain_xml("guest")), settings, trace=told.append)
    assert [t.partition("(")[0] for t in told] == ["governor: usher_prepare", "governor: usher_check"]
    assert all("name='guest'" in t and t.endswith(" ms") for t in told)
    assert "Write(path=" in told[0]


@pytest.mark.parametrize(("interface", "signed"), [("", False), ("<interface type='network'/>", True)])
def test_an_operation_is_asked_for_only_if_a_plugin_wants_it(
    pc: FakeHost, interface: str, signed: bool
) -> None:
    pc.plugin("picky", PICKY).domain("guest", "[plugins.picky]\n")
    xml = domain_xml("guest", body=f"<devices>{interface}</devices>")
    assert run_hook(pc, "guest", "prepare", xml).status == 0
    assert pc.exists("/run/virt-usher/guest.sta") == signed
    assert bool(pc.journal("guest")) == signed


def test_the_actions_of_several_plugins_are_undone_in_reverse(pc: FakeHost) -> None:
    write = "from dataclasses import dataclass\nfrom virt_usher import Write, hookimpl\n\n"
    write += "@dataclass\nclass Plugin:\n"
    for name in "ab":
        pc.file(f"/sys/{name}", "0")
        body = f"    @hookimpl\n    def usher_prepare(self):\n        yield Write('/sys/{name}', '1')\n"
        pc.plugin(name, write + body)
    pc.domain("guest", "[plugins.b]\n[plugins.a]\n")
    run_hook(pc, "guest", "prepare")
    run_hook(pc, "guest", "release")
    last = pc.read("/var/lib/virt-usher/last/guest.jnl")
    assert re.findall(r'"(do|undone)":(\d)', last) == [
        ("do", "1"),
        ("do", "2"),
        ("undone", "2"),
        ("undone", "1"),
    ]


BAD = {
    "an unknown hook": (
        broken("def usher_prepair(self):"),
        "unknown hook 'usher_prepair' (did you mean 'usher_prepare'?)",
    ),
    "a wrong argument": (broken("def usher_prepare(self, guest):"), "guest"),
    "a hook that is not marked": (own("def usher_prepare(self): ..."), "usher_prepare is not marked"),
    "an option of no type": (own("x: 'itn' = 1"), "name 'itn' is not defined"),
    "an option of a strange type": (own("x: dict = None"), "option x has the type <class 'dict'>"),
    "a default of another type": (own("x: int = 'one'"), "the default of x: 'one' is not a whole number"),
    "an action for a list": (prepares("Write('/sys/x', '1')"), "and not a list of such"),
    "a number for a text": (prepares("[Write('/sys/x', 1)]"), "the value 1 is not a text"),
    "half a path": (prepares("[Write('sys/x', '1')]"), "'sys/x' is not a whole path"),
    "no class": ("x = 1\n", "has no dataclass called Plugin"),
    "no dataclass": ("class Plugin: pass\n", "has no dataclass called Plugin"),
    "bad syntax": ("def f(:\n", "SyntaxError"),
    "an unknown import": ("import nonexistent\n", "ModuleNotFoundError: No module named 'nonexistent'"),
    "an error": ("1 / 0\n", "ZeroDivisionError: division by zero (bad.py:1)"),
    "an exit": ("import sys; sys.exit(0)\n", "SystemExit"),
    "a null byte": ("x = 1\0\n", "null bytes"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_plugin_that_does_not_fit_is_refused_when_it_is_loaded(pc: FakeHost, what: str) -> None:
    source, reason = BAD[what]
    pc.plugin("bad", source).domain("guest", "[plugins.bad]\n[plugins.governor]\n")
    before = pc.snapshot()
    result = run_hook(pc, "guest", "prepare")
    assert result.status == 3
    assert reason in result.stderr
    assert pc.snapshot() == before


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666])
@pytest.mark.parametrize("path", [f"{ADMIN}/mine.py", ADMIN, "/etc/virt-usher"])
def test_a_plugin_that_somebody_else_could_write_is_never_run(host: FakeHost, path: str, mode: int) -> None:
    ran = host.path("/ran")
    host.plugin("mine", f"open({ran!r}, 'w')\n")
    os.chmod(host.path(path), mode | 0o111 * (path[-3:] != ".py"))
    with pytest.raises(UsherError, match="could be written by somebody else than root"):
        load(host, "mine")
    assert not os.path.exists(ran)


def test_a_linked_plugin_is_vetted_where_it_really_lies(host: FakeHost) -> None:
    host.file("/home/u/mine.py", NOTE.format(name="mine")).file(f"{ADMIN}/.keep")
    os.symlink(host.path("/home/u/mine.py"), host.path(f"{ADMIN}/mine.py"))
    load(host, "mine")
    os.chmod(host.path("/home/u"), 0o777)
    with pytest.raises(UsherError, match="could be written by somebody else than root"):
        load(host, "mine")


@pytest.mark.parametrize("mode", [0o644, 0o666])
def test_a_plugin_is_compiled_from_its_file_and_from_nothing_beside_it(host: FakeHost, mode: int) -> None:
    """Python would run what lies in __pycache__ in its place, whoever wrote that."""
    ran, path = host.path("/ran"), host.path(f"{ADMIN}/mine.py")
    host.plugin("mine", f"open({ran!r}, 'w')\n")
    cached = py_compile.compile(path, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    assert cached
    os.chmod(cached, mode)
    os.chmod(os.path.dirname(cached), mode | 0o111)
    before = Path(cached).read_bytes()
    host.plugin("mine", NOTE.format(name="mine"))
    assert load(host, "mine").__name__ == "Plugin"
    assert not os.path.exists(ran)
    assert Path(cached).read_bytes() == before
    shutil.rmtree(os.path.dirname(cached))
    load(host, "mine")
    assert not os.path.exists(os.path.dirname(cached))


def test_two_plugins_of_one_name_are_refused_naming_both(host: FakeHost) -> None:
    host.plugin("governor", NOTE.format(name="governor"))
    with pytest.raises(UsherError) as caught:
        load(host, "governor")
    assert shipped_dir() in caught.value.message
    assert host.path(ADMIN) in caught.value.message


@pytest.mark.parametrize(
    "name", ["", "Upper", "with-dash", "../up", "a/b", "a.b", "1st", "x" * 65, "a\n", "ü", "__init__", "a\0"]
)
def test_what_cannot_be_a_plugins_name_is_never_looked_for(host: FakeHost, name: str) -> None:
    with pytest.raises(UsherError, match="cannot be the name of a plugin"):
        load(host, name)


def test_plugins_that_are_off_are_neither_loaded_nor_listed(pc: FakeHost) -> None:
    seen = os.open(pc.path("/seen"), os.O_RDWR | os.O_CREAT | os.O_APPEND)

    def watch() -> None:
        """Write down, in the hook's own process, what it opens and lists."""
        told = os.open(f"/proc/{os.getppid()}/fd/{seen}", os.O_WRONLY | os.O_APPEND)
        sys.addaudithook(
            lambda event, given: (
                os.write(told, f"{event} {given[0]!r}\n".encode()) and None
                if event in ("os.listdir", "os.scandir", "open")
                else None
            )
        )

    for n in range(10):
        pc.plugin(f"own{n}", "1 / 0\n")
    pc.domain("guest", "[plugins.governor]\n")
    for operation in ("prepare", "release"):
        assert run_hook(pc, "guest", operation, prepare=watch).status == 0
    os.close(seen)
    told = Path(pc.path("/seen")).read_text()
    assert "domains/guest.toml" in told
    assert ADMIN not in told
    assert not re.search(rf"os.(listdir|scandir) '{shipped_dir()}'", told)


def test_only_files_that_can_be_plugins_are_listed(host: FakeHost) -> None:
    host.plugin("mine", "").plugin("not-mine", "").file(f"{ADMIN}/notes.txt").file(f"{ADMIN}/__init__.py")
    found = installed(host)
    assert found["mine"] == host.path(f"{ADMIN}/mine.py")
    assert {"governor", "hugepages"} <= set(found)
    assert not {"not-mine", "notes", "__init__"} & set(found)


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "plugins").glob("*.py")))
def test_every_shipped_plugin_loads_and_explains_itself_and_its_options(host: FakeHost, name: str) -> None:
    from virt_usher.options import options_of

    plugin = load(host, name)
    assert (Path(shipped_dir()) / f"{name}.py").read_text().startswith('"""')
    assert all(option.help for option in options_of(plugin).values())
    assert all(
        not option.harmless or option.type in (bool, int, float, str)
        for option in options_of(plugin).values()
    )


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "plugins").glob("*.py")))
def test_a_shipped_plugin_that_ends_what_a_start_is_refused_for_is_for_roots_files(
    host: FakeHost, name: str
) -> None:
    """What ending.py lets pass, and what frees a module: units stopped, the console taken away."""
    plugin = load(host, name)
    ends = {"KeepUnit", "UnloadModule", "console"} & vars(sys.modules[plugin.__module__]).keys()
    assert bool(ends) == (name in ("consoles", "modules", "services"))
    assert getattr(plugin, "FILES_ONLY", False) == bool(ends)


def test_a_domain_that_asks_for_nothing_makes_no_shipped_plugin_fail(host: FakeHost) -> None:
    """On a host with nothing: no cpufreq, no huge pages, no nodes. A refusal is an answer, a bug is not."""
    for name in installed(host):
        plan = ask(host, name, domain_xml())
        assert plan.actions == []
        assert not [p.message for p in plan.problems if "Error" in p.message]
