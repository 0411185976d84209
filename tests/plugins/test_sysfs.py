"""Any value of sysfs can be held while domains run, from root's own configuration, and comes back."""

from __future__ import annotations

import errno

import pytest

from virt_usher.actions import Write
from virt_usher.testing import FakeHost, ask, domain_xml, run_hook

INTERVAL, THP = "/proc/sys/vm/stat_interval", "/sys/kernel/mm/transparent_hugepage/enabled"
PINS = "<vcpu>2</vcpu><cputune><vcpupin vcpu='0' cpuset='1'/><vcpupin vcpu='1' cpuset='3'/></cputune>"


@pytest.fixture
def knobs(host: FakeHost) -> FakeHost:
    """A host with some knobs, one of them for each of four CPUs."""
    host.file(INTERVAL, "1").file(THP, "madvise").file("/sys/bus/thing/remove", mode=0o200)
    for cpu in range(4):
        for state in range(3):
            host.file(f"/sys/devices/system/cpu/cpu{cpu}/cpuidle/state{state}/disable", "0")
    host.file("/sys/class/thing/flag", "0").link_to("/sys/other", "class/thing")
    return host


def planned(host: FakeHost, *lines: str) -> dict[str, str]:
    plan = ask(host, "sysfs", domain_xml(body=PINS), {"set": lines})
    assert not plan.problems
    return {a.path: a.value for a in plan.actions if isinstance(a, Write)}


def problems(host: FakeHost, *lines: str, body: str = PINS) -> list[str]:
    return [p.message for p in ask(host, "sysfs", domain_xml(body=body), {"set": lines}).problems]


def test_values_are_set_and_come_back(knobs: FakeHost) -> None:
    knobs.domain("guest", f'[plugins.sysfs]\nset = ["{INTERVAL} = 120", "{THP}=never"]')
    assert run_hook(knobs, "guest", "prepare").status == 0
    assert (knobs.read(INTERVAL), knobs.read(THP)) == ("120", "never")
    assert run_hook(knobs, "guest", "release").status == 0
    assert (knobs.read(INTERVAL), knobs.read(THP)) == ("1", "madvise")


def one_is_left(host: FakeHost, *others: str) -> None:
    """Let one set 120 and not put it back at its stop, though others have started; two wants 60."""
    for name, value in (("one", 120), ("two", 60)):
        host.domain(name, f'[plugins.sysfs]\nset = ["{INTERVAL} = {value}"]')
    for name in ("one", *others):
        run_hook(host, name, "prepare")
    host.fail(INTERVAL, errno.EIO)
    run_hook(host, "one", "release")
    host.heal()
    assert "Input/output error" in host.journal("one")
    assert host.read(INTERVAL) == "120"


@pytest.mark.parametrize("recovered", [False, True])
@pytest.mark.parametrize(("admins", "then"), [("", "1"), ("7", "7")])
def test_a_value_that_a_stopped_domain_could_not_put_back_rules_nobody(
    knobs: FakeHost, admins: str, then: str, recovered: bool
) -> None:
    one_is_left(knobs)
    if admins:
        knobs.write(INTERVAL, admins)
    run_hook(knobs, "two", "prepare")
    assert knobs.read(INTERVAL) == "60"
    if recovered:
        run_hook(knobs, "one", "release")
        assert knobs.read(INTERVAL) == "60"
    run_hook(knobs, "two", "release")
    assert knobs.read(INTERVAL) == then
    run_hook(knobs, "one", "release")
    assert (knobs.journal("one"), knobs.journal("two"), knobs.read(INTERVAL)) == ("", "", then)


def test_a_value_that_was_not_handed_over_is_put_back_by_whoever_goes_last(knobs: FakeHost) -> None:
    one_is_left(knobs, "two")
    run_hook(knobs, "two", "release")
    assert knobs.read(INTERVAL) == "1"
    assert "not ours" not in knobs.read("/var/lib/virt-usher/last/two.jnl")
    run_hook(knobs, "one", "release")
    assert (knobs.journal("one"), knobs.journal("two"), knobs.read(INTERVAL)) == ("", "", "1")


@pytest.mark.parametrize(("second", "third"), [(60, 0), (120, 0), (120, 30)])
def test_what_the_admin_set_between_two_that_are_left_comes_back(
    knobs: FakeHost, second: int, third: int
) -> None:
    one_is_left(knobs)
    knobs.write(INTERVAL, "7")
    knobs.domain("two", f'[plugins.sysfs]\nset = ["{INTERVAL} = {second}"]')
    run_hook(knobs, "two", "prepare")
    knobs.fail(INTERVAL, errno.EIO)
    run_hook(knobs, "two", "release")
    knobs.heal()
    names = ["one", "two"]
    if third:
        knobs.domain("three", f'[plugins.sysfs]\nset = ["{INTERVAL} = {third}"]')
        run_hook(knobs, "three", "prepare")
        names = ["three", *names]
    for name in names:
        run_hook(knobs, name, "release")
        assert not knobs.journal(name)
    assert knobs.read(INTERVAL) == "7"


def test_wildcards_and_the_cpus_of_the_domain(knobs: FakeHost) -> None:
    base = "/sys/devices/system/cpu"
    assert planned(knobs, base + "/cpu{cpu}/cpuidle/state[12]/disable=1") == {
        f"{base}/cpu{cpu}/cpuidle/state{state}/disable": "1" for cpu in (1, 3) for state in (1, 2)
    }


def test_a_file_has_one_name_however_it_is_reached(knobs: FakeHost) -> None:
    assert planned(knobs, "/sys/other/flag=1") == {"/sys/class/thing/flag": "1"}


def test_what_is_missing_is_refused_unless_it_may_be(knobs: FakeHost) -> None:
    assert problems(knobs, "/sys/none*=1") == ["sysfs: there is no /sys/none*"]
    assert planned(knobs, "-/sys/none*=1") == {}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("/sys/bus/thing/remove=1", "cannot be read, so nobody could put it back"),
        ("/etc/passwd=root", "only what is below /sys and /proc/sys"),
        ("/sys/../etc/passwd=root", "only what is below /sys and /proc/sys"),
        ("/sys/bus/thing=1", "cannot be written"),
        ("/sys/bus/thing/nr_hugepages=1", "see the plugin hugepages"),
        ("sys/flag=1", "is not PATH=VALUE"),
        (INTERVAL, "is not PATH=VALUE"),
    ],
)
def test_what_could_not_be_put_back_is_refused(knobs: FakeHost, line: str, reason: str) -> None:
    knobs.file("/etc/passwd").file("/sys/bus/thing/nr_hugepages", "0")
    assert reason in problems(knobs, line)[0]


def test_cpus_need_pins(knobs: FakeHost) -> None:
    found = problems(knobs, "/sys/devices/system/cpu/cpu{cpu}/cpuidle/state1/disable=1", body="")
    assert "pinned to no CPUs" in found[0]


def test_metadata_cannot_set_anything(knobs: FakeHost) -> None:
    xml = domain_xml(metadata=f"<u:plugin name='sysfs' set='{INTERVAL}=5'/>")
    result = run_hook(knobs, "guest", "prepare", xml)
    assert result.status != 0
    assert "<metadata> may not set set of sysfs" in result.stderr
    assert knobs.read(INTERVAL) == "1"
