"""devices tells what can be passed through, and what stands in the way."""

from __future__ import annotations

import json
import os
import pty
import sys
from pathlib import Path

import click
import pytest
from tests.cli.conftest import NOWHERE, Cli
from tests.host import machines

from virt_usher.cli import main
from virt_usher.host.pci import claim_key
from virt_usher.testing import FakeHost
from virt_usher.testing.pci import PciHost


@pytest.fixture
def pc(tmp_path: Path) -> FakeHost:
    machines.build(tmp_path / "host", machines.read("guide"))
    return FakeHost(tmp_path / "host")


def row(out: str, address: str) -> list[str]:
    """Return the words of the line about a device."""
    return next(line.split() for line in out.splitlines() if line.split()[1:2] == [address])


def test_a_line_for_each_device_tells_group_driver_and_reset(cli: Cli) -> None:
    out = cli("devices").out
    assert " ".join(row(out, "0000:06:00.0")) == "13 0000:06:00.0 nouveau with 06:00.1 VGA 10de:13c2"
    assert out.splitlines()[0].split() == ["GROUP", "ADDRESS", "DRIVER", "RESET", "USE", "DEVICE"]
    assert row(out, "0000:06:00.1")[:5] == ["13", "0000:06:00.1", "snd_hda_intel", "with", "06:00.0"]
    assert row(out, "0000:00:01.0") == ["1", "0000:00:01.0", "pcieport", "-", "bridge", "8086:0c01"]
    assert row(out, "0000:01:00.0")[-4:] == ["display", "boot", "VGA", "10de:1381"]


def test_what_cannot_be_reset_is_listed_with_its_reason_once(cli: Cli, tmp_path: Path) -> None:
    machines.build(tmp_path / "ivy", machines.read("ivybridge"))
    out = cli("devices", host=FakeHost(tmp_path / "ivy")).out
    assert "0000:00:14.0, 0000:00:1f.2: no reset of its own, and a root bus cannot be reset" in out
    assert row(out, "0000:00:1a.0")[3] == "yes"
    assert row(out, "0000:00:14.0")[3] == "no"


@pytest.mark.parametrize("machine", machines.MACHINES)
def test_programs_get_every_device_and_verdict(machine: str, cli: Cli, tmp_path: Path) -> None:
    functions = machines.read(machine)
    machines.build(tmp_path / machine, functions)
    ran = cli("devices", "--json", host=FakeHost(tmp_path / machine))
    assert ran.status == 0
    found = {d["address"]: d for d in ran.json}
    assert set(found) == {f.address for f in functions}
    for f in functions:
        one = found[f.address]
        assert (one["id"], one["driver"]) == (f.id, f.driver.replace("-", "", f.driver == "-"))
        # alone, or with what would have to come along
        assert one["reset"]["verdict"] in (f.alone, f.together)


def test_a_group_is_told_in_full(cli: Cli) -> None:
    ran = cli("devices", "--group", "1")
    assert "0000:01:00.0 VGA, group 1: with 01:00.1" in ran.out
    assert "the display the firmware chose" in ran.out
    assert "driver pcieport" in ran.out
    assert "0000:06:00.0" not in ran.out
    assert cli("devices", "--group", "99").status == 1


def test_who_holds_a_device_is_told(cli: Cli, pc: FakeHost) -> None:
    header = {"usher": 1, "name": "win10", "uuid": "x", "id": "1"}
    step = {"do": 1, "kind": "oneway", "key": claim_key("0000:06:00.0"), "plugin": "pci", "what": "bind"}
    pc.file("/run/virt-usher/win10.jnl", "\n".join(json.dumps(r) for r in (header, step)) + "\n")
    assert "domain win10: 0000:06:00.0 (held now)" in cli("devices").out
    held = {d["address"]: d["held_by"] for d in cli("devices", "--json").json}
    assert {a for a, name in held.items() if name == "win10"} == {"0000:06:00.0"}


@pytest.fixture
def bus(tmp_path: Path) -> PciHost:
    """A desktop: a disk, two cards of which a guest has one, two keyboards."""
    host = PciHost(tmp_path / "bus").driver("vfio-pci")
    host.device("0000:01:00.0", "10de:13c2", "vfio-pci", kind="030000", group=1)
    host.device("0000:01:00.1", "10de:0fbb", "vfio-pci", kind="040300", group=1)
    host.runs("qemu-system-x86", "/dev/vfio/1", guest="win10")
    host.device("0000:02:00.0", "144d:a80a", "nvme", kind="010802")
    host.hangs_on("0000:02:00.0", "block", "nvme0n1", dev="259:0")
    host.file("/proc/1/mountinfo", "30 1 259:0 / / rw - ext4 /dev/nvme0n1 rw")
    host.device("0000:03:00.0", "8086:37c8", "c6xx", kind="0b4000")
    for function in (0, 1):
        host.device(f"0000:06:00.{function}", "1022:149c", "xhci_hcd", kind="0c0330", group=6)
    host.hangs_on("0000:06:00.0", "usb_device", "3-1", "usb3", node="bus/usb/003/002")
    host.runs("qemu-system-x86", "/dev/bus/usb/003/002", guest="haos")
    for number in (4, 5):
        address = f"0000:{number:02}:00.0"
        host.device(address, "1b36:000d", "xhci_hcd", kind="0c0330")
        host.hangs_on(address, "input", f"input{number}", **{"name": "Keys", "capabilities/key": "fffffffe"})
    return host


