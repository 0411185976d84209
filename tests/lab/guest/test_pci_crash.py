"""Whatever dies or hangs, at whatever moment: devices come back, and libvirt goes on."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.lab import machine
from tests.lab.guest import kernel, usher, vfio
from tests.lab.guest.domains import PATIENCE, Domain, run, virsh, wait_for
from tests.lab.guest.test_pci import all_comes_back, state

__all__ = ["all_comes_back"]  # the fixture: every test ends with every device as it was

pytestmark = pytest.mark.product
SCRIPTS = Path("/etc/libvirt/hooks/usher.d")
STUCK = Path("/run/lab-stuck")
SCRIPT = f"#!/bin/sh\nwhile [ -e {STUCK} ]; do sleep 0.2; done\n"
DEVICE = "usb"
ADDRESS = machine.device(DEVICE).address


@pytest.fixture
def stuck(domain: Domain, request: pytest.FixtureRequest) -> Iterator[Domain]:
    """A domain whose hook hangs in one operation (the parameter) until STUCK is gone.

    It hangs when its device is on vfio: the scripts come after `pci` in a start, and before it at the end.
    Unmanaged: at the end libvirt leaves the device to the hook.
    """
    place = SCRIPTS / domain.name / request.param / ("end" if request.param == "release" else "begin")
    place.mkdir(parents=True)
    (place / "wait").write_text(SCRIPT)
    (place / "wait").chmod(0o755)
    domain.devices, domain.managed = (DEVICE,), False
    yield usher.enable(domain, "pci", "scripts")
    STUCK.unlink(missing_ok=True)
    run("rm", "-r", str(SCRIPTS / domain.name))


@contextmanager
def in_background(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run virsh beside the test; at the end of the block it must have ended."""
    command = ["virsh", "--quiet", "--connect", "qemu:///system", *arguments]
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        yield process
        process.wait(PATIENCE)


@contextmanager
def hanging(domain: Domain, operation: str) -> Iterator[subprocess.Popen[str]]:
    """Have a domain's hook hang in an operation, and what called for it in the background."""
    if operation == "release":
        virsh("start", domain.name)
    STUCK.touch()
    with in_background("destroy" if operation == "release" else "start", domain.name) as process:
        wait_for("a hook that hangs", lambda: len(hook(domain, operation)) == 3 and waiting(domain))
        assert kernel.driver(ADDRESS) == "vfio-pci"
        yield process
        STUCK.unlink(missing_ok=True)


