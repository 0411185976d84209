"""A plugin out of a package: installed as a user would, found by name, and missed by those who need it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from virt_usher.testing import FakeHost, run_hook

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "usher-swappiness"
SWITCH = '[plugins.swappiness]\nfrom = "usher_swappiness:Swappiness"\nvalue = 5\n'
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
def host(host: FakeHost, package: Path) -> FakeHost:
    """A host that has the package, a domain that has it on, and a knob."""
    host.domain("guest", SWITCH).file(KNOB, "60")
    shutil.copytree(package, host.path("/etc/virt-usher/packages"))
    return host


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


@pytest.mark.parametrize("home", ["os:system", "../x:Y", "usher_swappiness", "a b:c"])
def test_only_what_lies_in_the_packages_folder_is_loaded(host: FakeHost, home: str) -> None:
    host.domain("guest", f"[plugins.swappiness]\nfrom = {home!r}\n")
    result = run_hook(host, "guest", "prepare")
    assert "is not like 'module:Class'" in result.stderr or "there is no os in" in result.stderr
