"""The documentation names all there is, and what it shows works."""

from __future__ import annotations

import dataclasses
import inspect
import re
import tomllib
from pathlib import Path

import pytest

import virt_usher
from virt_usher import Domain, ending, hookspecs, options
from virt_usher.cli import author
from virt_usher.dispatch import DEADLINES
from virt_usher.host import Host
from virt_usher.plugins import load
from virt_usher.testing import FakeHost, ask, domain_xml, run_hook

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = sorted(p.stem for p in (ROOT / "plugins").glob("*.py"))


def text(name: str) -> str:
    return (ROOT / name).read_text()


@pytest.mark.parametrize("plugin", SHIPPED)
def test_every_plugin_is_in_the_readme_and_every_option_in_its_manual(plugin: str) -> None:
    assert f"| `{plugin}` |" in text("README.md")
    manual = text("docs/admin.md")
    assert f"| `{plugin}` |" in manual
    for option in options.options_of(load(Host("/"), plugin)).values():
        assert option.help, f"{plugin}.{option.name} has no help"
        assert f"| `{plugin}.{option.name}` |" in manual


@pytest.mark.parametrize("plugin", SHIPPED)
def test_every_plugin_says_in_one_line_what_it_does(plugin: str) -> None:
    first = (ROOT / "plugins" / f"{plugin}.py").read_text().splitlines()[0]
    assert re.fullmatch(r'"""[A-Z].{10,68}\."""', first), first


def test_every_hook_is_in_the_guide_with_its_arguments() -> None:
    for name, function in inspect.getmembers(hookspecs, inspect.isfunction):
        if name.startswith("usher_"):
            arguments = ", ".join(inspect.signature(function).parameters)
            assert f"`{name}({arguments})`" in text("docs/plugins.md")


def test_every_name_a_plugin_may_import_is_in_the_guide() -> None:
    guide = text("docs/plugins.md")
    missing = [name for name in virt_usher.__all__ if not re.search(rf"`{name}\b", guide)]
    assert not missing


def test_every_problem_that_can_be_waived_is_in_the_manual() -> None:
    waivers = text("docs/admin.md").partition("## Waivers")[2].partition("\n## ")[0]
    assert all(f"`{name}`" in waivers for name in ending.NAMES)


def test_every_deadline_is_in_the_manual() -> None:
    for name in DEADLINES:
        assert f"`deadlines.{name}`" in text("docs/admin.md")


def example(start: str) -> str:
    """Return the one block of Python in the guide whose first line begins so."""
    blocks = re.findall(r"```python\n(.*?)```", text("docs/plugins.md"), re.DOTALL)
    (found,) = [b for b in blocks if b.startswith(f'"""{start}')]
    return str(found)


def test_the_first_plugin_of_the_guide_works(host: FakeHost) -> None:
    host.plugin("swappiness", example("Keep the host from swapping")).file("/proc/sys/vm/swappiness", "60\n")
    plan = ask(host, "swappiness", domain_xml(), {"value": 5})
    assert not plan.problems
    assert [a.describe(host) for a in plan.actions] == ["swappiness: 60 → 5"]


def test_the_guides_plugin_for_a_running_guest_works(host: FakeHost) -> None:
    host.plugin("spare", example("Let the OOM killer")).domain("guest", "[plugins.spare]\n")
    run_hook(host, "guest", "prepare")
    pid = host.qemu_runs("guest", threads=("CPU 0/KVM",))
    host.file(f"/proc/{pid}/oom_score_adj", "0")
    assert run_hook(host, "guest", "started").status == 0
    assert host.read(f"/proc/{pid}/oom_score_adj") == "-500"
    assert f"the threads {pid + 1}" in host.journal("guest")
    host.qemu_ends("guest")
    run_hook(host, "guest", "release")
    assert not host.journal("guest")


def test_the_guides_plugin_passes_the_guides_test(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "latency.py").write_text(example("Keep the CPUs that"))
    (tmp_path / "test_latency.py").write_text(example("Only the pinned CPUs"))
    assert author.test(tmp_path / "latency.py") == 0, capsys.readouterr().out
    told = capsys.readouterr().out
    assert (told.count(": ok"), "kills and errors" in told) == (3, True)


def test_no_python_of_the_documentation_is_left_untried() -> None:
    blocks = {
        f: len(re.findall("```python", text(f))) for f in ("README.md", "docs/plugins.md", "docs/admin.md")
    }
    assert blocks == {"README.md": 0, "docs/plugins.md": 4, "docs/admin.md": 0}


@pytest.mark.parametrize(("table", "kind"), [("of the domain", Domain), ("of the host", Host)])
def test_what_the_guide_says_can_be_read_is_there(table: str, kind: type) -> None:
    rows = text("docs/plugins.md").split(f"| {table} | |\n|---|---|\n")[1].split("\n\n")[0].splitlines()
    names = [n for row in rows for n in re.findall(r"`(\w+)(?:\(|`)", row.split("|")[1])]
    assert len(names) >= len(rows)
    fields = {f.name for f in dataclasses.fields(Domain)}
    assert not [n for n in names if n not in fields and not hasattr(kind, n)]


def test_every_guarantee_names_tests_that_there_are() -> None:
    tests = list((ROOT / "tests").rglob("test_*.py"))
    names, source = {p.name for p in tests}, "".join(p.read_text() for p in tests)
    for line in text("SECURITY.md").partition("## What is guaranteed")[2].splitlines()[4:]:
        if line.startswith("| "):
            promise, _, named = line.strip("| ").rpartition(" | ")
            files = set(re.findall(r"(test_\w+\.py)", named))
            assert files <= names, promise
            for name in re.findall(r"\b(test_\w+)(?!\w*\.py)`", named):
                assert f"def {name}(" in source, f"{promise}: {name}"


@pytest.mark.parametrize("file", ["docs/admin.md", "docs/plugins.md", "README.md", "docs/troubleshooting.md"])
def test_toml_in_the_documentation_parses(file: str) -> None:
    for block in re.findall(r"```toml\n(.*?)```", text(file), re.DOTALL):
        tomllib.loads(block)


@pytest.mark.parametrize(
    "file", [p.relative_to(ROOT).as_posix() for p in [ROOT / "README.md", *ROOT.glob("docs/*.md")]]
)
def test_links_lead_somewhere(file: str) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text(file)):
        assert (ROOT / file).parent.joinpath(target).exists(), f"{file}: {target}"
