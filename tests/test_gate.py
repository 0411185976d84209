"""The gate: whether Python starts at all, and what libvirt sees when it cannot."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import ROOT

from virt_usher.cli.tell.plan import tell
from virt_usher.testing import FakeHost, domain_xml

GATE = ROOT / "hooks.d/qemu"
OPERATIONS = (
    "prepare",
    "start",
    "started",
    "stopped",
    "release",
    "reconnect",
    "migrate",
    "restore",
    "attach",
    "new",
)
PLAIN = b"<domain type='kvm'><name>guest</name></domain>\n"
WANTED = {
    "hostdev": b"<domain><devices><hostdev mode='subsystem' type='pci'/></devices></domain>",
    "network pool": b"<domain><devices><interface type='hostdev'/></devices></domain>",
    "vfio by hand": b"<domain><qemu:arg value='vfio-pci,host=01:00.0'/></domain>",
    "metadata": b"<domain><u:domain xmlns:u='urn:virt-usher:domain:1'/></domain>",
}


class Gate:
    """The real gate with its paths on a temporary root, and a stub for Python that tells what it got."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.etc, self.run_dir = root / "etc", root / "run"
        for folder in (self.etc / "domains", self.run_dir):
            folder.mkdir(parents=True)
        self.owned = root / "owned"
        self.owned.touch()
        self.python("exit 0")
        text = GATE.read_text()
        new = f"etc={self.etc} run={self.run_dir} lib={root}/lib python={root}/python"
        text, found = re.subn(r"^etc=\S+ run=\S+ lib=\S+ python=\S+$", new, text, flags=re.MULTILINE)
        assert found == 1
        # Who runs the tests owns this file, as root owns /proc/1.
        assert text.count("/proc/1 ") == 1
        self.path = root / "qemu"
        self.path.write_text(text.replace("/proc/1 ", f"{self.owned} "))
        self.path.chmod(0o755)

    def python(self, how: str) -> None:
        """Put something in the interpreter's place: it notes its arguments and stdin, then does this."""
        stub = self.root / "python"
        calls, stdin = self.root / "calls", self.root / "stdin"
        note = f"for a; do printf '%s\\0' \"$a\"; done >>{calls}; echo >>{calls}; cat >{stdin}; echo noise"
        stub.write_text(f"#!/bin/sh\n{note}\n{how}\n")
        stub.chmod(0o755)

    def call(
        self,
        name: str,
        operation: str,
        xml: bytes = PLAIN,
        extra: str = "-",
        shell: tuple[str, ...] = (),
        umask: int = 0o022,
    ) -> subprocess.CompletedProcess[bytes]:
        """Call the gate as libvirt does."""
        (self.root / "calls").unlink(missing_ok=True)
        done = subprocess.run(
            [
                *shell,
                self.path,
                name,
                operation,
                "end" if operation in ("stopped", "release") else "begin",
                extra,
            ],
            input=xml,
            capture_output=True,
            timeout=60,
            env={"PATH": os.environ["PATH"]},
            umask=umask,
        )
        assert done.stdout == b"", "stdout filters the XML of migrate and restore: it stays empty"
        return done

    @property
    def started(self) -> bool:
        return (self.root / "calls").exists()

    @property
    def arguments(self) -> list[str]:
        """What Python was called with, after its own options and the path."""
        return os.fsdecode((self.root / "calls").read_bytes()).rstrip("\n").split("\0")[3:-1]

    def marker(self, which: str, name: str = "guest") -> None:
        (
            self.root
            / {"own": f"etc/domains/{name}.toml", "every": "etc/every-domain.toml"}.get(
                which, f"run/{name}.{which}"
            )
        ).touch()


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path)


