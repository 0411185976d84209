"""Units follow domains with the real systemd: shared, put back as they were, and refused where they fail."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.lab.guest.domains import Domain, run
from tests.lab.guest.usher import enable, given_back, journal

pytestmark = pytest.mark.product

UNITS = Path("/run/systemd/system")
RUNS = "[Service]\nExecStart=/usr/bin/sleep infinity\n"
FLAG = Path("/run/lab-flag")
FILES = {
    "lab-wanted": RUNS,
    # It is started once before the domain, and may be started once an hour.
    "lab-disturbing": f"[Unit]\nStartLimitIntervalSec=1h\nStartLimitBurst=1\n{RUNS}"
    "[Install]\nWantedBy=multi-user.target\n",
    "lab-broken": "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/usr/bin/false\n",
    "lab-flaky": f"[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/usr/bin/test -e {FLAG}\n",
}


@pytest.fixture(autouse=True)
def units() -> Iterator[None]:
    """The units of these tests; the disturbing one runs and is enabled, the flaky one has failed."""
    for name, text in FILES.items():
        (UNITS / f"{name}.service").write_text(text)
    run("systemctl", "daemon-reload")
    run("systemctl", "enable", "--quiet", "--runtime", "--now", "lab-disturbing")
    run("systemctl", "start", "lab-flaky", check=False)
    FLAG.write_text("")
    yield
    FLAG.unlink()
    run("systemctl", "disable", "--quiet", "--runtime", "lab-disturbing", check=False)
    run("systemctl", "stop", *FILES)
    run("systemctl", "reset-failed", *FILES, check=False)
    for name in FILES:
        (UNITS / f"{name}.service").unlink()
    run("systemctl", "daemon-reload")


def states() -> dict[str, str]:
    """Return the state of each unit."""
    words = run("systemctl", "is-active", *FILES, "virt-usher-nosleep", check=False).stdout.split()
    return dict(zip(["wanted", "disturbing", "broken", "flaky", "nosleep"], words, strict=True))


def inhibited() -> bool:
    """Tell whether the host is kept awake by virt-usher."""
    return "virt-usher" in run("systemd-inhibit", "--list", "--no-legend", "--no-pager").stdout


def options(domain: Domain, *values: str) -> Domain:
    """Switch the plugin on with these options."""
    enable(domain, "services")
    run("virt-usher", "enable", domain.name, "services", *values)
    return domain


def test_two_domains_share_units_and_the_last_puts_them_back(domain: Domain, second_domain: Domain) -> None:
    before = states()
    assert before == {
        "wanted": "inactive",
        "disturbing": "active",
        "broken": "inactive",
        "flaky": "failed",
        "nosleep": "inactive",
    }
    both = [domain, second_domain]
    for one in both:
        options(one, "start=lab-wanted,lab-flaky", "stop=lab-disturbing", "inhibit_sleep=true").start()
    while both:
        now = states()
        assert (now["wanted"], now["flaky"], now["disturbing"]) == ("active", "active", "inactive")
        assert inhibited()
        assert run("systemctl", "is-enabled", "lab-disturbing").stdout.strip() == "enabled-runtime"
        one = both.pop(0)
        one.stop()
        given_back(one)
    assert states() == {**before, "flaky": "inactive"}
    assert not inhibited()
    assert run("systemctl", "is-enabled", "lab-disturbing").stdout.strip() == "enabled-runtime"


def test_a_unit_that_fails_to_start_refuses_the_domain(domain: Domain) -> None:
    before = states()
    refused = options(domain, "stop=lab-disturbing", "start=lab-broken").start(check=False)
    assert refused.returncode == 1
    assert "lab-broken.service failed to start" in refused.stderr
    assert "systemctl status lab-broken.service" in refused.stderr
    assert not journal(domain).exists()
    assert states() == before
