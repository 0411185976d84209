"""The hook as libvirt calls it: exit status, pipes and deadline of every operation, as real processes."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import ROOT, eventually

from virt_usher.testing import FakeHost, ask, domain_xml, run_hook, start_hook
from virt_usher.testing.conformance import differences, left

GOVERNOR = "/sys/devices/system/cpu/cpufreq/policy0/scaling_governor"
HEAD = """
import os, subprocess, sys, time
from dataclasses import dataclass
from virt_usher import Note, OneWay, Problem, UsherError, Write, hookimpl, option
"""


def plugin(body: str, hook: str = "usher_prepare", arguments: str = "domain, host") -> str:
    """Write a plugin of one hook."""
    lines = "\n".join(f"        {line}" for line in body.splitlines())
    return (
        f"{HEAD}\n@dataclass(frozen=True, eq=False)\nclass Plugin:\n"
        f"    @hookimpl\n    def {hook}(self, {arguments}):\n{lines}\n"
    )


# What libvirt calls (docs/hooks.rst, virhook.c), and whether a broken configuration may refuse it.
OPERATIONS = {
    "prepare": 3,
    "start": 3,
    "started": 0,
    "stopped": 0,
    "release": 0,
    "reconnect": 0,
    "migrate": 0,
    "restore": 0,
    "attach": 0,
    "what libvirt adds one day": 0,
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("extra", ["-", "from snapshot"])
def test_every_operation_passes_with_a_good_configuration(pc: FakeHost, operation: str, extra: str) -> None:
    pc.domain("guest", "[plugins.governor]\n")
    result = run_hook(pc, "guest", operation, extra=extra)
    assert (result.status, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_only_prepare_and_start_can_refuse(pc: FakeHost, operation: str, held: bool) -> None:
    if held:
        pc.domain("guest", "[plugins.governor]\n")
        run_hook(pc, "guest", "prepare")
    pc.domain("guest", "[plugins.nonsense]\n")
    result = run_hook(pc, "guest", operation)
    assert (result.status, result.stdout) == (OPERATIONS[operation], "")
    if result.status:
        assert result.stderr.startswith("\nvirt-usher refused to start 'guest':\n")
        assert "no plugin 'nonsense'" in result.stderr
    else:
        assert result.stderr == ""


@pytest.mark.parametrize("operation", ["prepare", "start", "started", "release"])
@pytest.mark.parametrize(
    "xml", [b"", b"<domain", b"\0\xff", b"<a/>", b"<!DOCTYPE d><domain><name>g</name></domain>"]
)
def test_broken_xml_is_a_reason_and_no_trace(pc: FakeHost, operation: str, xml: bytes) -> None:
    result = run_hook(pc, "guest", operation, xml)
    assert (result.status, result.stdout) == (OPERATIONS[operation], "")
    assert "Traceback" not in result.stderr
    if result.status:
        assert "XML" in result.stderr


@pytest.mark.parametrize("arguments", [[], ["guest"], ["guest", ""], ["", "prepare", "begin", "-"]])
def test_unknown_calls_leave_the_host_alone(pc: FakeHost, arguments: list[str]) -> None:
    script = "import sys; from virt_usher.dispatch import main; from virt_usher.host import LiveHost"
    command = f"{script}; main(sys.argv[2:], LiveHost(sys.argv[1]))"
    before = pc.snapshot()
    done = subprocess.run(
        [sys.executable, "-B", "-c", command, pc.root, *arguments],
        env={"PYTHONPATH": str(ROOT / "src")},
        input=domain_xml(),
        capture_output=True,
        timeout=60,
    )
    assert done.stdout == b""
    assert b"Traceback" not in done.stderr
    assert done.returncode == (3 if "prepare" in arguments else 0)
    assert not differences(before, pc.snapshot())


BAD_PLUGINS = {
    "raises": ("raise RuntimeError('no such luck')", "RuntimeError: no such luck (bad.py:"),
    "raises OSError": ("open('/nonexistent')", "No such file or directory: '/nonexistent'"),
    "exits": ("sys.exit(0)", "SystemExit: 0 (bad.py:"),
    "exits at once": ("os._exit(0)", "its own process ended with status 0"),
    "is killed": ("os.kill(os.getpid(), 9)", "its own process was killed by signal 9"),
    "returns nonsense": ("return ['performance']", "returned 'performance', which is no action"),
    "returns no list": ("return 7", "returned 7, and not a list of such"),
    "recurses": ("def f(): f()\nf()", "RecursionError"),
    "calls libvirt": (
        "import libvirt\nlibvirt.open()",
        "the plugin imports libvirt: libvirt waits for this hook",
    ),
    "refuses": ("raise UsherError('not today', 'come back tomorrow')", "come back tomorrow"),
}


@pytest.mark.parametrize("what", BAD_PLUGINS)
@pytest.mark.parametrize("hook", ["usher_prepare", "usher_check"])
def test_a_plugin_that_fails_refuses_the_start_and_is_named(pc: FakeHost, what: str, hook: str) -> None:
    body, reason = BAD_PLUGINS[what]
    if hook == "usher_check" and what == "returns nonsense":
        reason = "returned 'performance', which is no problem"
    pc.plugin("bad", plugin(body, hook)).domain("guest", "[plugins.governor]\n[plugins.bad]\n")
    before = pc.snapshot()
    result = run_hook(pc, "guest", "prepare")
    assert (result.status, result.stdout) == (3, "")
    assert result.stderr.startswith("\n")
    assert reason in result.stderr
    run_hook(pc, "guest", "release")
    assert not differences(before, pc.snapshot())


def test_a_plugin_that_imports_libvirt_is_not_loaded(pc: FakeHost) -> None:
    pytest.importorskip("libvirt", reason="Python's libvirt module: apt-get install python3-libvirt")
    pc.plugin("bad", plugin("return []").replace("import os,", "import libvirt, os,"))
    (problem,) = ask(pc, "bad", domain_xml()).problems  # as for `plan`, which may import it itself
    assert "imports libvirt: libvirt waits for this hook" in problem.message
    pc.domain("guest", "[plugins.bad]\n")
    assert "libvirt waits for this hook" in run_hook(pc, "guest", "prepare").stderr


def test_a_plugin_that_waits_for_virsh_is_told_why(pc: FakeHost) -> None:
    program = shutil.copy("/bin/sleep", pc.path("/virsh"))
    body = f"subprocess.run(['/bin/sh', '-c', '{program} 8; :'])\nreturn []"
    pc.plugin("asks", plugin(body)).domain("guest", "[plugins.asks]\n").config("[deadlines]\nstart = 4\n")
    result = run_hook(pc, "guest", "prepare")
    assert result.status == 3
    assert "plugin asks, usher_prepare: TimeoutError" in result.stderr
    assert re.search(r"virsh \(pid \d+\) calls libvirt, which waits for this hook", result.stderr)


def test_what_a_plugin_prints_never_reaches_libvirt(pc: FakeHost) -> None:
    body = (
        "print('out')\nos.write(1, b'out')\nos.write(2, b'err')\nsubprocess.run(['echo', 'out'])\nreturn []"
    )
    pc.plugin("loud", plugin(body)).domain("guest", "[plugins.loud]\n")
    result = run_hook(pc, "guest", "prepare")
    assert (result.status, result.stdout, result.stderr) == (0, "", "")


def test_a_child_that_lives_on_does_not_keep_libvirt_waiting(pc: FakeHost) -> None:
    note = f"open({pc.path('/pid')!r}, 'w').write(str(child.pid))"
    body = f"child = subprocess.Popen(['sleep', '600'])\n{note}\nreturn []"
    pc.plugin("forks", plugin(body)).domain("guest", "[plugins.forks]\n")
    try:
        assert run_hook(pc, "guest", "prepare").status in (0, 3)  # TimeoutError if the pipes stay open
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pc.read("/pid")), signal.SIGKILL)


def test_a_plugin_that_closes_all_files_and_hangs_is_not_waited_for(pc: FakeHost) -> None:
    note = f"open({pc.path('/pid')!r}, 'w').write(str(os.getpid()))"
    hang = "while True:\n    try:\n        time.sleep(600)\n    except BaseException:\n        pass"
    pc.plugin("hangs", plugin(f"os.closerange(0, 256)\n{note}\n{hang}"))
    pc.domain("guest", "[plugins.hangs]\n").config("[deadlines]\nstart = 1\n")
    try:
        result = run_hook(pc, "guest", "prepare")
        assert result.status == 3
        assert "was not ready in time" in result.stderr
    finally:
        os.kill(int(pc.read("/pid")), signal.SIGKILL)


def test_a_plugin_may_change_directory_and_environment(pc: FakeHost) -> None:
    pc.plugin("moves", plugin("os.chdir('/')\nos.environ.clear()\nreturn []"))
    pc.domain("guest", "[plugins.moves]\n[plugins.governor]\n")
    assert run_hook(pc, "guest", "prepare").status == 0
    assert pc.read(GOVERNOR) == "performance"
    assert run_hook(pc, "guest", "release").status == 0


def test_a_killed_worker_is_a_refusal_with_its_reason(pc: FakeHost) -> None:
    pc.domain("guest", "[plugins.governor]\n")
    result = run_hook(pc, "guest", "prepare", kill_at=8)
    assert result.status == 3
    assert "its own process was killed by signal 9" in result.stderr
    for operation in ("started", "release"):
        assert run_hook(pc, "guest", operation, kill_at=2).status == 0


def test_a_hanging_start_is_answered_at_the_deadline_and_undoes_itself(pc: FakeHost) -> None:
    pc.config("[deadlines]\nstart = 2\n").domain("guest", "[plugins.hugepages]\n[plugins.governor]\n")
    before = pc.snapshot()
    pc.stall("*/policy0/scaling_governor")
    xml = domain_xml(memory_kib=20480, hugepages=True)
    result = run_hook(pc, "guest", "prepare", xml)
    assert result.status == 3
    assert "was not ready in time" in result.stderr
    assert re.search(r"pid \d+ .*, at: governor: .* → performance", result.stderr), result.stderr
    eventually(lambda: pc.stalled, "the worker reaches the kernel")
    assert pc.pages(0)[0] == 10, "the worker is stuck in the kernel and cannot have given back anything"
    assert '"abandoned"' in pc.journal("guest")

    # libvirt's release comes meanwhile, and must not wait for it either; another domain does not care.
    again = start_hook(pc, "guest", "release", xml)
    pc.domain("other", "[plugins.hugepages]\n")
    assert run_hook(pc, "other", "prepare", xml).status == 0
    assert run_hook(pc, "other", "release", xml).status == 0
    os.unlink(pc.path("/etc/virt-usher/domains/other.toml"))
    pc.resume()
    assert again.wait().status == 0
    eventually(lambda: left(pc) == [], "the worker gives back what it took")
    assert not differences(before, pc.snapshot())


def test_a_hanging_stop_is_answered_at_the_deadline_and_finishes_later(pc: FakeHost) -> None:
    pc.config("[deadlines]\nstop = 1\n").domain("guest", "[plugins.governor]\n")
    before = pc.snapshot()
    assert run_hook(pc, "guest", "prepare").status == 0
    pc.stall("*/policy0/scaling_governor")
    assert run_hook(pc, "guest", "release").status == 0
    assert pc.read(GOVERNOR) == "performance"
    pc.resume()
    eventually(lambda: left(pc) == [], "the rest is given back")
    assert not differences(before, pc.snapshot())


# A /dev of one's own, of which only a few things are needed; all that is below it may be in /dev/shm.
DEV = """
mkdir -p "$1/shm"; touch "$1/null"; ln -s "$2" "$1/log"
mount --make-rprivate /
mount --bind /dev/null "$1/null"
[ ! -d /dev/shm ] || mount --rbind /dev/shm "$1/shm"
mount --rbind "$1" /dev
"""
CLONE_NEWNS = 0x20000


def log_to(folder: Path, path: Path) -> None:
    """Give this process, the hook's, a /dev/log that is this socket."""
    assert ctypes.CDLL(None).unshare(CLONE_NEWNS) == 0
    subprocess.run(["/bin/sh", "-euc", DEV, "sh", folder, path], check=True)


