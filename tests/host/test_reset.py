"""The verdict on a reset, for every device of every recorded host and in each special case."""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tests.host import machines

from virt_usher.actions import Action
from virt_usher.errors import UsherError
from virt_usher.host import Host, reset
from virt_usher.host.pci import Pci
from virt_usher.host.quirks import OWN, Quirks
from virt_usher.hostdev import PciHostdev
from virt_usher.prepare import Plan, Planned
from virt_usher.testing.tree import Tree


def given(*addresses: str, managed: bool = True) -> reset.Given:
    return reset.Given.to(PciHostdev(machines.full(a), managed, "hostdev") for a in addresses)


def verdict(host: Host, address: str, *others: str) -> reset.Verdict:
    device = host.pci.device(machines.full(address))
    return reset.verdict(device, given(address, *others), Quirks(host))


def sharing(pci: Pci, address: str) -> list[str]:
    """Return all that a domain could be given of what a reset of the bus reaches."""
    bridge = pci.device(address).parent
    return [a for a in pci.below(bridge) if not pci.device(a).is_bridge] if bridge else []


@pytest.mark.parametrize("machine", machines.MACHINES)
def test_every_recorded_device_gets_the_verdict_of_the_real_one(machine: str, tmp_path: Path) -> None:
    functions = machines.read(machine)
    host = machines.build(tmp_path, functions)
    pci = host.pci
    found = {}
    for f in functions:
        together = verdict(host, f.address, *sharing(pci, f.address))
        found[f.address] = (verdict(host, f.address).kind, together.kind)
    assert found == {f.address: (f.alone, f.together) for f in functions}
    assert {d.address for d in pci.devices} == set(found)


@pytest.mark.parametrize("machine", ["amd", "emulated", "ivybridge"])
def test_what_cannot_be_read_makes_no_verdict_better(machine: str, tmp_path: Path) -> None:
    functions = machines.read(machine)
    host = Tree(machines.build(tmp_path, functions).root)
    raised = 0
    for f in functions:
        near = sharing(Host(host.root).pci, f.address)
        for nth in range(1, 200):
            host.heal().fail("*", errno.EIO, nth, on="read")
            try:
                assert verdict(host, f.address, *near).kind == f.together
            except OSError:
                raised += 1
                continue
            if not host.happened("struck"):
                break
    assert raised > len(functions)


# what `why` must say: (machine, device, what else is given, text)
NAMES = {
    "the sibling that stays, by address and driver": [
        ("emulated", "04:00.0", "", "0000:04:00.1 shares the bus and stays with snd_hda_intel"),
        ("amd", "0c:00.1", "0c:00.0 0c:00.3", "0000:0c:00.2 shares the bus and stays with ccp"),
        ("ivybridge", "06:00.1", "", "0000:06:00.0 shares the bus and stays with nouveau"),
    ],
    "a sibling without driver, which a hot reset does not accept": [
        ("emulated", "08:00.0", "", "0000:08:00.1 shares the bus and has no driver; it needs vfio-pci"),
    ],
    "the root bus": [
        ("ivybridge", "00:14.0", "", "no reset of its own, and a root bus cannot be reset"),
        ("slots", "00:1e.0", "", "power management only"),
    ],
    "the bridge that would be reset along": [
        ("amd", "0f:02.0", "10:00.0", "the bridge 0000:0f:01.0 would be reset along"),
    ],
    "who does not stand a bus reset, bridge or device": [
        ("amd", "0d:00.0", "", "0000:00:09.0 (NVIDIA GB10 root port) does not stand a bus reset"),
        ("amd", "05:00.0", "", "0000:05:00.0 (Atheros QCA988x) does not stand a bus reset"),
    ],
    "the module that would help": [("amd", "03:00.0", "", "only with vendor-reset")],
    "the card a function is part of": [("amd", "03:00.1", "03:00.0", "it is part of 0000:03:00.0")],
    "with whom it is reset": [
        ("guide", "06:00.0", "06:00.1", "bus reset, together with 0000:06:00.1"),
        ("slots", "02:00.1", "02:00.0", "slot reset, together with 0000:02:00.0"),
        ("emulated", "01:00.0", "", "bus reset, alone on its bus"),
        ("emulated", "02:00.0", "", "function reset (flr)"),
        ("emulated", "09:00.0", "", "function reset (bus), alone on its bus"),
        ("ivybridge", "00:1a.0", "", "function reset (this kernel does not say how)"),
    ],
}


