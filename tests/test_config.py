"""What is on for a domain, who said so, and all that is wrong with it at once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from virt_usher.config import Settings, settings
from virt_usher.domain import Domain
from virt_usher.plugins import Plugins
from virt_usher.testing import FakeHost, domain_xml, run_hook

ETC = "/etc/virt-usher"
HARMLESS = """
from dataclasses import dataclass
from virt_usher import hookimpl, option

@dataclass(frozen=True, eq=False)
class Plugin:
    level: int = option(1, help="a number", harmless=True)
    words: tuple[str, ...] = option((), help="some texts", harmless=True)
    fast: bool = option(False, help="a switch", harmless=True)
    command: str = option("", help="something to run")

    @hookimpl
    def usher_prepare(self, domain):
        return []
"""


@pytest.fixture
def etc(host: FakeHost) -> FakeHost:
    """A host with a plugin `demo` of four options, one of which metadata must not set."""
    return host.plugin("demo", HARMLESS)


def of(host: FakeHost, name: str = "guest", metadata: str = "") -> Settings:
    return settings(host, Domain.from_xml(domain_xml(name, metadata=metadata)))


def problems(host: FakeHost, name: str = "guest", metadata: str = "") -> list[str]:
    """Return all that a start would be refused for, plugins' options included."""
    found = of(host, name, metadata)
    return [p.message for p in (*found.problems, *Plugins(host, found.plugins).problems)]


def options(found: Settings) -> dict[str, dict[str, object]]:
    return {p.name: dict(p.options) for p in found.plugins}


def test_nothing_is_on_where_nobody_said_so(etc: FakeHost) -> None:
    assert of(etc) == Settings()


LAYERS = {
    "config.toml": lambda h, v: h.config(f"[plugins.demo]\nlevel = {v}\n"),
    "every-domain.toml": lambda h, v: h.every_domain(f"[plugins.demo]\nlevel = {v}\n"),
    "<metadata>": lambda h, v: h.file("/metadata", f"<u:plugin name='demo' level='{v}'/>"),
    "guest.toml": lambda h, v: h.domain("guest", f"[plugins.demo]\nlevel = {v}\n"),
}


@pytest.mark.parametrize("low", range(4))
@pytest.mark.parametrize("high", range(4))
def test_the_later_layer_wins_key_by_key(etc: FakeHost, low: int, high: int) -> None:
    names = list(LAYERS)
    for i in {low, high}:
        LAYERS[names[i]](etc, i)
    found = of(etc, metadata=etc.get("/metadata"))
    assert found.problems == ()
    if max(low, high) == 0:
        assert found.plugins == (), "config.toml gives defaults, and switches nothing on"
        return
    (plugin,) = found.plugins
    assert plugin.options["level"] == max(low, high)
    assert plugin.where("level").endswith(names[max(low, high)])


def test_keys_of_all_layers_come_together(etc: FakeHost) -> None:
    etc.config("[plugins.demo]\nlevel = 5\n").every_domain('[plugins.demo]\ncommand = "x"\n')
    etc.domain("guest", "[plugins.demo]\nfast = true\n")
    assert options(of(etc, metadata="<u:plugin name='demo' words='a,b'/>")) == {
        "demo": {"level": 5, "command": "x", "words": ["a", "b"], "fast": True}
    }


def test_a_domains_own_file_can_switch_off_what_is_on_for_all_and_concerns_it_alone(etc: FakeHost) -> None:
    etc.every_domain("[plugins.demo]\n[plugins.governor]\n").domain(
        "guest", "[plugins.demo]\nenabled = false\n"
    )
    assert list(options(of(etc))) == ["governor"]
    assert list(options(of(etc, "other"))) == ["demo", "governor"]


def test_metadata_never_switches_off_what_the_host_switched_on(etc: FakeHost) -> None:
    etc.every_domain("[plugins.demo]\n")
    told = "<u:plugin name='demo' enabled='false'/>"
    assert "demo" in options(of(etc, metadata=told))
    assert any("enabled" in p for p in problems(etc, metadata=told))


