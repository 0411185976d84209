"""What others may write (names, metadata, a broken file) is read or refused in words, and stays data."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from xml.sax.saxutils import quoteattr

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lxml import etree
from tests.attacks.conftest import Tally
from tests.attacks.table import COMBINED, PLUGINS, WholeHost, furnish
from tests.attacks.test_kill_and_fail import SOAK

from virt_usher import config, options
from virt_usher.domain import Domain
from virt_usher.errors import UsherError
from virt_usher.host import Host
from virt_usher.plugins import Plugins, load
from virt_usher.prepare import make_plan
from virt_usher.testing import domain_xml, run_hook
from virt_usher.testing.conformance import differences

FILES = ("config.toml", "every-domain.toml", "domains/guest.toml")
GOOD = f"""metadata = "options"
[deadlines]
start = 9
{COMBINED.toml}
[waive."0000:01:00.0"]
device = "8086:10d3"
"""
VALUES = (
    "",
    "true",
    "0",
    "-1",
    "../../x",
    "/etc/shadow",
    "$(id)",
    "a,b",
    "x" * 300,
    "'\"<&>",
    "\u202eabc",
    "smb",
)


@settings(max_examples=2000 if SOAK else 150)
@given(st.sampled_from(FILES), st.integers(0, 2000), st.integers(0, 40), st.binary(max_size=8))
def test_a_broken_configuration_is_a_problem_and_nothing_else(
    file: str, at: int, gone: int, put: bytes
) -> None:
    data = GOOD.encode()
    at %= len(data)
    with tempfile.TemporaryDirectory() as root:
        path = Path(root, "etc/virt-usher", file)
        path.parent.mkdir(parents=True, mode=0o755)
        path.write_bytes(data[:at] + put + data[at + gone :])
        os.chmod(path, 0o644)
        host = Host(root)
        with suppress(UsherError):
            found = config.settings(host, Domain.from_xml(domain_xml()))
            Plugins(host, found.plugins)


@pytest.mark.parametrize("plugin", PLUGINS)
def test_metadata_neither_weakens_nor_commands(room: Path, plugin: str, tried: Tally) -> None:
    """Each option of each plugin, with each value: what is not harmless is refused, nothing is touched."""
    host, cases = furnish(room / "host").every_domain(COMBINED.toml), 0
    known = options.options_of(load(host, plugin))
    tries = {"enabled": False, "from": False, "set": False, "waive": False}
    tries |= {name: option.harmless for name, option in known.items()}
    before = host.snapshot()
    for name, harmless in tries.items():
        for value in VALUES:
            wanted = f"<u:plugin name='{plugin}' {name}={quoteattr(value)}/>"
            found = config.settings(host, Domain.from_xml(domain_xml(metadata=wanted)))
            told = [*found.problems, *Plugins(host, found.plugins).problems]
            assert harmless or told, f"{plugin}.{name}={value!r} was taken"
            assert plugin in [p.name for p in found.plugins], "the host switched it on"
            cases += 1
    assert not differences(before, host.snapshot())
    tried("hostile", cases)


WORDS = (
    *VALUES,
    "2",
    "0x10",
    "0-7",
    "99999999999999999999",
    "yes",
    "hugepages",
    "kvm",
    "pci",
    "0x0000",
    "GPU",
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A domain that needs all of the plugins, with some things in it gone, twice, elsewhere or other."""
    tree = etree.fromstring(COMBINED.xml())
    for _ in range(draw(st.integers(1, 4))):
        node = draw(st.sampled_from([x for x in tree.iter() if x is not tree]))
        parent, kind = (
            node.getparent(),
            draw(st.sampled_from(["gone", "twice", "moved", "text", "attribute", "less"])),
        )
        assert parent is not None
        if kind == "gone":
            parent.remove(node)
        elif kind == "twice":
            parent.append(deepcopy(node))
        elif kind == "moved":
            draw(st.sampled_from(list(tree.iter()))).append(deepcopy(node))
        elif kind == "text":
            node.text = draw(st.sampled_from(WORDS))
        elif kind == "attribute":
            names = [*node.attrib, "type", "mode", "cpuset", "unit", "nodeset"]
            node.set(draw(st.sampled_from(names)), draw(st.sampled_from(WORDS)))
        elif node.attrib:
            del node.attrib[draw(st.sampled_from(list(node.attrib)))]
    return etree.tostring(tree)


def test_a_mutated_domain_is_planned_or_refused_in_words(room: Path, tried: Tally) -> None:
    host = COMBINED.host(room / "host")
    before, cases = host.snapshot(), 0

    @settings(max_examples=5000 if SOAK else 300)
    @given(mutated())
    def law(xml: bytes) -> None:
        nonlocal cases
        cases += 1
        with suppress(UsherError):
            domain = Domain.from_xml(xml)
            plan = make_plan(host, domain, config.settings(host, domain))
            broken = [p.message for p in plan.problems if p.hint == "mend or disable the plugin"]
            assert not broken
            assert all(action.describe(host) for action in plan.actions)

    law()
    assert not differences(before, host.snapshot())
    tried("hostile", cases)


def test_names_of_every_byte_are_data(room: Path, tried: Tally) -> None:
    """All that libvirt takes for a name: no slash, no newline, up to 251 bytes."""
    host, cases = WholeHost(room / "host"), 0
    host.node(0, free_kib=1 << 20).hugetlbfs().every_domain("[plugins.hugepages]\n")
    before = host.snapshot()
    rest = bytes(b for b in (*range(1, 32), *range(127, 256)) if b != 10)
    odd = [os.fsdecode(rest[i : i + 10]) for i in range(0, len(rest), 10)]
    letters = [chr(c) for c in range(0x20, 0x7F) if chr(c) != "/"] + ["ü", "\u202e", "\U0001f600"]
    for name in (
        *odd,
        *(f"{a}x{a}" for a in letters),
        "x" * 251,
        "\udcff" * 251,
        "-",
        "..",
        ". .",
        "a b",
        "*",
        "%s",
        "{0}",
    ):
        # XML has no control character and no broken UTF-8; the name is that of the call.
        named = name if name.isprintable() or name == "\u202e" * 2 else "guest"
        xml = domain_xml(named, memory_kib=8 << 10, hugepages=True)
        result = run_hook(host, name, "prepare", xml)
        if name in ("..",) and result.status:
            assert "name" in result.stderr
        else:
            assert result.status == 0, f"{name!r}: {result.stderr}"
            assert host.pages(0)[0] == 4, name
        assert run_hook(host, name, "release", b"").status == 0
        assert not differences(before, host.snapshot()), name
        cases += 1
    tried("hostile", cases)
