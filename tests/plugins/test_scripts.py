"""Hook scripts run as libvirt would run them: sorted, with its arguments and XML, and never in its way."""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path

import pytest

from virt_usher.testing import FakeHost, ask, domain_xml, run_hook, start_hook

TREE = "/etc/libvirt/hooks/qemu.d"
# Writes down how it was called; $seen is replaced by a path.
RECORD = """#!/bin/sh
echo "$(basename "$0") $*; $(wc -c | tr -d ' ') bytes" >>SEEN
"""


def add(host: FakeHost, script: str, text: str = RECORD, mode: int = 0o755, name: str = "guest") -> None:
    host.file(f"{TREE}/{name}/{script}", text.replace("SEEN", host.path("/seen")), mode)


def seen(host: FakeHost) -> list[str]:
    path = Path(host.path("/seen"))
    return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def scripted(host: FakeHost) -> FakeHost:
    """A host whose domain `guest` has the plugin on, and no other configuration."""
    return host.domain("guest", "[plugins.scripts]\n")


def test_all_operations_run_their_scripts_in_order(scripted: FakeHost) -> None:
    for script in ("prepare/begin/20-b", "prepare/begin/05-z", "prepare/begin/10-a", "start/begin/s"):
        add(scripted, script)
    for script in ("started/begin/d", "stopped/end/x", "release/end/r"):
        add(scripted, script)
    add(scripted, "prepare/begin/readme.txt", mode=0o644)
    size = f"{len(domain_xml('guest'))} bytes"
    for operation in ("prepare", "start", "started", "stopped", "release"):
        assert run_hook(scripted, "guest", operation, domain_xml("guest")).status == 0
    assert seen(scripted) == [
        f"05-z guest prepare begin -; {size}",
        f"10-a guest prepare begin -; {size}",
        f"20-b guest prepare begin -; {size}",
        f"s guest start begin -; {size}",
        f"d guest started begin -; {size}",
        f"x guest stopped end -; {size}",
        f"r guest release end -; {size}",
    ]
    assert not scripted.journal("guest")


def test_scripts_of_both_ways_get_the_whole_of_a_large_domains_xml(scripted: FakeHost) -> None:
    for script in ("prepare/begin/p", "release/end/r"):
        add(scripted, script, '#!/bin/sh\ncat >"SEEN.$2"\n')
    disks = "<disk type='file'><source file='/ü'/></disk>" * 60_000
    xml = domain_xml("guest", f"<devices>{disks}</devices>")
    assert len(xml) > 2 << 20
    for operation in ("prepare", "release"):
        assert run_hook(scripted, "guest", operation, xml).status == 0
        assert Path(scripted.path(f"/seen.{operation}")).read_bytes() == xml


def test_xml_that_does_not_fit_refuses_the_start(scripted: FakeHost) -> None:
    """A file as large as its limit takes a part of one write and refuses the next, as a full disk does."""
    add(scripted, "prepare/begin/p")
    before = scripted.snapshot()
    xml = domain_xml("guest", f"<devices>{'<hub/>' * 20_000}</devices>")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, resource.RLIM_INFINITY))

    result = run_hook(scripted, "guest", "prepare", xml, prepare=limit)
    assert result.status == 3
    assert "File too large" in result.stderr
    assert run_hook(scripted, "guest", "release").status == 0
    assert not seen(scripted)
    assert scripted.snapshot() == before


def test_a_failing_script_refuses_the_start_with_its_last_lines(scripted: FakeHost) -> None:
    add(scripted, "prepare/begin/10", "#!/bin/sh\necho noise\necho the disk is not there >&2\nexit 7\n")
    add(scripted, "prepare/begin/20")
    add(scripted, "release/end/r")
    result = run_hook(scripted, "guest", "prepare")
    assert result.status != 0
    assert "10 ended with status 7: noise | the disk is not there" in result.stderr
    assert [line.split(";")[0] for line in seen(scripted)] == ["r guest release end -"]


def test_the_shutoff_reason_reaches_the_release_scripts(scripted: FakeHost) -> None:
    add(scripted, "release/end/r")
    run_hook(scripted, "guest", "prepare")
    run_hook(scripted, "guest", "release", extra="from snapshot")
    assert seen(scripted)[0].startswith("r guest release end from snapshot;")


