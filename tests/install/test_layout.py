"""What an install puts where, and what the next one changes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from threading import Event, Thread

import pytest
from tests.install.house import CHECKOUT, House
from tests.install.watch import watched

from virt_usher.dispatch import DEADLINES


def test_layout(package: House) -> None:
    package.install()
    release = package.lib / "releases" / package.current()
    assert os.readlink(package.lib / "current") == f"releases/{package.current()}"
    assert re.fullmatch(r"[\d.]+-[0-9a-f]{12}", package.current())
    for source, target in (("src/virt_usher", "virt_usher"), ("plugins", "plugins")):
        for path in (package.source / source).rglob("*.py"):
            there = release / target / path.relative_to(package.source / source)
            assert there.exists()
            compiled = there.parent / "__pycache__" / f"{there.stem}.{sys.implementation.cache_tag}.pyc"
            if Path("/usr/bin/python3").samefile(sys._base_executable):  # type: ignore[attr-defined]
                assert compiled.exists() == (target == "virt_usher")
    assert package.gate.stat().st_mode & 0o7777 == 0o755
    assert package.command.stat().st_mode & 0o7777 == 0o755
    assert (package.etc / "config.toml").stat().st_mode & 0o7777 == 0o644
    for folder in ("domains", "plugins"):
        assert (package.etc / folder).stat().st_mode & 0o7777 == 0o755
    assert not [path for path, (mode, *_) in package.files().items() if not mode & 0o120000 and mode & 0o022]


def test_manual_and_completions(package: House) -> None:
    package.install()
    for source, target in (
        ("docs/man/virt-usher.8", "man/man8/virt-usher.8"),
        ("completions/virt-usher.bash", "bash-completion/completions/virt-usher"),
        ("completions/virt-usher.zsh", "zsh/site-functions/_virt-usher"),
        ("completions/virt-usher.fish", "fish/vendor_completions.d/virt-usher.fish"),
    ):
        content = (package.source / source).read_bytes()
        assert (package.prefix / "share" / target).read_bytes() == content


def test_gate_has_its_paths(package: House) -> None:
    package.environment = {"PREFIX": "/opt/usher", "SYSCONFDIR": "/opt/etc", "PYTHON": sys.executable}
    package.installer()
    gate = (package.root / "dest/etc/libvirt/hooks/qemu").read_text()
    lib = "/opt/usher/lib/virt-usher/current"
    assert f"\netc=/opt/etc/virt-usher run=/run/virt-usher lib={lib} python={sys.executable}\n" in gate
    source = (CHECKOUT / "hooks.d/qemu").read_text()
    assert len(gate.splitlines()) == len(source.splitlines())
    command = (package.root / "dest/opt/usher/bin/virt-usher").read_text()
    assert command.startswith(f"#!{sys.executable} -IB\n")
    assert lib in command
    unit = package.root / "dest/opt/usher/lib/systemd/system/virt-usher-recover.service"
    assert "\nExecStart=/opt/usher/bin/virt-usher recover --boot\n" in unit.read_text()


def test_the_source_is_what_any_umask_made_it(package: House) -> None:
    subprocess.run(["chmod", "-R", "u=rwX,go=", package.own_source()], check=True)
    (package.source / "src/virt_usher/errors.py").chmod(0o666)
    package.install()
    installed = package.lib / "current/virt_usher/errors.py"
    assert installed.stat().st_mode & 0o7777 == 0o644
    assert installed.parent.stat().st_mode & 0o7777 == 0o755


def test_shipped_configuration_is_the_defaults() -> None:
    text = (CHECKOUT / "data/config.toml").read_text()
    assert not [v for v in tomllib.loads(text).values() if v != {}]
    told = tomllib.loads(re.sub(r"^#(?=\[|\w+ = )", "", text, flags=re.MULTILINE))
    assert told["deadlines"] == DEADLINES
    assert told["metadata"] == "options"
    from virt_usher import options, plugins
    from virt_usher.host import Host

    for name, table in told["plugins"].items():
        known = options.options_of(plugins.load(Host("/"), name))
        for key, value in table.items():
            assert key == "enabled" or known[key].default == value


def test_again_changes_nothing(package: House) -> None:
    package.install()
    (package.etc / "config.toml").write_text("# mine\n")
    before = package.files()
    package.install()
    assert {p: f for p, f in package.files().items() if before.get(p) != f}.keys() <= {
        # written anew, with the same content
        p
        for p in before
        if "/bin/" in p or "/share/" in p or "/systemd/" in p
    }
    assert {p: (m, c) for p, (m, _, c) in package.files().items()} == {
        p: (m, c) for p, (m, _, c) in before.items()
    }


def test_upgrade_keeps_the_release_before(package: House) -> None:
    package.install()
    first = package.current()
    package.change_source("second")
    package.install()
    second = package.current()
    package.install()
    assert package.releases() == {first, second}
    package.change_source("third")
    package.install()
    assert package.releases() == {second, package.current()}
    assert package.current() not in (first, second)


def test_upgrade_is_atomic(package: House) -> None:
    """Whoever looks at any moment finds a whole release, and a gate that can be executed."""
    package.install()
    paths = [package.lib / "current/virt_usher" / name for name in ("hook.py", "locks.py")]
    missed: list[Path] = []
    done = Event()

    def look() -> None:
        while not done.is_set():
            missed.extend(p for p in paths if not p.exists())
            missed.extend([package.gate] if not os.access(package.gate, os.X_OK) else [])

    looking = Thread(target=look)
    looking.start()
    try:
        for version in ("second", "third"):
            package.change_source(version)
            with (package.own_source() / "hooks.d/qemu").open("a") as gate:
                gate.write(f"# {version}\n")
            package.install()
    finally:
        done.set()
        looking.join()
    assert not missed
    assert package.gate.read_text().endswith("# third\n")


def test_a_damaged_release_is_repaired(package: House) -> None:
    package.install()
    before = package.files()
    damaged = package.lib / "current/virt_usher/locks.py"
    damaged.write_text("(")
    package.install()
    assert package.files().keys() == before.keys()
    assert damaged.read_bytes() == (package.source / "src/virt_usher/locks.py").read_bytes()


@pytest.mark.parametrize("name", ["qemu", "qemu.d/50-virt-usher"])
def test_the_hook_appears_complete(package: House, name: str) -> None:
    """No other file is ever in the hooks folder, and nothing is done to the hook once it is there."""
    folder = (package.hooks / name).parent
    folder.mkdir(parents=True)
    if name != "qemu":
        package.gate.write_text("#!/bin/sh\n")
    with watched(folder) as events:
        package.install()
    assert events == [("moved in", os.path.basename(name))]
    with watched(folder) as events:
        package.install()
    assert events == []


def test_broken_source_changes_nothing(package: House) -> None:
    package.install()
    before = package.current()
    package.change_source("x")
    (package.source / "src/virt_usher/locks.py").write_text("(")
    result = package.installer()
    assert result.returncode == 1
    assert "locks.py" in result.stdout + result.stderr
    assert package.current() == before


def test_removed(package: House) -> None:
    package.install()
    (package.etc / "domains/a.toml").touch()
    result = package.installer("--uninstall")
    assert result.returncode == 0
    files = [p for p, (mode, *_) in package.files().items() if not (package.root / p).is_dir()]
    assert sorted(files) == ["dest/etc/virt-usher/config.toml", "dest/etc/virt-usher/domains/a.toml"]
    assert package.installer("--uninstall").returncode == 0
    assert package.installer("--uninstall", "--purge").returncode == 0
    assert not package.etc.exists()


@pytest.mark.parametrize("option", ["--unknown", "--purge", "-x", "--deps --demo"])
def test_wrong_usage(package: House, option: str) -> None:
    result = package.installer(*option.split())
    assert result.returncode == 2
    assert "--uninstall" in result.stderr
    assert not (package.root / "dest").exists()


@pytest.mark.parametrize("option", ["--deps", "--demo"])
def test_nothing_is_downloaded_with_destdir(package: House, option: str) -> None:
    """An apt-get that is not the real one, should it be called."""
    package.environment["PATH"] = "/nonexistent"
    result = package.run("/bin/sh", package.source / "install.sh", option)
    assert result.returncode == 1
    assert "DESTDIR" in result.stderr


def test_help(package: House) -> None:
    result = package.installer("--help")
    assert result.returncode == 0
    for word in ("--deps", "--demo", "--uninstall", "--purge", "DESTDIR", "HOOKS_DIR", "PYTHON"):
        assert word in result.stdout
