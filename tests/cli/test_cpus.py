"""The picture of the CPUs says who has them, without colours too; pins fit the machine and the domain."""

from __future__ import annotations

from pathlib import Path

import pytest
from lxml import etree
from tests.cli.conftest import Cli

from virt_usher.cli.pins import merge
from virt_usher.testing import domain_xml, run_hook
from virt_usher.testing.cgroup import CpuHost

GUEST = "<vcpu>2</vcpu><cputune><vcpupin vcpu='0' cpuset='2'/><vcpupin vcpu='1' cpuset='6'/></cputune>"


@pytest.fixture
def quad(tmp_path: Path) -> CpuHost:
    """Four cores of two threads; 'win' isolates core 2, 'dev' is only pinned to CPU 3."""
    host = CpuHost(tmp_path / "quad").cores([0, 4], [1, 5], [2, 6], [3, 7]).systemd()
    host.domain("win", "[plugins.cpu_isolation]\n")
    assert run_hook(host, "win", "prepare", domain_xml("win", GUEST)).status == 0
    pid = host.qemu_runs("dev")
    host.file(f"/proc/{pid}/task/1/comm", "CPU 0/KVM").file(
        f"/proc/{pid}/task/1/status", "Cpus_allowed_list:\t3"
    )
    for cpu in range(8):
        host.file(f"/sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_governor", "schedutil")
        host.file(f"/sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_cur_freq", "1200000")
    return host


def test_the_picture_says_who_has_which_cpu(cli: Cli, quad: CpuHost) -> None:
    assert cli("cpus", host=quad).out.splitlines() == [
        "socket 0, node 0, cache of CPUs 0-7",
        "  schedutil at 1.2 GHz",
        "  0 h  1 h  2 W  3 d",
        "  4 h  5 h  6 W  7 h",
        "h host, D dev, W win",
    ]


def test_governors_and_domains_that_differ_are_told_apart(cli: Cli, quad: CpuHost) -> None:
    for cpu in (2, 6):
        quad.file(f"/sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_governor", "performance")
        quad.file(f"/sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_cur_freq", f"{cpu}000000")
    long = "w" * 70
    quad.domain(long, "[plugins.cpu_isolation]\nshare = true\nwhole_cores = false\n")
    assert run_hook(quad, long, "prepare", domain_xml(long, "<vcpu cpuset='6'>1</vcpu>")).status == 0
    quad.set_online(7, False)
    assert cli("cpus", host=quad).out.splitlines() == [
        "socket 0, node 0, cache of CPUs 0-6",
        "  schedutil on 0-1,3-5 at 1.2 GHz, performance on 2,6 at 2.0 to 6.0 GHz",
        "  0 h  1 h  2 W  3 d",
        "  4 h  5 h  6 +",
        "offline: 7",
        "h host",
        "D dev",
        "W win",
        f"A {long}",
        "+ several",
    ]


def test_programs_get_it_as_data(cli: Cli, quad: CpuHost) -> None:
    quad.set_online(7, False)
    found = cli("cpus", "--json", host=quad).json
    assert found["offline"] == [7]
    assert found["cpus"]["2"]["isolated"] == ["win"]
    assert found["cpus"]["3"]["pinned"] == ["dev"]
    assert found["groups"][0]["cores"][0] == [0, 4]


def test_pins_are_proposed_beside_those_of_others(cli: Cli, quad: CpuHost, libvirt: str) -> None:
    ran = cli("pins", "test", "--vcpus", "2", host=quad, uri=libvirt)
    assert ran.status == 0
    assert '<vcpupin vcpu="0" cpuset="3"/>' in ran.out
    assert '<vcpupin vcpu="1" cpuset="7"/>' in ran.out
    assert '<emulatorpin cpuset="0-1,4-5"/>' in ran.out
    assert '<topology sockets="1" dies="1" cores="1" threads="2"/>' in ran.out
    assert "numatune" not in ran.out
    assert cli("pins", "test", "--vcpus", "2", "--json", host=quad, uri=libvirt).json["cores"] == [[3, 7]]


def test_pins_that_cannot_be_are_an_error(cli: Cli, quad: CpuHost, libvirt: str) -> None:
    ran = cli("pins", "test", "--vcpus", "8", host=quad, uri=libvirt)
    assert ran.status == 1
    assert "2 of 4 cores are free" in ran.err


def test_pins_are_written_after_showing_the_difference(cli: Cli, quad: CpuHost, libvirt: str) -> None:
    ran = cli("pins", "test", "--vcpus", "2", "--apply", "--yes", host=quad, uri=libvirt)
    assert ran.status == 0, ran.err
    assert '+    <vcpupin vcpu="0" cpuset="3"/>' in ran.out
    assert "Written" in ran.out


def test_what_pins_do_not_speak_of_stays(quad: CpuHost) -> None:
    root = etree.fromstring(
        "<domain><vcpu placement='auto' cpuset='1'>8</vcpu>"
        "<cputune><shares>5</shares><vcpupin vcpu='9' cpuset='9'/></cputune><os/><features/>"
        "<cpu mode='custom'><model>x</model><topology clusters='9' cores='9'/></cpu></domain>"
    )
    for text in (
        "<vcpu placement='static'>2</vcpu>",
        "<cputune><vcpupin vcpu='0' cpuset='3'/></cputune>",
        "<numatune><memory nodeset='0'/></numatune>",
        "<cpu><topology sockets='1' cores='2'/></cpu>",
    ):
        merge(root, etree.fromstring(text))
    assert etree.tostring(root).decode() == (
        '<domain><vcpu placement="static">2</vcpu><cputune><shares>5</shares>'
        '<vcpupin vcpu="0" cpuset="3"/></cputune><numatune><memory nodeset="0"/></numatune><os/><features/>'
        '<cpu mode="custom"><model>x</model><topology clusters="1" cores="2" sockets="1"/></cpu></domain>'
    )
