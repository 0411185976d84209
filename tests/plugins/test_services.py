"""Units are put back as they were, whoever shares them, and a job is never waited for without end."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.conftest import eventually

from virt_usher.testing import FakeHost, domain_xml, run_hook
from virt_usher.units import own_name

# systemctl as far as it is used: one file per unit holds its state; stuck.service never changes, and
# moody.service exits with an error when it is stopped.
SYSTEMCTL = """#!/bin/sh
units=$(dirname "$0")/../../units
echo "$*" >>"$units/.calls"
for unit; do :; done
case $1 in
    is-system-running) cat "$units/.system" ;;
    reset-failed) [ "$(cat "$units/$unit")" != failed ] || echo inactive >"$units/$unit" ;;
    show)
        [ -e "$units/$unit" ] || { echo LoadState=not-found; echo ActiveState=inactive; exit 0; }
        echo LoadState=loaded; echo "ActiveState=$(cat "$units/$unit")" ;;
    --no-block)
        case $2:$unit in
            *:stuck.service) ;;
            start:broken.service) echo failed >"$units/$unit" ;;
            stop:moody.service) echo failed >"$units/$unit" ;;
            start:*) echo active >"$units/$unit" ;;
            stop:*) echo inactive >"$units/$unit" ;;
        esac ;;
esac
"""


@pytest.fixture
def systemd(host: FakeHost) -> FakeHost:
    """With systemd: smb is inactive, greeter active, crashed failed; broken fails, stuck never moves."""
    host.file("/usr/bin/systemctl", SYSTEMCTL, 0o755).file("/run/systemd/system/.keep")
    host.file("/units/.system", "running").file("/units/.calls")
    states = {
        "smb": "inactive",
        "greeter": "active",
        "broken": "inactive",
        "stuck": "active",
        "moody": "active",
        "crashed": "failed",
    }
    for name, state in states.items():
        host.file(f"/units/{name}.service", state)
    return host


def state(host: FakeHost, unit: str) -> str:
    return Path(host.path(f"/units/{unit}.service")).read_text().strip()


def calls(host: FakeHost, word: str) -> list[str]:
    return [c for c in Path(host.path("/units/.calls")).read_text().splitlines() if word in c]


def enable(host: FakeHost, name: str, options: str) -> bytes:
    host.domain(name, f"[plugins.services]\n{options}\n")
    return domain_xml(name)


def test_units_are_brought_and_put_back(systemd: FakeHost) -> None:
    xml = enable(systemd, "guest", 'start = ["smb"]\nstop = ["greeter.service"]')
    assert run_hook(systemd, "guest", "prepare", xml).status == 0
    assert (state(systemd, "smb"), state(systemd, "greeter")) == ("active", "inactive")
    assert all(c.startswith("--no-block") for c in calls(systemd, "start") + calls(systemd, "stop"))
    run_hook(systemd, "guest", "release")
    assert (state(systemd, "smb"), state(systemd, "greeter")) == ("inactive", "active")
    assert calls(systemd, "reset-failed"), "a start limit must not keep a unit from coming back"


@pytest.mark.parametrize("layer", ["config", "every_domain"])
@pytest.mark.parametrize("options", ["", " inhibit_sleep='yes'"])
def test_a_domains_metadata_stops_no_unit(systemd: FakeHost, layer: str, options: str) -> None:
    """The admin's default list is for domains that root switches it on for: it may end the desktop."""
    off = "enabled = false\n" if layer == "every_domain" else ""
    getattr(systemd, layer)(f'[plugins.services]\n{off}stop = ["greeter"]\n')
    xml = domain_xml(metadata=f"<u:plugin name='services'{options}/>")
    result = run_hook(systemd, "guest", "prepare", xml)
    assert (result.status, state(systemd, "greeter")) == (3, "active")
    assert "services can be switched on by root's files only" in result.stderr


def test_the_last_domain_that_wants_a_unit_puts_it_back(systemd: FakeHost) -> None:
    for name in ("one", "two"):
        assert run_hook(systemd, name, "prepare", enable(systemd, name, 'start = ["smb"]')).status == 0
    run_hook(systemd, "one", "release")
    assert state(systemd, "smb") == "active"
    run_hook(systemd, "two", "release")
    assert state(systemd, "smb") == "inactive"


def test_a_unit_somebody_else_changed_is_left_alone(systemd: FakeHost) -> None:
    run_hook(systemd, "guest", "prepare", enable(systemd, "guest", 'stop = ["greeter"]'))
    systemd.file("/units/greeter.service", "failed")
    run_hook(systemd, "guest", "release")
    assert state(systemd, "greeter") == "failed"


