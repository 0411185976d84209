"""A desktop on the card that a domain is given: a real display manager's session, under the real logind."""

from __future__ import annotations

import fcntl
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.lab import machine
from tests.lab.guest import kernel, usher
from tests.lab.guest.domains import Domain, run, virsh, wait_for

pytestmark = pytest.mark.product
GPU = machine.device("gpu").address
COMPOSITOR = Path("/run/lab-compositor.py")
GREETD = Path("/etc/greetd/config.toml")
LOGGED_IN = Path(
    "/run/greetd.run"
)  # there once greetd has let its first session in, which it does once a boot
HOLDERS = {"python3", "systemd", "systemd-logind"}


def node() -> str:
    """Return the card's node; its number changes when its driver comes back."""
    (card,) = (kernel.DEVICES / GPU / "drm").glob("card*")
    return f"/dev/dri/{card.name}"


def holders() -> set[str]:
    """Return the names of the processes that have the card open."""
    found = set()
    for fd in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if str(fd.readlink()) == node():
                found.add((fd.parents[1] / "comm").read_text().strip())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


# A desktop that logs in by itself, as ly and kiosks do: the session's leader is the unit's own process.
KIOSK = Path("/run/systemd/system/lab-kiosk.service")
KIOSKS = """
[Service]
User=jo
PAMName=greetd
TTYPath=/dev/tty7
StandardInput=tty-fail
ExecStart=/bin/sh -c 'exec {}'
"""
VT_ACTIVATE = 0x5606


@pytest.fixture(params=["greetd", "lab-kiosk"])
def desktop(request: pytest.FixtureRequest) -> Iterator[str]:
    """Let somebody be logged in who has a compositor on the card; yield the unit that does it."""
    kept = GREETD.read_text()
    shutil.copy(Path(__file__).with_name("compositor.py"), COMPOSITOR)
    run("useradd", "--create-home", "jo")
    compositor = f"python3 -B {COMPOSITOR} $(readlink -f /dev/dri/by-path/pci-{GPU}-card)"
    command = f"command = \"/bin/sh -c 'exec {compositor}'\""
    GREETD.write_text(
        f'[terminal]\nvt = 7\n[default_session]\n{command}\nuser = "_greetd"\n'
        f'[initial_session]\n{command}\nuser = "jo"\n'
    )
    LOGGED_IN.unlink(missing_ok=True)
    KIOSK.write_text(KIOSKS.format(compositor.replace("$", "$$")))
    run("systemctl", "daemon-reload")
    with open("/dev/tty0", "rb") as screen:
        fcntl.ioctl(screen, VT_ACTIVATE, 7)
    run("systemctl", "start", request.param)
    wait_for("the desktop", lambda: holders() == HOLDERS)
    yield request.param
    run("systemctl", "stop", request.param)
    GREETD.write_text(kept)
    KIOSK.unlink()
    run("systemctl", "daemon-reload")
    wait_for("the end of the session", lambda: not holders())
    run("loginctl", "terminate-user", "jo", check=False)
    wait_for("the end of the user's manager", lambda: run("userdel", "-r", "jo", check=False).returncode == 0)


def session() -> str:
    """Return the class of the session at the seat."""
    number = run("loginctl", "show-seat", "--property=ActiveSession", "--value", "seat0").stdout.strip()
    return run("loginctl", "show-session", "--property=Class", "--value", number).stdout.strip()


def test_a_desktop_makes_room_and_comes_back(domain: Domain, desktop: str) -> None:
    domain.devices = ("gpu", "gpu_audio")
    usher.enable(domain, "pci")
    said = virsh("start", domain.name, check=False).stderr
    assert set(re.findall(r"(\S+) \(pid \d+\)", said)) == HOLDERS, said
    assert "systemd (pid 1)" in said
    assert "kill" not in said
    hint = re.search(rf"virt-usher (enable \S+ services stop={desktop}.service);", said)
    assert hint, said
    assert holders() == HOLDERS
    run("virt-usher", *hint[1].split())
    # greetd asks who comes back to log in.
    for was in ("user", "greeter" if desktop == "greetd" else "user"):
        assert session() == was
        virsh("start", domain.name)
        assert kernel.driver(GPU) == "vfio-pci"
        assert run("systemctl", "is-active", desktop, check=False).stdout.strip() == "inactive"
        domain.stop()
        usher.given_back(domain)
        assert kernel.driver(GPU) == "bochs-drm"
        wait_for("the desktop", lambda: holders() == HOLDERS)
