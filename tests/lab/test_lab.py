"""The lab itself: its command line, and that a bad run is never a good one."""

from __future__ import annotations

import contextlib
import json
import re
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.lab import __main__ as main
from tests.lab import acpi, boot, emulator, initrd, machine, qemu
from tests.lab.boot import Options, Outcome
from tests.lab.rootfs import Image

PASSED = "<testcase classname='a' name='b'/>"
FAILED = "<testcase classname='a' name='c'><failure/></testcase>"
SKIPPED = "<testcase classname='a' name='d'><skipped/></testcase>"


def junit(out: Path, boot: int, *cases: str) -> None:
    (out / f"junit-{boot}.xml").write_text(
        f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>"
    )


def done(out: Path, problem: str = "") -> None:
    (out / "done").write_text(json.dumps({"problem": problem}))


def result(out: Path, tests: bool = True) -> Outcome:
    outcome = Outcome(up_after=1.0)
    boot._read_results(out, outcome, tests)
    return outcome


def test_the_boots_of_a_run_add_up(tmp_path: Path) -> None:
    junit(tmp_path, 0, PASSED, SKIPPED)
    junit(tmp_path, 1, PASSED)
    done(tmp_path)
    outcome = result(tmp_path)
    assert (outcome.passed, outcome.failed, outcome.skipped) == (2, 0, 1)
    assert outcome.good


def test_a_failed_test_fails_the_run(tmp_path: Path) -> None:
    junit(tmp_path, 0, PASSED, FAILED)
    done(tmp_path)
    assert not result(tmp_path).good
    assert result(tmp_path).failures == ["a::c"]


@pytest.mark.parametrize("cases", [(), (SKIPPED,)])
def test_a_run_without_a_test_fails(tmp_path: Path, cases: tuple[str, ...]) -> None:
    junit(tmp_path, 0, *cases)
    done(tmp_path)
    assert not result(tmp_path).good


@pytest.mark.parametrize("problem", ["", "false: ended with status 1"])
def test_a_command_needs_no_test_but_has_to_succeed(tmp_path: Path, problem: str) -> None:
    done(tmp_path, problem)
    assert result(tmp_path, tests=False).problem == problem


def test_a_run_that_ended_early_fails(tmp_path: Path) -> None:
    junit(tmp_path, 0, PASSED)
    assert result(tmp_path).problem == "the guest ended before its tests did"
    assert boot_never() == "the guest never came up"


def boot_never() -> str:
    outcome = Outcome()
    boot._read_results(Path("/nonexistent"), outcome)
    return outcome.problem


def test_a_failed_installation_fails_the_run(tmp_path: Path) -> None:
    junit(tmp_path, 0, PASSED)
    done(tmp_path, "install.sh failed with status 1")
    assert not result(tmp_path).good


QUIET = "import time; time.sleep(60)"


@pytest.mark.parametrize(
    ("options", "up", "console", "problem"),
    [
        (Options(boot_seconds=0), False, "", "not up after"),
        (Options(silent_seconds=0), True, "", "hung"),
        (Options(total_seconds=0), True, "", "took longer"),
        (Options(), False, "Kernel panic - not syncing: no init", "kernel panicked"),
        (Options(), False, "Oops: int3: 0000\nKernel panic - not syncing: Fatal", "text was patched"),
    ],
)
def test_a_guest_is_given_up(tmp_path: Path, options: Options, up: bool, console: str, problem: str) -> None:
    if up:
        (tmp_path / "up").touch()
    (tmp_path / "console.log").write_text(console)
    with subprocess.Popen([sys.executable, "-c", QUIET]) as guest:
        outcome = boot._watch(guest, tmp_path, tmp_path / "console.log", tmp_path / "monitor", options)
        guest.kill()
    assert problem in outcome.problem
    assert not outcome.good


@pytest.mark.parametrize(
    ("line", "selected"),
    [
        ("", "-m not soak"),
        ("--smoke -k pci -x", "-m smoke and not soak -k pci -x"),
        ("--soak", ""),
        ("--smoke --soak", "-m smoke"),
    ],
)
def test_long_tests_run_only_if_asked_for(line: str, selected: str) -> None:
    assert " ".join(main.choose(main.arguments(line.split())).pytest) == selected