def test_a_unit_that_fails_while_it_is_stopped_is_started_again(systemd: FakeHost) -> None:
    """As one does that exits non-zero on SIGTERM; two domains, of which the second finds it so."""
    for name in ("one", "two"):
        assert run_hook(systemd, name, "prepare", enable(systemd, name, 'stop = ["moody"]')).status == 0
        assert state(systemd, "moody") == "failed"
    run_hook(systemd, "one", "release")
    assert state(systemd, "moody") == "failed"
    run_hook(systemd, "two", "release")
    assert state(systemd, "moody") == "active"


def test_a_unit_that_does_not_come_back_is_tried_again(systemd: FakeHost) -> None:
    run_hook(systemd, "guest", "prepare", enable(systemd, "guest", 'stop = ["greeter"]'))
    fails = SYSTEMCTL.replace("start:broken.service", "start:greeter.service")
    systemd.file("/usr/bin/systemctl", fails, 0o755)
    for _ in range(2):
        run_hook(systemd, "guest", "release")
        assert "greeter.service failed to start" in systemd.journal("guest")
    systemd.file("/usr/bin/systemctl", SYSTEMCTL, 0o755)
    run_hook(systemd, "guest", "release")
    assert (state(systemd, "greeter"), systemd.journal("guest")) == ("active", "")


@pytest.mark.parametrize("names", [("greeter", "login"), ("login", "greeter"), ("login", "screen")])
@pytest.mark.parametrize("first", [0, 1])
def test_two_names_of_one_unit_are_one_claim(systemd: FakeHost, names: tuple[str, str], first: int) -> None:
    systemd.link_to("/etc/systemd/system/login.service", "/lib/systemd/system/screen.service")
    systemd.link_to("/usr/lib/systemd/system/screen.service", "greeter.service")
    for name in names:
        run_hook(systemd, name, "prepare", enable(systemd, name, f'stop = ["{name}"]'))
    assert len(calls(systemd, "--no-block stop")) == 1
    run_hook(systemd, names[first], "release")
    assert state(systemd, "greeter") == "inactive"
    run_hook(systemd, names[1 - first], "release")
    assert state(systemd, "greeter") == "active"


@pytest.mark.parametrize(
    ("links", "name"),
    [
        ({}, "a"),
        ({"/etc": "/lib/systemd/system/b.service"}, "b"),
        ({"/usr/lib": "b.service"}, "b"),
        ({"/usr/lib": "./../system/b.service"}, "b"),
        ({"/etc": "/usr/lib/systemd/system/a.service", "/usr/lib": "b.service"}, "a"),  # another's is hidden
        ({"/etc": "/dev/null", "/usr/lib": "b.service"}, "a"),  # masked
        ({"/etc": "/opt/app/a-1.2.service"}, "a"),  # systemctl link
        ({"/etc": "a.service"}, "a"),
        ({"/run": "b.service", "/usr/lib": "c.service"}, "b"),
    ],
)
def test_an_alias_is_a_link_to_another_unit(host: FakeHost, links: dict[str, str], name: str) -> None:
    for folder, target in links.items():
        host.link_to(f"{folder}/systemd/system/a.service", target)
    assert own_name(host, "a.service") == f"{name}.service"


def test_aliases_in_a_circle_come_to_an_end(host: FakeHost) -> None:
    host.link_to("/etc/systemd/system/a.service", "b.service")
    host.link_to("/etc/systemd/system/b.service", "a.service")
    assert own_name(host, "a.service") in ("a.service", "b.service")


def one_is_left(host: FakeHost) -> bytes:
    """Let one stop a unit that does not start again at its end; return one's XML."""
    xml = enable(host, "one", 'stop = ["greeter"]')
    run_hook(host, "one", "prepare", xml)
    fails = SYSTEMCTL.replace("start:broken.service", "start:greeter.service")
    host.file("/usr/bin/systemctl", fails, 0o755)
    run_hook(host, "one", "release")
    assert "failed to start" in host.journal("one")
    return xml


@pytest.mark.parametrize("anew", [False, True])
def test_what_a_stopped_domain_could_not_put_back_keeps_no_unit_down(systemd: FakeHost, anew: bool) -> None:
    """The unit would not start when one stopped, and one may start anew without it, before two comes."""
    one_is_left(systemd)
    if anew:
        assert run_hook(systemd, "one", "prepare", enable(systemd, "one", 'start = ["smb"]')).status == 0
    assert "failed to start" in systemd.journal("one")
    systemd.file("/usr/bin/systemctl", SYSTEMCTL, 0o755).file("/units/greeter.service", "active")
    run_hook(systemd, "two", "prepare", enable(systemd, "two", 'stop = ["greeter"]'))
    assert state(systemd, "greeter") == "inactive"
    run_hook(systemd, "two", "release")
    assert state(systemd, "greeter") == "active"
    run_hook(systemd, "one", "release")
    assert (systemd.journal("one"), systemd.journal("two")) == ("", "")
    assert (state(systemd, "greeter"), state(systemd, "smb")) == ("active", "inactive")