IN_THE_WAY = {
    "0000:01:00.0": ("guest", "is in use by qemu-system-x86 (pid "),
    "0000:01:00.1": ("guest", "is in use by qemu-system-x86 (pid "),
    "0000:02:00.0": ("data", "carries what is mounted on /"),
    "0000:03:00.0": ("vfio", "is on vfio-pci's list of devices that it refuses (Intel QAT C62x)"),
    "0000:04:00.0": ("", ""),
    "0000:05:00.0": ("", ""),
    "0000:06:00.0": ("guest", "is in use (/dev/bus/usb/003/002) by qemu-system-x86 (pid "),
    "0000:06:00.1": ("", ""),  # a guest has its neighbour's USB device, not the group
}


def test_who_uses_a_device_is_told_in_a_word_and_in_full(cli: Cli, bus: PciHost) -> None:
    found = {d["address"]: d["in_the_way"] for d in cli("devices", "--json", host=bus).json}
    out = cli("devices", host=bus).out
    assert found.keys() == IN_THE_WAY.keys()
    for address, (word, what) in IN_THE_WAY.items():
        assert [u["problem"] for u in found[address]] == [word] * bool(word)
        assert row(out, address)[4] == (word or "USB")
        assert any(line.startswith(what) for u in found[address] for line in [u["what"]]) == bool(what)
    assert "0000:01:00.0, 0000:01:00.1: is in use by qemu-system-x86" in out
    assert "0000:02:00.0: carries what is mounted on /" in out


def test_what_concerns_every_device_is_told_once(cli: Cli, bus: PciHost) -> None:
    bus.file("/sys/class/iommu/dmar0/x").file("/sys/kernel/irq/0/chip_name", "IO-APIC")
    ran = cli("devices", host=bus)
    assert ran.out.count("Each device could send any interrupt") == 1
    assert row(ran.out, "0000:04:00.0")[4] == "USB"


def test_the_last_keyboard_is_told_where_it_is_the_last(cli: Cli, bus: PciHost) -> None:
    bus.unplug("0000:05:00.0")
    os.unlink(bus.path("/sys/class/input/input5"))
    assert "has the host's last keyboard (Keys): plug" in cli("devices", "--group", "4", host=bus).out


def domain_uri(tmp_path: Path, *addresses: str) -> str:
    """Write what libvirt's test driver shall know: one domain with these devices."""
    pytest.importorskip("libvirt", reason="Python's libvirt module: apt-get install python3-libvirt")
    devices = ""
    for address in addresses:
        bus, slot, function = address.replace(".", ":").split(":")
        where = f"domain='0' bus='0x{bus}' slot='0x{slot}' function='0x{function}'"
        source = f"<source><address {where}/></source>"
        devices += f"<hostdev mode='subsystem' type='pci' managed='yes'>{source}</hostdev>"
    domain = (
        "<domain type='test'><name>win10</name><memory>8192</memory><os><type>hvm</type></os>"
        f"<devices>{devices}</devices></domain>"
    )
    file = tmp_path / "node.xml"
    file.write_text(f"<node>{domain}</node>")
    return f"test://{file}"


def test_a_domains_devices_are_judged_as_it_has_them(cli: Cli, tmp_path: Path) -> None:
    ran = cli("devices", "--domain", "win10", uri=domain_uri(tmp_path, "06:00.0"))
    assert ran.status == 1
    assert "0000:06:00.0 VGA, group 13: no" in ran.out
    assert "0000:06:00.1 shares the bus and stays with snd_hda_intel" in ran.out
    assert "0000:07:00.0" not in ran.out
    ran = cli("devices", "--domain", "win10", uri=domain_uri(tmp_path, "06:00.0", "06:00.1"))
    assert ran.status == 0
    assert "bus reset, together with 0000:06:00.1" in ran.out


def test_a_device_that_is_gone_is_told(cli: Cli, tmp_path: Path) -> None:
    ran = cli("devices", "--domain", "win10", uri=domain_uri(tmp_path, "0f:00.0"))
    assert ran.status == 1
    assert "there is no such device" in ran.out


def test_the_domains_that_are_configured_to_get_a_device_are_told(cli: Cli, tmp_path: Path) -> None:
    ran = cli("devices", uri=domain_uri(tmp_path, "06:00.0", "06:00.1"))
    assert "domain win10: 0000:06:00.0, 0000:06:00.1" in ran.out


def test_an_unknown_domain_is_an_error(cli: Cli, tmp_path: Path) -> None:
    ran = cli("devices", "--domain", "nobody", uri=domain_uri(tmp_path))
    assert ran.status == 1
    assert "libvirt knows no domain 'nobody'" in ran.err


def test_without_libvirt_the_rest_is_told_all_the_same(cli: Cli) -> None:
    ran = cli("devices")
    assert ran.status == 0
    assert "Who is configured to get a device is not known" in ran.out


def test_a_host_without_iommu_is_told(cli: Cli, tmp_path: Path) -> None:
    machines.build(tmp_path / "plain", machines.parse("00:05.0 1234:11e8 00ff00 - - - - x x"))
    assert "virt-usher doctor" in cli("devices", host=FakeHost(tmp_path / "plain")).out


def test_a_terminal_gets_lines_of_eighty_columns(pc: FakeHost) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        try:
            with open(1, "w", closefd=False) as sys.stdout:  # pytest has its own
                main(["devices"], pc, NOWHERE)
        finally:
            os._exit(0)
    out = b""
    try:
        while chunk := os.read(terminal, 65536):
            out += chunk
    except OSError:  # the terminal's other end is closed
        pass
    os.waitpid(pid, 0)
    lines = click.unstyle(out.decode()).replace("\r", "").splitlines()
    assert len(lines) > 9
    assert [line for line in lines if len(line) > 80] == []
