"""enable, disable and waive change files: validated, whole at any time, comments kept."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.cli.conftest import Cli

from virt_usher import config
from virt_usher.cli import edit
from virt_usher.domain import Domain
from virt_usher.testing import FakeHost, domain_xml

FILE = "/etc/virt-usher/domains/guest.toml"
EVERY = "/etc/virt-usher/every-domain.toml"
DEVICE = "/sys/bus/pci/devices/0000:01:00.0"
COMMENTED = """# what the guest needs

[plugins.hugepages]  # since the update
drop_caches = true   # it is slow otherwise

[waive."0000:02:00.0"]
device = "8086:1533"
problem = "reset"
reason = "tested"

# below the waivers
[plugins.governor]
governor = "performance"
"""


def on(host: FakeHost, name: str = "guest") -> dict[str, dict[str, object]]:
    """Return plugin -> options as the hook would have them for a domain."""
    found = config.settings(host, Domain.from_xml(domain_xml(name)))
    assert not found.problems
    return {p.name: dict(p.options) for p in found.plugins}


@pytest.mark.parametrize(
    ("before", "words", "after"),
    [
        (None, ["hugepages"], {"hugepages": {}}),
        (None, ["hugepages", "drop_caches=yes"], {"hugepages": {"drop_caches": True}}),
        (None, ["governor", "governor=schedutil"], {"governor": {"governor": "schedutil"}}),
        ("[plugins.hugepages]\nenabled = false\n", ["hugepages"], {"hugepages": {}}),
        ("[plugins.governor]\nepp = 'keep'\n", ["governor"], {"governor": {"epp": "keep"}}),
        (
            COMMENTED,
            ["hugepages", "drop_caches=off"],
            {"hugepages": {"drop_caches": False}, "governor": {"governor": "performance"}},
        ),
        (
            COMMENTED,
            ["governor", "epp=keep"],
            {"hugepages": {"drop_caches": True}, "governor": {"governor": "performance", "epp": "keep"}},
        ),
    ],
)
def test_enable_has_the_hook_see_the_plugin_with_its_options(
    cli: Cli, pc: FakeHost, before: str | None, words: list[str], after: dict[str, dict[str, object]]
) -> None:
    if before is not None:
        pc.domain("guest", before)
    ran = cli("enable", "guest", *words)
    assert ran.status == 0, ran.err
    assert on(pc) == after


def test_comments_and_all_that_was_not_asked_for_stay(cli: Cli, pc: FakeHost) -> None:
    pc.domain("guest", COMMENTED)
    cli("enable", "guest", "hugepages", "drop_caches=false")
    assert pc.read(FILE) == COMMENTED.replace("= true ", "= false ").rstrip("\n")


@pytest.mark.parametrize("plugin", ["consoles", "modules", "services"])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("[plugins.pci]\ngroup = true\n", ["NEW", "pci"]),
        ("# mine\n[plugins.governor]\n\n# a card\n# two lines\n[plugins.pci]\n", ["governor", "NEW", "pci"]),
        ("[plugins.NEW]\nenabled = false\n\n[plugins.pci]\n", ["NEW", "pci"]),
        ("[plugins.governor]\n", ["governor", "NEW"]),
        ("", ["NEW"]),
        ("[plugins]\npci = {}\n", ["pci", "NEW"]),  # no header to put it before: the check says so then
    ],
)
def test_what_frees_a_device_is_enabled_before_the_plugin_that_takes_it(
    cli: Cli, pc: FakeHost, plugin: str, before: str, after: list[str]
) -> None:
    pc.domain("guest", before.replace("NEW", plugin))
    ran = cli("enable", "guest", plugin)
    assert ran.status == 0, ran.err
    assert list(on(pc)) == [plugin if name == "NEW" else name for name in after]
    assert all(line in pc.read(FILE) for line in before.splitlines() if line.startswith("#"))


def test_a_file_that_cannot_be_edited_is_left_as_it_is(cli: Cli, pc: FakeHost) -> None:
    pc.domain("guest", "plugins = { pci = {} }\n")
    ran = cli("enable", "guest", "hugepages")
    assert (ran.status, "cannot be edited without harm" in ran.err) == (1, True)
    assert pc.read(FILE) == "plugins = { pci = {} }"


def test_the_difference_is_shown(cli: Cli, pc: FakeHost) -> None:
    pc.domain("guest", COMMENTED)
    ran = cli("enable", "guest", "hugepages", "drop_caches=false")
    changed = [line for line in ran.out.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    assert changed == [
        "-drop_caches = true   # it is slow otherwise",
        "+drop_caches = false   # it is slow otherwise",
    ]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["hugepagse"], "did you mean 'hugepages'?"),
        (["governor", "govenor=x"], "did you mean 'governor'?"),
        (["hugepages", "drop_caches=maybe"], "'maybe' is not true or false"),
        (["../evil"], "cannot be the name of a plugin"),
    ],
)
def test_what_the_hook_would_refuse_is_not_written(
    cli: Cli, pc: FakeHost, words: list[str], complaint: str
) -> None:
    pc.domain("guest", COMMENTED)
    ran = cli("enable", "guest", *words)
    assert (ran.status, complaint in ran.err) == (1, True)
    assert pc.read(FILE) == COMMENTED.rstrip("\n")


VERBS = {
    "enable": ["governor"],
    "disable": ["governor"],
    "waive": ["0000:01:00.0", "reset", "why", "--device-id", "10de:1288"],
}
WAIVE = 'waive."0000:01:00.0"'


@pytest.mark.parametrize(
    ("text", "verbs", "complaint"),
    [
        ("plugins = 1\n", "enable disable waive", "plugins: must hold tables: [plugins.NAME]"),
        ("plugins = []\n", "enable disable waive", "plugins: must hold tables: [plugins.NAME]"),
        ("[[plugins]]\nx = 1\n", "enable disable waive", "plugins: must hold tables: [plugins.NAME]"),
        ("waive = 1\n", "enable disable waive", 'waive: must hold tables: [waive."ADDRESS"]'),
        ("plugins.governor = 3\n", "enable", "plugins.governor is no table"),
        (f"{WAIVE} = 3\n", "waive", 'waive."0000:01:00.0" holds 3, which is no table'),
        (f"{WAIVE} = [3]\n", "waive", 'waive."0000:01:00.0" holds 3, which is no table'),
        ("a = " + "[" * 5000, "enable disable waive", "nested deeper than 20"),
        ("a = " + "[" * 30 + "]" * 30, "enable disable waive", "nested deeper than 20"),
        ("a." * 5000 + "b = 1\n", "enable disable waive", "nested deeper than 20"),
    ],
)
def test_what_cannot_be_edited_is_named_with_file_and_key_and_left_as_it_is(
    cli: Cli, pc: FakeHost, text: str, verbs: str, complaint: str
) -> None:
    pc.domain("guest", text)
    for verb in verbs.split():
        ran = cli(verb, "guest", *VERBS[verb])
        assert (ran.status, f"virt-usher: {FILE}: " in ran.err) == (1, True), ran.err
        assert complaint in ran.err
        assert "mend the file by hand first" in ran.err
        assert pc.read(FILE) == text.rstrip("\n")


def test_bytes_that_are_no_text_are_named_with_the_file(cli: Cli, pc: FakeHost) -> None:
    Path(pc.domain("guest", "").path(FILE)).write_bytes(b"# \xff\n")
    ran = cli("enable", "guest", "governor")
    assert (ran.status, f"virt-usher: {FILE}: 'utf-8' codec" in ran.err) == (1, True)


@pytest.mark.parametrize("name", ["", "a/b", "../../shadow", "\udcff", "a\nb"])
def test_no_name_leads_out_of_the_folder(cli: Cli, pc: FakeHost, name: str) -> None:
    before = pc.snapshot()
    ran = cli("enable", name, "hugepages")
    assert (ran.status, "cannot be the name of a domain" in ran.err) == (1, True)
    assert pc.snapshot() == before


@pytest.mark.parametrize("name", ["a b", "it's", "-dash", "[x]", "ü", "n" * 240])
def test_any_other_name_gets_its_own_file(cli: Cli, pc: FakeHost, name: str) -> None:
    assert cli("enable", "--", name, "hugepages").status == 0
    assert on(pc, name) == {"hugepages": {}}


def test_a_file_that_is_broken_is_left_as_it_is(cli: Cli, pc: FakeHost) -> None:
    pc.domain("guest", "[plugins\n")
    ran = cli("enable", "guest", "hugepages")
    assert (ran.status, FILE in ran.err) == (1, True)
    assert pc.read(FILE) == "[plugins"


def test_a_file_that_others_may_write_is_not_used(cli: Cli, pc: FakeHost) -> None:
    pc.file(FILE, COMMENTED, 0o666)
    ran = cli("enable", "guest", "governor")
    assert (ran.status, "chmod go-w" in ran.err) == (1, True)


def test_the_file_is_readable_to_all_and_nothing_else_stays(cli: Cli, pc: FakeHost) -> None:
    old = os.umask(0o077)
    try:
        cli("enable", "guest", "hugepages")
    finally:
        os.umask(old)
    assert os.listdir(pc.path("/etc/virt-usher/domains")) == ["guest.toml"]
    assert stat.S_IMODE(os.stat(pc.path(FILE)).st_mode) == 0o644


def test_a_domain_unknown_to_libvirt_is_warned_of_and_written(cli: Cli, pc: FakeHost, libvirt: str) -> None:
    ran = cli("enable", "guest", "hugepages", uri=libvirt)
    assert (ran.status, "libvirt knows no domain 'guest'" in ran.err) == (0, True)
    assert on(pc) == {"hugepages": {}}
    assert cli("enable", "test", "hugepages", uri=libvirt).err == ""


def test_saying_it_twice_changes_nothing_the_second_time(cli: Cli, pc: FakeHost) -> None:
    cli("enable", "guest", "hugepages")
    ran = cli("enable", "guest", "hugepages")
    assert (ran.status, "nothing to change" in ran.out) == (0, True)


def test_every_domain_is_enabled_and_disabled_in_one_file(cli: Cli, pc: FakeHost) -> None:
    assert cli("enable", "--every-domain", "governor", "epp=keep").status == 0
    assert on(pc) == {"governor": {"epp": "keep"}}
    assert cli("disable", "--every-domain", "governor").status == 0
    assert not pc.exists(EVERY)


def test_disable_takes_the_table_out_and_keeps_the_rest(cli: Cli, pc: FakeHost) -> None:
    pc.domain("guest", COMMENTED)
    assert cli("disable", "guest", "hugepages").status == 0
    assert on(pc) == {"governor": {"governor": "performance"}}
    assert "# what the guest needs" in pc.read(FILE)
    assert "# below the waivers" in pc.read(FILE)


def test_the_file_goes_with_its_last_table(cli: Cli, pc: FakeHost) -> None:
    cli("enable", "guest", "hugepages")
    cli("disable", "guest", "hugepages")
    assert not pc.exists(FILE)


@pytest.mark.parametrize("own", [None, COMMENTED])
def test_disable_overrules_what_is_on_for_every_domain(cli: Cli, pc: FakeHost, own: str | None) -> None:
    pc.every_domain("[plugins.governor]\n")
    if own:
        pc.domain("guest", own)
    assert cli("disable", "guest", "governor").status == 0
    assert "governor" not in on(pc)


def test_disabling_what_is_not_on_says_so(cli: Cli) -> None:
    assert "is not on" in cli("disable", "guest", "governor").out
    unknown = cli("disable", "guest", "govenor")
    assert (unknown.status, "did you mean" in unknown.err) == (1, True)


def test_a_waiver_binds_the_card_that_is_there(cli: Cli, pc: FakeHost) -> None:
    pc.file(f"{DEVICE}/vendor", "0x10de").file(f"{DEVICE}/device", "0x1288")
    ran = cli("waive", "guest", "01:00.0", "reset", "it resets after a rescan")
    assert ran.status == 0, ran.err
    (waiver,) = config.settings(pc, Domain.from_xml(domain_xml())).waivers
    assert (waiver.address, waiver.device) == ("0000:01:00.0", "10de:1288")
    assert (waiver.problem, waiver.reason) == ("reset", "it resets after a rescan")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["0000:01:00.0", "reset", "r"], "this host has no PCI device 0000:01:00.0"),
        (["1:0.0", "reset", "r"], "is not a PCI address"),
        (["0000:01:00.0", "reset", "r", "--device-id", "nvidia"], "is not vendor:device"),
        (["0000:01:00.0", "rset", "r", "--device-id", "10de:1288"], "did you mean 'reset'?"),
        (
            ["0000:01:00.0", "data", "r", "--device-id", "10de:1288"],
            "'data' is no problem that can be waived",
        ),
    ],
)
def test_a_waiver_that_could_not_hold_is_not_written(
    cli: Cli, pc: FakeHost, words: list[str], complaint: str
) -> None:
    pc.domain("guest", COMMENTED)
    ran = cli("waive", "guest", *words)
    assert (ran.status, complaint in ran.err) == (1, True)
    assert pc.read(FILE) == COMMENTED.rstrip("\n")


def test_a_device_can_have_several_waivers_and_comments_stay(cli: Cli, pc: FakeHost) -> None:
    pc.domain("guest", COMMENTED)
    for problem, reason in (("group", "one"), ("in-use", "two"), ("group", "three")):
        ran = cli("waive", "guest", "0000:02:00.0", problem, reason, "--device-id", "8086:1533")
        assert ran.status == 0, ran.err
    found = config.settings(pc, Domain.from_xml(domain_xml()))
    waived = {w.problem: w.reason for w in found.waivers}
    assert (waived, found.problems) == ({"reset": "tested", "group": "three", "in-use": "two"}, ())
    assert "# below the waivers" in pc.read(FILE)


def test_a_card_that_is_away_can_be_named(cli: Cli, pc: FakeHost) -> None:
    words = ("0000:01:00.0", "reset", "it is lent out", "--device-id", "10DE:1288", "--every-domain")
    assert cli("waive", *words).status == 0
    (waiver,) = config.settings(pc, Domain.from_xml(domain_xml())).waivers
    assert (waiver.device, waiver.file) == ("10de:1288", EVERY)


@pytest.mark.parametrize(
    "words",
    [
        ["enable"],
        ["enable", "guest"],
        ["enable", "guest", "hugepages", "drop_caches"],
        ["enable", "--every-domain"],
        ["disable", "guest"],
        ["disable", "guest", "hugepages", "governor"],
        ["waive", "guest", "0000:01:00.0", "reset"],
        ["waive", "guest", "0000:01:00.0", "reset", "two", "words"],
    ],
)
def test_wrong_usage_ends_with_2_and_writes_nothing(cli: Cli, pc: FakeHost, words: list[str]) -> None:
    before = pc.snapshot()
    assert cli(*words).status == 2
    assert pc.snapshot() == before


_KEYS = st.sampled_from(["hugepages", "governor", "scripts"])
_TABLES = st.dictionaries(_KEYS, st.dictionaries(st.sampled_from(["a", "b"]), st.integers() | st.text()))


@settings(max_examples=30)
@given(before=_TABLES, name=_KEYS, value=st.text())
def test_an_edit_changes_what_was_asked_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, before: dict[str, dict[str, object]], name: str, value: str
) -> None:
    import tomllib

    import tomlkit

    host = FakeHost(tmp_path_factory.mktemp("edit"))
    host.domain("guest", tomlkit.dumps({"plugins": before}))
    file = edit.ConfigFile(host, "guest")
    file.table("plugins", name)["a"] = value
    file.write()
    expected = {**before, name: {**before.get(name, {}), "a": value}}
    assert tomllib.loads(Path(host.path(FILE)).read_text(encoding="utf-8"))["plugins"] == expected