# A multiboot kernel at 1 MiB whose code follows its header: cli; hlt; and again.
MULTIBOOT = (0x1BADB002, 0x10000, -0x1BADB002 - 0x10000 & 0xFFFFFFFF, 0x100000, 0x100000, 0, 0, 0x100020)
HALTS = struct.pack("<8I", *MULTIBOOT) + bytes.fromhex("faf4ebfc")
with_qemu = pytest.mark.skipif(bool(main.missing()), reason="the lab cannot run here")


@pytest.fixture
def dead(tmp_path: Path) -> Image:
    """An image whose kernel does nothing."""
    image = Image("dead", tmp_path / "image")
    image.folder.mkdir()
    for name, content in (("vmlinuz", HALTS), ("initrd", b"none"), ("root.ext4", bytes(1 << 20))):
        (image.folder / name).write_bytes(content)
    return image


def emulators(scratch: Path) -> list[str]:
    """Return the pids of what was started with a run's folder on its command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (process / "cmdline").read_bytes()
            if emulator.NAME.encode() in line.split(b"\0")[0] and f"{scratch}/monitor".encode() in line:
                found.append(process.name)
    return found


@with_qemu
def test_a_machine_that_never_comes_up_fails_and_leaves_logs_alone(tmp_path: Path, dead: Image) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    outcome = boot.run(dead, Options(boot_seconds=3), scratch)
    assert "the guest was not up after 3 s" in outcome.problem
    assert not outcome.good
    assert not emulators(scratch)
    main.keep(scratch, "dead", None, failed=True)
    assert {path.name for path in scratch.iterdir()} >= {"console.log", "qemu.log", "qemu.command"}
    assert not [*scratch.rglob("*.img"), *scratch.rglob("*.tar")]
    assert str(tmp_path) not in Path("/proc/mounts").read_text()


@with_qemu
def test_no_machine_outlives_its_runner(tmp_path: Path, dead: Image) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    code = "import sys; from pathlib import Path; from tests.lab import boot, rootfs;"
    code += "boot.run(rootfs.Image('dead', Path(sys.argv[1])), boot.Options(), Path(sys.argv[2]))"
    with subprocess.Popen(
        [sys.executable, "-B", "-c", code, str(dead.folder), str(scratch)], cwd=boot.CHECKOUT
    ) as runner:
        until(lambda: (scratch / "monitor").exists())
        assert emulators(scratch)
        runner.kill()
    until(lambda: not emulators(scratch))


def until(ready: Callable[[], bool]) -> None:
    """Wait for something that is a matter of moments, on a machine that may be busy."""
    end = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_runs_side_by_side_share_the_image_alone(tmp_path: Path) -> None:
    image = Image("any", tmp_path / "image")

    def words(run: str) -> set[str]:
        scratch = tmp_path / run
        line = qemu.command(
            ["qemu"], image.folder, scratch / "share", scratch, "kvm", scratch / "t", f"file:{scratch}/c"
        )
        return set(",".join(line).split(","))

    shared = {word for word in words("one") & words("two") if str(tmp_path) in word}
    assert shared == {
        str(image.folder / "vmlinuz"),
        str(image.folder / "initrd"),
        f"file={image.folder}/root.ext4",
    }
    # No port, no fixed name, and nothing written into the image.
    line = " ".join(qemu.command(["qemu"], image.folder, tmp_path, tmp_path, "kvm", tmp_path / "t", "stdio"))
    assert not re.search(r"hostfwd|tcp:|-vnc|-netdev (?!hubport)", line)
    assert "root.ext4,format=raw,snapshot=on" in line


def test_every_device_is_on_the_command_line(tmp_path: Path) -> None:
    image = Image("any", tmp_path)
    line = " ".join(qemu.command(["qemu"], image.folder, tmp_path, tmp_path, "kvm", tmp_path / "t", "stdio"))
    for device in machine.DEVICES:
        assert f"{device.qemu},bus={device.bus},addr={device.address[-4:]}" in line
    assert "{" not in line


def test_roles_and_addresses_are_unique() -> None:
    addresses = [d.address for d in machine.DEVICES] + [b.address for b in machine.BRIDGES]
    assert len(set(addresses)) == len(addresses)
    assert len(machine.BY_ROLE) == len(machine.DEVICES)


def test_every_cpu_has_one_clock() -> None:
    assert sorted(cpu for policy in machine.CPUFREQ_POLICIES for cpu in policy) == list(range(machine.CPUS))
    assert acpi.source().count("_PSS") == machine.CPUS


def test_an_archive_member_is_padded() -> None:
    member = initrd._entry("name", 0o100644, b"12345")
    assert len(member) % 4 == 0
    assert member.startswith(b"070701")


def test_what_fails_twice_has_failed_and_what_passes_then_is_named() -> None:
    def outcome(failed: int = 0, problem: str = "") -> boot.Outcome:
        failures = [f"tests.lab.guest.test_pages::test_{n}[0]" for n in range(failed)]
        return boot.Outcome(passed=5, failed=failed, failures=failures, problem=problem)

    assert main.again(outcome(failed=2)) == "test_0[0] or test_1[0]"
    assert main.again(outcome(failed=2, problem="hung")) == ""
    passed = main.both(outcome(failed=1), outcome())
    assert (passed.good, passed.passed, passed.failed) == (True, 6, 0)
    assert "failed, and passed on a fresh machine" in passed.failures[0]
    assert not main.both(outcome(failed=1), outcome(failed=1)).good
    assert not main.both(outcome(failed=1), outcome(problem="hung")).good


@pytest.mark.parametrize(
    ("problems", "runs", "good"),
    [
        (["", "never"], 1, True),
        ([boot.TRIPPED, boot.CRASHED, "", "never"], 3, True),
        ([boot.TRIPPED] * main.TRIES + ["never"], main.TRIES, False),
        (["hung", "never"], 1, False),
    ],
)
def test_the_emulators_own_fault_is_tried_again_and_named(
    capsys: pytest.CaptureFixture[str], problems: list[str], runs: int, good: bool
) -> None:
    outcomes = [
        Outcome(1, problem=problem, done=(problem,), failures=[f"{problem}!"]) for problem in problems
    ]
    left_out: list[tuple[str, ...]] = []

    def run(done: tuple[str, ...]) -> Outcome:
        left_out.append(done)
        return outcomes.pop(0)

    outcome = main.untripped("trixie", run)
    assert outcome.good == good
    assert left_out == [tuple(problems[:n]) for n in range(runs)]
    assert outcome.passed == 1 + len(left_out[-1])
    said = capsys.readouterr().out
    assert said.count("ONCE MORE") == runs - 1
    assert all(f"also {problem}!, which failed" in said for problem in left_out[-1])


def test_what_passed_before_a_crash_is_known_but_for_a_reboots(tmp_path: Path) -> None:
    (tmp_path / "tests.log").write_text(
        "test_a.py::test_x PASSED   [ 1%]\ntest_a.py::test_y[a-b] PASSED [ 2%]\ntest_a.py::test_z FAILED\n"
        "test_reboot.py::test_reboot_with_domains_running PASSED\ntest_a.py::test_u "
    )
    outcome = Outcome(up_after=1.0, problem=boot.CRASHED)
    boot._read_results(tmp_path, outcome)
    assert outcome.done == ("test_a.py::test_x", "test_a.py::test_y[a-b]")
    assert outcome.failures == ["test_a.py::test_z"]


@pytest.mark.parametrize(
    ("says", "version"),
    [
        ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)", (7, 2)),
        ("QEMU emulator version 10.0.2", (10, 0)),
        ("error while loading shared libraries", ()),
    ],
)
def test_a_qemu_is_taken_at_its_word(tmp_path: Path, says: str, version: tuple[int, ...]) -> None:
    script = tmp_path / "qemu"
    script.write_text(f"#!/bin/sh\necho '{says}'\n")
    script.chmod(0o755)
    assert emulator.version([str(script)]) == version
    assert emulator.version([str(tmp_path / "none")]) == ()