def test_a_background_child_does_not_hold_up_libvirt(scripted: FakeHost) -> None:
    add(scripted, "prepare/begin/10", "#!/bin/sh\nsleep 30 &\necho $! >SEEN\n")
    assert start_hook(scripted, "guest", "prepare").wait(10).status == 0
    os.kill(int(seen(scripted)[0]), 9)


def test_a_script_that_hangs_is_answered_for_at_the_deadline(scripted: FakeHost) -> None:
    scripted.config("[deadlines]\nstart = 1\n")
    add(scripted, "prepare/begin/10", "#!/bin/sh\necho $$ >SEEN\nexec sleep 30\n")
    result = run_hook(scripted, "guest", "prepare")
    pid = seen(scripted)[0]
    assert f"still runs as pid {pid}" in result.stderr
    os.kill(int(pid), 9)  # it was left to its work


def test_the_scripts_of_the_way_back_come_after_one_that_outlived_its_start(scripted: FakeHost) -> None:
    scripted.config("[deadlines]\nstart = 1\n")
    late = scripted.path("/late")
    add(
        scripted,
        "prepare/begin/10",
        f"#!/bin/sh\nwhile [ ! -e {late} ]; do sleep 0.05; done\necho late >>SEEN\n",
    )
    add(scripted, "release/end/r")
    assert "still runs as pid" in run_hook(scripted, "guest", "prepare").stderr
    assert not Path(scripted.path("/seen")).exists()
    release = start_hook(scripted, "guest", "release")
    Path(late).touch()
    assert release.wait(10).status == 0
    assert [line.split(" ")[0] for line in seen(scripted)] == ["late", "r"]


def test_a_script_that_waits_for_virsh_is_told_why(scripted: FakeHost) -> None:
    scripted.config("[deadlines]\nstart = 2\n")
    program = shutil.copy("/bin/sleep", scripted.path("/virsh"))
    add(scripted, "prepare/begin/10", f"#!/bin/sh\n{program} 5\n")
    assert "calls libvirt, which waits for this hook" in run_hook(scripted, "guest", "prepare").stderr


@pytest.mark.parametrize("name", ["a$(touch pwned)", "-rf", "two words", "ü'\""])
def test_a_hostile_name_is_an_argument_and_nothing_else(host: FakeHost, name: str) -> None:
    host.domain(name, "[plugins.scripts]\n")
    add(host, "prepare/begin/p", name=name)
    assert run_hook(host, name, "prepare", domain_xml(name)).status == 0
    assert seen(host)[0].startswith(f"p {name} prepare begin -;")


def test_a_script_others_can_write_is_refused(scripted: FakeHost) -> None:
    add(scripted, "release/end/r", mode=0o777)
    result = run_hook(scripted, "guest", "prepare")
    assert "could be written by somebody else than root" in result.stderr
    assert not seen(scripted)


def test_the_plan_lists_what_would_run_and_warns_of_virsh_and_of_a_second_dispatcher(
    scripted: FakeHost,
) -> None:
    add(scripted, "prepare/begin/10", "#!/bin/sh\nvirsh nodedev-detach pci_0000_01_00_0\n")
    add(scripted, "release/end", "#!/bin/sh\nvirsh list\n")  # a file for the folder, as VFIO-Tools lets one
    scripted.file("/etc/libvirt/hooks/usher.d/guest/prepare/begin/20", RECORD, 0o755)
    scripted.file("/etc/libvirt/hooks/qemu", "#!/bin/sh\n", 0o755)
    plan = ask(scripted, "scripts", domain_xml("guest"))
    assert not plan.problems
    (action,) = plan.actions
    own = "/etc/libvirt/hooks/usher.d/guest/prepare/begin/20"
    assert f"run {TREE}/guest/prepare/begin/10, {own}" in action.describe(scripted)
    notes = [str(p.item) for p in plan.items if p.item is not action]
    for script in ("prepare/begin/10", "release/end"):
        assert sum(f"guest/{script} calls virsh" in n for n in notes) == 1
    assert sum("they run twice" in n for n in notes) == 1
