"""The domain's XML is libvirt's, but what is in it is anybody's."""

from __future__ import annotations

import resource
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import settings as given_settings
from hypothesis import strategies as st

from virt_usher import UsherError, cpulist
from virt_usher.domain import Domain
from virt_usher.testing import FakeHost, domain_xml, run_hook

LAUGHS = "".join(f"<!ENTITY l{i} '{f'&l{i - 1};' * 10}'>" for i in range(1, 12))
HOSTILE = {
    "nothing": b"",
    "blank": b"   \n",
    "no xml": b"hello",
    "truncated": domain_xml(hugepages=True)[:-20],
    "another document": b"<network><name>x</name></network>",
    "no name": b"<domain><uuid>x</uuid></domain>",
    "an entity": b"<!DOCTYPE d [<!ENTITY e 'x'>]><domain><name>&e;</name></domain>",
    "a file": b"<!DOCTYPE d [<!ENTITY e SYSTEM 'file:///etc/passwd'>]><domain><name>&e;</name></domain>",
    "the network": b"<!DOCTYPE d [<!ENTITY e SYSTEM 'http://192.0.2.1/x'>]><domain><name>&e;</name></domain>",
    "an external dtd": b"<!DOCTYPE d SYSTEM 'file:///etc/passwd'><domain><name>g</name></domain>",
    "a parameter entity": b"<!DOCTYPE d [<!ENTITY % p SYSTEM 'file:///etc/passwd'> %p;]>"
    b"<domain><name>g</name></domain>",
    "billion laughs": f"<!DOCTYPE d [<!ENTITY l0 'ha'>{LAUGHS}]><domain><name>&l11;</name></domain>".encode(),
    "a wrong encoding": b"<?xml version='1.0' encoding='utf-16'?><domain><name>g</name></domain>",
    "an unknown encoding": b"<?xml version='1.0' encoding='klingon'?><domain><name>g</name></domain>",
    "bytes of no encoding": b"<domain><name>\xff\xfe</name></domain>",
    "a null": b"<domain><name>a\0b</name></domain>",
    "deep nesting": b"<domain><name>g</name>" + b"<a>" * 100_000,
    "a huge attribute": b"<domain a='" + b"x" * (11 << 20) + b"'><name>g</name></domain>",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_xml_is_one_clear_error(what: str) -> None:
    with pytest.raises(UsherError) as caught:
        Domain.from_xml(HOSTILE[what])
    assert "XML" in caught.value.message
    assert "root:" not in caught.value.message
    assert len(caught.value.message) < 500


@given_settings(max_examples=200)
@given(st.integers(0, 400), st.binary(max_size=6))
def test_a_cut_or_changed_document_is_read_or_refused_and_nothing_else(at: int, with_: bytes) -> None:
    xml = domain_xml(hugepages="<page size='1' unit='G'/>", body="<vcpu>4</vcpu>")
    at %= len(xml)
    for changed in (xml[:at], xml[:at] + with_ + xml[at + len(with_) :]):
        try:
            domain = Domain.from_xml(changed)
            _ = (domain.memory_blocks, domain.pinned_cpus, domain.vcpus, domain.metadata)
        except UsherError:
            continue


def bounded() -> None:
    """Let this process have 200 MB more than it has already, and two seconds of CPU."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with open("/proc/self/statm") as stream:
        used = max(used, int(stream.read().split()[0]) * resource.getpagesize())
    resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20), used + (200 << 20)))
    resource.setrlimit(resource.RLIMIT_CPU, (2, 2))


def test_ten_megabytes_take_bounded_memory(host: FakeHost) -> None:
    disks = b"<disk type='file'><source file='/x'/></disk>" * (10 * (1 << 20) // 46)
    xml = domain_xml(body=f"<devices>{disks.decode()}</devices>")
    assert len(xml) > 9 << 20
    host.every_domain("[plugins.governor]\n")

    result = run_hook(host, "guest", "prepare", xml, prepare=bounded)
    assert (result.status, result.stderr) == (0, "")


STRANGE = {
    "10,000 levels": b"<a>" * 10_000 + b"</a>" * 10_000,
    "unknown namespaces": b"<x:vcpu xmlns:x='urn:x'>9</x:vcpu><vcpu xmlns='urn:y'>many</vcpu>",
    "10 MB of text": b"<description>" + b"x" * 10_000_000 + b"</description>",
    "10 MB of metadata": b"<metadata>" + b"<a b='c'/>" * 1_000_000 + b"</metadata>",
    "all of it twice": domain_xml(hugepages=True),
}


@pytest.mark.parametrize("what", STRANGE)
def test_strange_xml_is_read_or_refused_in_bounds(host: FakeHost, what: str) -> None:
    host.every_domain("[plugins.hugepages]\n")
    xml = domain_xml().replace(b"</domain>", STRANGE[what] + b"</domain>")
    result = run_hook(host, "guest", "prepare", xml, prepare=bounded)
    assert result.status in (0, 3)
    assert bool(result.stderr) == bool(result.status)
    assert not result.status or "the domain's XML cannot be read" in result.stderr, result.stderr


def test_names_are_read_as_they_are() -> None:
    for name in ("a<b>&c", "it's", 'say "x"', "-x", "ümläut", "x" * 250):
        assert Domain.from_xml(domain_xml(name)).name == name


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("", set()),
        ("0", {0}),
        ("0-3", {0, 1, 2, 3}),
        ("0-3,^2", {0, 1, 3}),
        (" 0 , 4-5 ", {0, 4, 5}),
        ("7,7", {7}),
        ("^2,0-3", {0, 1, 2, 3}),
        ("3-1", None),
        ("-1", None),
        ("a", None),
        ("0-", None),
        ("1-2-3", None),
        ("0-99999999999", None),
        ("1e3", None),
        ("0x1", None),
    ],
)
def test_cpu_lists_are_read_as_libvirt_and_the_kernel_write_them(text: str, numbers: set[int] | None) -> None:
    if numbers is None:
        with pytest.raises(UsherError):
            cpulist.parse(text)
    else:
        assert cpulist.parse(text) == numbers


@given(st.sets(st.integers(0, 300)))
def test_a_cpu_list_written_is_read_back(numbers: set[int]) -> None:
    assert cpulist.parse(cpulist.show(numbers)) == numbers


@pytest.mark.parametrize(
    ("body", "cpus"),
    [
        ("", ""),
        ("<vcpu>2</vcpu>", ""),
        ("<vcpu cpuset='1-2'>2</vcpu>", "1-2"),
        ("<cputune><vcpupin vcpu='0' cpuset='3'/><emulatorpin cpuset='5'/></cputune>", "3,5"),
        ("<vcpu cpuset='0'>1</vcpu><cputune><iothreadpin iothread='1' cpuset='7'/></cputune>", "0,7"),
    ],
)
def test_pinned_cpus_are_those_of_all_threads(body: str, cpus: str) -> None:
    assert Domain.from_xml(domain_xml(body=body)).pinned_cpus == cpulist.parse(cpus)


BROKEN_VALUES: dict[str, Callable[[Domain], object]] = {
    "<vcpu>many</vcpu>": lambda d: d.vcpus,
    "<cputune><vcpupin vcpu='0' cpuset='x'/></cputune>": lambda d: d.pinned_cpus,
    "<cpu><numa><cell id='0' memory='1' unit='furlong'/></numa></cpu>": lambda d: d.memory_blocks,
    "<cpu><numa><cell id='x' memory='1'/></numa></cpu>": lambda d: d.memory_blocks,
    "<numatune><memory nodeset='9-1'/></numatune>": lambda d: d.memory_blocks,
    "<devices><memory model='dimm'><target><size>x</size></target></memory></devices>": lambda d: (
        d.memory_blocks
    ),
}


@pytest.mark.parametrize("body", BROKEN_VALUES)
def test_a_value_that_makes_no_sense_is_an_error_that_shows_it(body: str) -> None:
    with pytest.raises(UsherError):
        BROKEN_VALUES[body](Domain.from_xml(domain_xml(body=body)))


@pytest.mark.parametrize(
    ("number", "unit", "kib"),
    [
        (1, "", 1),
        (1, "G", 1 << 20),
        (1, "GiB", 1 << 20),
        (1, "MB", 977),
        (2048, "KiB", 2048),
        (1, "b", 1),
        (3, "T", 3 << 30),
    ],
)
def test_memory_has_libvirts_units_rounded_up_to_kib(number: int, unit: str, kib: int) -> None:
    attribute = f" unit='{unit}'" if unit else ""
    body = f"<cpu><numa><cell id='0' memory='{number}'{attribute}/></numa></cpu>"
    (block,) = Domain.from_xml(domain_xml(body=body)).memory_blocks
    assert block.kib == kib