@pytest.fixture
def stuck(tmp_path: Path) -> socket.socket:
    """A journald's socket, at tmp_path/log, whose queue is full and that reads nothing."""
    if subprocess.run(["unshare", "--map-root-user", "--mount", "true"], capture_output=True).returncode:
        missing = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        missing("needs a mount namespace: unshare --mount")
    receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    receiver.bind(os.fspath(tmp_path / "log"))
    with contextlib.suppress(BlockingIOError):
        while True:  # each from a socket of its own, or that one's buffer would be full first
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender:
                sender.sendto(b"x", os.fspath(tmp_path / "log"))
    return receiver


@pytest.mark.parametrize(("operation", "status"), [("prepare", 3), ("release", 0)])
def test_a_stuck_journald_does_not_keep_libvirt_waiting(
    pc: FakeHost, stuck: socket.socket, tmp_path: Path, operation: str, status: int
) -> None:
    pc.config("[deadlines]\nstart = 2\nstop = 2\n").domain("guest", "[plugins.governor]\n")
    before = pc.snapshot()
    if operation == "release":
        run_hook(pc, "guest", "prepare")
    hook = start_hook(pc, "guest", operation, prepare=lambda: log_to(tmp_path / "dev", tmp_path / "log"))
    with stuck:
        result = hook.wait(30)
        assert result.status == status, result.stderr
        assert ("was not ready in time" in result.stderr) == (operation == "prepare")
        said = b""
        while b"not ready in time" not in said:  # once somebody reads
            stuck.settimeout(30)
            said = stuck.recv(8192)
    eventually(lambda: left(pc) == [], "the worker gives back what it took")
    assert not differences(before, pc.snapshot())


