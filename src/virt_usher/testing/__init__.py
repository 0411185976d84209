"""What tests of plugins need: a fake host with the kernel's behaviour, and the real hook run on it.

    def test_frequency(tmp_path):
        host = FakeHost(tmp_path).policy(0, cpus=[0, 1], governor="schedutil")
        plan = ask(host, "governor", domain_xml())
        assert [a.value for a in plan.actions] == ["performance"]

`check_nothing_stays` kills and fails the hook at every step for your plugin's domain, and compares the
host with what it was.
"""

from virt_usher.testing.conformance import ask, check_nothing_stays
from virt_usher.testing.fake import UUID, FakeHost
from virt_usher.testing.recorded import unfold
from virt_usher.testing.run import Hook, Result, run_hook, start_hook
from virt_usher.testing.tree import Killed
from virt_usher.testing.xml import domain_xml

__all__ = [
    "UUID",
    "FakeHost",
    "Hook",
    "Killed",
    "Result",
    "ask",
    "check_nothing_stays",
    "domain_xml",
    "run_hook",
    "start_hook",
    "unfold",
]
