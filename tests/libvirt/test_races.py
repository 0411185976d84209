"""Domains that share pages and a value start and stop at once: each runs, and then nothing is left."""

from __future__ import annotations

import random

from tests.libvirt.domain import Domain
from tests.libvirt.pool import nr_pages
from tests.libvirt.private import HOOKS, PrivateLibvirt, Result, pool_becomes, wait_for
from tests.libvirt.product import JOURNALS, enable

COUNT, ROUNDS = 5, 2
KNOB = "/proc/sys/net/ipv4/ip_default_ttl"  # of the network namespace, not the machine's
RAN = "/run/ran"
SCRIPT = f'#!/bin/sh\necho "$1 $2 $(wc -c)" >>{RAN}\n'
TOML = f'[plugins.hugepages]\n[plugins.sysfs]\nset = ["{KNOB} = 77"]\n[plugins.scripts]\n'


def at_once(lv: PrivateLibvirt, commands: list[str]) -> list[Result]:
    """Run virsh commands in random order, all at the same time; none may fail."""
    random.shuffle(commands)
    calls = [lv.spawn("virsh", "-c", "qemu:///system", command, timeout=60) for command in commands]
    results = [lv.finish(call, timeout=60) for call in calls]
    assert all(r.returncode == 0 for r in results), [r.stderr for r in results]
    return results


def test_domains_that_start_and_stop_at_once_all_run_and_leave_nothing(usher: PrivateLibvirt) -> None:
    before, ttl = nr_pages(), usher.lines(KNOB)
    assert ttl != ["77"]
    domains = [enable(usher, Domain(f"race{n}", mib=32), TOML) for n in range(COUNT)]
    trees = [f"{HOOKS}/qemu.d/{d.name}" for d in domains]
    usher.remove(RAN)
    try:
        for domain, tree in zip(domains, trees, strict=True):
            for operation in ("prepare/begin", "release/end"):
                usher.write(f"{tree}/{operation}/10", SCRIPT, 0o755)
            usher.define(domain)
        for _ in range(ROUNDS):
            at_once(usher, [f"start {d.uuid}" for d in domains])
            assert {usher.state(d) for d in domains} == {"running"}
            assert len({usher.qemu_pid(d) for d in domains}) == COUNT
            assert nr_pages() == before + sum(d.pages for d in domains)
            assert usher.run("cat", KNOB).stdout == "77\n"
            # Two of them go, while the others stop, start and stop.
            ups = [f"destroy {d.uuid}; start {d.uuid}; domstate {d.uuid}; destroy {d.uuid}" for d in domains]
            results = at_once(usher, [f"destroy {d.uuid}" for d in domains[:2]] + ups[2:])
            assert sum("running" in r.stdout for r in results) == COUNT - 2
            pool_becomes(before)
        wait_for("no journal", lambda: not list(usher.path(JOURNALS).glob("*.jnl")))
        assert [usher.run("cat", KNOB).stdout.strip()] == ttl
        ran = sorted(line.rsplit(" ", 1)[0] for line in usher.lines(RAN))
        lives = {d.name: ROUNDS * (1 if d in domains[:2] else 2) for d in domains}
        assert ran == sorted(
            f"{n} {o}" for n, c in lives.items() for o in ("prepare", "release") for _ in range(c)
        )
        assert all(int(line.rsplit(" ", 1)[1]) > 500 for line in usher.lines(RAN)), "each got its XML"
    finally:
        usher.remove(*trees)
