"""A plugin is told the process and the threads of the running guest, and is left out where there is none."""

from __future__ import annotations

import errno
import os

import pytest

from virt_usher import Guest
from virt_usher.cli import main
from virt_usher.domain import Domain
from virt_usher.testing import FakeHost, ask, domain_xml, run_hook

NAMES = ("call_rcu", "IO mon_iothread", "IO iothread3", "CPU 0/TCG", "CPU 11/KVM", "worker", "vnc_worker")
DOMAIN = Domain.from_xml(domain_xml("guest"))
PLUGIN = """
from dataclasses import dataclass
from virt_usher import Note, Write, hookimpl

@dataclass(frozen=True, eq=False)
class Plugin:
    @hookimpl
    def usher_started(self, guest):
        yield Note(f"vCPU 0 is {guest.vcpus[0]}")
        yield Write(f"/proc/{guest.pid}/oom_score_adj", "-900", "the OOM killer's view")
"""


def test_threads_are_told_by_libvirts_numbers(host: FakeHost) -> None:
    pid = host.qemu_runs("guest", threads=NAMES)
    others = {pid + 1: "call_rcu", pid + 2: "IO mon_iothread", pid + 6: "worker", pid + 7: "vnc_worker"}
    assert Guest.of(host, DOMAIN) == Guest(pid, {0: pid + 4, 11: pid + 5}, {3: pid + 3}, others)


def test_a_thread_that_has_just_ended_is_none(host: FakeHost) -> None:
    pid = host.qemu_runs("guest", threads=NAMES)
    os.unlink(host.path(f"/proc/{pid}/task/{pid + 6}/comm"))
    guest = Guest.of(host, DOMAIN)
    assert guest is not None
    assert pid + 6 not in guest.others


@pytest.mark.parametrize("uuid", ["", "5dd6a1c8-6e5b-4c0e-9f43-00000000ffff"])
def test_a_process_of_another_guest_is_not_taken_for_it(host: FakeHost, uuid: str) -> None:
    host.qemu_runs("guest", threads=NAMES)
    assert Guest.of(host, Domain.from_xml(domain_xml("guest", uuid=uuid))) is None


def started(host: FakeHost) -> tuple[int, str]:
    """Start a guest whose plugin writes to it; return its pid, and where that is."""
    host.plugin("mine", PLUGIN).domain("guest", "[plugins.mine]\n")
    assert run_hook(host, "guest", "prepare").status == 0
    pid = host.qemu_runs("guest", threads=NAMES)
    knob = f"/proc/{pid}/oom_score_adj"
    host.file(knob, "0")
    assert run_hook(host, "guest", "started").status == 0
    return pid, knob


def test_a_plugin_acts_on_the_running_guest_and_is_undone(host: FakeHost) -> None:
    pid, knob = started(host)
    assert host.read(knob) == "-900"
    assert f"vCPU 0 is {pid + 4}" in host.journal("guest")
    host.qemu_ends("guest")
    assert run_hook(host, "guest", "release").status == 0
    assert not host.journal("guest")


def test_a_process_that_got_the_guests_number_keeps_its_own_value(host: FakeHost) -> None:
    pid, knob = started(host)
    host.qemu_ends("guest")
    host.file(f"/proc/{pid}/stat", f"{pid} (sshd) S 1 " + " ".join(["0"] * 17) + f" {pid + 1} 0")
    host.file(knob, "-900")
    assert run_hook(host, "guest", "release").status == 0
    assert host.read(knob) == "-900"
    assert not host.journal("guest")


def test_a_guest_of_which_nobody_can_tell_whether_it_runs_keeps_all(
    host: FakeHost, capfd: pytest.CaptureFixture[str]
) -> None:
    _, knob = started(host)
    host.fail("/run/libvirt/qemu/*.pid", errno.EIO, on="read")
    run_hook(host, "guest", "release")
    with pytest.raises(SystemExit):
        main(("recover",), host)
    said = capfd.readouterr().out
    assert "guest: left alone" in said
    assert "Input/output error" in said
    host.heal()
    assert host.read(knob) == "-900"
    assert host.journal("guest")


def test_a_directory_that_cannot_be_read_is_not_an_empty_one(host: FakeHost) -> None:
    os.symlink("loop", host.path("/loop"))
    with pytest.raises(OSError, match="symbolic links"):
        host.entries("/loop")
    assert host.entries("/none") == []


def test_without_a_running_guest_the_plan_says_what_is_left_out(host: FakeHost) -> None:
    plan = ask(host.plugin("mine", PLUGIN), "mine", domain_xml("guest"), operation="started")
    assert not plan.problems
    (planned,) = plan.items
    assert "needs the running guest" in str(planned.item)
