"""virt-usher plugins new and test: for those who write a plugin."""

from __future__ import annotations

import inspect
import os
import tempfile
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import click
import tomlkit

from virt_usher.cli import base
from virt_usher.config import Enabled
from virt_usher.domain import Domain
from virt_usher.errors import UsherError
from virt_usher.plugins import NAME, Plugins
from virt_usher.testing import FakeHost, ask, check_nothing_stays, domain_xml, run_hook
from virt_usher.testing.conformance import differences

PLUGIN = '''"""Set the host's swappiness while the domain runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from virt_usher import Action, Domain, Host, Write, hookimpl, option


@dataclass(frozen=True, eq=False)
class Plugin:
    value: int = option(1, help="vm.swappiness while the domain runs")

    @hookimpl
    def usher_prepare(self, domain: Domain, host: Host) -> Iterator[Action]:
        # Read what you need from domain and host, and return actions: virt-usher does and undoes them.
        yield Write("/proc/sys/vm/swappiness", str(self.value), "swappiness")
'''
TEST = '''"""What {name} does on a fake host. Run it: virt-usher plugins test {name}.py"""

from virt_usher.testing import FakeHost, ask, domain_xml


def furnish(host: FakeHost) -> None:
    """Give the empty fake host what the plugin looks at."""
    host.file("/proc/sys/vm/swappiness", "60")


def test_it_sets_swappiness(host: FakeHost) -> None:
    plan = ask(host, "{name}", domain_xml(), {{"value": 5}})
    assert [a.describe(host) for a in plan.actions] == ["swappiness: 60 → 5"]
'''


_GIVE = "the test file can give it what it wants: DOMAIN = domain_xml(…), OPTIONS = {…}, furnish(host)"


def new(name: str) -> int:
    """Write a plugin and its test into the current directory; neither may exist."""
    if not NAME.fullmatch(name):
        raise UsherError(f"{name!r} cannot be the name of a plugin: small letters, digits and _")
    files = {Path(f"{name}.py"): PLUGIN, Path(f"test_{name}.py"): TEST.format(name=name)}
    for path in files:
        if path.exists():
            raise UsherError(f"{path} is there already", "choose another name, or another directory")
    for path, text in files.items():
        path.write_text(text)
        click.echo(path)
    click.echo("\nIt works as it is. Make it yours, then:")
    for command in (
        f"virt-usher plugins test {name}.py",
        f"install -m 644 {name}.py /etc/virt-usher/plugins/",
        f"virt-usher enable DOMAIN {name}",
    ):
        base.command_line(command, 2)
    return 0


def test(path: Path) -> int:
    """Run a plugin's own tests, and attack it at every write, on fake hosts; print a short verdict."""
    if not path.is_file():
        raise UsherError(f"there is no file {path}", "virt-usher plugins new NAME writes one")
    beside = path.with_name(f"test_{path.name}")
    tests = _load(beside) if beside.is_file() else None
    furnish = getattr(tests, "furnish", None)
    checks: dict[str, Callable[[FakeHost], object]] = {
        name: function
        for name, function in inspect.getmembers(tests, inspect.isfunction)
        if name.startswith("test_")
    }
    checks["nothing stays, wherever it is killed or fails"] = lambda host: _attack(path, tests)
    with tempfile.TemporaryDirectory() as folder:
        plugins = Plugins(_host(Path(folder), path, None), (Enabled(path.stem),))
    if plugins.problems:  # and every test would fail for that
        hint = plugins.problems[0].hint
        base.say(
            f"it does not fit: FAILED: {plugins.problems[0].message.replace(folder, '')}; {hint}",
            0,
            "problem",
        )
        return base.finish(True)
    failed = 0
    for name, check in checks.items():
        with tempfile.TemporaryDirectory() as folder:
            text = _verdict(lambda check=check, folder=folder: check(_host(Path(folder), path, furnish)))  # type: ignore[misc]  # bound now
        failed += text.startswith("FAILED")
        base.say(
            f"{name.removeprefix('test_').replace('_', ' ')}: {text}",
            0,
            "problem" if text[0] == "F" else "ok",
        )
    if tests is None:
        base.say(f"(there is no {beside.name}, so it has no tests of its own)")
    return base.finish(failed > 0)


def _verdict(check: Callable[[], object]) -> str:
    """Run one check; whatever it raises is its failure, and an author wants to see where."""
    try:
        told = check()
    except Exception as error:
        if isinstance(error, UsherError):
            return f"FAILED: {error.message}" + (f"; {error.hint}" if error.hint else "")
        trace = inspect.trace()[-1]
        said = str(error) or "".join(trace.code_context or ()).strip()
        return f"FAILED: {type(error).__name__}: {said} ({os.path.basename(trace.filename)}:{trace.lineno})"
    return str(told or "ok")


def _attack(path: Path, tests: ModuleType | None) -> str:
    """Attack a start and a stop of the test file's DOMAIN with its OPTIONS, or of a plain domain without."""
    furnish = getattr(tests, "furnish", None)
    options: dict[str, object] = getattr(tests, "OPTIONS", {})
    xml: bytes = getattr(tests, "DOMAIN", domain_xml())
    toml = tomlkit.dumps({"plugins": {path.stem: options}})
    with tempfile.TemporaryDirectory() as folder:
        numbers = iter(range(1 << 30))

        def make_host() -> FakeHost:
            host = _host(Path(folder) / str(next(numbers)), path, furnish)
            return host.domain(name, toml)

        name = Domain.from_xml(xml).name
        host = make_host()
        before = host.snapshot()
        plan = ask(host, path.stem, xml, options)
        if changed := differences(before, host.snapshot()):
            raise UsherError(f"it changes the host by itself: {changed}", "return actions instead")
        refused = plan.problems[0].message if plan.problems else run_hook(host, name, "prepare", xml).stderr
        if refused:
            raise UsherError(f"it refuses the fake host: {refused.replace(host.root, '').strip()}", _GIVE)
        if not plan.actions and not plan.later:
            return f"not tried, it has nothing to do: {_GIVE}"
        cases = check_nothing_stays(make_host, name, xml)
    return f"ok ({sum(cases.values())} kills and errors)"


def _host(folder: Path, plugin: Path, furnish: Callable[[FakeHost], None] | None) -> FakeHost:
    host = FakeHost(folder).plugin(plugin.stem, plugin.read_text())
    if furnish:
        furnish(host)
    return host


def _load(path: Path) -> ModuleType:
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsherError(f"{path} cannot be loaded: {type(error).__name__}: {error}") from None
    return module
