"""The plugins consoles and modules on a real kernel: a card with the text console, and a driver's stack."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.lab import machine
from tests.lab.guest import kernel, usher
from tests.lab.guest.domains import Domain, run, virsh, wait_for

pytestmark = pytest.mark.product
VGA = machine.device("vga").address
OTHERS = [d.address for d in machine.DEVICES if d.driver == "bochs-drm" and d.address != VGA]
FBIOGET_CON2FBMAP = 0x460F
SOUND = machine.device("gpu_audio").address


def consoles() -> dict[str, str]:
    """Return which console drivers show a text console now, by their names."""
    folders = Path("/sys/class/vtconsole").iterdir()
    return {(f / "name").read_text().strip(): (f / "bind").read_text().strip() for f in folders}


def framebuffers() -> dict[str, str]:
    """Return which device each framebuffer is of."""
    names = Path("/sys/class/graphics").glob("fb[0-9]*")
    return {f.name: (f / "device").resolve().name for f in names}


def console_on() -> str:
    """Return which device shows the first text console: what sysfs does not say."""
    with open("/dev/fb0", "rb") as fb0:  # any framebuffer answers
        answer = fcntl.ioctl(fb0, FBIOGET_CON2FBMAP, struct.pack("II", 1, 0))
    return framebuffers()[f"fb{struct.unpack('II', answer)[1]}"]


def bochs(verb: str, *addresses: str) -> None:
    for address in addresses:
        Path("/sys/bus/pci/drivers/bochs-drm", verb).write_text(address)


@pytest.fixture(
    params=[(), pytest.param(OTHERS[:1], marks=pytest.mark.soak)], ids=["alone", "beside another"]
)
def console_card(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let the card that can be passed have the text console; it would be on the first one."""
    bochs("unbind", *OTHERS, VGA)
    bochs("bind", VGA, *request.param)
    yield
    bochs("unbind", VGA, *request.param)
    bochs("bind", *OTHERS, VGA)


def shown(text: dict[str, str]) -> bool:
    return any("frame buffer" in name and bind == "1" for name, bind in text.items())


@pytest.mark.usefixtures("console_card")
def test_a_card_with_the_text_console(domain: Domain) -> None:
    before = consoles(), framebuffers(), kernel.driver(VGA)
    assert shown(before[0])
    assert console_on() == VGA
    domain.devices = ("vga",)
    usher.enable(domain, "pci")
    said = virsh("start", domain.name, check=False).stderr
    assert "the text console (fb0)" in said
    assert f"virt-usher enable {domain.name} consoles; or: " in said
    assert (consoles(), framebuffers(), kernel.driver(VGA)) == before
    run("virt-usher", "enable", domain.name, "consoles")
    virsh("start", domain.name)
    assert kernel.driver(VGA) == "vfio-pci"
    assert not shown(consoles())
    domain.stop()
    usher.given_back(domain)
    assert (consoles(), framebuffers(), kernel.driver(VGA)) == before
    assert console_on() == VGA


def test_a_drivers_stack(domain: Domain) -> None:
    stack = [m for m in ("snd_hda_intel", "snd_hda_codec_generic") if Path("/sys/module", m).exists()]
    domain.devices = ("gpu", "gpu_audio")
    domain.define()
    run("virt-usher", "enable", domain.name, "modules", f"unload={','.join(stack)}")
    run("virt-usher", "enable", domain.name, "pci")
    node = next((kernel.DEVICES / SOUND / "sound").glob("card*")).name.replace("card", "/dev/snd/controlC")
    with open(node, "rb"):
        said = virsh("start", domain.name, check=False).stderr
    assert f"is in use ({node}) by python3 (pid {os.getpid()})" in said
    assert "snd_hda_intel is in use (1 references" in said
    assert kernel.driver(SOUND) == "snd_hda_intel"
    virsh("start", domain.name)
    assert kernel.driver(SOUND) == "vfio-pci"
    assert not any(Path("/sys/module", m).exists() for m in stack)
    domain.stop()
    usher.given_back(domain)
    assert kernel.driver(SOUND) == "snd_hda_intel"
    assert all(Path("/sys/module", m).exists() for m in stack)
    assert (kernel.DEVICES / SOUND / "driver_override").read_text() == "(null)\n"
    # The driver looks for its codecs after its probe (azx_probe_work), and the card may get another number.
    wait_for("the sound card", lambda: any((kernel.DEVICES / SOUND).glob("sound/card*")))


def test_a_module_that_other_cards_need(domain: Domain) -> None:
    domain.devices = ("gpu", "gpu_audio")
    domain.define()
    run("virt-usher", "enable", domain.name, "modules", "unload=bochs")
    said = virsh("start", domain.name, check=False).stderr
    assert "bochs drives " in said
    assert "too, which would have no driver" in said
    assert kernel.driver(VGA) == "bochs-drm"