def test_a_second_start_waits_for_the_first_and_then_names_it(pc: FakeHost) -> None:
    pc.config("[deadlines]\nstart = 4\n").domain("guest", "[plugins.governor]\n")
    before = pc.snapshot()
    pc.stall("*/policy0/scaling_governor")
    first = start_hook(pc, "guest", "prepare")
    eventually(lambda: pc.stalled, "the first start reaches the kernel")
    second = run_hook(pc, "guest", "prepare")
    assert second.status == 3
    assert "domain guest is held by pid" in second.stderr
    assert first.wait().status == 3
    pc.resume()
    eventually(lambda: left(pc) == [], "the first gives back what it took")
    assert not differences(before, pc.snapshot())


def test_a_failed_step_of_a_running_guest_is_undone_alone_and_never_stops_it(pc: FakeHost) -> None:
    late = plugin("yield Write('/sys/late', '1')\nyield Write('/sys/later', '1')", "usher_started")
    pc.file("/sys/late", "0").file("/sys/later", "0", 0o444).plugin("late", late)
    pc.domain("guest", "[plugins.governor]\n[plugins.late]\n")
    before = pc.snapshot()
    for operation in ("prepare", "start", "started"):
        result = run_hook(pc, "guest", operation)
        assert (result.status, result.stderr) == (0, ""), operation
    assert pc.read("/sys/late") == "1"
    assert pc.read(GOVERNOR) == "performance"
    assert "/sys/later: Permission denied" in pc.journal("guest").replace(pc.root, "")
    run_hook(pc, "guest", "release")
    assert not differences(before, pc.snapshot())


