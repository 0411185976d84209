"""What a plugin's author and an owner of hook scripts are promised, seen with a real libvirt and QEMU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.libvirt.domain import Domain
from tests.libvirt.private import CHECKOUT, HOOKS, PrivateLibvirt
from tests.libvirt.product import CONFIG, cli, enable

SWAPPINESS = Path("/proc/sys/vm/swappiness")
TELL = """
from dataclasses import dataclass
import json
from virt_usher import Note, hookimpl

@dataclass(frozen=True, eq=False)
class Plugin:
    @hookimpl
    def usher_started(self, guest):
        yield Note(json.dumps([guest.pid, guest.vcpus, guest.iothreads, list(guest.others)]))
"""


def notes(lv: PrivateLibvirt, domain: Domain, operation: str) -> list[str]:
    operations = json.loads(cli(lv, "last", "--json", domain.name).stdout)["operations"]
    return [s["what"] for o in operations if o["op"] == operation for s in o["steps"]]


def test_a_plugin_is_told_the_threads_of_the_running_guest(usher: PrivateLibvirt) -> None:
    domain = Domain("guest", memory="<iothreads>2</iothreads>", vcpus=3)
    usher.write(f"{CONFIG}/plugins/tell.py", TELL)
    result = usher.start(enable(usher, domain, "[plugins.tell]\n"))
    assert result.returncode == 0, result.stderr
    pid = usher.qemu_pid(domain)
    threads = {
        int(t.name): (t / "comm").read_text().strip() for t in usher.path(f"/proc/{pid}/task").iterdir()
    }
    (note,) = notes(usher, domain, "started")
    told_pid, vcpus, iothreads, others = json.loads(note)
    assert told_pid == pid
    assert {n: threads[t].partition("/")[0] for n, t in vcpus.items()} == {
        "0": "CPU 0",
        "1": "CPU 1",
        "2": "CPU 2",
    }
    assert {n: threads[t] for n, t in iothreads.items()} == {"1": "IO iothread1", "2": "IO iothread2"}
    assert not {pid, *vcpus.values(), *iothreads.values()} & set(others)


def test_a_newcomer_follows_the_guides_ten_commands(usher: PrivateLibvirt) -> None:
    """From an installed virt-usher to an own plugin with a test, on a domain that really starts."""
    guide = (CHECKOUT / "docs/plugins.md").read_text().partition("## Ten commands")[2]
    commands = guide.split("```")[1].strip().splitlines()
    assert len(commands) <= 10
    usher.define(Domain("win10", memory=""))
    usher.remove("/root/walk")
    usher.run("mkdir", "/root/walk", check=True)
    before, seen = SWAPPINESS.read_text(), {}
    for command in commands:
        ran = usher.run("sh", "-c", f"cd /root/walk; {command}", timeout=240)
        assert ran.returncode == 0, f"{command}: {ran.stdout}{ran.stderr}"
        seen[command.partition("#")[0].strip()] = (ran.stdout, SWAPPINESS.read_text())
    assert seen["virt-usher plugins test calm.py"][0].count(": ok") == 2
    assert f"swappiness: {before.strip()} → 5" in seen["virt-usher plan win10"][0]
    assert seen["virsh start win10"][1] == "5\n"
    assert "swappiness" in seen["virt-usher status win10"][0]
    assert "release: ok" in seen["virt-usher last win10"][0]
    assert SWAPPINESS.read_text() == before


# As the users of VFIO-Tools have them: each says how it was called, by whom its stdin names.
SCRIPT = """#!/bin/sh
echo "$*; $(grep -c '<uuid>UUID</uuid>')" >>/run/private/seen
sleep 60 &
echo $! >>/run/private/sleepers
"""
FIRST_LIFE = ["prepare/begin", "start/begin", "started/begin", "stopped/end", "release/end"]


@pytest.fixture
def tree(usher: PrivateLibvirt) -> Iterator[Domain]:
    """A domain with a script for each operation, and the plugin switched on: no more is needed."""
    domain = Domain("win10", memory="")
    for operation in FIRST_LIFE:
        path = f"{HOOKS}/qemu.d/{domain.name}/{operation}/10-tell.sh"
        usher.write(path, SCRIPT.replace("UUID", domain.uuid), 0o755)
    usher.remove("/run/private/seen", "/run/private/sleepers")
    usher.define(domain)
    assert cli(usher, "enable", domain.name, "scripts").returncode == 0
    yield domain
    # What the scripts left behind in the background held up nobody.
    usher.run("kill", *usher.lines("/run/private/sleepers"), check=True)


def test_a_tree_of_vfio_tools_works_after_one_enable(usher: PrivateLibvirt, tree: Domain) -> None:
    plan = cli(usher, "plan", tree.name).stdout
    assert all(f"{o}/10-tell.sh" in plan for o in FIRST_LIFE[:3])
    assert usher.virsh("start", tree.uuid, timeout=20).returncode == 0
    assert usher.virsh("destroy", tree.uuid, timeout=20).returncode == 0
    *seen, last = usher.lines("/run/private/seen")
    assert seen == [f"{tree.name} {o.replace('/', ' ')} -; 1" for o in FIRST_LIFE[:-1]]
    # libvirt 10.5 and later say why it ended
    assert last in [f"{tree.name} release end {reason}; 1" for reason in ("-", "destroyed")]


@pytest.mark.parametrize("operation", ["prepare/begin", "start/begin"])
def test_a_failing_script_refuses_the_start_in_virshs_words(
    usher: PrivateLibvirt, tree: Domain, operation: str
) -> None:
    usher.write(
        f"{HOOKS}/qemu.d/{tree.name}/{operation}/20-disk.sh",
        "#!/bin/sh\necho mounting\necho the disk is in use >&2\nexit 7\n",
        0o755,
    )
    result = usher.virsh("start", tree.uuid, timeout=20)
    assert result.returncode == 1
    assert "20-disk.sh ended with status 7: mounting | the disk is in use" in result.stderr
    # The way back ran all the same, and the next start succeeds.
    assert [line.split()[1] for line in usher.lines("/run/private/seen")][-2:] == ["stopped", "release"]
    usher.remove(f"{HOOKS}/qemu.d/{tree.name}/{operation}/20-disk.sh")
    assert usher.virsh("start", tree.uuid, timeout=20).returncode == 0


def test_a_script_that_fails_once_the_guest_runs_does_not_end_it(usher: PrivateLibvirt, tree: Domain) -> None:
    usher.write(f"{HOOKS}/qemu.d/{tree.name}/started/begin/20-late.sh", "#!/bin/sh\nexit 7\n", 0o755)
    assert usher.virsh("start", tree.uuid, timeout=20).returncode == 0
    assert usher.state(tree) == "running"
    assert "20-late.sh ended with status 7" in cli(usher, "last", tree.name).stdout
