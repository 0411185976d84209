"""A report holds what virt-usher reads of a host, nothing that names its owner, and can be unfolded again."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tests.cli.conftest import Cli
from tests.host import machines
from tests.lab import machine as lab

from virt_usher.cli.report import record
from virt_usher.errors import UsherError
from virt_usher.host import Host, LiveHost
from virt_usher.host.quirks import Quirks
from virt_usher.host.reset import Given, verdict
from virt_usher.testing import FakeHost, unfold

FIXTURES = Path(__file__).parents[1] / "host" / "fixtures"


def verdicts(host: Host, addresses: list[str]) -> dict[str, str]:
    """Return what the reset check says of each device if it is given alone."""
    given = {a: Given(frozenset((a,)), frozenset((a,))) for a in addresses}
    return {a: verdict(host.pci.device(a), g, Quirks(host)).kind for a, g in given.items()}


@pytest.mark.parametrize("machine", machines.MACHINES)
def test_a_report_unfolds_into_the_same_host(cli: Cli, tmp_path: Path, machine: str) -> None:
    functions = machines.read(machine)
    machines.build(tmp_path / "original", functions)
    original = LiveHost(str(tmp_path / "original"))
    # cli wants a fake host; the command itself reads any.
    (tmp_path / "report").write_text(json.dumps(record(original)))
    copy = Host(str(unfold(tmp_path / "report", tmp_path / "copy")))
    assert record(copy) == record(original)
    addresses = [f.address for f in functions]
    assert verdicts(copy, addresses) == verdicts(original, addresses)


def test_cpus_and_memory_are_in_it(cli: Cli, pc: FakeHost, tmp_path: Path) -> None:
    assert cli("report", str(tmp_path / "report")).status == 0
    copy = Host(str(unfold(tmp_path / "report", tmp_path / "copy")))
    assert copy.memory.nodes == pc.memory.nodes
    assert [p.governor for p in copy.cpufreq_policies(range(4))] == [
        p.governor for p in pc.cpufreq_policies(range(4))
    ]


def test_nothing_is_overwritten(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "report").write_text("mine")
    ran = cli("report", str(tmp_path / "report"))
    assert (ran.status, (tmp_path / "report").read_text()) == (1, "mine")


@pytest.mark.parametrize(
    "part",
    [
        {"files": {"/../../evil": "x"}},
        {"files": {"evil": "x"}},
        {"links": {"/sys/a": "../../../../../../../../tmp"}},
    ],
)
def test_a_report_that_leads_outside_is_refused(tmp_path: Path, part: dict[str, dict[str, str]]) -> None:
    empty: dict[str, object] = {"report": 1, "files": {}, "links": {}, "bytes": {}}
    (tmp_path / "report").write_text(json.dumps(empty | part))
    with pytest.raises(UsherError, match="leads outside"):
        unfold(tmp_path / "report", tmp_path / "copy")


# What a start must say of each device of the lab, given alone and with all that shares its bus; VFIO
# itself says the same there (tests/lab/guest/test_reset.py).
ZOO = {
    "stuck": ("none", "none"),
    "stuck_sound": ("none", "none"),
    "stuck_vga": ("none", "none"),
    "pm_only": ("pm", "pm"),
    "nic": ("hot", "hot"),
    "nvme": ("function", "function"),
    "usb": ("function", "function"),
    "gpu": ("none", "hot"),
    "gpu_audio": ("none", "hot"),
    "pci_nic": ("none", "hot"),
    "pci_sound": ("none", "hot"),
    "sriov": ("function", "function"),
    "pair": ("none", "hot"),
    "pair_edu": ("none", "hot"),
    "vga": ("function", "function"),
    "twin": ("pm", "hot"),
    "twin_second": ("pm", "hot"),
    "switched": ("function", "function"),
    "pool_nic": ("function", "function"),
    "far_nic": ("hot", "hot"),
}
RECORDED = {
    "lab-bookworm": "6.1.",
    "lab-trixie": "6.12.",
    "lab-forky": "7.2.",
}


@pytest.mark.parametrize("release", RECORDED)
def test_a_recorded_machine_has_the_verdicts_of_the_lab(tmp_path: Path, release: str) -> None:
    host = Host(str(unfold(FIXTURES / f"{release}.report", tmp_path / "host")))
    assert host.get("/proc/sys/kernel/osrelease").startswith(RECORDED[release])
    assert host.memory.nodes == (0, 1)
    assert [p.cpus for p in host.cpufreq_policies(range(8))] == [frozenset(p) for p in lab.CPUFREQ_POLICIES]
    found, groups = {}, {}
    for device in lab.DEVICES:
        pci = host.pci.device(device.address)
        near = {d.address for d in lab.DEVICES if d.bus == device.bus != "pcie.0"} | {device.address}
        given = [Given(frozenset(g), frozenset(g)) for g in ({device.address}, near)]
        alone, together = (verdict(pci, g, Quirks(host)).kind for g in given)
        found[device.role] = (alone, together)
        members = map(host.pci.device, host.pci.group(pci.group))
        groups[device.role] = {m.address for m in members if not m.is_bridge}
    assert found == ZOO
    assert groups == {d.role: {m.address for m in lab.group_of(d.role)} for d in lab.DEVICES}


@pytest.mark.parametrize("file", sorted(FIXTURES.glob("*.report")), ids=lambda p: p.stem)
def test_a_report_names_nobody(file: Path) -> None:
    """The lab's devices have serial numbers and network addresses; a report of them has neither."""
    text = file.read_text()
    assert file.stem in RECORDED
    assert not re.search(r"([0-9a-f]{2}:){5}[0-9a-f]{2}", text, re.IGNORECASE)
    assert not re.search(r"lab-nvme|lab-sriov|virt-usher-lab|serial|/home/|hostname", text)
