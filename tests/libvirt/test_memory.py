"""How much is taken: what the domain's XML asks for, less what is there; never what is somebody else's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.libvirt.domain import Domain
from tests.libvirt.pool import POOL, free_pages, nr_pages
from tests.libvirt.private import PrivateLibvirt, pool_becomes
from tests.libvirt.product import CONFIG, HUGEPAGES, cli, enable, journal

METADATA = """<usher:domain xmlns:usher="urn:virt-usher:domain:1">
  <usher:plugin name="hugepages"/>
</usher:domain>"""


@pytest.fixture
def pool(usher: PrivateLibvirt) -> Iterator[None]:
    """Let a test play the other programs that use the host's pool."""
    before = nr_pages()
    yield
    usher.remove_domains()
    set_pool(before)


def set_pool(pages: int) -> None:
    """Set what stays when its users go, as every write does; pages in use are surplus until then."""
    (POOL / "nr_hugepages").write_text(str(pages))
    assert nr_pages() - int((POOL / "surplus_hugepages").read_text()) == pages


def backing(hugepages: str, more: str = "") -> str:
    return f"<memoryBacking>{hugepages}{more}</memoryBacking>"


SHAPES = {
    "default size": backing("<hugepages/>"),
    "size given": backing("<hugepages><page size='2' unit='MiB'/></hugepages>"),
    "memfd": backing("<hugepages/>", "<source type='memfd'/><access mode='shared'/>"),
    "bound to a node": backing("<hugepages/>") + "<numatune><memory mode='strict' nodeset='0'/></numatune>",
    "guest cells": backing("<hugepages><page size='2' unit='MiB' nodeset='0-1'/></hugepages>")
    + """<cpu><numa><cell id='0' cpus='0' memory='32' unit='MiB'/><cell id='1' memory='32' unit='MiB'/>
         </numa></cpu>""",
}


@pytest.mark.parametrize("memory", SHAPES.values(), ids=SHAPES)
def test_every_way_to_ask_for_huge_pages_is_served(usher: PrivateLibvirt, memory: str) -> None:
    before = nr_pages()
    domain = enable(usher, Domain("guest", memory=memory))
    result = usher.start(domain)
    assert result.returncode == 0, result.stderr
    assert (nr_pages(), free_pages()) == (before + domain.pages, 0)
    assert usher.destroy(domain).returncode == 0
    pool_becomes(before)


@pytest.mark.parametrize(
    ("file", "metadata"),
    [(f"{CONFIG}/domains/guest.toml", ""), (f"{CONFIG}/every-domain.toml", ""), (None, METADATA)],
    ids=["own file", "every domain", "metadata"],
)
def test_every_way_to_switch_a_plugin_on_works(
    usher: PrivateLibvirt, file: str | None, metadata: str
) -> None:
    if file:
        usher.write(file, HUGEPAGES)
    domain = Domain("guest", metadata=metadata)
    result = usher.start(domain)
    assert result.returncode == 0, result.stderr
    assert nr_pages() == domain.pages


REFUSED = {
    "more memory than there is": (Domain("guest", mib=64 << 20), "needed"),
    "a size that is nowhere mounted": (
        Domain("guest", mib=1024, memory=backing("<hugepages><page size='1' unit='GiB'/></hugepages>")),
        "mount",
    ),
    "a size this kernel does not have": (
        Domain("guest", memory=backing("<hugepages><page size='4' unit='MiB'/></hugepages>")),
        "4 MiB",
    ),
}


@pytest.mark.parametrize(("domain", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_had_is_refused_before_anything_is_touched(
    usher: PrivateLibvirt, domain: Domain, reason: str
) -> None:
    before, allocated = nr_pages(), ever_allocated()
    result = usher.start(enable(usher, domain))
    assert result.returncode == 1
    title, cause, *hints = result.stderr.partition("unexpected exit status 1: \n")[2].strip().splitlines()
    assert title == "virt-usher refused to start 'guest':"
    assert reason in cause
    assert hints
    assert (nr_pages(), ever_allocated()) == (before, allocated)
    assert not journal(usher, domain)


def ever_allocated() -> int:
    """Count the huge pages that the kernel ever put into a pool."""
    fields = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    return int(fields["htlb_buddy_alloc_success"])


def test_what_virsh_refuses_plan_foretells(usher: PrivateLibvirt) -> None:
    domain, reason = REFUSED["more memory than there is"]
    refusal = usher.start(enable(usher, domain)).stderr
    plan = cli(usher, "plan", domain.name)
    assert plan.returncode == 1
    assert reason in refusal
    assert reason in plan.stdout + plan.stderr


def test_a_broken_file_of_one_domain_concerns_no_other(usher: PrivateLibvirt) -> None:
    broken, sound = enable(usher, Domain("broken"), "[plugins.hugepages\n"), enable(usher, Domain("sound"))
    result = usher.start(broken)
    assert result.returncode == 1
    assert f"{CONFIG}/domains/broken.toml" in result.stderr
    assert usher.start(sound).returncode == 0


def test_of_two_domains_each_gives_back_its_own(usher: PrivateLibvirt) -> None:
    before = nr_pages()
    first, second = enable(usher, Domain("first", mib=64)), enable(usher, Domain("second", mib=32))
    for domain in (first, second):
        assert usher.start(domain).returncode == 0
    assert usher.destroy(first).returncode == 0
    pool_becomes(before + second.pages)
    assert usher.state(second) == "running"
    assert usher.destroy(second).returncode == 0
    pool_becomes(before)


@pytest.mark.usefixtures("pool")
def test_free_pages_of_the_admin_s_are_used_and_stay(usher: PrivateLibvirt) -> None:
    domain = enable(usher, Domain("guest"))
    own = domain.pages // 2
    set_pool(own)
    assert usher.start(domain).returncode == 0
    assert nr_pages() == domain.pages
    assert usher.destroy(domain).returncode == 0
    pool_becomes(own)


@pytest.mark.usefixtures("pool")
@pytest.mark.parametrize("by", [+7, -7])
def test_a_pool_changed_meanwhile_by_somebody_else_keeps_that_change(usher: PrivateLibvirt, by: int) -> None:
    domain = enable(usher, Domain("guest"))
    set_pool(10)
    assert usher.start(domain).returncode == 0
    set_pool(nr_pages() + by)
    assert usher.destroy(domain).returncode == 0
    pool_becomes(10 + by)
