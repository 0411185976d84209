"""last answers: which step failed, why, and how long did each take."""

from __future__ import annotations

import errno
import os
from typing import Any

from tests.cli.conftest import Cli, hook

from virt_usher.testing import FakeHost, domain_xml, run_hook

XML = domain_xml(memory_kib=8 << 10, hugepages=True)
BOTH = "[plugins.hugepages]\n[plugins.governor]\n"
GOVERNOR = "/sys/devices/system/cpu/cpufreq/policy0/scaling_governor"


def operations(cli: Cli, name: str = "guest") -> dict[str, Any]:
    return {op["op"]: op for op in cli("last", name, "--json").json["operations"]}


def test_a_start_and_stop_show_each_step_with_its_duration(cli: Cli, pc: FakeHost) -> None:
    pc.domain("guest", BOTH)
    hook(pc, "guest", "prepare", XML)
    hook(pc, "guest", "release")
    found = operations(cli)
    assert list(found) == ["prepare", "release"]
    assert {s["result"] for s in found["prepare"]["steps"]} == {"done"}
    assert {s["result"] for s in found["release"]["steps"]} == {"given back"}
    assert all(s["ms"] >= 0 for op in found.values() for s in op["steps"])
    ran = cli("last", "guest")
    assert (ran.status, ran.out.count("4 pages of 2 MiB")) == (0, 2)


def test_the_order_is_that_of_the_deeds_and_back(cli: Cli, pc: FakeHost) -> None:
    pc.domain("guest", BOTH)
    hook(pc, "guest", "prepare", XML)
    hook(pc, "guest", "release")
    found = operations(cli)
    done, undone = ([s["what"] for s in found[op]["steps"]] for op in ("prepare", "release"))
    assert undone == done[::-1]


def test_a_refusal_is_told_with_all_its_reasons_and_hints(cli: Cli, pc: FakeHost) -> None:
    pc.domain("guest", "[plugins.hugepages]\n[plugins.governor]\ngovernor = 'nonsense'\n")
    xml = domain_xml(memory_kib=64 << 30, hugepages=True)
    refusal = run_hook(pc, "guest", "prepare", xml)
    assert refusal.status != 0
    ran = cli("last", "guest")
    assert ran.status == 1
    assert "prepare: refused" in ran.out
    for line in refusal.stderr.strip().splitlines()[1:]:
        assert line.strip() in ran.out


def test_the_step_that_failed_is_named_with_its_cause(cli: Cli, pc: FakeHost) -> None:
    pc.domain("guest", BOTH)
    pc.fail(GOVERNOR, errno.EIO)
    assert run_hook(pc, "guest", "prepare", XML).status != 0
    pc.heal()
    steps = operations(cli)["prepare"]["steps"]
    assert {s["result"] for s in steps} == {"done", "failed", "given back"}
    assert [s["what"] for s in steps if s["result"] == "failed"] == [
        "policy0 governor: schedutil → performance"
    ]
    assert "Input/output error" in cli("last", "guest").out


def test_a_start_that_was_killed_shows_the_step_it_was_in(cli: Cli, pc: FakeHost) -> None:
    pc.domain("guest", BOTH)
    for point in range(1, 100):
        result = run_hook(pc, "guest", "prepare", XML, kill_at=point, kill="family")
        assert result.killed, "no kill point left a step unfinished"
        if '"do":1' in pc.journal("guest") and '"ok":1' not in pc.journal("guest"):
            break
    ran = cli("last", "guest")
    assert ran.status == 1
    assert "killed in the middle" in ran.out
    assert "unfinished: 4 pages of 2 MiB" in ran.out


def test_a_notice_of_what_was_left_out_is_told(cli: Cli, pc: FakeHost) -> None:
    pc.domain("guest", BOTH)
    hook(pc, "guest", "prepare", domain_xml())
    assert "left out: the domain asks for no huge pages" in cli("last", "guest").out


def test_what_was_left_behind_is_told_at_the_stop(cli: Cli, pc: FakeHost) -> None:
    pc.domain("guest", "[plugins.governor]\n")
    hook(pc, "guest", "prepare", XML)
    pc.fail(GOVERNOR, errno.EIO)
    hook(pc, "guest", "release")
    found = operations(cli)["release"]
    assert found["bad"]
    assert ["Input/output" in s["why"] for s in found["steps"] if s["result"] == "left behind"] == [True]


def test_a_domain_that_never_started_is_told_so(cli: Cli) -> None:
    ran = cli("last", "nobody")
    assert (ran.status, "no start of 'nobody'" in ran.err) == (1, True)


def test_the_record_outlives_the_boot(cli: Cli, pc: FakeHost) -> None:
    pc.domain("guest", BOTH)
    hook(pc, "guest", "prepare", XML)
    for name in pc.entries("/run/virt-usher"):
        os.unlink(pc.path(f"/run/virt-usher/{name}"))
    assert "prepare: ok" in cli("last", "guest").out
