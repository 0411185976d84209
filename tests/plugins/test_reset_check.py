"""A start is refused for a device that cannot be reset, with the reason and a way round."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from tests.host import machines

from virt_usher.actions import Note
from virt_usher.config import settings
from virt_usher.domain import Domain
from virt_usher.host import CONFIG_DIR
from virt_usher.prepare import Plan, make_plan
from virt_usher.testing import FakeHost, ask, domain_xml, run_hook

WEAK = "power management only (D3hot and back), which resets little"


def machine(tmp_path: Path, name: str) -> FakeHost:
    machines.build(tmp_path, machines.read(name))
    return FakeHost(tmp_path)


def hostdevs(*addresses: str, managed: str = "yes", tag: str = "hostdev type='pci'") -> str:
    return "<devices>" + "".join(_hostdev(machines.full(a), managed, tag) for a in addresses) + "</devices>"


def _hostdev(address: str, managed: str, tag: str) -> str:
    domain, bus, rest = address.split(":")
    slot, function = rest.split(".")
    where = f"domain='0x{domain}' bus='0x{bus}' slot='0x{slot}' function='0x{function}'"
    source = f"<source><address type='pci' {where}/></source>"
    return f"<{tag} managed='{managed}'>{source}</{tag.split()[0]}>"


def check(host: FakeHost, *addresses: str, **options: object) -> Plan:
    return ask(host, "reset_check", domain_xml(body=hostdevs(*addresses)), options)


def planned(host: FakeHost, xml: bytes, operation: str = "prepare") -> Plan:
    """Return the plan of a domain as it is configured."""
    domain = Domain.from_xml(xml)
    return make_plan(host, domain, settings(host, domain), operation)


def notes(plan: Plan) -> list[str]:
    return [p.item.text for p in plan.items if isinstance(p.item, Note)]


# -- what is refused, and how that reads


REFUSALS = [
    pytest.param(
        "ivybridge",
        ["00:14.0"],
        "0000:00:14.0 (8086:1e31) cannot be reset: no reset of its own, and a root bus cannot be reset",
        "virt-usher waive guest 0000:00:14.0 reset 'REASON'",
        id="a controller on the root bus",
    ),
    pytest.param(
        "guide",
        ["06:00.0"],
        "0000:06:00.0 (10de:13c2) cannot be reset: no reset of its own, "
        "and 0000:06:00.1 shares the bus and stays with snd_hda_intel",
        "give the domain 0000:06:00.1 too; or: virt-usher enable guest pci group=true",
        id="a card without its sound, in one group",
    ),
    pytest.param(
        "amd",
        ["0c:00.0", "0c:00.1", "0c:00.2"],
        "0000:0c:00.{} ({}) cannot be reset: no reset of its own, "
        "and 0000:0c:00.3 shares the bus and stays with xhci_hcd",
        "give the domain 0000:0c:00.3 too; or: virt-usher waive guest 0000:0c:00.{} reset 'REASON'",
        id="an APU without its USB controller, in groups of their own",
    ),
    pytest.param(
        "amd",
        ["03:00.0"],
        "0000:03:00.0 (1002:731f) cannot be reset: AMD Navi 10 (RX 5600XT/5700/5700XT): bus reset advertised "
        "but leaves GPU dead; ok only with vendor-reset + reset_method=device_specific",
        "virt-usher waive guest 0000:03:00.0 reset 'REASON'",
        id="a card that is known for it",
    ),
    pytest.param(
        "amd",
        ["11:00.0"],
        "0000:11:00.0 (10de:2684) cannot be reset: it does not answer: its config space reads as all ones",
        "power the host off and on, since a reboot may not do; or: "
        "virt-usher waive guest 0000:11:00.0 silent 'REASON'",
        id="a device that does not answer",
    ),
    pytest.param(
        "guide",
        ["00:01.0"],
        "0000:00:01.0 (8086:0c01): it is a bridge, which cannot be given to a domain",
        "take it out of the domain: virsh edit guest",
        id="a bridge",
    ),
    pytest.param(
        "guide",
        ["0f:00.0"],
        "0000:0f:00.0: there is no such device",
        "take it out of the domain: virsh edit guest",
        id="a device that is gone",
    ),
]


@pytest.mark.parametrize(("name", "given", "message", "hint"), REFUSALS)
def test_a_refusal_says_the_cause_and_the_next_step(
    name: str, given: list[str], message: str, hint: str, tmp_path: Path
) -> None:
    host = machine(tmp_path, name)
    plan = check(host, *given)
    ids = [host.pci.device(machines.full(a)).id for a in given]
    assert [(p.message, p.hint) for p in plan.problems] == [
        (f"reset_check: {message.format(number, identity)}", hint.format(number))
        for number, identity in enumerate(ids)
    ]
    assert not plan.items


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("guide", ["06:00.0", "06:00.1"]),
        ("guide", ["01:00.0", "01:00.1"]),
        ("guide", ["06:00.0", "06:00.1", "07:00.0", "07:00.1"]),
        ("ivybridge", ["01:00.0", "01:00.1"]),
        ("ivybridge", ["06:00.0", "06:00.1"]),
        ("ivybridge", ["00:1a.0", "00:1b.0", "00:1d.0"]),
        ("slots", ["0c:00.1"]),
        ("emulated", ["01:00.0", "02:00.0", "03:00.0", "09:00.0", "81:00.0"]),
        ("emulated", ["06:01.0", "06:02.0"]),
        ("vmd", ["10000:e1:00.0"]),
        ("guide", []),
    ],
)
def test_what_can_be_reset_passes_without_a_word(name: str, given: list[str], tmp_path: Path) -> None:
    plan = check(machine(tmp_path, name), *given)
    assert (plan.problems, plan.items) == ((), ())


def test_all_devices_are_named_at_once(tmp_path: Path) -> None:
    plan = check(machine(tmp_path, "emulated"), "00:05.0", "00:06.0", "04:00.0")
    assert [p.message[13:25] for p in plan.problems] == ["0000:00:05.0", "0000:00:06.0", "0000:04:00.0"]


def test_the_twin_of_a_card_does_not_stand_in_for_its_sound(tmp_path: Path) -> None:
    plan = check(machine(tmp_path, "guide"), "06:00.0", "07:00.1")
    assert [p.message[13:25] for p in plan.problems] == ["0000:06:00.0", "0000:07:00.1"]


def test_the_sound_of_a_bad_card_needs_no_waiver_of_its_own(tmp_path: Path) -> None:
    plan = check(machine(tmp_path, "amd"), "03:00.0", "03:00.1")
    assert [p.message[13:25] for p in plan.problems] == ["0000:03:00.0"]


def test_devices_on_the_command_line_are_checked_too(tmp_path: Path) -> None:
    arguments = "".join(
        f"<q:arg value='-device'/><q:arg value='vfio-pci,host={a}'/>" for a in ("06:00.0", "06:00.1")
    )
    body = f"<q:commandline xmlns:q='http://libvirt.org/schemas/domain/qemu/1.0'>{arguments}</q:commandline>"
    host = machine(tmp_path, "guide")
    plan = planned(host, domain_xml(body=body))
    assert len(plan.problems) == 2  # nobody binds them
    for address in ("0000:06:00.0", "0000:06:00.1"):
        machines.bind(tmp_path, address, "vfio-pci")
    assert planned(host, domain_xml(body=body)).problems == ()


def test_a_weak_reset_is_told_and_passes(tmp_path: Path) -> None:
    plan = check(machine(tmp_path, "slots"), "00:1e.0", "01:00.0")
    assert plan.problems == ()
    assert notes(plan) == [f"0000:00:1e.0: {WEAK}; a root bus cannot be reset"]


# -- ways round


@pytest.mark.parametrize("name", ["guest", "my guest", "it's", "-x", "a;reboot", "ü"])
def test_the_hint_is_a_command_that_can_be_pasted(name: str, tmp_path: Path) -> None:
    plan = ask(machine(tmp_path, "ivybridge"), "reset_check", domain_xml(name, hostdevs("00:14.0")))
    words = shlex.split(plan.problems[0].hint)
    words = [w for w in words if w != "--"]
    assert words == ["virt-usher", "waive", name, "0000:00:14.0", "reset", "REASON"]


def waiver(device: str, problem: str) -> str:
    return f'[waive."0000:00:14.0"]\ndevice = "{device}"\nproblem = "{problem}"\nreason = "seen to work"\n'


def test_a_waiver_lets_its_one_card_pass(tmp_path: Path) -> None:
    host = machine(tmp_path, "ivybridge").domain("guest", waiver("8086:1e31", "reset"))
    plan = planned(host, domain_xml(body=hostdevs("00:14.0", "00:1f.2")))
    assert [p.message[13:25] for p in plan.problems] == ["0000:00:1f.2"]
    assert "seen to work" in plan.waived[0]


@pytest.mark.parametrize(("device", "problem"), [("8086:1e32", "reset"), ("8086:1e31", "silent")])
def test_a_waiver_for_another_card_or_problem_is_void_and_said_to_be(
    device: str, problem: str, tmp_path: Path
) -> None:
    host = machine(tmp_path, "ivybridge").domain("guest", waiver(device, problem))
    (found,) = planned(host, domain_xml(body=hostdevs("00:14.0"))).problems
    where = "/etc/virt-usher/domains/guest.toml"
    assert found.message.endswith(f"; void here: the waiver of {problem!r} of {device} in {where}")
    (other,) = planned(host, domain_xml(body=hostdevs("00:1f.2"))).problems
    assert "void" not in other.message


def test_an_admin_may_choose_to_be_told_only(tmp_path: Path) -> None:
    host = machine(tmp_path, "ivybridge").config("[plugins.reset_check]\nrefuse = false")
    plan = planned(host, domain_xml(body=hostdevs("00:14.0")))
    assert plan.problems == ()
    assert notes(plan) == ["0000:00:14.0: no reset of its own, and a root bus cannot be reset"]


# -- when it is on


def test_it_is_on_by_itself_for_a_domain_with_devices_and_comes_first(tmp_path: Path) -> None:
    host = machine(tmp_path, "ivybridge").domain("guest", "[plugins.governor]")
    found = settings(host, Domain.from_xml(domain_xml(body=hostdevs("00:14.0"))))
    assert [p.name for p in found.plugins] == ["reset_check", "governor"]
    assert [p.name for p in settings(host, Domain.from_xml(domain_xml())).plugins] == ["governor"]


@pytest.mark.parametrize(
    ("config", "own", "on"),
    [
        ("", "", True),
        ("[plugins.reset_check]\nenabled = true", "", True),
        ("[plugins.reset_check]\nrefuse = false", "", True),
        ("[plugins.reset_check]\nenabled = false", "", False),
        ("", "[plugins.reset_check]\nenabled = false", False),
        ("[plugins.reset_check]\nenabled = false", "[plugins.reset_check]", True),
    ],
)
def test_only_the_admins_files_switch_it(config: str, own: str, on: bool, tmp_path: Path) -> None:
    host = machine(tmp_path, "ivybridge").config(config)
    host.domain("guest", own)
    found = settings(host, Domain.from_xml(domain_xml(body=hostdevs("00:14.0"))))
    assert ([p.name for p in found.plugins], found.problems) == (["reset_check"] * on, ())


def test_config_toml_does_not_switch_it_on_without_devices(tmp_path: Path) -> None:
    host = machine(tmp_path, "ivybridge").config("[plugins.reset_check]\nenabled = true")
    assert settings(host, Domain.from_xml(domain_xml())).plugins == ()


def test_metadata_does_not_weaken_it(tmp_path: Path) -> None:
    xml = domain_xml(body=hostdevs("00:14.0"), metadata="<u:plugin name='reset_check' refuse='no'/>")
    plan = planned(machine(tmp_path, "ivybridge"), xml)
    assert "<metadata> may not set refuse" in plan.problems[0].message


def test_a_virtual_function_out_of_a_pool_is_checked_when_it_is_known(tmp_path: Path) -> None:
    host = machine(tmp_path, "slots")
    host.file(
        "/etc/libvirt/qemu/networks/vfs.xml", "<network><forward mode='hostdev' managed='yes'/></network>"
    )
    before = domain_xml(
        body="<devices><interface type='network'><source network='vfs'/></interface></devices>"
    )
    plan = planned(host, before)
    assert (plan.problems, plan.items) == ((), ())
    assert "start" in plan.later
    late = domain_xml(body=hostdevs("0b:00.0", tag="interface type='hostdev'"))
    told = f"0000:0b:00.0: {WEAK}; 0000:0b:00.1 shares the bus and stays with e1000e"
    assert notes(planned(host, late, "start")) == [told]


def test_an_ordinary_network_asks_for_nothing(tmp_path: Path) -> None:
    host = machine(tmp_path, "slots")
    host.file("/etc/libvirt/qemu/networks/lan.xml", "<network><forward mode='nat'/></network>")
    body = "<devices><interface type='network'><source network='lan'/></interface></devices>"
    assert settings(host, Domain.from_xml(domain_xml(body=body))).plugins == ()


def test_an_address_that_makes_no_sense_is_one_problem(tmp_path: Path) -> None:
    xml = domain_xml(body=hostdevs("00:14.0").replace("0x14", "twenty"))
    plan = planned(machine(tmp_path, "ivybridge"), xml)
    assert [p.message for p in plan.problems] == [
        "<address slot='twenty'> of a host device is no number of C's"
    ]


# -- through the real hook


def test_the_hook_refuses_in_ten_lines_and_touches_nothing(tmp_path: Path) -> None:
    host = machine(tmp_path, "ivybridge")
    (tmp_path / CONFIG_DIR.lstrip("/")).mkdir(parents=True, exist_ok=True)
    before = host.snapshot()
    result = run_hook(host, "guest", "prepare", domain_xml(body=hostdevs("00:14.0", "01:00.0", "06:00.1")))
    assert result.status != 0
    assert result.stderr.count(") cannot be reset: ") == 3
    assert "virt-usher waive guest 0000:00:14.0 reset" in result.stderr
    assert len(result.stderr.strip().splitlines()) <= 10
    assert host.snapshot() == before
