"""A plugin out of a package: installed as a user would, found by name, and missed by those who need it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from virt_usher.cli import run
from virt_usher.testing import FakeHost, run_hook

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "usher-swappiness"
SWITCH = '[plugins.swappiness]\nfrom = "usher_swappiness:Swappiness"\nvalue = 5\n'
NOWHERE = "test:///there/is/no/such/file.xml"
OWN = "/etc/virt-usher/domains/guest.toml"
KNOB = "/proc/sys/vm/swappiness"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example package as pip installs it; built from a copy, since a build writes beside its source."""
    source = shutil.copytree(EXAMPLE, tmp_path_factory.mktemp("source") / "usher-swappiness")
    target = tmp_path_factory.mktemp("packages")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(target),
        str(source),
    ]
    subprocess.run(
        [*pip, "--disable-pip-version-check"],
        check=True,
        env={**os.environ, "PIP_ROOT_USER_ACTION": "ignore"},
    )
    return target


@pytest.fixture
def host(host: FakeHost, package: Path) -> Iterator[FakeHost]:
    """A host that has the package, a domain that has it on, and a knob; this process forgets the package."""
    host.domain("guest", SWITCH).file(KNOB, "60")
    shutil.copytree(package, host.path("/etc/virt-usher/packages"))
    path = list(sys.path)
    yield host
    sys.path[:] = path
    sys.modules.pop("usher_swappiness", None)


def test_a_packaged_plugin_does_its_work_and_is_undone(host: FakeHost) -> None:
    assert run_hook(host, "guest", "prepare").status == 0
    assert host.read(KNOB) == "5"
    run_hook(host, "guest", "release")
    assert host.read(KNOB) == "60"


def test_a_package_that_went_away_is_still_undone(host: FakeHost) -> None:
    run_hook(host, "guest", "prepare")
    shutil.rmtree(host.path("/etc/virt-usher/packages"))
    run_hook(host, "guest", "release")
    assert host.read(KNOB) == "60"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda p: shutil.rmtree(p), "there is no usher_swappiness in /etc/virt-usher/packages"),
        (lambda p: (p / "usher_swappiness.py").write_text("nonsense("), "SyntaxError"),
        (lambda p: (p / "usher_swappiness.py").write_text("x = 1"), "has no dataclass called Swappiness"),
        (lambda p: (p / "usher_swappiness.py").chmod(0o666), "could be written by somebody else"),
    ],
    ids=["uninstalled", "broken", "empty", "writable"],
)
def test_a_damaged_package_refuses_those_who_need_it_and_nobody_else(
    host: FakeHost, damage: object, reason: str
) -> None:
    assert callable(damage)
    damage(Path(host.path("/etc/virt-usher/packages")))
    result = run_hook(host, "guest", "prepare")
    assert result.status != 0
    assert reason in result.stderr
    assert run_hook(host.domain("other", "[plugins.governor]\n"), "other", "prepare").status == 0


def _loose(path: Path, mode: int = 0o777) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if mode & 0o100:
        path.mkdir(exist_ok=True)
    else:
        path.touch()
    path.chmod(mode)


def _linked(packages: Path, loose: str = "", mode: int = 0o777) -> None:
    """Make a link to a folder of modules elsewhere, which others can write somewhere."""
    (packages.parent / "away/far").mkdir(parents=True)
    (packages.parent / "away/far/more.py").touch()
    (packages / "linked").symlink_to(packages.parent / "away/far")
    if loose:
        (packages.parent / loose).chmod(mode)


# What is not the plugin's own file, and can be imported all the same; the second is where others can write.
REACHED: dict[str, tuple[Callable[[Path], None], str]] = {
    "a module beside it": (lambda p: _loose(p / "helper.py", 0o666), "packages/helper.py"),
    "another package's folder": (lambda p: _loose(p / "other"), "packages/other"),
    "a folder of folders": (lambda p: _loose(p / "other/deep/er"), "packages/other/deep/er"),
    "the bytecode": (lambda p: _loose(p / "__pycache__/helper.pyc", 0o666), "__pycache__/helper.pyc"),
    "the folder of bytecode": (lambda p: _loose(p / "__pycache__"), "packages/__pycache__"),
    "all of it": (lambda p: p.chmod(0o777), "/packages"),
    "what is in a link's target": (lambda p: _linked(p, "away/far/more.py", 0o666), "far/more.py"),
    "a link's target": (lambda p: _linked(p, "away/far"), "away/far"),
    "the folder of a link's target": (lambda p: _linked(p, "away"), "virt-usher/away"),
    "a link to nothing yet": (lambda p: (p / "linked").symlink_to("/nowhere"), "packages/linked"),
}


