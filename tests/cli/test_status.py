"""status tells what domains hold, and everything that is not as it should be."""

from __future__ import annotations

import errno

import pytest
from tests.cli.conftest import Cli, hook
from tests.conftest import eventually

from virt_usher.testing import FakeHost, domain_xml, start_hook

POLICY = "/sys/devices/system/cpu/cpufreq/policy0"
GOVERNOR = f"{POLICY}/scaling_governor"
PAGES = domain_xml(memory_kib=8 << 10, hugepages=True)
UUIDS = {"a": "5dd6a1c8-6e5b-4c0e-9f43-00000000000a", "b": "5dd6a1c8-6e5b-4c0e-9f43-00000000000b"}


def running(host: FakeHost, name: str, governor: str) -> None:
    """Start a domain that wants a governor on the CPUs of policy 0."""
    host.domain(name, f'[plugins.governor]\ngovernor = "{governor}"\nepp = "keep"\n')
    pin = "<vcpu cpuset='0-1'>1</vcpu>"
    hook(host, name, "prepare", domain_xml(name, pin, uuid=UUIDS[name]))
    host.qemu_runs(name, UUIDS[name])


def test_a_host_without_domains_has_nothing_to_tell(cli: Cli, pc: FakeHost) -> None:
    before = pc.snapshot()
    assert cli("status").status == 0
    assert cli("status", "--json").json == []
    assert pc.snapshot() == before


def test_original_and_present_value_of_each_change_are_told(cli: Cli, pc: FakeHost) -> None:
    original = pc.read(GOVERNOR)
    running(pc, "a", "performance")
    ran = cli("status", "a")
    assert ran.status == 0, ran.out
    assert f"was {original}, is performance" in ran.out
    assert f"pid {pc.qemu('a', UUIDS['a'])}" in ran.out


def test_pages_are_told_by_node(cli: Cli, pc: FakeHost) -> None:
    pc.domain("guest", "[plugins.hugepages]\n")
    hook(pc, "guest", "prepare", PAGES)
    pc.qemu_runs("guest", pages={(0, 2048): 4})
    held = cli("status", "--json").json[0]["holds"]
    assert held[0]["pools"] == [{"node": 0, "ours": 4, "present": 4, "free": 0}]


def test_the_claim_that_rules_is_named_to_the_domain_it_overrules(cli: Cli, pc: FakeHost) -> None:
    running(pc, "a", "performance")
    running(pc, "b", "powersave")
    first, second = cli("status", "--json").json
    assert [h["overruled_by"] for h in (*first["holds"], *second["holds"])] == [None, "a"]
    assert "the earlier claim of a rules" in cli("status", "b").out
    assert cli("status").status == 0


@pytest.mark.parametrize("whose", ["a", "b"])
def test_the_value_of_any_claim_that_rules_is_no_drift(cli: Cli, pc: FakeHost, whose: str) -> None:
    running(pc, "a", "performance")
    running(pc, "b", "powersave")
    pc.qemu_ends(whose)
    hook(pc, whose, "release")
    ran = cli("status", "--json")
    assert (ran.status, [h["drift"] for h in ran.json[0]["holds"]]) == (0, [False])


def test_a_value_that_somebody_else_changed_is_drift(cli: Cli, pc: FakeHost) -> None:
    running(pc, "a", "performance")
    pc.write(GOVERNOR, "schedutil")
    ran = cli("status")
    assert ran.status == 1
    assert "changed by somebody else" in ran.out


def test_pages_that_somebody_took_away_are_drift(cli: Cli, pc: FakeHost) -> None:
    pc.domain("guest", "[plugins.hugepages]\n")
    hook(pc, "guest", "prepare", PAGES)
    pc.qemu_runs("guest")
    pc.resize(0, -1)
    assert cli("status").status == 1


def test_a_domain_without_qemu_is_told_with_the_next_step(cli: Cli, pc: FakeHost) -> None:
    pc.domain("guest", "[plugins.hugepages]\n")
    hook(pc, "guest", "prepare", PAGES)
    # Its worker has answered, and may have its lock for a moment still.
    eventually(lambda: "being worked on" not in cli("status").out, "the worker ends")
    ran = cli("status")
    assert ran.status == 1
    assert "virt-usher recover" in ran.out


def test_what_could_not_be_given_back_is_told_with_its_cause(cli: Cli, pc: FakeHost) -> None:
    running(pc, "a", "performance")
    pc.qemu_ends("a")
    pc.fail(GOVERNOR, errno.EIO)
    hook(pc, "a", "release")
    ran = cli("status")
    assert ran.status == 1
    assert "left behind: policy0 governor" in ran.out
    assert "Input/output error" in ran.out


def test_an_abandoned_worker_is_told_with_what_it_waits_in(cli: Cli, pc: FakeHost) -> None:
    pc.domain("guest", "[plugins.governor]\n").config("[deadlines]\nstart = 1\n").stall(GOVERNOR)
    call = start_hook(pc, "guest", "prepare")
    assert "not ready in time" in call.wait().stderr
    ran = cli("status", "--json")
    pc.resume()
    assert ran.status == 1
    assert [set(w) for w in ran.json[0]["abandoned"]] == [{"pid", "waits_in", "stack"}]
    assert f"pid {ran.json[0]['abandoned'][0]['pid']}" in ran.json[0]["working"]
    eventually(lambda: not pc.journal("guest"), "all is given back")
    assert cli("status").status == 0


def test_names_cannot_speak_to_the_terminal(cli: Cli, pc: FakeHost) -> None:
    name = "\x1b[31mred"
    pc.domain(name, "[plugins.governor]\n")
    hook(pc, name, "prepare", domain_xml("red"))
    assert "\\x1b[31mred" in cli("status").out
