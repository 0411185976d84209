"""An install on a running system: what it refuses, what it tells libvirt's daemon, and the way out."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import DEVNULL, Popen

import pytest
from tests.install.house import House

FOREIGN = "#!/bin/sh\n# the admin's own\n"
PLAIN = "<domain type='qemu'><name>a</name><uuid>c7a5fdbd-edaf-9455-926a-d65c16db1809</uuid></domain>"
METADATA = (
    "<metadata><u:domain xmlns:u='urn:virt-usher:domain:1'><u:plugin name='nosuch'/></u:domain></metadata>"
)
WANTS = PLAIN.replace("</domain>", f"{METADATA}</domain>")


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def nothing_installed(house: House) -> bool:
    return not house.lib.exists() and not house.command.exists() and not (house.hooks / "qemu.d").exists()


# ---- refused before anything is touched


@pytest.mark.parametrize(
    ("python", "message"),
    [
        ("/nonexistent/python3", "missing in /nonexistent/python3"),
        ("bare", "lxml"),  # without the distribution's packages
    ],
)
def test_missing_modules(house: House, python: str, message: str) -> None:
    if python == "bare":
        python = str(program(house.root / "python", 'exec /usr/bin/python3 -S "$@"'))
    house.environment = {"PYTHON": python}
    result = house.installer()
    assert result.returncode == 1
    assert message in result.stderr
    assert "apt-get install python3 python3-lxml python3-pluggy" in result.stderr
    assert "--deps" in result.stderr
    assert nothing_installed(house)
    assert not house.etc.exists()


@pytest.mark.parametrize("spoil", ["mode", "owner", "hooks", "above"])
def test_what_others_can_write_is_refused(house: House, spoil: str) -> None:
    place = {"hooks": house.hooks, "above": house.root / "usr"}.get(spoil, house.lib)
    place.mkdir(parents=True)
    if spoil == "owner":
        os.chown(place, 12345, 0)
    else:
        place.chmod(0o775)
    result = house.installer()
    assert result.returncode == 1
    assert f"chown root:root {place} && chmod go-w {place}" in result.stderr
    assert not house.command.exists()
    assert not house.gate.exists()


def test_a_path_that_would_break_the_gate_is_refused(house: House) -> None:
    for variable, path in (("PREFIX", "usr/local"), ("SYSCONFDIR", "/a b"), ("PYTHON", "/usr/$(id)")):
        house.environment = {variable: path}
        assert house.installer().returncode == 1
    assert nothing_installed(house)


# ---- a hook of the admin's own


def with_libvirt(house: House, **versions: str) -> None:
    """Let these programs, and no others, say which libvirt this is."""
    for name in ("libvirtd", "virtqemud", "virsh"):
        answer = f"echo '{versions[name]}'" if name in versions else "exit 127"
        program(house.root / "bin" / name, answer)
    house.environment["PATH"] = f"{house.root}/bin:{os.environ['PATH']}"


def test_foreign_hook_stays(house: House) -> None:
    house.hooks.mkdir(parents=True)
    house.gate.write_text(FOREIGN)
    with_libvirt(house, virtqemud="virtqemud (libvirt) 11.3.0")
    assert f"libvirt calls it as {house.hooks}/qemu.d/50-virt-usher" in house.install().stdout
    ours = house.hooks / "qemu.d/50-virt-usher"
    assert ours.stat().st_mode & 0o7777 == 0o755
    house.gate.unlink()  # the admin's own is gone: ours stays where it is, and is not called twice
    house.install()
    assert not house.gate.exists()
    house.gate.write_text(FOREIGN)
    assert house.installer("--uninstall").returncode == 0
    assert house.gate.read_text() == FOREIGN
    assert not ours.parent.exists()


@pytest.mark.parametrize("version", ["libvirtd (libvirt) 6.5.0", "10.0.0"])
def test_libvirt_that_chains_hooks(house: House, version: str) -> None:
    house.hooks.mkdir(parents=True)
    house.gate.write_text(FOREIGN)
    with_libvirt(house, **{version.split()[0] if " " in version else "virsh": version})
    house.install()
    assert (house.hooks / "qemu.d/50-virt-usher").exists()


@pytest.mark.parametrize("versions", [{"libvirtd": "libvirtd (libvirt) 6.4.0"}, {}])
@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_foreign_hook_that_would_not_be_chained(house: House, versions: dict[str, str], kind: str) -> None:
    house.hooks.mkdir(parents=True)
    if kind == "file":
        house.gate.write_text(FOREIGN)
    else:
        house.gate.symlink_to("/nonexistent")
    with_libvirt(house, **versions)
    result = house.installer()
    assert result.returncode == 1
    assert "hook of your own" in result.stderr
    assert nothing_installed(house)


# ---- the daemon


@contextmanager
def daemon(house: House, body: str = "sleep 0.05") -> Iterator[Path]:
    """Run what looks like libvirtd to the installer; yields the file with a line for each SIGHUP."""
    told = house.root / "told"
    told.touch()
    house.run_dir.mkdir(exist_ok=True)
    shutil.copy("/bin/sh", house.root / "libvirtd")
    loop = f"trap 'echo told >>{told}' HUP; echo $$ >{house.run_dir}/libvirtd.pid; while :; do {body}; done"
    # Under nohup SIGHUP is ignored, and a shell cannot trap what it was started with ignored.
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with Popen([house.root / "libvirtd", "-c", loop], stdin=DEVNULL) as process:
        signal.signal(signal.SIGHUP, before)
        try:
            wait_for((house.run_dir / "libvirtd.pid").exists)
            yield told
        finally:
            process.kill()


def test_the_running_daemon_is_told_once(house: House) -> None:
    with daemon(house) as told:
        assert "Told the running libvirtd" in house.install().stdout
        pid = (house.run_dir / "libvirtd.pid").read_text().strip()
        start = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        assert (house.run_dir / "virt-usher/.told").read_text() == f"{pid} {start}\n"
        assert house.run_dir.joinpath("virt-usher").stat().st_mode & 0o7777 == 0o700
        assert "Told" not in house.install().stdout
        for version in ("second", "third"):  # upgraded in place: it knows that there is a hook
            with (house.own_source() / "hooks.d/qemu").open("a") as gate:
                gate.write(f"# {version}\n")
            house.install()
        assert told.read_text() == "told\n"


def test_a_daemon_that_looked_later_is_not_told(house: House) -> None:
    house.install()
    time.sleep(1.2)
    with daemon(house) as told:
        assert "Told" not in house.install().stdout
        assert told.read_text() == ""


def test_the_daemon_is_not_told_while_a_hook_runs(house: House) -> None:
    other = program(house.hooks / "network", f"sleep 1; echo over >>{house.root}/told")
    with daemon(house, f"{other}; while sleep 0.05; do :; done") as told:
        house.install()
        wait_for(lambda: "told" in told.read_text())
        assert told.read_text() == "over\ntold\n"


def test_a_process_that_has_the_daemons_old_number_is_left_alone(house: House) -> None:
    house.run_dir.mkdir()
    (house.run_dir / "libvirtd.pid").write_text(f"{os.getpid()}\n")
    assert "Told" not in house.install().stdout


# ---- what was installed works


def test_the_gate_works(house: House) -> None:
    house.install()
    before = house.files(but=" ")
    assert house.run(house.gate, "a", "prepare", "begin", "-", input_=PLAIN).returncode == 0
    refused = house.run(house.gate, "a", "prepare", "begin", "-", input_=WANTS)
    assert refused.returncode == 1
    assert "there is no plugin 'nosuch'" in refused.stderr
    assert house.files(but=" ") == before  # no bytecode, nothing


def test_the_hook_reads_the_configuration_of_this_install(house: House) -> None:
    house.install()
    (house.etc / "domains/a.toml").write_text("nosuch = 1\n")
    refused = house.run(house.gate, "a", "prepare", "begin", "-", input_=PLAIN)
    assert refused.returncode == 1
    assert f"{house.etc}/domains/a.toml" in refused.stderr


def test_the_command_works(house: House) -> None:
    house.install()
    before = house.files(but=" ")
    result = house.run(house.command, "--version")
    assert result.returncode == 0, result.stderr
    assert house.files(but=" ") == before


# ---- the daemon hook, where no systemd runs


def call_daemon_hook(house: House, usher: str, *argv: str, name: str = "libvirtd") -> None:
    """Call it as a daemon of that name does, with another virt-usher."""
    house.install()
    house.command.write_text(usher)
    # A copy: a shell may start the last command of a script in its own place.
    shutil.copy("/bin/sh", house.root / name)
    result = house.run(
        house.root / name, "-c", '"$@"; status=$?; exit $status', name, house.hooks / "daemon", *argv
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_daemon_hook_recovers(house: House) -> None:
    usher = (
        f"import sys, time; time.sleep(.2); open('{house.root}/called', 'a').write(' '.join(sys.argv[1:]))"
    )
    call_daemon_hook(house, usher, "-", "start", "-", "start")
    assert (house.root / "called").read_text() == "recover --boot"


@pytest.mark.parametrize(
    ("operation", "name"), [("shutdown", "libvirtd"), ("reload", "libvirtd"), ("start", "virtnetworkd")]
)
def test_daemon_hook_recovers_only_at_the_start_of_the_qemu_driver(
    house: House, operation: str, name: str
) -> None:
    call_daemon_hook(house, f"open('{house.root}/called', 'a')", "-", operation, "-", operation, name=name)
    assert not (house.root / "called").exists()


def test_daemon_hook_does_not_hold_up_the_daemon_for_ever(house: House) -> None:
    """Here for a tenth of a second instead of a minute; recover goes on, unharmed."""
    program(house.root / "bin/timeout", 'shift; exec /usr/bin/timeout 0.1 "$@"')
    house.environment["PATH"] = f"{house.root}/bin:{os.environ['PATH']}"
    wait = f"import os, time\nwhile not os.path.exists('{house.root}/go'): time.sleep(.01)\n"
    usher = f"print('noise', flush=True)\n{wait}print('noise', flush=True)\nopen('{house.root}/called', 'a')"
    call_daemon_hook(house, usher, "-", "start", "-", "start")
    assert not (house.root / "called").exists()
    (house.root / "go").touch()
    wait_for((house.root / "called").exists)


# ---- the way out


def test_uninstall(house: House) -> None:
    house.install()
    house.run(house.gate, "a", "prepare", "begin", "-", input_=WANTS)
    result = house.installer("--uninstall")
    assert result.returncode == 0, result.stderr
    assert not any(house.hooks.iterdir())
    assert nothing_installed(house)
    assert not (house.run_dir / "virt-usher").exists()
    assert {path.name for path in house.etc.iterdir()} == {"config.toml", "domains", "plugins"}


def test_uninstall_leaves_the_hook_to_a_domain_that_holds_something(house: House) -> None:
    house.install()
    journal = house.run_dir / "virt-usher/a b.jnl"
    journal.parent.mkdir(exist_ok=True)
    journal.write_text('{"version": 999}\n')  # as a newer version might have left it
    before = house.files()
    result = house.installer("--uninstall", "--purge")
    assert result.returncode == 1
    assert "\na b\n" in result.stderr
    assert "Nothing has been removed" in result.stderr
    assert house.files() == before
    journal.unlink()
    assert house.installer("--uninstall", "--purge").returncode == 0
    assert not house.etc.exists()


def test_uninstall_waits_for_a_running_hook(house: House) -> None:
    gate = program(house.gate, f"# virt-usher's gate\nsleep 1; echo over >{house.root}/over")
    with daemon(house, f"{gate}; sleep 30"):
        assert house.installer("--uninstall").returncode == 0
    assert (house.root / "over").exists()
    assert not gate.exists()


def test_uninstall_keeps_the_switch_as_it_was(house: House) -> None:
    house.install()
    (house.etc / "off").touch()
    house.installer("--uninstall")
    assert (house.etc / "off").exists()