@pytest.mark.parametrize("what", NAMES)
def test_the_verdict_names(what: str, tmp_path: Path) -> None:
    for machine, address, others, text in NAMES[what]:
        host = machines.build(tmp_path / f"{machine}-{address}", machines.read(machine))
        assert text in verdict(host, address, *others.split()).why


def test_a_long_list_of_obstacles_is_cut(tmp_path: Path) -> None:
    lines = [f"00:01.0/01:00.{i} 1022:1234 0c0330 xhci_hcd 1 - - x x" for i in range(7)]
    port = "00:01.0 1022:1633 060400 pcieport 0 - - x x"
    host = machines.build(tmp_path, machines.parse("\n".join([port, *lines])))
    found = verdict(host, "01:00.0")
    assert found.why.count("stays with") == 3
    assert found.why.endswith("; and 3 more")
    assert len(found.companions) == 6


# -- what is on a vfio driver, and whose it is

CARD = """
00:01.0          8086:1901  060400  pcieport       0   -    -              x  x
00:01.0/01:00.0  10de:1381  030000  nouveau        1   bus  multifunction  x  x
00:01.0/01:00.1  10de:0fbc  040300  snd_hda_intel  2   -    multifunction  x  x
"""


@dataclass(frozen=True)
class Bind(Action):
    """An action that puts a device on vfio, as far as a verdict cares."""

    binds: str
    kind: ClassVar[str] = "oneway"

    @property
    def key(self) -> str:
        return self.binds

    def fields(self) -> dict[str, Any]:
        return {}

    def describe(self, host: Host) -> str:
        return self.binds


def plan(*addresses: str) -> Plan:
    return Plan(tuple(Planned("pci", Bind(a)) for a in addresses))


HDA = "snd_hda_intel"
GPU, SOUND = PciHostdev("0000:01:00.0", True, "hostdev"), PciHostdev("0000:01:00.1", True, "hostdev")
LOOSE = PciHostdev(SOUND.address, False, "commandline")


@pytest.mark.parametrize(
    ("devices", "planned", "sound_driver", "sound_group", "kind"),
    [
        pytest.param([GPU, SOUND], plan(), HDA, "2", "hot", id="libvirt will bind what is managed"),
        pytest.param([GPU, LOOSE], plan(), HDA, "2", "none", id="nobody binds what is not managed"),
        pytest.param([GPU, LOOSE], plan(SOUND.address), HDA, "2", "hot", id="the plan binds it"),
        pytest.param([GPU, LOOSE], plan(), "vfio-pci", "2", "hot", id="it is on vfio-pci already"),
        pytest.param([GPU, LOOSE], plan(), "mlx5_vfio_pci", "2", "hot", id="it is on a variant driver"),
        pytest.param([GPU, LOOSE], plan(), "pci-stub", "2", "none", id="pci-stub is not enough"),
        pytest.param([GPU], plan(SOUND.address), "-", "1", "hot", id="the plan binds one of the group"),
        pytest.param([GPU], plan(SOUND.address), "-", "2", "none", id="the plan binds one of another group"),
        pytest.param([GPU], plan(), "vfio-pci", "2", "none", id="a sibling on vfio for somebody else"),
        pytest.param([GPU], plan(), "vfio-pci", "1", "hot", id="a sibling on vfio in the group"),
    ],
)
def test_a_hot_reset_needs_every_sibling_on_vfio_and_its_group(
    devices: list[PciHostdev], planned: Plan, sound_driver: str, sound_group: str, kind: str, tmp_path: Path
) -> None:
    text = CARD.replace("snd_hda_intel  2", f"{sound_driver} {sound_group}")
    host = machines.build(tmp_path, machines.parse(text))
    given = reset.Given.to(devices, planned)
    assert reset.verdict(host.pci.device(GPU.address), given, Quirks(host)).kind == kind