@pytest.mark.parametrize(
    ("policy", "metadata", "on", "problem"),
    [
        ("off", "<u:plugin name='demo'/>", False, ""),
        ("off", "<u:plugin name='demo' level='2'/>", False, ""),
        ("switch", "<u:plugin name='demo'/>", True, ""),
        ("switch", "<u:plugin name='demo' level='2'/>", False, "set no options"),
        ("options", "<u:plugin name='demo' level='2' fast='yes'/>", True, ""),
        ("options", "<u:plugin name='demo' command='rm'/>", True, "<metadata> may not set command of demo"),
        ("options", "<u:plugin name='demo' level='many'/>", False, "cannot read the values of level"),
        ("options", "<u:plugin name='demo' fast='2'/>", False, "cannot read the values of fast"),
        ("options", "<u:plugin name='demo' lever='2'/>", True, "did you mean 'level'"),
        ("options", "<u:plugin name='demo' from='os:system'/>", True, "from"),
        ("options", "<u:plugin name='dem'/>", False, "did you mean 'demo'"),
        ("options", "<u:plugin/>", False, "cannot be the name of a plugin"),
        ("options", "<u:plugin name='../../tmp/x'/>", False, "cannot be the name of a plugin"),
        ("options", "<u:plugin name='__init__'/>", False, "cannot be the name of a plugin"),
        ("options", "<u:waive address='0000:01:00.0'/><u:off/>", False, ""),
        ("everything", "<u:plugin name='demo'/>", True, "'everything' is none of off, switch, options"),
    ],
)
def test_metadata_may_do_what_the_policy_says_and_no_more(
    etc: FakeHost, policy: str, metadata: str, on: bool, problem: str
) -> None:
    etc.config(f'metadata = "{policy}"\n')
    found = problems(etc, metadata=metadata)
    assert ("demo" in options(of(etc, metadata=metadata))) == on
    assert len(found) == bool(problem), found
    assert problem in "".join(found)


@pytest.mark.parametrize("option", ["command", "words.evil"])
def test_a_harmful_option_from_metadata_refuses_even_if_a_file_sets_it_too(
    etc: FakeHost, option: str
) -> None:
    """Nobody can tell then whose value was meant."""
    etc.every_domain('[plugins.demo]\ncommand = "mine"\n')
    assert problems(etc, metadata=f"<u:plugin name='demo' {option}='evil'/>")


def test_all_that_is_wrong_is_told_at_once_with_file_key_and_the_right_spelling(etc: FakeHost) -> None:
    etc.config(
        "[deadlines]\nstrat = 3\nstop = -1\nstart = true\n[plugin.demo]\n[plugins.demo]\nenabled = true\n"
    )
    etc.every_domain('[plugins.demo]\nlevle = 3\nfast = "yes"\n[plugins.governer]\n')
    etc.domain("guest", '[plugins.demo]\nenabled = "no"\n[waive."0000:01:00.0"]\ndevice = 3\n[waves]\n')
    told = "\n".join(problems(etc))
    for part in (
        f"{ETC}/config.toml: deadlines.strat: unknown key (did you mean 'start'?)",
        f"{ETC}/config.toml: deadlines.stop: -1 is not a number of seconds",
        f"{ETC}/config.toml: deadlines.start: True is not a number of seconds",
        f"{ETC}/config.toml: plugin: unknown key (did you mean 'plugins'?)",
        f"{ETC}/config.toml: plugins.demo.enabled: config.toml switches nothing on",
        f"{ETC}/every-domain.toml: plugins.demo.levle: no such option (did you mean 'level'?)",
        f"{ETC}/every-domain.toml: plugins.demo.fast: 'yes' is not true or false",
        "no plugin 'governer' (did you mean 'governor'?)",
        f"{ETC}/domains/guest.toml: plugins.demo.enabled: 'no' is not true or false",
        f'{ETC}/domains/guest.toml: waive."0000:01:00.0": needs device, problem and reason',
        f"{ETC}/domains/guest.toml: waves: unknown key (did you mean 'waive'?)",
    ):
        assert part in told, told


@pytest.mark.parametrize(
    "text",
    [
        *("[[[", "a = ", "\0", "[plugins]\ndemo = 3\n", "plugins = 3\n", "waive = 3\n", "deadlines = 3\n"),
        *(f"trace = {'[' * n}{']' * n}\n" for n in (30, 5000)),
        "trace" + ".a" * 5000 + " = 1\n",
    ],
    ids=lambda text: text[:20],
)
@pytest.mark.parametrize("file", ["config", "every_domain", "domain"])
def test_nonsense_in_a_file_is_a_problem_and_no_trace(etc: FakeHost, text: str, file: str) -> None:
    etc.domain("guest", text) if file == "domain" else getattr(etc, file)(text)
    assert problems(etc)