@pytest.mark.parametrize(
    ("option", "unit", "meanwhile", "then"),
    [
        ("start", "smb", "reloading", "inactive"),
        ("start", "greeter", "reloading", "reloading"),
        ("start", "smb", "deactivating", "deactivating"),
        ("stop", "greeter", "deactivating", "active"),
        ("stop", "greeter", "activating", "activating"),
    ],
)
def test_a_unit_under_way_counts_as_where_it_goes(
    systemd: FakeHost, option: str, unit: str, meanwhile: str, then: str
) -> None:
    run_hook(systemd, "guest", "prepare", enable(systemd, "guest", f'{option} = ["{unit}"]'))
    systemd.file(f"/units/{unit}.service", meanwhile)
    run_hook(systemd, "guest", "release")
    assert state(systemd, unit) == then
    assert "left alone" not in systemd.read("/var/lib/virt-usher/last/guest.jnl")


@pytest.mark.parametrize(
    ("option", "meanwhile", "then"), [("start", "active", "inactive"), ("stop", "failed", "failed")]
)
def test_a_unit_that_had_failed_is_brought_and_put_back_to_rest(
    systemd: FakeHost, option: str, meanwhile: str, then: str
) -> None:
    assert (
        run_hook(systemd, "guest", "prepare", enable(systemd, "guest", f'{option} = ["crashed"]')).status == 0
    )
    assert state(systemd, "crashed") == meanwhile
    run_hook(systemd, "guest", "release")
    assert state(systemd, "crashed") == then
    assert "left alone" not in systemd.read("/var/lib/virt-usher/last/guest.jnl")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ('start = ["nosuch"]', "there is no unit nosuch.service"),
        ('start = ["broken"]', "broken.service failed to start"),
        ('stop = ["stuck"]', "stuck.service is active, not inactive, in time"),
        ('start = ["smb"]\nstop = ["smb.service"]', "smb.service is to be both started and stopped"),
        ('start = ["smb"]\nstop = ["samba"]', "smb.service is to be both started and stopped"),
        ("start = 5", "is not a list"),
    ],
)
def test_a_unit_that_cannot_be_brought_refuses_the_start(
    systemd: FakeHost, options: str, reason: str
) -> None:
    systemd.config("[deadlines]\nstart = 4\n")
    systemd.link_to("/etc/systemd/system/samba.service", "/usr/lib/systemd/system/smb.service")
    result = run_hook(systemd, "guest", "prepare", enable(systemd, "guest", options))
    assert result.status != 0
    assert reason in result.stderr
    assert state(systemd, "smb") == "inactive"


def test_two_domains_that_want_opposites_do_not_both_start(systemd: FakeHost) -> None:
    run_hook(systemd, "one", "prepare", enable(systemd, "one", 'start = ["smb"]'))
    result = run_hook(systemd, "two", "prepare", enable(systemd, "two", 'stop = ["smb"]'))
    assert "smb.service is kept active for the domain 'one'" in result.stderr


@pytest.mark.parametrize("recovered", [False, True])
@pytest.mark.parametrize("works", [False, True])
def test_what_is_left_of_a_stopped_domain_forbids_no_opposite(
    systemd: FakeHost, works: bool, recovered: bool
) -> None:
    """Nor is it the next one's to put back, should the unit fail once more."""
    one_is_left(systemd)
    if works:
        systemd.file("/usr/bin/systemctl", SYSTEMCTL, 0o755)
    result = run_hook(systemd, "two", "prepare", enable(systemd, "two", 'start = ["greeter"]'))
    assert (result.status == 0) == works
    if works and recovered:
        run_hook(systemd, "one", "release")
    run_hook(systemd, "two", "release")
    assert not systemd.journal("two")
    systemd.file("/usr/bin/systemctl", SYSTEMCTL, 0o755)
    run_hook(systemd, "one", "release")
    assert (systemd.journal("one"), state(systemd, "greeter")) == ("", "active")


def test_a_domain_starts_again_while_another_wants_what_is_left_of_it(systemd: FakeHost) -> None:
    xml = one_is_left(systemd)
    systemd.file("/usr/bin/systemctl", SYSTEMCTL, 0o755)
    assert run_hook(systemd, "two", "prepare", enable(systemd, "two", 'stop = ["greeter"]')).status == 0
    result = run_hook(systemd, "one", "prepare", xml)
    assert result.status == 0, result.stderr
    for name in ("two", "one"):
        run_hook(systemd, name, "release")
    assert (systemd.journal("one"), systemd.journal("two")) == ("", "")
    assert state(systemd, "greeter") == "active"