# -- what the files pretend, and what an admin may do to them


@pytest.mark.parametrize(
    ("methods", "kind", "usable"),
    [
        pytest.param("bus", "none", (), id="bus of function 0 is a lie"),
        pytest.param("empty", "none", (), id="an empty list is none at all"),
        pytest.param("-", "none", (), id="no file"),
        pytest.param("flr+bus", "function", ("flr",), id="bus is dropped, flr stays"),
        pytest.param("acpi", "function", ("acpi",), id="acpi"),
        pytest.param("device_specific", "function", ("device_specific",), id="device_specific"),
        pytest.param("pm+bus", "pm", ("pm",), id="pm is left, and weak"),
        pytest.param("pm+flr", "pm", ("pm", "flr"), id="an admin put pm first: the kernel stops there"),
        pytest.param("cxl_bus", "none", (), id="the CXL way of a bus reset"),
        pytest.param("?", "function", ("?",), id="a kernel before 5.15"),
    ],
)
def test_function_0_with_a_sibling_has_what_the_kernel_would_really_do(
    methods: str, kind: str, usable: tuple[str, ...], tmp_path: Path
) -> None:
    host = machines.build(tmp_path, machines.parse(CARD.replace("1   bus ", f"1 {methods}")))
    found = verdict(host, "01:00.0")
    assert (found.kind, found.methods) == (kind, usable)


def test_an_emptied_list_is_named(tmp_path: Path) -> None:
    host = machines.build(tmp_path, machines.parse("00:05.0 1234:11e8 00ff00 - 3 empty - x x"))
    assert verdict(host, "00:05.0").why == "its reset_method is empty, and a root bus cannot be reset"


def test_virtual_functions_on_the_bus_count_as_siblings(tmp_path: Path) -> None:
    text = """
        00:07.0          1b36:000c  060400  pcieport  9   -    -           x  x
        00:07.0/0c:00.0  1b36:0010  010802  nvme      19  bus  vfs=1       x  x
        00:07.0/0c:00.1  1b36:0010  010802  -         20  -    vf=0c:00.0  x  x
    """
    host = machines.build(tmp_path, machines.parse(text))
    assert "0000:0c:00.1 shares the bus" in verdict(host, "0c:00.0").why
    assert "a virtual function takes no part" in verdict(host, "0c:00.1", "0c:00.0").why


def test_a_slot_reset_is_for_single_functions_behind_a_port_that_pciehp_drives(tmp_path: Path) -> None:
    text = """
        00:01.0          1b36:000c  060400  pcieport  1   -    {}  x  x
        00:01.0/01:00.0  10de:1381  030000  nouveau   1   bus  {}  x  x
        00:01.0/01:00.1  10de:0fbc  040300  -         1   -    -   x  x
    """
    for port, card, kind in (
        ("pciehp", "-", "function"),
        ("pciehp", "multifunction", "none"),
        ("-", "-", "none"),
    ):
        host = machines.build(tmp_path / f"{port}{card}", machines.parse(text.format(port, card)))
        assert verdict(host, "01:00.0").kind == kind, (port, card)


def test_a_device_that_is_not_there_is_absent(tmp_path: Path) -> None:
    host = machines.build(tmp_path, machines.read("guide"))
    assert verdict(host, "0f:00.0").kind == "absent"
    assert verdict(Host(str(tmp_path / "empty")), "0f:00.0").kind == "absent"


# -- the table


