"""The text console leaves a graphics card that a domain gets, and is back when the domain has stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.plugins.test_pci import AUDIO, AUDIO_ID, GPU, GPU_ID, PORT, xml

from virt_usher import Note, OneWay, Write
from virt_usher.testing import ask, check_nothing_stays, run_hook
from virt_usher.testing.pci import CONSOLE, PciHost

IGPU = "0000:00:02.0"
BIND = f"{CONSOLE}/bind"


def make(root: Path, plugins: tuple[str, ...] = ("consoles", "pci"), first: str = GPU) -> PciHost:
    """Two graphics cards with a framebuffer each; the console is on that of `first`."""
    host = PciHost(root).driver("vfio-pci").driver("nouveau", [GPU_ID])
    host.device(PORT, "8086:0151", "pcieport", kind="060400", group=1)
    host.device(GPU, GPU_ID, "nouveau", kind="030000", under=PORT)
    host.device(IGPU, "8086:0152", "i915", kind="030000", group=2)
    host.framebuffer(GPU, "fb0" if first == GPU else "fb1")
    host.framebuffer(IGPU, "fb0" if first == IGPU else "fb1")
    host.config("[plugins.reset_check]\nenabled = false\n")
    return host.domain("guest", "".join(f"[plugins.{p}]\n" for p in plugins))


def alone(root: Path) -> PciHost:
    """The card's framebuffer is the only one: fbcon goes with it."""
    host = make(root)
    host.unplug(IGPU)
    return host


def refused(host: PciHost) -> str:
    before = host.snapshot()
    result = run_hook(host, "guest", "prepare", xml(GPU))
    assert result.status == 3
    assert host.snapshot() == before
    return result.stderr


@pytest.mark.parametrize("cards", [make, alone], ids=["beside another", "alone"])
def test_the_console_leaves_and_comes_back(tmp_path: Path, cards: Callable[[Path], PciHost]) -> None:
    host = cards(tmp_path)
    before = host.snapshot()
    result = run_hook(host, "guest", "prepare", xml(GPU))
    assert result.status == 0, result.stderr
    assert host.driver_of(GPU) == "vfio-pci"
    assert host.get(BIND, "gone") == ("0" if cards is make else "gone")
    assert run_hook(host, "guest", "release").status == 0
    assert host.snapshot() == before


def test_a_console_that_did_not_show_stays_so(tmp_path: Path) -> None:
    host = make(tmp_path).file(BIND, "0")
    before = host.snapshot()
    assert run_hook(host, "guest", "prepare", xml(GPU)).status == 0
    assert run_hook(host, "guest", "release").status == 0
    assert host.snapshot() == before


def test_a_console_on_another_card_is_not_touched(tmp_path: Path) -> None:
    plan = ask(make(tmp_path, first=IGPU), "consoles", xml(GPU))
    assert [p.item for p in plan.items] == [Note(f"the text console is not on {GPU}")]


def test_the_framebuffer_of_the_firmwares_display(tmp_path: Path) -> None:
    """The kernel may put the console there, though another framebuffer came first."""
    host = make(tmp_path, first=IGPU).file(f"/sys/bus/pci/devices/{GPU}/boot_vga", "1")
    assert ask(host, "consoles", xml(GPU)).actions == [Write(BIND, "0", "text console (vtcon1)")]


def test_what_is_no_display_has_no_console(tmp_path: Path) -> None:
    host = make(tmp_path).device(AUDIO, AUDIO_ID, kind="040300", under=PORT)
    assert not ask(host, "consoles", xml(AUDIO)).items


def test_nothing_stays_after_a_kill_or_an_error_at_any_write(tmp_path: Path) -> None:
    number = iter(range(10000))
    cases = check_nothing_stays(lambda: alone(tmp_path / str(next(number))), "guest", xml(GPU), stride=6)
    assert all(count > 1 for count in cases.values())


# -- what the check of the plugin pci makes of it


def test_the_refusal_names_the_plugin(tmp_path: Path) -> None:
    said = refused(make(tmp_path, plugins=("pci",)))
    assert f"{GPU} ({GPU_ID}) shows the text console (fb0)" in said
    assert "virt-usher enable guest consoles; or: virt-usher waive guest" in said


