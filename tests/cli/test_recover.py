"""recover gives back what stale domains hold, and leaves every other alone."""

from __future__ import annotations

import errno

from tests.cli.conftest import Cli, hook, hook_of_gone_daemon
from tests.conftest import eventually

from virt_usher.testing import FakeHost, domain_xml, start_hook

XML = domain_xml(memory_kib=8 << 10, hugepages=True)
BOTH = "[plugins.hugepages]\n[plugins.governor]\n"
GOVERNOR = "/sys/devices/system/cpu/cpufreq/policy0/scaling_governor"


def test_without_journals_it_touches_nothing(cli: Cli, pc: FakeHost) -> None:
    before = pc.snapshot()
    assert cli("recover").status == 0
    assert cli("recover", "--boot").out == ""
    assert pc.snapshot() == before


def test_what_a_domain_of_a_gone_daemon_holds_is_given_back(cli: Cli, pc: FakeHost) -> None:
    pc.domain("guest", BOTH)
    before = pc.snapshot()
    hook_of_gone_daemon(pc, "guest", "prepare", XML)
    assert pc.snapshot() != before
    ran = cli("recover", "--boot")
    assert ran.status == 0, ran.out
    assert "guest: given back: hugepages: 4 pages of 2 MiB" in ran.out
    assert pc.snapshot() == before
    assert not pc.journal("guest")


def test_a_domain_whose_qemu_lives_is_left_alone(cli: Cli, pc: FakeHost) -> None:
    pc.domain("guest", BOTH)
    hook_of_gone_daemon(pc, "guest", "prepare", XML)
    pc.qemu_runs("guest")
    before = pc.snapshot()
    ran = cli("recover")
    assert (ran.status, "guest: runs, left alone" in ran.out) == (0, True)
    assert pc.snapshot() == before


def test_while_its_daemon_lives_libvirt_is_asked(cli: Cli, pc: FakeHost, libvirt: str) -> None:
    pc.domain("guest", BOTH).domain("test", "[plugins.governor]\n")
    hook(pc, "guest", "prepare", XML)
    hook(pc, "test", "prepare", domain_xml("test"))
    ran = cli("recover", uri=libvirt)
    assert ran.status == 1
    assert "test: left alone: libvirt says that it is active" in ran.out
    assert not pc.journal("guest")
    assert pc.journal("test")


def test_what_nobody_can_be_asked_about_is_left_alone(cli: Cli, pc: FakeHost) -> None:
    pc.domain("guest", BOTH)
    hook(pc, "guest", "prepare", XML)
    for boot in ([], ["--boot"]):
        ran = cli("recover", *boot)
        assert (ran.status, "guest: left alone" in ran.out) == (1, True)
        assert pc.journal("guest")


def test_a_domain_in_the_middle_of_its_start_is_skipped_naming_the_holder(cli: Cli, pc: FakeHost) -> None:
    pc.domain("guest", BOTH).stall(GOVERNOR)
    call = start_hook(pc, "guest", "prepare", XML)
    eventually(lambda: pc.stalled, "the start reaches the kernel")
    ran = cli("recover")
    pc.resume()
    assert call.wait().status == 0
    assert ran.status == 1
    assert "guest: left alone: domain guest is held by pid " in ran.out


def test_one_name_recovers_one_domain(cli: Cli, pc: FakeHost) -> None:
    for name in ("a", "b"):
        pc.domain(name, "[plugins.governor]\n")
        hook_of_gone_daemon(pc, name, "prepare", domain_xml(name))
    assert cli("recover", "a").status == 0
    assert (pc.journal("a"), bool(pc.journal("b"))) == ("", True)


def test_what_cannot_be_given_back_is_told_and_can_be_tried_again(cli: Cli, pc: FakeHost) -> None:
    pc.domain("guest", BOTH)
    before = pc.snapshot()
    hook_of_gone_daemon(pc, "guest", "prepare", XML)
    pc.fail(GOVERNOR, errno.EIO)
    ran = cli("recover")
    assert ran.status == 1
    assert "guest: left: governor: policy0 governor" in ran.out
    assert "Input/output error" in ran.out
    pc.heal()
    assert cli("recover").status == 0
    assert pc.snapshot() == before


def test_the_journal_of_a_newer_version_is_kept(cli: Cli, pc: FakeHost) -> None:
    pc.file("/run/virt-usher/guest.jnl", '{"usher":99,"name":"guest","daemon":[1,1]}\n')
    ran = cli("recover")
    assert (ran.status, "newer virt-usher" in ran.out) == (1, True)
    assert pc.journal("guest")