def test_what_prepare_set_may_be_set_again_at_start(pc: FakeHost) -> None:
    pc.plugin("early", plugin("yield Write('/sys/knob', '1')"))
    pc.plugin("late", plugin("yield Write('/sys/knob', '2')", "usher_start"))
    pc.file("/sys/knob", "0").domain("guest", "[plugins.early]\n[plugins.late]\n")
    for operation in ("prepare", "start"):
        result = run_hook(pc, "guest", operation)
        assert (result.status, result.stderr) == (0, ""), operation
    assert pc.read("/sys/knob") == "1"  # the earlier claim rules
    run_hook(pc, "guest", "release")
    assert pc.read("/sys/knob") == "0"


def test_many_domains_at_once_share_one_host(pc: FakeHost) -> None:
    names = [f"guest{i}" for i in range(8)]
    for name in names:
        pc.domain(name, "[plugins.hugepages]\n[plugins.governor]\n")
    before = pc.snapshot()
    xml = {n: domain_xml(n, memory_kib=20480, hugepages=True, uuid=f"{i:036}") for i, n in enumerate(names)}
    for _ in range(2):
        starts = [start_hook(pc, name, "prepare", xml[name]) for name in names]
        assert [hook.wait().stderr for hook in starts] == [""] * 8
        assert pc.pages(0)[0] == 80
        stops = [start_hook(pc, name, "release", xml[name]) for name in names]
        assert [hook.wait().status for hook in stops] == [0] * 8
        assert not differences(before, pc.snapshot())


RELEASE = """
import sys
before = set(sys.modules)
sys.path.insert(0, sys.argv[1])
import os, time
from virt_usher.dispatch import Line, give_back
from virt_usher.event import Event
from virt_usher.host import LiveHost
from virt_usher.journal import Journals
from virt_usher.locks import Locks
host = LiveHost(sys.argv[2])
line = Line(host, Event("guest", "release"), os.open(os.devnull, os.O_WRONLY), os.pipe()[0], time.monotonic())
os.set_blocking(line._token, False)
give_back(line, Journals(host, Locks(host, line.deadline)))
print(*sorted(set(sys.modules) - before))
"""
# What a release may load. Each module costs every stop of every domain: think before you add one.
ALLOWED = {
    *("__future__", "_struct", "contextlib", "fcntl", "select", "struct", "syslog"),
    *("_json", "json", "json.decoder", "json.encoder", "json.scanner"),
    # what json and contextlib need
    *("_collections", "_functools", "_operator", "collections", "functools", "itertools"),
    *("copyreg", "enum", "keyword", "operator", "reprlib", "types"),
    *("_sre", "re", "re._casefix", "re._compiler", "re._constants", "re._parser"),
}
ALLOWED_OURS = {
    *("virt_usher", "virt_usher.dispatch", "virt_usher.effects", "virt_usher.errors", "virt_usher.event"),
    *("virt_usher.host", "virt_usher.host.pool", "virt_usher.journal", "virt_usher.locks", "virt_usher.log"),
}


def test_release_loads_a_short_list_of_modules(pc: FakeHost) -> None:
    pc.domain("guest", "[plugins.hugepages]\n[plugins.governor]\n")
    run_hook(pc, "guest", "prepare", domain_xml(memory_kib=20480, hugepages=True))
    done = subprocess.run(
        [sys.executable, "-I", "-B", "-c", RELEASE, str(ROOT / "src"), pc.root],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    loaded = set(done.stdout.split())
    assert "virt_usher.effects" in loaded
    assert loaded - ALLOWED - ALLOWED_OURS == set()
    assert pc.journal("guest") == "", "the release did its work"