# (markers present, XML) -> the operations that start Python.
CASES: list[tuple[tuple[str, ...], bytes, set[str]]] = [
    ((), PLAIN, set()),
    ((), b"", set()),
    (("own",), PLAIN, {"prepare"}),
    (("every",), PLAIN, {"prepare"}),
    (("jnl",), PLAIN, {"prepare", "release"}),
    (("own", "jnl"), PLAIN, {"prepare", "release"}),
    (("own", "jnl", "sta"), PLAIN, {"prepare", "start", "release"}),
    (("own", "jnl", "std"), PLAIN, {"prepare", "started", "release"}),
    (("own", "every", "jnl", "sta", "std"), PLAIN, {"prepare", "start", "started", "release"}),
    ((), WANTED["hostdev"], {"prepare"}),
    ((), WANTED["network pool"], {"prepare", "start"}),
    ((), WANTED["vfio by hand"], {"prepare"}),
    ((), WANTED["metadata"], {"prepare"}),
    (("jnl",), WANTED["network pool"], {"prepare", "release"}),
]


@pytest.mark.parametrize(("markers", "xml", "starts"), CASES)
def test_python_starts_only_where_there_is_something_to_do(
    gate: Gate, markers: tuple[str, ...], xml: bytes, starts: set[str]
) -> None:
    for marker in markers:
        gate.marker(marker)
    for operation in OPERATIONS:
        done = gate.call("guest", operation, xml)
        assert (done.returncode, done.stderr) == (0, b"")
        assert (operation, gate.started) == (operation, operation in starts)
        if gate.started and operation in ("prepare", "start", "started"):
            assert (gate.root / "stdin").read_bytes().rstrip(b"\n") == xml.rstrip(b"\n")
        if gate.started and operation == "release":
            assert (gate.root / "stdin").read_bytes() == b""


SHELLS = [("sh",), ("dash",), ("bash", "--posix"), ("busybox", "sh")]


@pytest.mark.parametrize("shell", SHELLS, ids=lambda s: s[0])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_first_call_after_boot_is_noted_in_a_folder_as_python_makes_it(
    gate: Gate, tmp_path: Path, operation: str, shell: tuple[str, ...]
) -> None:
    """/run is empty then, and no domain may ever need Python: doctor would say that nobody called."""
    python = Path(FakeHost(tmp_path / "host").private_dir("/run"))
    for umask in (0, 0o022, 0o277):
        gate.run_dir.rmdir()
        done = gate.call("guest", operation, shell=shell, umask=umask)
        assert (done.returncode, done.stderr, gate.started) == (0, b"", False)
        noted = operation in ("prepare", "start", "started", "release")
        assert gate.run_dir.exists() == noted
        if noted:
            assert gate.run_dir.stat().st_mode == python.stat().st_mode
            (gate.run_dir / ".called").unlink()
            assert gate.call("guest", operation, shell=shell).stderr == b""
            (gate.run_dir / ".called").unlink()
        else:
            gate.run_dir.mkdir()


@pytest.mark.parametrize("shell", SHELLS, ids=lambda s: s[0])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_run_folder_that_cannot_be_made_is_nobodys_concern(
    gate: Gate, operation: str, shell: tuple[str, ...]
) -> None:
    gate.run_dir.rmdir()
    gate.run_dir.touch()
    done = gate.call("guest", operation, shell=shell)
    assert (done.returncode, done.stderr, gate.started) == (0, b"", False)


def test_another_domains_markers_start_nothing(gate: Gate) -> None:
    for marker in ("own", "jnl", "sta", "std"):
        gate.marker(marker, "other")
    for operation in OPERATIONS:
        assert gate.call("guest", operation).returncode == 0
        assert not gate.started


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_off_switch_lets_starts_pass_and_stops_give_back(gate: Gate, operation: str) -> None:
    for marker in ("own", "every", "jnl", "sta", "std"):
        gate.marker(marker)
    (gate.etc / "off").touch()
    gate.python("echo broken >&2; exit 1")
    done = gate.call("guest", operation, WANTED["hostdev"])
    assert (done.returncode, done.stderr) == (0, b"")
    assert gate.started == (operation == "release")


