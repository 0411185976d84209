"""Whatever comes in whatever order: the host is as it was when nobody holds it, save what its admin set."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from tests.attacks import tally
from tests.attacks.calls import gone_daemon, recover
from tests.attacks.table import KNOBS, NIC, PINS, WholeHost, furnish, given

from virt_usher.testing import domain_xml
from virt_usher.testing.conformance import differences

SOAK = bool(os.environ.get("VIRT_USHER_SOAK"))
EXAMPLES = 400 if SOAK else 12 if os.environ.get("CI") == "true" else 4
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
NAMES = ("one", "two", "three")
# What a domain may have on, in TOML; two that want a thing differently are among them.
WANTS = {
    "governor": "[plugins.governor]\n",
    "hugepages": "[plugins.hugepages]\n",
    "fast": f'[plugins.sysfs]\nset = ["{KNOBS[0]} = 120"]\n',
    "slow": f'[plugins.sysfs]\nset = ["{KNOBS[0]} = 5", "{KNOBS[1]} = never"]\n',
    "units": '[plugins.services]\nstart = ["smb"]\nstop = ["greeter"]\n',
    "pci": "[plugins.pci]\n",
    "cpus": "[plugins.cpu_isolation]\nshare = true\n",
}
wants = st.lists(st.sampled_from(list(WANTS)), min_size=1, max_size=4, unique=True)
# What cannot be written at a stop: the domain's claim is left over.
STUCK = ("", "", *KNOBS, "*/nr_hugepages", "*/cpumask", "*/scaling_governor", "*/bind")
points = st.one_of(st.just(0), st.integers(1, 90))
kills = st.sampled_from(["process", "family"])


class Host(RuleBasedStateMachine):
    """Three domains, an admin, and a machine that may be killed at any write."""

    @initialize()
    def begin(self) -> None:
        self.room = tempfile.TemporaryDirectory(dir=MEMORY)
        self.host: WholeHost = furnish(Path(self.room.name) / "host")
        self.host.config("[plugins.reset_check]\nenabled = false\n")
        self.quiet = self.look()
        self.running: dict[str, bytes] = {}
        self.unclear: set[str] = set()  # killed in a start or a stop, or left over, and nothing came after
        self.number = 700

    def look(self) -> dict[str, str]:
        return {p: t for p, t in self.host.snapshot().items() if not p.startswith("/etc/virt-usher")}

    def held(self, what: str) -> bool:
        """Whether another domain has something, or had it when it was killed."""
        return any(what in self.host.journal(n) for n in NAMES)

    @rule(name=st.sampled_from(NAMES), wanted=wants, point=points, kill=kills)
    def start(self, name: str, wanted: list[str], point: int, kill: str) -> None:
        if name in self.running:
            return
        if "fast" in wanted and "slow" in wanted:
            wanted.remove("slow")
        self.host.domain(name, "".join(WANTS[w] for w in wanted))
        body = (given(NIC) if "pci" in wanted else "") + (PINS if "cpus" in wanted else "")
        xml = domain_xml(name, body, 300 * 2048, "hugepages" in wanted)
        taken = "pci" in wanted and any(NIC in self.host.journal(n) for n in NAMES if n != name)
        result = gone_daemon(self.host, name, "prepare", xml, point, kill)
        if result.killed:
            self.unclear.add(name)
            return
        self.unclear.discard(name)
        if result.status:
            assert taken, result.stderr
            assert "is held by domain" in result.stderr
        else:
            self.running[name] = xml
            self.host.qemu_runs(name)

    @rule(name=st.sampled_from(NAMES), point=points, kill=kills, stuck=st.sampled_from(STUCK))
    def stop(self, name: str, point: int, kill: str, stuck: str) -> None:
        """Stop a domain; one that does not run gets a release too, as libvirt calls it after a refusal."""
        if self.running.pop(name, None):
            self.host.qemu_ends(name)
        if stuck:
            self.host.fail(stuck, errno.EIO)
        result = gone_daemon(self.host, name, "release", b"", point, kill)
        self.host.heal()
        left = bool(self.host.journal(name))
        assert result.killed or stuck or not left
        (self.unclear.add if result.killed or left else self.unclear.discard)(name)

    @rule(name=st.sampled_from(NAMES), operation=st.sampled_from(["prepare", "reconnect"]))
    def again(self, name: str, operation: str) -> None:
        """A domain that runs cannot start again, and a restarted daemon changes nothing."""
        if name in self.running:
            before = self.look()
            result = gone_daemon(self.host, name, operation, self.running[name])
            assert bool(result.status) == (operation == "prepare"), result.stderr
            assert not differences(before, self.look())

    @rule()
    def recover(self) -> None:
        before = self.look()
        recover(self.host)
        if not self.unclear:
            assert not differences(before, self.look()), "those that run are left alone"
        self.unclear.clear()

    @rule(knob=st.sampled_from(KNOBS))
    def admin(self, knob: str) -> None:
        """Set a value of one's own: from then on it is what stays."""
        self.number += 1
        self.host.write(knob, str(self.number))
        self.quiet[knob] = self.look()[knob]

    @rule()
    def admins_interrupt(self) -> None:
        """Let CPUs have an interrupt, one of which domains isolate."""
        path = "/proc/irq/1/smp_affinity_list"
        self.host.write(path, "2-3")
        self.quiet[path] = self.look()[path]

    @rule(unit=st.sampled_from(["smb", "greeter"]), active=st.booleans())
    def admins_unit(self, unit: str, active: bool) -> None:
        """Start or stop a unit, but not to what a domain has made of it, which nobody could tell."""
        if active != (unit == "smb") or not self.held(f'"{unit}.service"'):
            self.host.file(f"/.kernel/states/{unit}.service", "active" if active else "inactive")
            shown = f"state of {unit}.service"
            self.quiet[shown] = self.look()[shown]

    @invariant()
    def all_is_back_when_nobody_holds_it(self) -> None:
        if hasattr(self, "quiet") and not self.running and not self.unclear:
            changed = differences(self.quiet, self.look())
            assert not changed

    @invariant()
    def pages_are_those_of_who_runs(self) -> None:
        if hasattr(self, "quiet") and not self.unclear:
            count = sum(b"hugepages" in xml for xml in self.running.values()) * 300
            more = sum(self.host.pages(n)[0] for n in (0, 1)) - (3 + count - min(3, count))
            # The three that were there count as a killed start's until all of it is given back: one that
            # starts before that has as many more, until it stops.
            assert 0 <= more <= (3 if self.running else 0)

    def teardown(self) -> None:
        if hasattr(self, "quiet"):
            for name in NAMES:
                self.stop(name, 0, "process", "")
            self.all_is_back_when_nobody_holds_it()
            tally.note("laws", 1)
            self.room.cleanup()


TestLaws = pytest.mark.timeout(7200)(Host.TestCase)
TestLaws.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=20,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