def test_bytes_that_are_no_utf8_are_a_problem(etc: FakeHost) -> None:
    etc.domain("guest", "")
    Path(etc.path(f"{ETC}/domains/guest.toml")).write_bytes(b"# \xff\n[plugins.demo]\n")
    assert problems(etc)


def test_a_broken_file_of_one_domain_concerns_that_domain_only(pc: FakeHost) -> None:
    pc.domain("broken", "[[[").domain("guest", "[plugins.governor]\n")
    assert run_hook(pc, "broken", "prepare").status == 3
    assert run_hook(pc, "guest", "prepare").status == 0
    assert "broken" not in "".join(problems(pc))


@pytest.mark.parametrize(
    ("path", "mode", "owner"),
    [
        (f"{ETC}/config.toml", 0o664, 0),
        (f"{ETC}/every-domain.toml", 0o666, 0),
        (f"{ETC}/domains/guest.toml", 0o622, 0),
        (f"{ETC}/domains/guest.toml", 0o1666, 0),
        (f"{ETC}/domains", 0o777, 0),
        (ETC, 0o775, 0),
        (f"{ETC}/domains/guest.toml", 0o644, 12345),
        (f"{ETC}/domains", 0o755, 12345),
    ],
)
def test_a_file_that_somebody_else_could_write_is_not_used(
    etc: FakeHost, path: str, mode: int, owner: int
) -> None:
    text = "[plugins.demo]\n"
    etc.config("[plugins.demo]\nlevel = 2\n").every_domain(text).domain("guest", text)
    os.chmod(etc.path(path), mode)
    if owner:
        if os.geteuid() != 0:
            pytest.skip("only root can give a file away")
        os.chown(etc.path(path), owner, owner)
    found = of(etc).problems
    assert found
    assert f"{path} could be written by somebody else than root" in found[0].message
    assert found[0].hint.startswith("chown root:root")


@pytest.mark.parametrize("where", ["file", "folder", "link's own folder"])
def test_a_link_is_followed_only_through_folders_that_nobody_else_can_write(
    etc: FakeHost, where: str
) -> None:
    etc.file("/home/admin/guest.toml", "[plugins.demo]\n").file(f"{ETC}/domains/.keep")
    os.symlink(etc.path("/home/admin/guest.toml"), etc.path(f"{ETC}/domains/guest.toml"))
    assert of(etc).problems == ()
    assert "demo" in options(of(etc))
    path, mode = {
        "file": ("/home/admin/guest.toml", 0o666),
        "folder": ("/home/admin", 0o777),
        "link's own folder": (f"{ETC}/domains", 0o777),
    }[where]
    os.chmod(etc.path(path), mode)
    assert [p.message for p in of(etc).problems]
    assert "demo" not in options(of(etc))


LEVELS = ("/etc", ETC, f"{ETC}/domains", f"{ETC}/domains/guest.toml")


@pytest.mark.parametrize("loose", ["nothing", "the target", "its folder", "a link's folder on the way"])
@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize("level", LEVELS)
def test_a_link_at_any_level_is_looked_behind(etc: FakeHost, level: str, relative: bool, loose: str) -> None:
    """Over a second link, in a folder of its own, to what lies in a third."""
    etc.file(f"{ETC}/domains/guest.toml", "[plugins.demo]\n").file("/srv/way/.keep").file("/home/admin/.keep")
    os.rename(etc.path(level), etc.path("/home/admin/it"))
    first, second, it = etc.path(level), etc.path("/srv/way/link"), etc.path("/home/admin/it")
    for link, target in ((first, second), (second, it)):
        os.symlink(os.path.relpath(target, os.path.dirname(link)) if relative else target, link)
    if loose == "the target":
        os.chmod(it, os.stat(it).st_mode | 0o002)
    elif loose != "nothing":
        os.chmod(etc.path("/home/admin" if loose == "its folder" else "/srv/way"), 0o777)
    assert bool(of(etc).problems) == (loose != "nothing"), of(etc).problems
    assert ("demo" in options(of(etc))) == (loose == "nothing")