def test_a_unit_that_two_could_not_put_back_is_what_it_was_before_both(systemd: FakeHost) -> None:
    one_is_left(systemd)
    systemd.file("/units/greeter.service", "inactive").file("/usr/bin/systemctl", SYSTEMCTL, 0o755)
    assert run_hook(systemd, "two", "prepare", enable(systemd, "two", 'start = ["greeter"]')).status == 0
    systemd.file("/usr/bin/systemctl", SYSTEMCTL.replace("stop:*)", "stop:*) exit 1 ;; gone)"), 0o755)
    run_hook(systemd, "two", "release")
    systemd.file("/usr/bin/systemctl", SYSTEMCTL, 0o755)
    for name in ("one", "two"):
        run_hook(systemd, name, "release")
    assert (systemd.journal("one"), systemd.journal("two")) == ("", "")
    assert state(systemd, "greeter") == "active"


@pytest.mark.parametrize("order", [("one", "two"), ("two", "one")])
def test_a_unit_that_the_admin_started_between_two_domains_runs_afterwards(
    systemd: FakeHost, order: tuple[str, str]
) -> None:
    systemd.file("/units/greeter.service", "inactive")
    run_hook(systemd, "one", "prepare", enable(systemd, "one", 'stop = ["greeter"]'))
    systemd.file("/units/greeter.service", "active")
    run_hook(systemd, "two", "prepare", enable(systemd, "two", 'stop = ["greeter"]'))
    assert state(systemd, "greeter") == "inactive"
    for name in order:
        run_hook(systemd, name, "release")
    assert state(systemd, "greeter") == "active"


def test_a_unit_that_a_killed_start_had_no_need_to_change_is_the_admins(systemd: FakeHost) -> None:
    systemd.file("/units/greeter.service", "inactive")
    xml = enable(systemd, "one", 'stop = ["greeter"]')
    killed = False
    for point in range(1, 40):
        systemd.file("/units/greeter.service", "inactive")
        run_hook(systemd, "one", "prepare", xml, kill_at=point, kill="family")
        if '"unit":"greeter.service"' in systemd.journal("one"):
            killed = True
            systemd.file("/units/greeter.service", "active")
        before = state(systemd, "greeter")
        run_hook(systemd, "one", "release")
        assert state(systemd, "greeter") == before
    assert killed


def test_no_job_is_queued_while_the_system_stops(systemd: FakeHost) -> None:
    run_hook(systemd, "guest", "prepare", enable(systemd, "guest", 'start = ["smb"]'))
    systemd.file("/units/.system", "stopping")
    run_hook(systemd, "guest", "release")
    assert state(systemd, "smb") == "active"
    assert not systemd.journal("guest")
    kept = systemd.read("/var/lib/virt-usher/last/guest.jnl")
    assert '"remark":"smb.service is left as it is: the system is stopping"' in kept


def test_a_start_while_the_system_stops_says_what_it_skipped(systemd: FakeHost) -> None:
    systemd.file("/units/.system", "stopping")
    assert run_hook(systemd, "guest", "prepare", enable(systemd, "guest", 'start = ["smb"]')).status == 0
    assert state(systemd, "smb") == "inactive"
    assert '"skipped":"the system is stopping"' in systemd.journal("guest")


def test_a_systemctl_that_outlives_its_hook_does_not_have_the_last_word(systemd: FakeHost) -> None:
    """It was slow to send the job, and the start was refused meanwhile."""
    slow = 'case $2 in start) touch "$0.slow"; while [ -e "$0.slow" ]; do sleep 0.05; done ;; esac'
    systemd.file("/usr/bin/systemctl", SYSTEMCTL.replace("case $1 in", f"{slow}\ncase $1 in", 1), 0o755)
    systemd.config("[deadlines]\nstart = 2\n")
    xml = enable(systemd, "guest", 'start = ["smb"]')
    assert run_hook(systemd, "guest", "prepare", xml).status == 3
    Path(systemd.path("/usr/bin/systemctl.slow")).unlink()
    run_hook(systemd, "guest", "release")
    eventually(lambda: not systemd.journal("guest"), "all is given back")
    assert state(systemd, "smb") == "inactive"


def test_a_host_without_systemd_refuses_with_one_line(host: FakeHost) -> None:
    result = run_hook(host, "guest", "prepare", enable(host, "guest", 'start = ["smb"]'))
    assert "systemd does not run here" in result.stderr
