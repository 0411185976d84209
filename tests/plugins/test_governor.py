"""governor: policies of the domain's CPUs, the preference in the kernel's order, what a driver cannot do."""

from __future__ import annotations

import pytest

from virt_usher import Note, Write
from virt_usher.testing import FakeHost, ask, domain_xml, run_hook
from virt_usher.testing.conformance import differences

CPUFREQ = "/sys/devices/system/cpu/cpufreq"
PINNED = "<cputune><vcpupin vcpu='0' cpuset='2'/><emulatorpin cpuset='0'/></cputune>"


@pytest.fixture
def cpus(host: FakeHost) -> FakeHost:
    """Three policies of two CPUs each, with the kernel's governors."""
    return host.policy(0, cpus=[0, 1]).policy(2, cpus=[2, 3]).policy(10, cpus=[4, 5])


def wanted(host: FakeHost, body: str = "", options: dict[str, object] | None = None) -> list[str]:
    plan = ask(host, "governor", domain_xml(body=body), options)
    assert [p.message for p in plan.problems] == []
    writes = [a for a in plan.actions if isinstance(a, Write)]
    return [f"{w.path.removeprefix(CPUFREQ + '/')}={w.value}" for w in writes]


@pytest.mark.parametrize(
    ("body", "policies"),
    [
        ("", ["policy0", "policy2", "policy10"]),
        (PINNED, ["policy0", "policy2"]),
        ("<vcpu cpuset='5'>1</vcpu>", ["policy10"]),
        ("<vcpu cpuset='0-5,^0-1'>1</vcpu>", ["policy2", "policy10"]),
        ("<vcpu cpuset='64'>1</vcpu>", []),
    ],
)
def test_the_policies_of_the_cpus_the_domain_runs_on(cpus: FakeHost, body: str, policies: list[str]) -> None:
    assert wanted(cpus, body) == [f"{p}/scaling_governor=performance" for p in policies]


@pytest.mark.parametrize("driver", ["intel_pstate", "amd-pstate-epp"])
@pytest.mark.parametrize(
    ("options", "writes"),
    [
        ({}, ["energy_performance_preference=performance", "scaling_governor=performance"]),
        ({"epp": "keep"}, ["energy_performance_preference=performance", "scaling_governor=performance"]),
        ({"governor": "powersave"}, ["scaling_governor=powersave"]),
        (
            {"governor": "powersave", "epp": "balance_power"},
            ["scaling_governor=powersave", "energy_performance_preference=balance_power"],
        ),
        (
            {"governor": "powersave", "epp": "77"},
            ["scaling_governor=powersave", "energy_performance_preference=77"],
        ),
    ],
)
def test_the_preference_is_set_while_the_kernel_takes_it(
    host: FakeHost, driver: str, options: dict[str, object], writes: list[str]
) -> None:
    host.policy(0, cpus=[0], driver=driver)
    assert wanted(host, options=options) == [f"policy0/{w}" for w in writes]


@pytest.mark.parametrize("driver", ["acpi-cpufreq", "intel_pstate", "amd-pstate-epp"])
@pytest.mark.parametrize("before", [("powersave", "balance_power"), ("performance", "performance")])
@pytest.mark.parametrize("options", ["", 'governor = "powersave"\nepp = "power"', 'epp = "keep"'])
def test_each_policys_own_original_comes_back_byte_for_byte(
    host: FakeHost, driver: str, before: tuple[str, str], options: str
) -> None:
    governors = ("performance", "powersave")
    host.policy(0, cpus=[0], driver=driver, governor=before[0], epp=before[1], governors=governors)
    host.policy(1, cpus=[1], driver=driver, governor="powersave", epp="power", governors=governors)
    host.domain("guest", f"[plugins.governor]\n{options}\n")
    snapshot = host.snapshot()
    result = run_hook(host, "guest", "prepare")
    assert (result.status, result.stderr) == (0, "")
    for policy in (0, 1):
        expected = "powersave" if "powersave" in options else "performance"
        assert host.read(f"{CPUFREQ}/policy{policy}/scaling_governor") == expected
    run_hook(host, "guest", "release")
    assert not differences(snapshot, host.snapshot())


