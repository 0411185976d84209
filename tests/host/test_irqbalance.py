"""irqbalance is asked and told through its socket, in the words of the real one; none is no trouble."""

from __future__ import annotations

import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from virt_usher import cpulist
from virt_usher.host import irq, irqbalance
from virt_usher.testing import domain_xml, run_hook
from virt_usher.testing.cgroup import CpuHost


class Daemon:
    """An irqbalance: what it is told shows only after its next look."""

    def __init__(self, path: str, settings: frozenset[int]) -> None:
        self.settings = self.banned = self.told = settings
        self.silent = False
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(path)
        self._socket.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            line, _ = self._socket.accept()
            with line:
                text = line.recv(1024).decode()
                if self.silent:
                    continue
                if text == "setup":
                    line.sendall(f"SLEEP 10 IRQ 5 LOAD 1 DIFF 0 BANNED {_mask(self.banned)}".encode())
                elif text == "settings cpus NULL":
                    self.told = self.settings
                elif text.startswith("settings cpus "):
                    self.told = cpulist.parse(text.split()[2])

    def hears(self, cpus: set[int]) -> bool:
        """Whether it is told to leave out these; nobody waits for it to read what was sent."""
        end = time.monotonic() + 10
        while self.told != cpus and time.monotonic() < end:
            time.sleep(0.01)
        return self.told == cpus

    def look(self) -> None:
        """Let ten seconds go by."""
        self.banned = self.told


def _mask(cpus: frozenset[int]) -> str:
    return f"00000000,{sum(1 << n for n in cpus):08x}"


@pytest.fixture
def pc4() -> Iterator[CpuHost]:
    """Four cores, and two domains, in a short path: a socket's has 108 bytes at most."""
    with tempfile.TemporaryDirectory() as root:
        host = CpuHost(Path(root)).cores([0], [1], [2], [3]).irq(1, "0-3").systemd()
        for name, cpus in (("one", "2"), ("two", "3")):
            host.domain(name, f'[plugins.cpu_isolation]\ncpus = "{cpus}"\n')
        Path(host.path(irqbalance.SOCKETS)).mkdir(parents=True)
        yield host


@pytest.fixture
def daemon(pc4: CpuHost) -> Daemon:
    """An irqbalance whose settings leave CPU 1 out."""
    return Daemon(pc4.path(f"{irqbalance.SOCKETS}/irqbalance42.sock"), frozenset({1}))


def start(host: CpuHost, name: str) -> None:
    result = run_hook(host, name, "prepare", domain_xml(name))
    assert result.status == 0, result.stderr


def test_it_leaves_out_isolated_cpus_besides_its_own(pc4: CpuHost, daemon: Daemon) -> None:
    start(pc4, "one")
    assert daemon.hears({1, 2}), daemon.told
    start(pc4, "two")
    assert daemon.hears({1, 2, 3}), daemon.told
    run_hook(pc4, "one", "release")
    assert daemon.hears({1, 3}), daemon.told
    daemon.look()
    run_hook(pc4, "two", "release")
    assert daemon.hears({1}), daemon.told


def test_a_start_before_it_shows_what_it_was_told(pc4: CpuHost, daemon: Daemon) -> None:
    start(pc4, "one")
    assert daemon.hears({1, 2}), daemon.told
    daemon.look()
    run_hook(pc4, "one", "release")
    start(pc4, "two")
    assert daemon.hears({1, 2, 3}), daemon.told
    run_hook(pc4, "two", "release")
    assert daemon.hears({1}), daemon.told


def test_one_that_does_not_answer_refuses_a_start_and_is_told_later(pc4: CpuHost, daemon: Daemon) -> None:
    daemon.silent = True
    refused = run_hook(pc4, "one", "prepare", domain_xml("one"))
    assert refused.status == 3
    assert "irqbalance does not answer" in refused.stderr
    assert not pc4.journal("one")
    daemon.silent = False
    start(pc4, "one")
    assert daemon.hears({1, 2}), daemon.told
    daemon.silent = True
    run_hook(pc4, "one", "release")
    assert "irqbalance does not answer" in pc4.journal("one")
    daemon.silent = False
    run_hook(pc4, "one", "release")
    assert daemon.hears({1}), daemon.told
    assert not pc4.journal("one")


def test_none_or_one_that_was_killed_is_no_trouble(pc4: CpuHost) -> None:
    assert irqbalance.banned(pc4) is None
    start(pc4, "one")
    run_hook(pc4, "one", "release")
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(pc4.path(f"{irqbalance.SOCKETS}/irqbalance41.sock"))
    assert irqbalance.banned(pc4) is None
    start(pc4, "one")
    run_hook(pc4, "one", "release")
    assert irq.read(pc4, irq.DEFAULT) == {0, 1, 2, 3}