@pytest.mark.parametrize("what", REACHED)
def test_whatever_a_package_could_import_is_roots_alone(host: FakeHost, what: str) -> None:
    damage, named = REACHED[what]
    damage(Path(host.path("/etc/virt-usher/packages")))
    result = run_hook(host, "guest", "prepare")
    assert result.status == 3
    told = " ".join(result.stderr.split())
    assert re.search(f"{named}(: No such file| could be written by somebody else than root)", told), told
    assert "/packages" in told.partition("chmod" if "chmod" in told else "take out of")[2], "the remedy"
    assert host.read(KNOB) == "60"


def test_a_folder_of_packages_may_be_a_link_and_lead_back(host: FakeHost) -> None:
    packages = Path(host.path("/etc/virt-usher/packages"))
    _linked(packages)
    (packages / "linked/back").symlink_to(packages)
    assert run_hook(host, "guest", "prepare").status == 0
    assert host.read(KNOB) == "5"


def test_it_is_listed_with_how_to_use_it_and_enabled_by_name(
    host: FakeHost, capsys: pytest.CaptureFixture[str]
) -> None:
    os.unlink(host.path(OWN))
    assert run(["plugins", "swappiness"], host, NOWHERE) == 0
    told = capsys.readouterr().out
    for line in (
        'from = "usher_swappiness:Swappiness"',
        "virt-usher enable DOMAIN swappiness",
        "value = 1  vm.swappiness while the domain runs",
    ):
        assert line in told
    assert run(["enable", "guest", "swappiness", "value=5"], host, NOWHERE) == 0
    assert host.read(OWN) == SWITCH.strip()
    assert run(["enable", "guest", "swappiness", "value=7"], host, NOWHERE) == 0
    assert run_hook(host, "guest", "prepare").status == 0
    assert host.read(KNOB) == "7"


def test_a_class_that_no_entry_point_names_is_enabled_by_its_place(host: FakeHost) -> None:
    os.unlink(host.path(OWN))
    assert run(["enable", "guest", "calm", "from=usher_swappiness:Swappiness", "value=5"], host, NOWHERE) == 0
    assert host.read(OWN) == SWITCH.strip().replace("swappiness]", "calm]")
    assert run_hook(host, "guest", "prepare").status == 0
    assert host.read(KNOB) == "5"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["swappines"], "there is no plugin 'swappines'"),
        (["swappiness", "from=usher_swappiness:Nothing"], "has no dataclass called Nothing"),
        (["swappiness", "from=os:system"], "there is no os in /etc/virt-usher/packages"),
        (["swappiness", "valeu=5"], "did you mean 'value'?"),
    ],
)
def test_what_is_not_there_is_not_enabled(
    host: FakeHost, words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["enable", "other", *words], host, NOWHERE) == 1
    assert complaint in capsys.readouterr().err
    assert not host.exists("/etc/virt-usher/domains/other.toml")


def test_a_broken_package_is_listed_with_its_error(
    host: FakeHost, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(host.path("/etc/virt-usher/packages/usher_swappiness.py")).write_text("nonsense(")
    assert run(["plugins"], host, NOWHERE) == 1
    told = capsys.readouterr().out
    assert "SyntaxError" in told
    assert "hugepages" in told


@pytest.mark.parametrize("home", ["os:system", "../x:Y", "usher_swappiness", "a b:c"])
def test_only_what_lies_in_the_packages_folder_is_loaded(host: FakeHost, home: str) -> None:
    host.domain("guest", f"[plugins.swappiness]\nfrom = {home!r}\n")
    result = run_hook(host, "guest", "prepare")
    assert "is not like 'module:Class'" in result.stderr or "there is no os in" in result.stderr