def test_a_picture_of_the_consoles_own_goes_with_it(tmp_path: Path) -> None:
    """A connector stays `enabled` when its console has gone, also right before the unbind."""
    host = make(tmp_path).file(f"/sys/bus/pci/devices/{GPU}/boot_vga", "1")
    host.hangs_on(
        GPU, "drm", "card0-HDMI-A-1", "drm/card0/card0-HDMI-A-1", status="connected", enabled="enabled"
    )
    result = run_hook(host, "guest", "prepare", xml(GPU))
    assert result.status == 0, result.stderr


def test_somebodys_picture_beside_the_console_of_another_card_stays_a_reason(tmp_path: Path) -> None:
    host = make(tmp_path, first=IGPU).hangs_on(GPU, "drm", "card0", "drm/card0")
    host.hangs_on(
        GPU, "drm", "card0-HDMI-A-1", "drm/card0/card0-HDMI-A-1", status="connected", enabled="enabled"
    ).runs("kwin", "/dev/dri/card0")
    assert "shows a picture on HDMI-A-1" in refused(host)


def test_a_console_that_leaves_too_late_is_refused(tmp_path: Path) -> None:
    said = refused(make(tmp_path, plugins=("pci", "consoles")))
    assert "shows the text console (fb0), which the plan ends only after it takes the device" in said
    assert "put the plugin that ends it before pci" in said


def test_a_console_that_comes_back_before_the_unbind_refuses(tmp_path: Path) -> None:
    """The kernel reports success for a console that it did not unbind (store_bind in vt.c)."""
    host = make(tmp_path)
    host.hide("console_stays", "yes")
    assert "shows the text console (fb0)" in refused(host)


@pytest.mark.parametrize("plugin", ["consoles", "modules"])
def test_the_domains_metadata_cannot_switch_it_on(tmp_path: Path, plugin: str) -> None:
    """Whoever may define domains is not always root, and could take the host's display with it."""
    host = make(tmp_path, plugins=("pci",))
    usher = f"<u:domain xmlns:u='urn:virt-usher:domain:1'><u:plugin name='{plugin}'/></u:domain>"
    given = xml(GPU).replace(b"<devices>", f"<metadata>{usher}</metadata><devices>".encode())
    result = run_hook(host, "guest", "prepare", given)
    assert result.status == 3
    assert f"{plugin} can be switched on by root's files only" in result.stderr


# -- what the firmware left


def firmware(root: Path, driver: str, name: str, below: str) -> PciHost:
    host = PciHost(root).driver("vfio-pci").device(GPU, GPU_ID, kind="030000", under=PORT, boot_vga="1")
    host.file("/sys/class/vtconsole/vtcon1/name", "(M) frame buffer device").file(BIND, "1")
    host.file("/sys/class/graphics/fb0/name", name)
    return host.link_to(
        f"/sys/bus/platform/drivers/{driver}/{driver}.0", f"../../../../devices/{below}/{driver}.0"
    )


@pytest.mark.parametrize(
    ("driver", "name", "below"),
    [
        ("efi-framebuffer", "EFI VGA", "platform"),
        ("vesa-framebuffer", "VESA VGA", "platform"),
        ("simple-framebuffer", "simpledrmdrmfb", f"pci0000:00/{PORT}/{GPU}"),  # from 6.9 on below its card
    ],
)
def test_the_firmwares_framebuffer_goes_for_good(tmp_path: Path, driver: str, name: str, below: str) -> None:
    host = firmware(tmp_path, driver, name, below)
    write, one_way = ask(host, "consoles", xml(GPU)).actions
    assert write == Write(BIND, "0", "text console (vtcon1)")
    assert isinstance(one_way, OneWay)
    assert (one_way.path, one_way.value) == (f"/sys/bus/platform/drivers/{driver}/unbind", f"{driver}.0")
    assert "after the next boot" in one_way.reason


def test_another_cards_firmware_framebuffer_is_left(tmp_path: Path) -> None:
    host = firmware(tmp_path, "efi-framebuffer", "EFI VGA", f"pci0000:00/{IGPU}")
    host.device(IGPU, "8086:0152", kind="030000", group=2)
    host.file("/sys/class/graphics/fb0/name", "EFI VGA").file(f"/sys/bus/pci/devices/{GPU}/boot_vga", "0")
    assert not ask(host, "consoles", xml(GPU)).actions
