"""plan shows what the hook would do, and ends as the hook would."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.cli.conftest import Cli

from virt_usher.testing import FakeHost, domain_xml, run_hook

PAGES = "[plugins.hugepages]\n"
GOVERNOR = "/sys/devices/system/cpu/cpufreq/policy0/scaling_governor"


def xml_file(folder: Path, xml: bytes) -> str:
    path = folder / "domain.xml"
    path.write_bytes(xml)
    return str(path)


@pytest.fixture
def guest(tmp_path: Path) -> str:
    """The file of a domain of 64 MiB in huge pages."""
    return xml_file(tmp_path, domain_xml(memory_kib=64 << 10, hugepages=True))


def test_each_action_is_shown_from_what_is_to_what_would_be(cli: Cli, pc: FakeHost, guest: str) -> None:
    pc.domain("guest", PAGES + '[plugins.governor]\ngovernor = "performance"\n')
    now = pc.read(GOVERNOR)
    ran = cli("plan", "--xml", guest)
    assert ran.status == 0
    assert "hugepages: 32 pages of 2 MiB" in ran.out
    assert f"governor: policy0 governor: {now} → performance" in ran.out
    assert all(len(line) <= 80 for line in ran.out.splitlines())


def test_a_trace_shows_every_hook_call_of_the_plan(cli: Cli, pc: FakeHost, guest: str) -> None:
    own = "from dataclasses import dataclass\nfrom virt_usher import hookimpl\n\n@dataclass\nclass Plugin:\n"
    for hook in ("usher_wants(self, operation)", "usher_start(self, domain)", "usher_started(self)"):
        own += f"    @hookimpl\n    def {hook}:\n        {'return True' if 'wants' in hook else '1 / 0'}\n"
    pc.plugin("own", own).domain("guest", "[plugins.governor]\n[plugins.own]\n")
    assert "trace" not in cli("plan", "--json", "--xml", guest).json[0]
    told = cli("plan", "--trace", "--json", "--xml", guest).json[0]["trace"]
    assert [t.partition("(")[0] for t in told] == [
        "governor: usher_prepare",
        "governor: usher_check",
        "own: usher_wants",
        "own: usher_wants",
        "own: usher_start",
        "governor: usher_check",
        "own: usher_wants",
        "own: usher_started",
        "governor: usher_check",
    ]
    assert "(domain=Domain(name='guest'" in told[0]
    assert "[Write(path=" in told[0]
    assert "(operation='start') = True in " in told[2]
    assert "ZeroDivisionError" in told[4]
    assert all(t.endswith(" ms") for t in told)
    out = cli("plan", "--trace", "--xml", guest).out
    assert out.count("trace: ") == len(told)
    assert f"host={pc!r}" in out


def test_nothing_is_changed(cli: Cli, pc: FakeHost, guest: str) -> None:
    pc.domain("guest", PAGES + "[plugins.governor]\n")
    before = pc.snapshot()
    cli("plan", "--xml", guest)
    assert pc.snapshot() == before


@pytest.mark.parametrize(
    ("toml", "memory_kib"),
    [
        (PAGES, 64 << 10),
        (PAGES, 64 << 30),
        ("[plugins.hugepagse]\n", 64 << 10),
        ("[plugins.hugepages]\ndrop_cache = true\n", 64 << 10),
        ("not toml at all", 64 << 10),
        (None, 64 << 30),
    ],
)
def test_it_says_refused_exactly_when_the_hook_refuses(
    cli: Cli, pc: FakeHost, tmp_path: Path, toml: str | None, memory_kib: int
) -> None:
    if toml is not None:
        pc.domain("guest", toml)
    xml = domain_xml(memory_kib=memory_kib, hugepages=True)
    ran = cli("plan", "--json", "--xml", xml_file(tmp_path, xml))
    refused = run_hook(pc, "guest", "prepare", xml).status != 0
    assert (ran.json[0]["refused"], ran.status) == (refused, int(refused))


def test_all_problems_come_at_once_each_with_its_hint(cli: Cli, pc: FakeHost, tmp_path: Path) -> None:
    pc.domain("guest", PAGES + "[plugins.govenor]\n[nonsense]\n")
    ran = cli("plan", "--xml", xml_file(tmp_path, domain_xml(memory_kib=64 << 30, hugepages=True)))
    assert "a start would be refused" in ran.out
    for part in ("nonsense: unknown key", "did you mean 'governor'?", "lower the domain's <memory>"):
        assert part in " ".join(ran.out.split())


def test_a_domain_that_the_gate_lets_pass_is_not_refused(cli: Cli, pc: FakeHost, guest: str) -> None:
    pc.config("broken")
    ran = cli("plan", "--xml", guest)
    assert ran.status == 0
    assert "does not even look at its start" in ran.out


@pytest.mark.parametrize(
    ("policy", "told"), [("", True), ("[plugins.reset_check]\nenabled = false\n", False)]
)
def test_what_a_pool_will_give_is_said_to_be_checked_at_start(
    cli: Cli, pc: FakeHost, tmp_path: Path, policy: str, told: bool
) -> None:
    pc.config(policy)
    pc.file("/etc/libvirt/qemu/networks/vfs.xml", "<network><forward mode='hostdev'/></network>")
    body = '<devices><interface type="network"><source network="vfs"/></interface></devices>'
    ran = cli("plan", "--xml", xml_file(tmp_path, domain_xml(body=body)))
    assert ran.status == 0
    assert "does not even look" not in ran.out
    assert ("a device out of network vfs is checked at start" in ran.out) == told


def test_the_off_switch_lets_every_start_pass(cli: Cli, pc: FakeHost, guest: str) -> None:
    pc.domain("guest", "broken").file("/etc/virt-usher/off", "")
    ran = cli("plan", "--xml", guest)
    assert ran.status == 0
    assert "every start passes untouched" in " ".join(ran.out.split())


def test_xml_that_cannot_be_read_is_a_problem_not_a_crash(cli: Cli, tmp_path: Path) -> None:
    ran = cli("plan", "--xml", xml_file(tmp_path, b"<domain>"))
    assert ran.status == 1
    assert "cannot be read" in ran.out


def test_without_libvirt_it_says_so_with_the_next_step(cli: Cli) -> None:
    ran = cli("plan", "guest")
    assert ran.status == 1
    assert ran.err.startswith("virt-usher: libvirt cannot be asked")
    assert len(ran.err.splitlines()) == 2


def test_without_a_name_all_domains_of_libvirt_are_planned(cli: Cli, pc: FakeHost, libvirt: str) -> None:
    pc.domain("test", "[plugins.governor]\n")
    plans = cli("plan", "--json", uri=libvirt).json
    assert [p["domain"] for p in plans] == ["test"]
    assert {s["plugin"] for s in plans[0]["steps"]} == {"governor"}
    assert cli("plan", "test", uri=libvirt).status == 0
    unknown = cli("plan", "tset", uri=libvirt)
    assert (unknown.status, "libvirt knows no domain 'tset'" in unknown.err) == (1, True)


@pytest.mark.parametrize("verb", [["plan"], ["pins"], ["devices", "--domain"]])
@pytest.mark.parametrize("name", ["\udcff", "a\0b", "a/b"])
def test_a_name_that_libvirt_cannot_know_is_said_to_be_none(
    cli: Cli, libvirt: str, verb: list[str], name: str
) -> None:
    ran = (
        cli(*verb, "--", name, uri=libvirt)
        if verb != ["devices", "--domain"]
        else cli(*verb, name, uri=libvirt)
    )
    assert ran.status == 1
    assert "cannot be the name of a domain" in ran.err
    assert "virsh list --all" in ran.err


def test_a_file_that_is_nested_absurdly_deep_concerns_its_domain_alone(
    cli: Cli, pc: FakeHost, libvirt: str, tmp_path: Path
) -> None:
    pc.domain("guest", "a=" + "[" * 5000).domain("test", "[plugins.governor]\n")
    for words in (("plan", "--xml", xml_file(tmp_path, domain_xml("guest"))), ("doctor",)):
        ran = cli(*words)
        assert "domains/guest.toml: tables and lists are nested deeper than 20" in " ".join(ran.out.split())
    assert cli("plan", uri=libvirt).status == 0
    assert cli("plugins").status == 0


def test_a_name_and_a_file_together_are_wrong_usage(cli: Cli, guest: str) -> None:
    assert cli("plan", "guest", "--xml", guest).status == 2