def test_vendor_reset_counts_where_the_kernel_is_told_to_use_it(tmp_path: Path) -> None:
    for methods, loaded, kind in (
        ("device_specific", True, "function"),
        ("device_specific+bus", True, "function"),
        ("bus+device_specific", True, "known-bad"),
        ("device_specific", False, "known-bad"),
        ("bus", True, "known-bad"),
        ("?", True, "function"),
    ):
        root = tmp_path / f"{methods}{loaded}"
        line = f"00:01.0/03:00.0 1002:731f 030000 amdgpu 4 {methods} - x x"
        host = machines.build(root, machines.parse(f"00:01.0 1022:1633 060400 pcieport 1 - - x x\n{line}"))
        if loaded:
            (root / "sys/module/vendor_reset").mkdir(parents=True)
        assert verdict(host, "03:00.0").kind == kind, (methods, loaded)


def test_a_broken_flr_counts_only_where_the_kernel_would_use_it(
    tmp_path: Path,
) -> None:
    for methods, kind in (("flr+bus", "known-bad"), ("pm+bus", "hot"), ("bus", "function")):
        line = f"00:01.0/06:00.0 14c3:0616 028000 mt7921e 9 {methods} - x x"
        root = tmp_path / methods
        host = machines.build(root, machines.parse(f"00:01.0 1022:1633 060400 pcieport 1 - - x x\n{line}"))
        assert verdict(host, "06:00.0").kind == kind, methods


def test_an_admin_adds_rows(tmp_path: Path) -> None:
    host = machines.build(tmp_path, machines.read("emulated"))
    own = tmp_path / OWN.lstrip("/")
    own.parent.mkdir(parents=True)
    own.write_text("# ours\n1b36:0010\tknown_bad\tour disk\tticket 7\thangs the host\n")
    own.chmod(0o644)
    found = verdict(host, "02:00.0")
    assert (found.kind, found.why) == ("known-bad", "our disk: hangs the host")


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("1b36:10\tknown_bad", "reset-quirks.tsv:1: '1b36:10' is no vendor:device"),
        ("1b36:0010\tknow_bad", "did you mean 'known_bad'?"),
        ("nonsense", "'nonsense' is no vendor:device"),
    ],
)
def test_a_row_that_makes_no_sense_is_refused_with_its_line(row: str, told: str, tmp_path: Path) -> None:
    host = machines.build(tmp_path, machines.read("emulated"))
    (tmp_path / "etc/virt-usher").mkdir(parents=True)
    (tmp_path / OWN.lstrip("/")).write_text(row)
    with pytest.raises(UsherError, match=re.escape(told)):
        verdict(host, "02:00.0")


def test_rows_that_others_could_write_are_refused(tmp_path: Path) -> None:
    host = machines.build(tmp_path, machines.read("emulated"))
    (tmp_path / "etc/virt-usher").mkdir(parents=True)
    (tmp_path / OWN.lstrip("/")).touch()
    (tmp_path / OWN.lstrip("/")).chmod(0o666)
    with pytest.raises(UsherError, match="could be written by somebody else"):
        verdict(host, "02:00.0")


@pytest.mark.parametrize(
    ("line", "kind", "found"),
    [
        ("00:01.0/03:00.0 10de:2350 030200 - 4 - - x x", "no_bus_reset", True),
        ("00:01.0/03:00.0 10de:2380 030200 - 4 - - x x", "no_bus_reset", False),
        ("00:01.0/03:00.0 1425:5401 020000 - 4 - - x x", "device_specific", True),
        ("00:01.0/03:00.0 1002:9999 030000 - 4 - - x x", "no_pm_reset", True),
        ("00:01.0/03:00.0 1002:9999 040300 - 4 - - x x", "no_pm_reset", False),
        ("00:01.0/03:00.0 d063:1000 ff0000 - 4 - - x x", "no_flr", False),  # only revision 01
    ],
)
def test_ids_may_be_ranges_and_be_narrowed(line: str, kind: str, found: bool, tmp_path: Path) -> None:
    host = machines.build(tmp_path, machines.parse(line))
    assert (Quirks(host).of(host.pci.device("0000:03:00.0"), kind) is not None) == found
