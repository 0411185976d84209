"""A device goes to another driver and comes back, whatever happens in between."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from virt_usher import BindDriver, UsherError, rebind
from virt_usher.journal import Journals
from virt_usher.locks import Locks
from virt_usher.testing import UUID, check_nothing_stays, domain_xml, run_hook
from virt_usher.testing.conformance import differences
from virt_usher.testing.pci import BUS, UNSET, PciHost

NIC = "0000:01:00.0"
ID = "8086:10d3"


def hostdev(address: str = NIC, managed: str = "yes") -> str:
    domain, bus, rest = address.split(":")
    slot, function = rest.split(".")
    return (
        f"<hostdev mode='subsystem' type='pci' managed='{managed}'><source><address domain='0x{domain}' "
        f"bus='0x{bus}' slot='0x{slot}' function='0x{function}'/></source></hostdev>"
    )


def xml(name: str = "guest", managed: str = "yes", address: str = NIC) -> bytes:
    return domain_xml(name, f"<devices>{hostdev(address, managed)}</devices>")


def make(root: Path, driver: str = "e1000e", override: str = UNSET) -> PciHost:
    """Return a host with one network card, and the plugin on for two domains."""
    host = PciHost(root)
    for name in ("vfio-pci", "mlx5_vfio_pci", "pci-stub", "special"):
        host.driver(name)
    host.driver("e1000e", [ID])
    host.device(NIC, ID, driver, under="0000:00:01.0", override=override)
    host.config("[plugins.reset_check]\nenabled = false\n")
    for name in ("guest", "other"):
        host.domain(name, "[plugins.pci]\n")
    return host


@dataclass(frozen=True)
class Before:
    """How a device is before the domain starts."""

    driver: str
    override: str = UNSET


BEFORE = [
    Before("e1000e"),
    Before("e1000e", "e1000e"),
    Before("e1000e", "later-perhaps"),  # an override that an admin set after the driver was bound
    Before("special", "special"),
    Before(""),
    Before("", "none"),
    Before("vfio-pci", "vfio-pci"),
    Before("pci-stub", "pci-stub"),
]


def nothing(host: PciHost) -> None:
    """What libvirt does with a device it does not manage."""


def same_driver(host: PciHost) -> None:
    """libvirt 9.0, managed: the device is where it shall be already, so it stays there at the end too."""
    host.libvirt_detaches(NIC)
    host.libvirt_reattaches(NIC)


def variant(host: PciHost) -> None:
    """libvirt from 10.0, managed: on to the driver made for it, and at the end to the default one."""
    host.libvirt_detaches(NIC, "mlx5_vfio_pci")
    host.libvirt_reattaches(NIC)


def died_on_variant(host: PciHost) -> None:
    """The same, and the daemon dies before it gives the device back."""
    host.libvirt_detaches(NIC, "mlx5_vfio_pci")


Libvirt = Callable[[PciHost], None]
BETWEEN: dict[str, list[Libvirt]] = {"no": [nothing], "yes": [nothing, same_driver, variant, died_on_variant]}


@pytest.mark.parametrize("before", BEFORE, ids=str)
@pytest.mark.parametrize(("managed", "libvirt"), [(m, f) for m, fs in BETWEEN.items() for f in fs])
def test_the_device_is_as_it_was(tmp_path: Path, before: Before, managed: str, libvirt: Libvirt) -> None:
    host = make(tmp_path, before.driver, before.override)
    tree = host.snapshot()
    result = run_hook(host, "guest", "prepare", xml(managed=managed))
    assert result.status == 0, result.stderr
    assert "vfio" in host.driver_of(NIC)
    libvirt(host)
    assert run_hook(host, "guest", "release").status == 0
    assert not differences(tree, host.snapshot())


@pytest.mark.parametrize(("before", "stride"), [(BEFORE[2], 1), (BEFORE[4], 2)], ids=str)
def test_nothing_stays_after_a_kill_or_an_error_at_any_write(
    tmp_path: Path, before: Before, stride: int
) -> None:
    number = iter(range(10000))
    cases = check_nothing_stays(
        lambda: make(tmp_path / str(next(number)), before.driver, before.override), "guest", xml(), stride
    )
    assert all(count > 4 for count in cases.values())


@pytest.mark.parametrize("libvirt", [same_driver, variant, died_on_variant])
@pytest.mark.parametrize("before", [BEFORE[2], BEFORE[4]], ids=str)
def test_a_release_killed_at_any_write_goes_on_where_it_was(
    tmp_path: Path, before: Before, libvirt: Libvirt
) -> None:
    point, killed = 0, True
    while killed:
        point += 1
        host = make(tmp_path / str(point), before.driver, before.override)
        tree = host.snapshot()
        assert run_hook(host, "guest", "prepare", xml()).status == 0
        libvirt(host)
        killed = bool(run_hook(host, "guest", "release", kill_at=point).killed)
        assert run_hook(host, "guest", "release").status == 0
        assert not differences(tree, host.snapshot()), f"killed at point {point}"
    assert point > 5


def test_a_device_on_the_wanted_driver_is_left_as_it_is(tmp_path: Path) -> None:
    host = make(tmp_path, "vfio-pci", "vfio-pci").fail(f"{BUS}/*", errno.EIO)
    assert run_hook(host, "guest", "prepare", xml(managed="no")).status == 0
    assert "vfio-pci" in host.journal("guest")


def test_a_driver_that_somebody_else_chose_stays(tmp_path: Path) -> None:
    host = make(tmp_path)
    assert run_hook(host, "guest", "prepare", xml(managed="no")).status == 0
    host.libvirt_detaches(NIC, "special")  # an admin did, and the override says so
    assert run_hook(host, "guest", "release").status == 0
    assert host.state(NIC) == ("special", "special")
    assert not host.journal("guest")


def test_awake_devices_sleep_again_afterwards(tmp_path: Path) -> None:
    host = make(tmp_path).domain("guest", "[plugins.pci]\nkeep_awake = true\n")
    tree = host.snapshot()
    assert run_hook(host, "guest", "prepare", xml()).status == 0
    assert host.read(f"{BUS}/devices/{NIC}/d3cold_allowed") == "0"
    assert host.read(f"{BUS}/devices/{NIC}/power/control") == "on"
    assert run_hook(host, "guest", "release").status == 0
    assert not differences(tree, host.snapshot())


# -- claims


def test_a_second_domain_is_refused_and_the_first_keeps_the_device(tmp_path: Path) -> None:
    host = make(tmp_path)
    assert run_hook(host, "guest", "prepare", xml()).status == 0
    held, journal = host.state(NIC), host.journal("guest")
    refused = run_hook(host, "other", "prepare", xml("other"))
    assert refused.status == 3
    assert f"{NIC} is held by domain 'guest'" in refused.stderr
    assert run_hook(host, "other", "release").status == 0  # libvirt calls it after a refusal too
    assert (host.state(NIC), host.journal("guest")) == (held, journal)


def test_two_at_once_and_one_gets_it(tmp_path: Path) -> None:
    host = make(tmp_path)
    journals = Journals(host, Locks(host, time.monotonic() + 5))
    for name in ("guest", "other"):
        journals.of(name).begin(UUID, 1, 15)
    action = BindDriver(NIC, "vfio-pci").record()
    journals.do(journals.of("guest"), "pci", "first", action)
    with pytest.raises(UsherError, match="held by domain 'guest'"):
        journals.do(journals.of("other"), "pci", "second", action)
    assert not journals.of("other").live()


def test_an_unbind_that_hangs_keeps_nobody_waiting(tmp_path: Path) -> None:
    """The worker is left alone, the device is in doubt, and comes back when the kernel lets go."""
    host = make(tmp_path)
    host.config("[deadlines]\nstart = 1\n[plugins.reset_check]\nenabled = false\n")
    tree = host.snapshot()
    host.stall("*/driver/unbind")
    began = time.monotonic()
    assert run_hook(host, "guest", "prepare", xml()).status == 3
    assert time.monotonic() - began < 3
    assert host.stalled
    refused = run_hook(host, "other", "prepare", xml("other"))
    assert refused.status == 3
    assert "held by domain 'guest', whose hook (pid " in refused.stderr
    host.resume()
    until = time.monotonic() + 10
    while host.journal("guest") and time.monotonic() < until:
        time.sleep(0.02)
    assert not differences(tree, host.snapshot())


# -- what the kernel refuses


@pytest.mark.parametrize(
    ("number", "name", "why"),
    [
        (errno.EBUSY, "EBUSY", "group is in use"),
        (errno.EINVAL, "EINVAL", "refuses it"),
        (errno.ENODEV, "ENODEV", "does not know"),
        (errno.EIO, "EIO", "could not start it"),
    ],
)
def test_a_failed_bind_says_what_and_why_and_puts_all_back(
    tmp_path: Path, number: int, name: str, why: str
) -> None:
    host = make(tmp_path)
    host.hide(f"probe.vfio-pci.{NIC}", number)
    tree = host.snapshot()
    refused = run_hook(host, "guest", "prepare", xml())
    assert refused.status == 3
    for text in (NIC, "vfio-pci", name, why):
        assert text in refused.stderr
    assert not differences(tree, host.snapshot())


def test_an_unbind_refused_by_the_kernel(tmp_path: Path) -> None:
    host = make(tmp_path).fail("*/driver/unbind", errno.EPERM)
    tree = host.snapshot()
    refused = run_hook(host, "guest", "prepare", xml())
    assert f"{NIC} cannot be taken from e1000e: Operation not permitted (EPERM)" in refused.stderr
    assert not differences(tree, host.snapshot())


def test_a_driver_that_lets_go_by_itself(tmp_path: Path) -> None:
    """ENODEV of an unbind is no error when the device is free: that was all it was for."""
    host = make(tmp_path)
    device = rebind.Device(host, NIC)
    host.fail("*/driver/unbind", errno.ENODEV)
    with pytest.raises(UsherError):
        device.unbind()
    host.heal().write(f"{BUS}/drivers/e1000e/unbind", NIC)
    device.unbind()


# -- users


def held(host: PciHost) -> Journals:
    journals = Journals(host, Locks(host, time.monotonic() + 5))
    journals.of("guest").begin(UUID, 1, 15)
    return journals


def test_whoever_takes_the_device_after_the_check_refuses_the_start(tmp_path: Path) -> None:
    host = make(tmp_path)
    tree, journals = host.snapshot(), held(host)
    host.hangs_on(NIC, "net", "eth0", flags="0x1003", uevent="")
    host.file("/proc/net/route", "Iface Destination Gateway Flags RefCnt Use Metric Mask\n"
              "eth0 00000000 0102A8C0 0003 0 0 0 00000000")  # fmt: skip
    with pytest.raises(UsherError, match="eth0, the way of the default route"):
        journals.do(journals.of("guest"), "pci", "x", BindDriver(NIC, "vfio-pci").record())
    assert host.driver_of(NIC) == "e1000e"
    assert not journals.roll_back(journals.of("guest"))
    assert host.read(f"{BUS}/devices/{NIC}/driver_override") == UNSET
    assert tree


def test_what_was_reported_and_waived_is_no_reason_any_more(tmp_path: Path) -> None:
    host = make(tmp_path)
    journals = held(host)
    host.hangs_on(NIC, "net", "eth0", flags="0x1003", upper_br0="")
    waived = BindDriver(NIC, "vfio-pci", waived=("in-use",)).record()
    journals.do(journals.of("guest"), "pci", "x", waived)
    assert host.driver_of(NIC) == "vfio-pci"


def test_a_device_in_a_running_guest_is_not_taken_back(tmp_path: Path) -> None:
    """Not even when all says that the guest is gone: an unbind would never end."""
    host = make(tmp_path)
    tree = host.snapshot()
    assert run_hook(host, "guest", "prepare", xml()).status == 0
    pid = host.runs("qemu-system-x86", "/dev/vfio/1", guest="guest")
    assert host.opened(NIC)
    assert run_hook(host, "guest", "release").status == 0
    assert host.driver_of(NIC) == "vfio-pci"
    assert "is in use by qemu-system-x86" in host.journal("guest")
    host.ends(pid)
    assert run_hook(host, "guest", "release").status == 0
    assert not differences(tree, host.snapshot())


def test_a_driver_the_host_uses_again_is_not_unbound(tmp_path: Path) -> None:
    host = make(tmp_path, "special", "special")
    assert run_hook(host, "guest", "prepare", xml()).status == 0
    variant(host)
    assert host.state(NIC) == ("e1000e", UNSET)
    host.hangs_on(NIC, "net", "eth0", upper_br0="")
    assert run_hook(host, "guest", "release").status == 0
    assert host.driver_of(NIC) == "e1000e"
    assert "part of br0" in host.journal("guest")


# -- modules, devices that go, udev


def test_the_module_is_loaded_first(tmp_path: Path) -> None:
    host = PciHost(tmp_path).driver("vfio-pci", loaded=False).device(NIC, ID, "e1000e")
    journals = held(host)
    journals.do(journals.of("guest"), "pci", "x", BindDriver(NIC, "vfio-pci").record())
    assert host.driver_of(NIC) == "vfio-pci"


def test_a_module_that_cannot_be_loaded(tmp_path: Path) -> None:
    host = make(tmp_path)
    tree, journals = host.snapshot(), held(host)
    with pytest.raises(
        UsherError, match="no-such cannot be loaded: modprobe: FATAL: Module no-such not found"
    ):
        journals.do(journals.of("guest"), "pci", "x", BindDriver(NIC, "no-such").record())
    assert not journals.roll_back(journals.of("guest"))
    assert {k: v for k, v in host.snapshot().items() if k.startswith("/sys")} == {
        k: v for k, v in tree.items() if k.startswith("/sys")
    }


@pytest.mark.parametrize("on_disk", [True, False])
def test_the_old_driver_was_unloaded_meanwhile(tmp_path: Path, on_disk: bool) -> None:
    host = make(tmp_path)
    assert run_hook(host, "guest", "prepare", xml()).status == 0
    for file in ("bind", "unbind"):
        Path(host.path(f"{BUS}/drivers/e1000e/{file}")).unlink()
    Path(host.path(f"{BUS}/drivers/e1000e")).rmdir()
    if not on_disk:
        host.hide("module.e1000e", "")
        Path(host.path("/.kernel/module.e1000e")).unlink()
    assert run_hook(host, "guest", "release").status == 0
    assert host.state(NIC) == ("e1000e" if on_disk else "", UNSET)
    assert ("e1000e, which it had, is not loaded" in host.journal("guest")) is not on_disk


def test_a_device_that_is_gone_is_given_back(tmp_path: Path) -> None:
    host = make(tmp_path)
    assert run_hook(host, "guest", "prepare", xml()).status == 0
    host.unplug(NIC)
    assert run_hook(host, "guest", "release").status == 0
    assert not host.journal("guest")


def test_another_device_at_the_address_is_left_alone(tmp_path: Path) -> None:
    host = make(tmp_path)
    assert run_hook(host, "guest", "prepare", xml()).status == 0
    host.unplug(NIC)
    host.device(NIC, "10de:1288", "vfio-pci", under="0000:00:01.0")
    assert run_hook(host, "guest", "release").status == 0
    assert host.driver_of(NIC) == "vfio-pci"
    assert not host.journal("guest")


def test_a_driver_that_udev_is_about_to_load_is_waited_for(tmp_path: Path) -> None:
    host = make(tmp_path, "").file("/run/udev/queue")

    def udev() -> None:
        host.write(f"{BUS}/drivers_probe", NIC)
        Path(host.path("/run/udev/queue")).unlink()

    late = threading.Timer(0.3, udev)
    late.start()
    journals = held(PciHost(tmp_path))
    step = journals.do(journals.of("guest"), "pci", "x", BindDriver(NIC, "vfio-pci").record())
    late.join()
    assert step.data["driver"] == "e1000e"
    assert not journals.roll_back(journals.of("guest"))
    assert host.driver_of(NIC) == "e1000e"


def test_a_driver_that_is_just_being_loaded_is_waited_for(tmp_path: Path) -> None:
    """It has no `unbind` yet, and libvirt would leave the device with it."""
    host = make(tmp_path, "e1000e")
    unbind = Path(host.path(f"{BUS}/drivers/e1000e/unbind"))
    unbind.unlink()
    late = threading.Timer(0.3, host.driver, ("e1000e", [ID]))
    late.start()
    journals = held(PciHost(tmp_path))
    journals.do(journals.of("guest"), "pci", "x", BindDriver(NIC, "vfio-pci").record())
    assert host.driver_of(NIC) == "vfio-pci"
    late.join()
    assert not journals.roll_back(journals.of("guest"))
    assert host.driver_of(NIC) == "e1000e"


# -- the fake bus answers as the kernel does (drivers/base/bus.c, pci-driver.c, vfio)


@dataclass(frozen=True)
class Answer:
    """A write to the bus, and what the kernel says and does."""

    path: str
    value: str
    errno: int = 0
    driver: str = "e1000e"
    override: str = UNSET


ANSWERS = [
    Answer(f"devices/{NIC}/driver_override", "vfio-pci", override="vfio-pci"),
    Answer(f"devices/{NIC}/driver_override", ""),
    Answer(f"devices/{NIC}/driver/unbind", NIC, driver=""),
    Answer("drivers/e1000e/unbind", NIC, driver=""),
    Answer("drivers/vfio-pci/unbind", NIC, errno.ENODEV),
    Answer("drivers/e1000e/bind", NIC, errno.EBUSY),
    Answer("drivers/vfio-pci/bind", NIC, errno.ENODEV),
    Answer("drivers/vfio-pci/bind", "0000:09:00.0", errno.ENODEV),
    Answer("drivers_probe", NIC),
    Answer("drivers_probe", "0000:09:00.0", errno.ENODEV),
]


@pytest.mark.parametrize("answer", ANSWERS, ids=str)
def test_the_fake_bus(tmp_path: Path, answer: Answer) -> None:
    host, seen = make(tmp_path), 0
    try:
        host.write(f"{BUS}/{answer.path}", answer.value)
    except OSError as error:
        seen = error.errno or 0
    assert (seen, *host.state(NIC)) == (answer.errno, answer.driver, answer.override)


def test_a_driverless_device_has_no_unbind(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        make(tmp_path, "").write(f"{BUS}/devices/{NIC}/driver/unbind", NIC)


@pytest.mark.parametrize(
    ("override", "driver"), [(UNSET, "e1000e"), ("vfio-pci", "vfio-pci"), ("none", ""), ("no-such", "")]
)
def test_a_probe_says_yes_whatever_comes_of_it(tmp_path: Path, override: str, driver: str) -> None:
    host = make(tmp_path, "", override)
    host.write(f"{BUS}/drivers_probe", NIC)
    assert host.driver_of(NIC) == driver


@pytest.mark.parametrize(
    ("kind", "vfs", "number"), [("060400", None, errno.EINVAL), ("020000", 4, errno.EBUSY)]
)
def test_vfio_refuses(tmp_path: Path, kind: str, vfs: int | None, number: int) -> None:
    host = make(tmp_path).device("0000:09:00.0", "0001:0002", kind=kind, vfs=vfs, override="vfio-pci")
    with pytest.raises(OSError, match=f"Errno {number}"):
        host.write(f"{BUS}/drivers/vfio-pci/bind", "0000:09:00.0")


def test_a_group_in_use_keeps_host_drivers_out(tmp_path: Path) -> None:
    host = make(tmp_path, "vfio-pci").device("0000:01:00.1", ID)
    host.runs("qemu-system-x86", "/dev/vfio/1")
    with pytest.raises(OSError, match=f"Errno {errno.EBUSY}"):
        host.write(f"{BUS}/drivers/e1000e/bind", "0000:01:00.1")
    with pytest.raises(OSError, match=f"Errno {errno.EINVAL}"):
        host.write(f"{BUS}/drivers_probe", "0000:01:00.1")