def hook(domain: Domain, operation: str) -> list[int]:
    """Return the processes of a hook's call: the gate, the keeper of the deadline, the worker."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        ours = any(word.endswith(("/hooks/qemu", "/hook.py")) for word in words)
        if ours and [domain.name, operation] == words[-5:-3]:
            found.append(int(folder.name))
    return sorted(found)


def waiting(domain: Domain) -> bool:
    """Tell whether the script runs that everything waits for."""
    own = f"{SCRIPTS / domain.name}/".encode()
    return any(own in file.read_bytes() for file in Path("/proc").glob("[0-9]*/cmdline") if file.exists())


def kill_daemon() -> None:
    run("systemctl", "kill", "--signal=KILL", "--kill-whom=main", "libvirtd")


def the_daemon_is_back() -> None:
    wait_for("the daemon", lambda: virsh("list", check=False).returncode == 0)


@pytest.mark.parametrize("victims", ["worker", pytest.param("all", marks=pytest.mark.soak)])
@pytest.mark.parametrize("stuck", ["prepare", "start"], indirect=True, ids=str)
def test_a_hook_killed_in_a_start(stuck: Domain, victims: str, request: pytest.FixtureRequest) -> None:
    operation = request.node.callspec.params["stuck"]
    with hanging(stuck, operation) as start:
        gate, keeper, worker = hook(stuck, operation)
        for pid in (worker,) if victims == "worker" else (gate, keeper, worker):
            os.kill(pid, signal.SIGKILL)
        STUCK.unlink()
        said, _ = start.communicate(timeout=PATIENCE)
    assert start.returncode == 1
    assert "was killed by signal 9" in said if victims == "worker" else "signal" in said, said
    assert stuck.state == "shut off"
    usher.given_back(stuck)
    assert kernel.driver(ADDRESS) == "xhci_hcd"


@pytest.mark.parametrize(("victims", "then"), [("worker", "start"), ("all", "recover")])
@pytest.mark.parametrize("stuck", ["release"], indirect=True, ids=str)
def test_a_hook_killed_in_a_stop(stuck: Domain, victims: str, then: str) -> None:
    with hanging(stuck, "release"):
        gate, keeper, worker = hook(stuck, "release")
        for pid in (worker,) if victims == "worker" else (gate, keeper, worker):
            os.kill(pid, signal.SIGKILL)
    assert stuck.state == "shut off"
    assert kernel.driver(ADDRESS) == "vfio-pci"
    if then == "start":
        virsh("start", stuck.name)
        stuck.stop()
        usher.given_back(stuck)
    else:
        run("virt-usher", "recover")
        assert not usher.journal(stuck).exists()
    assert kernel.driver(ADDRESS) == "xhci_hcd"


@pytest.mark.parametrize("stuck", ["prepare", "release"], indirect=True, ids=str)
def test_the_daemon_killed_meanwhile(stuck: Domain, request: pytest.FixtureRequest) -> None:
    """The hook outlives it. What it took for a start that nobody waits for is there to be recovered."""
    operation = request.node.callspec.params["stuck"]
    with hanging(stuck, operation):
        kill_daemon()
        the_daemon_is_back()
    wait_for("the end of the hook", lambda: not hook(stuck, operation))
    wait_for("the domain's end", lambda: stuck.state == "shut off")
    run("virt-usher", "recover")
    assert not usher.journal(stuck).exists()
    assert kernel.driver(ADDRESS) == "xhci_hcd"


@pytest.mark.parametrize("stuck", ["release"], indirect=True, ids=str)
def test_a_device_that_somebody_opened_is_kept_until_they_close_it(stuck: Domain) -> None:
    """An unbind would hang until then, and take libvirt's lock of all devices with it."""
    with hanging(stuck, "release") as destroy, vfio.opened([ADDRESS]):
        STUCK.unlink()
        destroy.wait(PATIENCE)
        assert stuck.state == "shut off"
        said = run("virt-usher", "status", check=False)
        assert said.returncode == 1
        assert f"is in use by python3 (pid {os.getpid()})" in said.stdout
        assert run("virt-usher", "recover", check=False).returncode == 1
        assert kernel.driver(ADDRESS) == "vfio-pci"
    run("virt-usher", "recover")
    assert kernel.driver(ADDRESS) == "xhci_hcd"


def test_a_driver_that_does_not_let_go(domain: Domain, second_domain: Domain) -> None:
    """ALSA waits in its remove for the last open file, and cannot be killed (snd_card_free)."""
    gpu, sound = (machine.device(role).address for role in ("gpu", "gpu_audio"))
    card = next((kernel.DEVICES / sound / "sound").glob("card*")).name.removeprefix("card")
    deadlines = Path("/etc/virt-usher/config.toml")
    before, policy = state(), deadlines.read_text()
    domain.devices, second_domain.devices = ("gpu", "gpu_audio"), ("switched",)
    usher.enable(second_domain, "pci")
    usher.enable(domain, "pci")
    for address, problem in ((gpu, "display"), (sound, "in-use")):
        run("virt-usher", "waive", domain.name, address, problem, "a test")
    deadlines.write_text("[deadlines]\nstart = 25\nstop = 4\n")
    try:
        with open(f"/dev/snd/controlC{card}", "rb"), in_background("start", domain.name) as start:
            wait_for("the first unbind", lambda: kernel.driver(gpu) == "vfio-pci" or start.poll())
            virsh("start", second_domain.name)  # meanwhile
            said, _ = start.communicate(timeout=PATIENCE)
            assert start.returncode == 1
            assert "was not ready in time" in said
            assert f"{sound}: snd_hda_intel → vfio-pci" in said
            assert "waits in the kernel in snd_card_free" in said, said
            assert domain.state == "shut off"
            assert "it waits in snd_card_free" in run("virt-usher", "status", check=False).stdout
            second_domain.stop()
            second_domain.devices = ("gpu", "gpu_audio")
            other = virsh("start", second_domain.define().name, check=False).stderr
            assert f"is held by domain '{domain.name}', whose hook (pid " in other
        usher.given_back(domain)
        usher.given_back(second_domain)
        assert state() == before
    finally:
        deadlines.write_text(policy)
