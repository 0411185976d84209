"""What isolation would do is planned from the domain's pins; what cannot be is refused, untouched."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from virt_usher import cpulist
from virt_usher.actions import Isolate, Note
from virt_usher.host import cgroup
from virt_usher.prepare import Plan
from virt_usher.testing import ask, check_nothing_stays, domain_xml, run_hook, start_hook
from virt_usher.testing.cgroup import CpuHost


def furnish(host: CpuHost) -> CpuHost:
    """Four cores of two threads, systemd, an interrupt."""
    host.cores([0, 4], [1, 5], [2, 6], [3, 7]).systemd().workqueues()
    return host.irq(1, "0-7").irq(2, "2", managed=True)


@pytest.fixture
def quad(tmp_path: Path) -> CpuHost:
    return furnish(CpuHost(tmp_path / "host"))


def guest(*vcpus: int, emulator: str = "0", more: str = "") -> bytes:
    """A domain with each vCPU on one CPU, and its emulator on others."""
    pins = "".join(f"<vcpupin vcpu='{i}' cpuset='{cpu}'/>" for i, cpu in enumerate(vcpus))
    emulatorpin = f"<emulatorpin cpuset='{emulator}'/>" if emulator else ""
    return domain_xml(body=f"<vcpu>{len(vcpus)}</vcpu><cputune>{pins}{emulatorpin}</cputune>{more}")


def plan(host: CpuHost, xml: bytes, **options: object) -> Plan:
    return ask(host, "cpu_isolation", xml, options)


def isolated(host: CpuHost, xml: bytes, **options: object) -> str:
    """Return the CPUs that a plan without problems isolates."""
    made = plan(host, xml, **options)
    assert not made.problems
    cpus = {a.cpus for a in made.actions if isinstance(a, Isolate)}
    assert len(cpus) == 1
    return cpulist.show(cpus.pop())


def refusals(host: CpuHost, xml: bytes, **options: object) -> str:
    """Return why a start is refused; each reason must come with what to do."""
    problems = plan(host, xml, **options).problems
    assert all(p.hint for p in problems)
    return "\n".join(p.message for p in problems)


def test_whole_cores_of_the_pinned_cpus_are_isolated(quad: CpuHost) -> None:
    assert isolated(quad, guest(2, 6)) == "2,6"
    assert isolated(quad, guest(2, 3)) == "2-3,6-7"
    assert isolated(quad, guest(2, 3), whole_cores=False) == "2-3"


def test_cpus_may_be_named_or_come_from_other_pins(quad: CpuHost) -> None:
    more = "<cputune><iothreadpin iothread='1' cpuset='1'/></cputune>"
    assert isolated(quad, guest(2, 6, emulator="3", more=more), cpus="1,5") == "1,5"
    assert isolated(quad, guest(2, 6, emulator="3"), pins=["vcpu", "emulator"]) == "2-3,6-7"
    assert isolated(quad, guest(2, 6, more=more), pins=["iothread"]) == "1,5"
    assert isolated(quad, domain_xml(body="<vcpu cpuset='2-3'>4</vcpu>")) == "2-3,6-7"


def test_the_plan_says_what_changes_from_what_to_what(quad: CpuHost) -> None:
    quad.systemd(custom="0-3")
    made = plan(quad, guest(2, 6))
    assert [a.describe(quad) for a in made.actions] == [
        "irqs off CPUs 2,6: default, 1 0-7 → 0-1,3-5,7; 2 2 → 0-1,3-5,7",
        "workqueues off CPUs 2,6: cpumask, writeback/cpumask 0-7 → 0-1,3-5,7",
        "units off CPUs 2,6: custom.slice 0-3 → 0-1,3; init.scope, system.slice, user.slice 0-7 → 0-1,3-5,7",
    ]


@pytest.mark.parametrize("part", ["units", "irqs", "workqueues"])
def test_each_part_can_be_left_out(quad: CpuHost, part: str) -> None:
    parts = {a.part for a in plan(quad, guest(2, 6), **{part: False}).actions if isinstance(a, Isolate)}
    assert parts == {"units", "irqs", "workqueues"} - {part}


def test_slices_with_guests_are_never_confined(quad: CpuHost) -> None:
    quad.unit("web.slice").unit("db.slice").every_domain("[plugins.cpu_isolation]\n")
    pid = quad.qemu_runs("other")
    quad.file(f"/proc/{pid}/cgroup", "0::/web.slice/machine-qemu\\x2d1\\x2dother.scope/libvirt/emulator")
    xml = guest(2, 6, more="<resource><partition>/db/big</partition></resource>")
    assert run_hook(quad, "guest", "prepare", xml).status == 0
    unconfined = {u for u in quad.entries(cgroup.CGROUP) if cgroup.effective(quad, u) == set(range(8))}
    assert {"machine.slice", "web.slice", "db.slice"} <= unconfined
    assert not {"system.slice", "user.slice", "init.scope"} & unconfined


def test_what_systemd_does_not_manage_is_named(quad: CpuHost) -> None:
    quad.unit("lxc").unit("empty", populated=False)
    notes = [p.item.text for p in plan(quad, guest(2, 6)).items if isinstance(p.item, Note)]
    assert notes == ["not systemd's, so not confined: lxc"]


def test_threads_of_qemu_without_a_pin_are_mentioned(quad: CpuHost) -> None:
    notes = [p.item.text for p in plan(quad, guest(2, 6, emulator="")).items if isinstance(p.item, Note)]
    assert notes == ["no <emulatorpin>: QEMU's own threads may run on isolated CPUs too"]


def test_a_domain_without_pins_is_refused(quad: CpuHost) -> None:
    assert "the domain is pinned to no CPUs" in refusals(quad, domain_xml())


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ('cpus = "2-x"', "cpus: '2-x' is not a list of numbers such as '0-3,8'"),
        ('keep = "5-2"', "keep: '5-2' has a range that makes no sense"),
        (
            'pins = ["vcpu", "emulater"]',
            "pins: 'emulater' is none of vcpu, iothread, emulator (did you mean 'emulator'",
        ),
    ],
)
def test_an_option_that_makes_no_sense_is_named_with_its_file(
    quad: CpuHost, option: str, reason: str
) -> None:
    quad.domain("guest", f"[plugins.cpu_isolation]\n{option}\n")
    result = run_hook(quad, "guest", "prepare", guest(2, 6))
    assert result.status != 0
    assert result.stderr.count("\n  - ") == 1
    assert f"- /etc/virt-usher/domains/guest.toml: plugins.cpu_isolation.{reason}" in result.stderr


def test_pins_outside_the_machine_or_offline_are_refused(quad: CpuHost) -> None:
    assert "CPU 8, which this machine does not have" in refusals(quad, guest(2, 8))
    quad.set_online(6, False)
    assert "CPU 6, which is offline" in refusals(quad, guest(2, 6))


def test_the_host_keeps_its_first_core(quad: CpuHost) -> None:
    assert "the host keeps CPU 0,4, and would lose 4" in refusals(quad, guest(3, 4), whole_cores=False)
    assert "the host keeps CPU 0,4, and would lose 0,4" in refusals(quad, guest(0, 1))
    assert isolated(quad, guest(1, 2, 3)) == "1-3,5-7"


def test_the_host_keeps_what_the_admin_says(quad: CpuHost) -> None:
    assert isolated(quad, guest(0, 2), keep="1") == "0,2,4,6"
    assert "the host keeps CPU 0-2, and would lose 2" in refusals(quad, guest(2, 3), keep="0-2")
    assert "keeps CPU 9, which is not online" in refusals(quad, guest(2, 3), keep="9")


def test_another_domains_cpus_are_refused_unless_shared(quad: CpuHost) -> None:
    quad.every_domain("[plugins.cpu_isolation]\n")
    assert run_hook(quad, "first", "prepare", guest(2, 6)).status == 0
    assert "CPU 2,6 is isolated for the domain 'first'" in refusals(quad, guest(2, 3))
    assert "CPU 2 is isolated for the domain 'first'" in refusals(quad, guest(3, 7, emulator="0,2"))
    assert isolated(quad, guest(2, 3), share=True) == "2-3,6-7"
    assert isolated(quad, guest(3, 7)) == "3,7"


def test_pins_that_the_guests_slice_does_not_allow_are_refused(quad: CpuHost) -> None:
    """Where libvirt would say: cannot set CPU affinity on process 4711: Invalid argument."""
    quad.systemctl("--runtime", "set-property", "--", "machine.slice", "AllowedCPUs=2,6")
    assert isolated(quad, guest(2, 6, emulator="2")) == "2,6"
    assert "pinned to CPU 0, where machine.slice may not run" in refusals(quad, guest(2, 6, emulator="0"))


def test_a_slice_that_would_lose_all_its_cpus_is_refused(quad: CpuHost) -> None:
    quad.systemd(custom="2-3")
    assert isolated(quad, guest(2, 6)) == "2,6"
    assert "custom.slice may use CPU 2-3 only" in refusals(quad, guest(2, 3))
    assert isolated(quad, guest(2, 3), units=False) == "2-3,6-7"
    xml = guest(2, 3, emulator="2", more="<resource><partition>/custom</partition></resource>")
    assert isolated(quad, xml) == "2-3,6-7", "its own slice is not confined"
    # Where a cpuset has no CPU that is online, the kernel silently gives it all of them, isolated ones too.
    quad.set_online(3, False)
    quad.set_online(7, False)
    assert cgroup.effective(quad, "custom.slice") == {2}
    assert "custom.slice may use CPU 2-3 only" in refusals(quad, guest(2, 6))


def test_two_starts_at_once_cannot_both_have_a_cpu(quad: CpuHost) -> None:
    quad.every_domain("[plugins.cpu_isolation]\n")
    quad.stall("/proc/irq/1/*")
    first = start_hook(quad, "first", "prepare", guest(2, 6))
    while not quad.stalled:
        time.sleep(0.01)
    second = start_hook(quad, "second", "prepare", guest(2, 6))
    time.sleep(0.5)
    quad.resume()
    results = [hook.wait() for hook in (first, second)]
    assert [r.status == 0 for r in results] == [True, False]
    assert "CPU 2,6 is isolated for the domain 'first'" in results[1].stderr


def test_a_host_that_cannot_is_refused_in_one_line(quad: CpuHost) -> None:
    Path(quad.path(f"{cgroup.CGROUP}/cgroup.controllers")).unlink()
    assert refusals(quad, guest(2, 6)) == "cpu_isolation: " + cgroup.unsupported(quad)
    assert "cgroup v1" in cgroup.unsupported(quad)
    shutil.rmtree(quad.path("/run/systemd"))
    assert "does not run systemd" in cgroup.unsupported(quad)
    assert isolated(quad, guest(2, 6), units=False) == "2,6"


def test_a_refusal_touches_nothing(quad: CpuHost) -> None:
    quad.every_domain("[plugins.cpu_isolation]\n")
    before = quad.snapshot()
    assert run_hook(quad, "guest", "prepare", guest(0, 1)).status != 0
    run_hook(quad, "guest", "release")
    assert quad.snapshot() == before
    assert not quad.systemctl_calls()


@pytest.mark.timeout(600)
def test_nothing_stays_wherever_it_is_attacked(tmp_path: Path) -> None:
    made: list[CpuHost] = []

    def make() -> CpuHost:
        made.append(furnish(CpuHost(tmp_path / f"host{len(made)}")))
        made[-1].every_domain("[plugins.cpu_isolation]\n")
        return made[-1]

    check_nothing_stays(make, "guest", guest(2, 6), stride=4)
    assert len(made) > 30