def test_a_link_of_somebody_else_in_a_sticky_folder_is_not_followed(etc: FakeHost) -> None:
    etc.file("/home/admin/guest.toml", "[plugins.demo]\n").file(f"{ETC}/domains/.keep").file("/tmp/.keep")
    os.chmod(etc.path("/tmp"), 0o1777)
    os.symlink(etc.path("/home/admin/guest.toml"), link := etc.path("/tmp/link"))
    os.symlink(link, etc.path(f"{ETC}/domains/guest.toml"))
    assert "demo" in options(of(etc))
    os.lchown(link, 4711, 4711)
    (problem,) = of(etc).problems
    assert "/tmp/link could be written by somebody else" in problem.message
    assert "demo" not in options(of(etc))


@pytest.mark.parametrize("level", LEVELS)
def test_a_link_in_a_circle_is_a_problem_and_not_a_hang(etc: FakeHost, level: str) -> None:
    etc.file(f"{ETC}/domains/guest.toml", "[plugins.demo]\n")
    os.rename(etc.path(level), etc.path("/gone"))
    os.symlink(os.path.basename(level), etc.path(level))
    assert of(etc).problems


@pytest.mark.parametrize(
    "name",
    ["two words", "it's", "-x", "[a]*", "$(x)", "..", "a.toml", "ümläut", "x" * 246, "x" * 250, "a\udcff"],
)
def test_hostile_names_have_their_own_file_and_no_others(etc: FakeHost, name: str) -> None:
    etc.domain("guest", "[plugins.demo]\n").every_domain("[plugins.governor]\n")
    domain = Domain(Domain.from_xml(domain_xml()).element, name, "uuid")
    assert [p.name for p in settings(etc, domain).plugins] == ["governor"]
    assert settings(etc, domain).problems == ()
    if len(name) < 250:
        etc.domain(name, "[plugins.demo]\n")
        assert [p.name for p in settings(etc, domain).plugins] == ["governor", "demo"]


def test_waivers_are_read_with_the_file_they_stand_in(etc: FakeHost) -> None:
    etc.domain(
        "guest", '[waive."0000:01:00.0"]\ndevice = "10de:1288"\nproblem = "reset"\nreason = "tested"\n'
    )
    (waiver,) = of(etc).waivers
    assert (waiver.address, waiver.device, waiver.problem, waiver.reason) == (
        "0000:01:00.0",
        "10de:1288",
        "reset",
        "tested",
    )
    assert waiver.file == f"{ETC}/domains/guest.toml"


AT, ID = "0000:01:00.0", "10de:13c2"
SPELT = "is not a PCI address in the kernel's spelling"
PAIR = "is not vendor:device such as 10de:1288"
NONE = "is no problem that can be waived"


@pytest.mark.parametrize(
    ("address", "device", "problem", "told"),
    [
        ("01:00.0", ID, "in-use", f": {SPELT} (did you mean '0000:01:00.0'?)"),
        ("0000:01:0A.0", ID, "in-use", f": {SPELT} (did you mean '0000:01:0a.0'?)"),
        ("gpu", ID, "in-use", f": {SPELT} such as 0000:01:00.0"),
        (AT, ID.upper(), "in-use", f".device: '10DE:13C2' {PAIR} (did you mean '10de:13c2'?)"),
        (AT, "0x10de", "in-use", f".device: '0x10de' {PAIR}"),
        (AT, ID, "in_use", f".problem: 'in_use' {NONE} (did you mean 'in-use'?): ours are in-use, "),
        (AT, ID, "data", f".problem: 'data' {NONE}: ours are in-use, display, vfio, group, reset, silent"),
    ],
)
@pytest.mark.parametrize("file", ["domain", "every_domain"])
def test_a_waiver_that_can_match_nothing_is_a_mistake_with_file_and_key(
    etc: FakeHost, file: str, address: str, device: str, problem: str, told: str
) -> None:
    text = f'[waive."{address}"]\ndevice = "{device}"\nproblem = "{problem}"\nreason = "r"\n'
    etc.domain("guest", text) if file == "domain" else etc.every_domain(text)
    found = of(etc)
    assert found.waivers == ()
    (mistake,) = found.problems
    path = f"{ETC}/domains/guest.toml" if file == "domain" else f"{ETC}/every-domain.toml"
    assert mistake.message.startswith(f'{path}: waive."{address}"{told}')
    assert mistake.hint


def test_deadlines_come_from_config_toml(etc: FakeHost) -> None:
    etc.config("[deadlines]\nstart = 7\nstop = 2.5\n")
    assert (of(etc).start, of(etc).stop) == (7.0, 2.5)
