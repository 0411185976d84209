"""The entry: exit statuses, errors in one place, quick help, and no trace ever."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cli.conftest import Cli, hook
from tests.conftest import eventually

from virt_usher.cli import VERBS
from virt_usher.testing import FakeHost, domain_xml

ROOT = Path(__file__).resolve().parents[2]
ENTRY = (
    f"import sys; sys.path[:0] = [{str(ROOT / 'src')!r}]; from virt_usher.cli import main; "
    "from virt_usher.host import LiveHost; main(sys.argv[2:], LiveHost(sys.argv[1]), 'test:///nowhere')"
)


def command(host: FakeHost, *argv: str) -> list[str]:
    """Return the command line of a process of its own."""
    return [sys.executable, "-I", "-B", "-c", ENTRY, host.root, *argv]


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_help(cli: Cli, verb: str) -> None:
    for option in ("--help", "-h"):
        ran = cli(verb, option)
        assert (ran.status, VERBS[verb] in ran.out) == (0, True)


@pytest.mark.parametrize("argv", [["nonsense"], ["status", "--nonsense"], ["last"], ["doctor", "extra"]])
def test_wrong_usage_ends_with_2(cli: Cli, argv: list[str]) -> None:
    ran = cli(*argv)
    assert (ran.status, ran.out) == (2, "")
    assert "Usage:" in ran.err


def test_an_error_is_one_line_and_its_hint(cli: Cli) -> None:
    ran = cli("last", "no\nbody")
    assert ran.status == 1
    first, hint = ran.err.splitlines()
    assert first.startswith(r"virt-usher: no start of 'no\nbody'")
    assert hint.startswith("  ")


@pytest.mark.parametrize("verb", [["last", "a/b"], ["last", "n" * 300], ["enable", "n" * 300, "hugepages"]])
def test_an_impossible_name_is_an_error_not_a_trace(cli: Cli, verb: list[str]) -> None:
    ran = cli(*verb)
    assert (ran.status, "virt-usher: " in ran.err) == (1, True)


def test_help_loads_no_verb(pc: FakeHost) -> None:
    """lxml, pluggy, tomlkit and libvirt are what takes time."""
    script = ENTRY.replace("; main(", "\ntry: main(") + (
        "\nfinally: print(*sorted(m for m in sys.modules if m.split('.')[0] in "
        "('lxml', 'pluggy', 'tomlkit', 'libvirt', 'subprocess') or m.startswith('virt_usher.cli.')))"
    )
    run = subprocess.run(
        [sys.executable, "-I", "-B", "-c", script, pc.root, "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.splitlines()[-1] == "virt_usher.cli.base"


def test_a_reader_that_leaves_early_causes_no_complaint(pc: FakeHost) -> None:
    read, write = os.pipe()
    os.close(read)
    run = subprocess.run(command(pc, "plugins"), stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (run.returncode, run.stderr) == (1, "")


def test_ctrl_c_ends_without_a_trace(pc: FakeHost) -> None:
    # Where the tests run in the background SIGINT is ignored, and a child would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    argv = command(pc, "plan", "--xml", "-")
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        signal.signal(signal.SIGINT, before)
        assert process.stdin
        assert process.stderr
        # More than a pipe takes: once this is written, the verb reads. Then it sleeps, waiting for more.
        process.stdin.write(b"x" * (1 << 20))
        process.stdin.flush()
        stat = Path(f"/proc/{process.pid}/stat")
        eventually(lambda: stat.read_text().rpartition(")")[2].split()[0] == "S", "it waits for an answer")
        process.send_signal(signal.SIGINT)
        error = process.stderr.read()
    assert (process.returncode, error.strip()) == (130, b"")


def on_terminal(argv: list[str], **environment: str) -> str:
    """Run a command on a terminal and return what it shows."""
    terminal, screen = os.openpty()
    with subprocess.Popen(argv, stdout=screen, stderr=screen, env={**os.environ, **environment}):
        os.close(screen)
        shown = b""
        try:
            while chunk := os.read(terminal, 4096):
                shown += chunk
        except OSError:  # how Linux says that the other end is closed
            os.close(terminal)
    return shown.decode()


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("verb", ["plugins", "no-such-verb"])
def test_closed_files_are_no_trouble(pc: FakeHost, closed: str, verb: str) -> None:
    status = 2 if verb == "no-such-verb" else 0
    run = subprocess.run(
        ["sh", "-c", f'"$@" {closed}', "sh", *command(pc, verb)], capture_output=True, text=True, check=False
    )
    assert run.returncode == status
    assert "Error" not in run.stderr.replace("Error: No such command", "")
    assert bool(run.stdout) == (status == 0 and ">&-" not in closed.replace("2>&-", ""))


def test_a_terminal_gets_short_lines_and_colour_a_pipe_neither(cli: Cli, pc: FakeHost) -> None:
    pc.domain("guest", "[plugins.hugepages]\n")
    hook(pc, "guest", "prepare", domain_xml(memory_kib=8 << 10, hugepages=True))
    shown = on_terminal(command(pc, "status"))
    assert "\x1b[" in shown
    assert "\x1b[" not in on_terminal(command(pc, "status"), NO_COLOR="1")
    plain = on_terminal(command(pc, "doctor"), NO_COLOR="1").splitlines()
    assert max(len(line) for line in plain if not line.startswith(" " * 9)) <= 80
    assert "\x1b[" not in cli("status").out
