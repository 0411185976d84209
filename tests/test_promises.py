"""Promise 1 and 2, attacked: nothing is left behind, and a refused start has touched nothing."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from virt_usher.testing import FakeHost, check_nothing_stays, domain_xml, run_hook
from virt_usher.testing.conformance import differences, left

pytestmark = pytest.mark.timeout(600)  # many cases in one test, on CPUs that others use too

BOTH = "[plugins.hugepages]\n[plugins.governor]\n"
XML = domain_xml(memory_kib=600 * 2048, hugepages=True)  # more than one node has
ALL_SIZES = domain_xml(
    memory_kib=3 << 20,
    hugepages="<page size='2048' nodeset='0'/><page size='1' unit='G' nodeset='1'/>",
    body="<cpu><numa><cell id='0' memory='102400'/><cell id='1' memory='1048576'/></numa></cpu>",
)


def combined(host: FakeHost) -> FakeHost:
    """Pages of one size on two nodes, a governor of the kernel's and one of a driver's own."""
    host.node(0, free_kib=1 << 20).node(1, free_kib=1 << 20).hugetlbfs()
    return host.policy(0, cpus=[0, 1], driver="intel_pstate").domain("guest", BOTH)


def two_sizes(host: FakeHost) -> FakeHost:
    """Pages of two sizes, some of them there already, and a preference that does not come back by itself."""
    host.node(0, free_kib=2 << 20, pages={2048: 7}).node(1, free_kib=2 << 20)
    host.hugetlbfs().hugetlbfs("/dev/hugepages1G", 1 << 20)
    return host.policy(0, cpus=[0], driver="amd-pstate-epp").domain("guest", BOTH)


@pytest.mark.parametrize(("furnished", "xml", "stride"), [(combined, XML, 5), (two_sizes, ALL_SIZES, 12)])
def test_nothing_stays_wherever_the_hook_is_killed_or_a_write_fails(
    new_host: Callable[[], FakeHost], furnished: Callable[[FakeHost], FakeHost], xml: bytes, stride: int
) -> None:
    cases = check_nothing_stays(lambda: furnished(new_host()), "guest", xml, stride)
    print(cases)
    assert all(count * stride > 10 for count in cases.values()), cases


def test_nothing_stays_when_a_record_is_torn(new_host: Callable[[], FakeHost]) -> None:
    """A crash within write(2): killed right after each record in turn, the record then cut short."""
    lines, point, torn = 0, 0, 0
    while True:
        point += 1
        host = combined(new_host())
        before = host.snapshot()
        hit = run_hook(host, "guest", "prepare", XML, kill_at=point, kill="family").killed
        if not hit:
            break
        text = host.journal("guest")
        # The journal grew last: the deed that its last line announces is not done yet.
        if text.count("\n") > lines:
            last = text.splitlines(keepends=True)[-1]
            path = Path(host.path("/run/virt-usher/guest.jnl"))
            path.write_text(text[: len(text) - 1 - torn % len(last)])
            torn += 1
            for operation in ("release", "prepare", "release"):
                assert run_hook(host, "guest", operation, XML).status == 0
            assert not differences(before, host.snapshot()), last
        lines = text.count("\n")
    assert torn > 8


def test_a_write_that_fails_refuses_the_start_and_names_path_and_reason(pc: FakeHost) -> None:
    pc.domain("guest", BOTH)
    before = pc.snapshot()
    for number in (errno.EBUSY, errno.EINVAL, errno.EPERM, errno.ENODEV, errno.EIO):
        pc.fail("*/policy2/scaling_governor", number, nth=1)
        result = run_hook(pc, "guest", "prepare", XML)
        pc.heal()
        assert result.status == 3
        assert "policy2/scaling_governor" in result.stderr
        assert os.strerror(number) in result.stderr
        assert not differences(before, pc.snapshot())


def test_a_full_run_directory_refuses_the_start_and_does_not_stop_a_release(
    new_host: Callable[[], FakeHost],
) -> None:
    host = combined(new_host())
    before = host.snapshot()
    run_hook(host, "guest", "prepare", XML)
    size = len(host.journal("guest").encode())
    run_hook(host, "guest", "release", XML)
    for room in range(0, size, 83):
        result = run_hook(host, "guest", "prepare", XML, prepare=partial(_files_at_most, room))
        assert "virt-usher" in result.stderr or result.status == 0
        if result.status == 0:  # only what nobody needs for undoing did not fit
            assert room > size - 200
        else:
            assert not differences(before, host.snapshot()), room
        run_hook(host, "guest", "release", XML)
        assert not differences(before, host.snapshot()), room
    for room in range(0, 2 * size, 191):
        assert run_hook(host, "guest", "prepare", XML).status == 0
        run_hook(host, "guest", "release", XML, prepare=partial(_files_at_most, room))
        run_hook(host, "guest", "release", XML)
        assert not differences(before, host.snapshot()), room


def _files_at_most(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_release_needs_no_configuration_no_plugin_and_no_xml(pc: FakeHost) -> None:
    before = {p: t for p, t in pc.snapshot().items() if not p.startswith("/etc")}
    pc.domain("guest", BOTH)
    assert run_hook(pc, "guest", "prepare", XML).status == 0
    shutil.rmtree(pc.path("/etc/virt-usher"))
    pc.file("/etc/virt-usher/config.toml", "[[[ no toml")
    assert run_hook(pc, "guest", "release", b"").status == 0
    after = {p: t for p, t in pc.snapshot().items() if not p.startswith("/etc")}
    assert not differences(before, after)


def test_release_goes_on_past_a_failure_and_the_next_start_finishes_it(pc: FakeHost) -> None:
    pc.domain("guest", BOTH)
    before = pc.snapshot()
    assert run_hook(pc, "guest", "prepare", XML).status == 0
    pc.fail("*/policy0/scaling_governor", errno.EBUSY)
    assert run_hook(pc, "guest", "release", XML).status == 0
    assert pc.read("/sys/devices/system/cpu/cpufreq/policy0/scaling_governor") == "performance"
    assert pc.read("/sys/devices/system/cpu/cpufreq/policy2/scaling_governor") == "schedutil"
    assert pc.pages(0) == pc.pages(1) == (0, 0, 0)
    assert "guest.jnl" in left(pc)

    refused = run_hook(pc, "guest", "prepare", XML)
    assert refused.status == 3
    assert "left behind earlier: policy0 governor" in refused.stderr
    pc.domain("guest", "[plugins.hugepages]\n")
    unrelated = run_hook(pc, "guest", "prepare", XML)
    assert unrelated.status == 0, "what was left behind refuses only what needs it"
    run_hook(pc, "guest", "release", XML)

    pc.heal().domain("guest", BOTH)
    assert run_hook(pc, "guest", "prepare", XML).status == 0
    run_hook(pc, "guest", "release", XML)
    assert not differences(before, pc.snapshot())


def test_a_refused_start_has_touched_nothing_and_gives_all_reasons_at_once(pc: FakeHost) -> None:
    pc.domain("guest", '[plugins.hugepages]\n[plugins.governor]\ngovernor = "warp"\n[plugins.huge]\n')
    before = pc.snapshot()
    result = run_hook(pc, "guest", "prepare", domain_xml(memory_kib=1 << 30, hugepages=True))
    assert result.status == 3
    for reason in (
        "at most 1024 (2 GiB) could be had",
        "cannot have the governor 'warp'",
        "no plugin 'huge'",
    ):
        assert reason in result.stderr
    assert not differences(before, pc.snapshot())
    assert left(pc) == []


def test_the_same_call_twice_and_calls_without_a_start_are_harmless(pc: FakeHost) -> None:
    pc.domain("guest", BOTH)
    before = pc.snapshot()
    for operation in (
        "release",
        "started",
        "stopped",
        "prepare",
        "prepare",
        "start",
        "started",
        "reconnect",
        "release",
        "release",
    ):
        assert run_hook(pc, "guest", operation, XML).status == 0, operation
        if operation == "prepare":
            assert pc.pages(0)[0] + pc.pages(1)[0] == 600
    assert not differences(before, pc.snapshot())