def test_a_policy_that_is_offline_is_left_out(cpus: FakeHost) -> None:
    cpus.set_online(2, False)
    cpus.set_online(3, False)
    assert [w.split("/")[0] for w in wanted(cpus)] == ["policy0", "policy10"]
    assert wanted(cpus, "<vcpu cpuset='2-3'>1</vcpu>") == []


def test_a_host_without_cpufreq_is_a_skipped_step_and_no_error(host: FakeHost) -> None:
    plan = ask(host.cpus(4), "governor", domain_xml())
    assert (plan.actions, plan.problems) == ([], ())
    (note,) = [p.item for p in plan.items if isinstance(p.item, Note)]
    assert "no cpufreq on this host" in note.text


@pytest.mark.parametrize(
    ("driver", "options", "problem"),
    [
        ("acpi-cpufreq", {"governor": "ondemand"}, ""),  # the kernel loads the module
        ("acpi-cpufreq", {"governor": "warp"}, "policy0 cannot have the governor 'warp'"),
        ("intel_pstate", {"governor": "schedutil"}, "policy0 cannot have the governor 'schedutil'"),
        ("amd-pstate-epp", {"governor": "ondemand"}, "policy0 cannot have the governor 'ondemand'"),
        (
            "intel_pstate",
            {"governor": "powersave", "epp": "fast"},
            "policy0 cannot have the preference 'fast'",
        ),
        ("acpi-cpufreq", {"governor": "schedutil", "epp": "fast"}, ""),  # it has no preference
        ("intel_pstate", {"epp": "power"}, "'performance' allows no preference 'power'"),
    ],
)
def test_what_the_driver_cannot_do_is_refused_with_what_it_can(
    host: FakeHost, driver: str, options: dict[str, object], problem: str
) -> None:
    host.policy(0, cpus=[0], driver=driver)
    found = ask(host, "governor", domain_xml(), options).problems
    assert len(found) == bool(problem)
    for one in found:
        assert problem in one.message
        assert "it has: " in one.hint or "leave out epp" in one.hint


@pytest.mark.parametrize("manager", ["power-profiles-daemon", "tuned", "tuned-ppd"])
def test_a_daemon_that_sets_governors_too_is_mentioned(cpus: FakeHost, manager: str) -> None:
    cpus.file(f"/sys/fs/cgroup/system.slice/{manager}.service/cgroup.procs", "1")
    plan = ask(cpus, "governor", domain_xml())
    notes = [p.item.text for p in plan.items if isinstance(p.item, Note)]
    assert any(manager in note for note in notes)
    assert not plan.problems


@pytest.mark.parametrize("driver", ["acpi-cpufreq", "intel_pstate", "amd-pstate-epp"])
@pytest.mark.parametrize("governor", ["performance", "powersave"])
@pytest.mark.parametrize("order", ["ABAB", "ABBA", "BABA", "BAAB"])
def test_domains_that_want_different_things_leave_the_original_in_any_order(
    host: FakeHost, driver: str, governor: str, order: str
) -> None:
    """Each letter starts its domain, and stops it the second time."""
    known = ("performance", "powersave")
    host.policy(0, cpus=[0], driver=driver, governor=governor, governors=known)
    host.policy(1, cpus=[1], driver=driver, governor="powersave", epp="balance_power", governors=known)
    host.domain("A", "[plugins.governor]\n").domain(
        "B", '[plugins.governor]\ngovernor="powersave"\nepp="power"\n'
    )
    before = host.snapshot()
    started: set[str] = set()
    for name in order:
        result = run_hook(host, name, "release" if name in started else "prepare", domain_xml(name))
        assert (result.status, result.stderr) == (0, "")
        started.add(name)
    assert not differences(before, host.snapshot())
