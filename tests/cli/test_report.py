"""A report holds what virt-usher reads of a host, nothing that names its owner, and can be unfolded again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.cli.conftest import Cli
from tests.host import machines

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


@pytest.mark.parametrize("file", sorted(FIXTURES.glob("*.report")), ids=lambda p: p.stem)
def test_recorded_machines_have_the_verdicts_of_the_table(tmp_path: Path, file: Path) -> None:
    """Reports from the lab's machines: roles that a start refuses, and roles that it lets pass."""
    host = Host(str(unfold(file, tmp_path / "host")))
    found = verdicts(host, host.entries("/sys/bus/pci/devices"))
    assert {"function", "none", "bridge"} <= set(found.values())
    assert host.memory.nodes == (0, 1)
    assert host.cpufreq_policies(range(8))