NAMES = [
    "two words",
    "it's",
    'say "x"',
    "-e",
    "--help",
    "[ab]*?",
    "$(touch pwned)",
    "`touch pwned`",
    ";touch pwned",
    "..",
    "a\\nb",
    "tab\there",
    "ümläut",
    "x" * 250,
    os.fsdecode(b"latin\xe9"),
]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
@pytest.mark.parametrize("marker", ["own", "jnl"])
def test_hostile_names_are_passed_on_as_they_are(gate: Gate, name: str, marker: str) -> None:
    """Of 250 bytes only the journal's name fits: a file of its own cannot exist for such a domain."""
    if len(os.fsencode(f"{name}.toml")) > 255 and marker == "own":
        gate.marker("every")
    else:
        gate.marker(marker, name)
    done = gate.call(name, "prepare", extra="from snapshot")
    assert (done.returncode, done.stderr) == (0, b"")
    assert gate.arguments == [name, "prepare", "begin", "from snapshot"]
    assert not list(gate.root.rglob("pwned"))
    assert not Path("pwned").exists()
    assert gate.call(f"{name}2"[-250:], "start").returncode == 0
    assert not gate.started


def test_names_of_every_byte_are_passed_on_as_they_are(gate: Gate) -> None:
    """All that libvirt takes: any byte but a slash and a newline, up to 251 of them."""
    names = [bytes([byte]) for byte in range(1, 256) if byte not in b"/\n"]
    for name in map(os.fsdecode, (*names, b"\xff" * 251, b"\xc3" * 251)):
        gate.marker("jnl", name)
        done = gate.call(name, "prepare")
        assert (done.returncode, done.stderr) == (0, b""), name
        assert gate.arguments == [name, "prepare", "begin", "-"]
        (gate.run_dir / f"{name}.jnl").unlink()
        gate.call(name, "release")
        assert not gate.started, f"{name!r} has no journal, whatever else is there"


