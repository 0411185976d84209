"""Governors follow the domain's CPUs, on clocks of one CPU and of two."""

from __future__ import annotations

import pytest
from tests.lab.guest import kernel
from tests.lab.guest.domains import Domain
from tests.lab.guest.usher import enable, given_back

pytestmark = pytest.mark.product
SHARED = "policy2"


@pytest.mark.smoke
def test_a_domain_without_pins_sets_all(domain: Domain) -> None:
    before = kernel.governors()
    enable(domain, "governor").start()
    assert set(kernel.governors().values()) == {"performance"}
    domain.stop()
    given_back(domain)
    assert kernel.governors() == before


def test_one_cpu_of_a_shared_clock(domain: Domain) -> None:
    before = kernel.governors()
    domain.pins = "3"
    enable(domain, "governor").start()
    assert kernel.governors() == {**before, SHARED: "performance"}
    domain.stop()
    given_back(domain)
    assert kernel.governors() == before


@pytest.mark.parametrize("first_out", [0, 1])
def test_the_last_of_two_gives_a_shared_clock_back(
    domain: Domain, second_domain: Domain, first_out: int
) -> None:
    before = kernel.governors()
    domain.pins, second_domain.pins = "2", "3"
    both = [domain, second_domain]
    for one in both:
        enable(one, "governor").start()
    first = both.pop(first_out)
    first.stop()
    given_back(first)
    assert kernel.governors() == {**before, SHARED: "performance"}
    both[0].stop()
    given_back(both[0])
    assert kernel.governors() == before


def test_what_the_admin_set_meanwhile_stays(domain: Domain) -> None:
    before = kernel.governors()
    file = kernel.CPUFREQ / SHARED / "scaling_governor"
    domain.pins = "2"
    enable(domain, "governor").start()
    file.write_text("powersave")
    domain.stop()
    given_back(domain)
    assert kernel.governors() == {**before, SHARED: "powersave"}
    file.write_text(before[SHARED])
