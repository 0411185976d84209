"""What the commands tell of real starts and stops."""

from __future__ import annotations

import json

from lxml import etree
from tests.libvirt.domain import Domain
from tests.libvirt.pool import nr_pages
from tests.libvirt.private import PrivateLibvirt, pool_becomes
from tests.libvirt.product import cli, enable


def test_enable_plan_start_status_last(usher: PrivateLibvirt) -> None:
    """The README's first success, as somebody would type it."""
    before = nr_pages()
    domain = Domain("guest")
    usher.define(domain)
    assert cli(usher, "enable", domain.name, "hugepages").returncode == 0
    plan = cli(usher, "plan", domain.name)
    assert plan.returncode == 0, plan.stderr
    assert f"{domain.pages} pages" in plan.stdout
    assert nr_pages() == before

    assert usher.virsh("start", domain.uuid).returncode == 0
    holding = json.loads(cli(usher, "status", "--json").stdout)
    assert [held["domain"] for held in holding] == [domain.name]
    assert f"{domain.pages} pages" in cli(usher, "status").stdout

    assert usher.destroy(domain).returncode == 0
    pool_becomes(before)
    assert json.loads(cli(usher, "status", "--json").stdout) == []
    last = cli(usher, "last", domain.name).stdout
    assert last.index("prepare: ok") < last.index("release: ok")


def test_last_tells_why_a_start_was_refused(usher: PrivateLibvirt) -> None:
    domain = enable(usher, Domain("greedy", mib=64 << 20))
    assert usher.start(domain).returncode == 1
    last = cli(usher, "last", domain.name)
    assert "refused" in last.stdout
    assert "hugepages" in last.stdout


def test_doctor_knows_that_libvirt_calls_the_hook(usher: PrivateLibvirt) -> None:
    assert usher.start(Domain("guest", memory="")).returncode == 0
    doctor = cli(usher, "doctor")
    assert doctor.returncode == 0, doctor.stdout
    assert "libvirt called the hook" in doctor.stdout


def test_a_host_without_cpufreq_skips_the_governor_in_one_line(usher: PrivateLibvirt) -> None:
    """On one that has it, the start must succeed as well."""
    domain = enable(usher, Domain("guest", memory=""), "[plugins.governor]\n")
    result = usher.start(domain)
    assert result.returncode == 0, result.stderr
    assert usher.destroy(domain).returncode == 0
    assert sum("governor" in line for line in cli(usher, "last", domain.name).stdout.splitlines()) >= 1


def test_pins_are_shown_written_and_held(usher: PrivateLibvirt) -> None:
    """For one vCPU: any machine with a second core has room for it."""
    domain = Domain(
        "guest", memory="<memoryBacking><nosharepages/></memoryBacking>", qemu_args=("-no-user-config",)
    )
    usher.define(domain)
    was = inactive(usher, domain)
    dry = cli(usher, "pins", domain.name)
    assert (dry.returncode, inactive(usher, domain)) == (0, was), dry.stderr
    written = cli(usher, "pins", domain.name, "--apply", "--yes")
    assert written.returncode == 0, written.stderr
    pin = next(line for line in dry.stdout.splitlines() if "<vcpupin" in line).strip()
    assert f"+    {pin}" in written.stdout
    now = inactive(usher, domain)
    assert now != was
    assert without_pins(now) == without_pins(was)
    again = cli(usher, "pins", domain.name, "--apply", "--yes")
    assert (again.returncode, again.stdout) == (0, "The domain is pinned like this already.\n")
    assert inactive(usher, domain) == now
    assert usher.virsh("start", domain.uuid).returncode == 0
    (cpu,) = {pin.get("cpuset") for pin in etree.fromstring(now).iter("vcpupin")}
    assert f" {cpu}" in usher.virsh("vcpupin", domain.uuid, "--live").stdout
    assert usher.destroy(domain).returncode == 0


def inactive(usher: PrivateLibvirt, domain: Domain) -> str:
    return usher.virsh("dumpxml", "--inactive", domain.uuid).stdout


def without_pins(xml: str) -> list[str]:
    """Return all parts of a domain but those that pins are about, whatever their layout."""
    pinned = {"vcpu", "cputune", "numatune", "cpu"}
    parts = [part for part in etree.fromstring(xml) if part.tag not in pinned]
    return [etree.canonicalize(etree.tostring(part, encoding="unicode"), strip_text=True) for part in parts]