@pytest.mark.parametrize("how", ["exit 1", "exit 4", "kill -KILL $$", "exit 127", "missing", "no program"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_broken_python_refuses_only_starts_that_need_it(gate: Gate, operation: str, how: str) -> None:
    for marker in ("own", "jnl", "sta", "std"):
        gate.marker(marker)
    gate.python(how)
    if how == "missing":
        (gate.root / "python").unlink()
    if how == "no program":
        (gate.root / "python").chmod(0o644)
    done = gate.call("guest", operation)
    if operation in ("prepare", "start"):
        assert done.returncode == 1
        told = done.stderr.decode().splitlines()[-3:]
        assert "virt-usher itself is broken" in told[0]
        assert "repair:" in told[1]
        assert f"touch {gate.etc}/off" in told[2]
    else:
        assert (done.returncode, done.stderr) == (0, b"")
    assert gate.call("unconcerned", "prepare").returncode == 0


def test_a_refusal_is_passed_on_as_it_is(gate: Gate) -> None:
    gate.marker("own")
    gate.python("printf '\\nnot today\\n' >&2; exit 3")
    done = gate.call("guest", "prepare")
    assert (done.returncode, done.stderr) == (1, b"\nnot today\n")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_an_ordinary_users_session_daemon_is_left_alone(gate: Gate) -> None:
    gate.marker("every")
    os.chown(gate.owned, 12345, 12345)
    assert gate.call("guest", "prepare").returncode == 0
    assert not gate.started


def test_xml_of_10_mib_passes_through(gate: Gate) -> None:
    xml = b"<domain>" + b"<a>%s</a>" % (b"x" * (10 << 20)) + WANTED["hostdev"] + b"</domain>"
    assert gate.call("guest", "prepare", xml).returncode == 0
    assert (gate.root / "stdin").read_bytes() == xml + b"\n"


def test_secrets_on_stdin_are_not_even_read(gate: Gate) -> None:
    """migrate and restore carry passwords; the pipe still holds them when the gate has ended."""
    gate.marker("every")
    for operation in ("migrate", "restore"):
        source, end = os.pipe()
        os.write(end, b"secret")
        os.close(end)
        subprocess.run([gate.path, "guest", operation, "begin", "-"], stdin=source, check=True, timeout=60)
        assert os.read(source, 100) == b"secret"
        os.close(source)


# Calls the real hook on the fake host: what the gate starts, with its options and its path left out.
REAL = """
import sys
sys.path.insert(0, {src!r})
from virt_usher.dispatch import main
from virt_usher.testing import FakeHost
main(sys.argv[1:], FakeHost({root!r}))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="the hook works for root only")
def test_gate_and_hook_together_prepare_and_give_back(gate: Gate, pc: FakeHost) -> None:
    code = REAL.format(src=str(ROOT / "src"), root=pc.root)
    script = f'#!/bin/sh\nshift 3\nexec {shlex.quote(sys.executable)} -B -c {shlex.quote(code)} "$@"\n'
    (gate.root / "python").write_text(script)
    for ours, fakes in ((gate.etc, "/etc/virt-usher"), (gate.run_dir, "/run/virt-usher")):
        for folder in (ours / "domains", ours):
            if folder.exists():
                folder.rmdir()
        Path(pc.path(fakes)).mkdir(parents=True, exist_ok=True)
        ours.symlink_to(pc.path(fakes))
    name = "it's $(a) -guest"
    pc.domain(name, "[plugins.hugepages]\n[plugins.governor]\n")
    xml = domain_xml(name, memory_kib=20480, hugepages=True)
    for operation, pages in (
        ("prepare", 10),
        ("start", 10),
        ("started", 10),
        ("stopped", 10),
        ("release", 0),
    ):
        done = gate.call(name, operation, xml)
        assert (done.returncode, done.stderr) == (0, b""), operation
        assert pc.pages(0)[0] == pages
    refused = gate.call(name, "prepare", domain_xml(name, memory_kib=1 << 40, hugepages=True))
    assert refused.returncode == 1
    assert refused.stderr.startswith(b"\nvirt-usher refused to start")
    assert pc.pages(0)[0] == 0


ADDRESS = "<address domain='0x0000' bus='0x01' slot='0x00' function='0x0'/>"
CONCERNS = {
    "nothing": "",
    "an ordinary network": "<interface type='network'><source network='lan'/></interface>",
    "a pool": "<interface type='network'><source network='vfs'/></interface>",
    "USB": "<hostdev mode='subsystem' type='usb'/>",
    "PCI": f"<hostdev mode='subsystem' type='pci'><source>{ADDRESS}</source></hostdev>",
    "a network card": f"<interface type='hostdev'><source>{ADDRESS}</source></interface>",
    "NVMe": f"<disk type='nvme' device='disk'><source type='pci'>{ADDRESS}</source></disk>",
    "vfio by hand": "</devices><q:commandline xmlns:q='http://libvirt.org/schemas/domain/qemu/1.0'>"
    "<q:arg value='-device'/><q:arg value='vfio-pci,host=01:00.0'/></q:commandline><devices>",
    "metadata": "</devices><metadata><u:domain xmlns:u='urn:virt-usher:domain:1'/></metadata><devices>",
}


@pytest.mark.parametrize("what", CONCERNS)
@pytest.mark.parametrize("marker", ["", "own", "every", "jnl"])
def test_plan_says_of_every_domain_what_the_gate_does(
    gate: Gate, pc: FakeHost, what: str, marker: str
) -> None:
    """A policy that is broken refuses all whom Python sees, and nobody else."""
    for name, mode in (("lan", "nat"), ("vfs", "hostdev")):
        pc.file(f"/etc/libvirt/qemu/networks/{name}.xml", f"<network><forward mode='{mode}'/></network>")
    pc.config("broken")
    if marker:
        gate.marker(marker)
        names = {"own": "/etc/virt-usher/domains/guest.toml", "every": "/etc/virt-usher/every-domain.toml"}
        pc.file(names.get(marker, "/run/virt-usher/guest.jnl"), "")
    xml = domain_xml("guest", body=f"<devices>{CONCERNS[what]}</devices>")
    at_start = xml.replace(
        b"<interface type='network'><source network='vfs'", b"<interface type='hostdev'><source"
    )
    looked = []
    for operation, text in (("prepare", xml), ("start", at_start)):
        gate.call("guest", operation, text)
        looked.append(gate.started)
    for text in (xml, xml.replace(b"'", b'"')):
        assert tell(pc, "", text)["refused"] == any(looked), text
