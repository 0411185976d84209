"""Modules are unloaded in order, only when nobody uses them, and their devices have their drivers back."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.plugins.test_pci import AUDIO, AUDIO_ID, GPU, GPU_ID, PORT, xml
from tests.plugins.test_services import SYSTEMCTL

from virt_usher.testing import ask, check_nothing_stays, run_hook
from virt_usher.testing.modules import ModuleHost

STACK = ("nvidia_drm", "nvidia_modeset", "nvidia_uvm", "nvidia")
TWIN = "0000:02:00.0"
OTHER = "0000:03:00.0"


def make(root: Path, *plugins: str, unload: tuple[str, ...] = STACK) -> ModuleHost:
    """A card of NVIDIA's with its stack of modules, which two domains want out of the way."""
    host = ModuleHost(root)
    host.driver("vfio-pci").driver("nvidia", [GPU_ID]).driver("snd_hda_intel", [AUDIO_ID])
    host.device(PORT, "8086:0151", "pcieport", kind="060400", group=1)
    host.device(GPU, GPU_ID, "nvidia", kind="030000", under=PORT)
    host.module("nvidia", "nvidia").module("nvidia_uvm", uses=["nvidia"])
    host.module("nvidia_modeset", uses=["nvidia"]).module("nvidia_drm", uses=["nvidia_modeset", "nvidia"])
    host.module("snd_hda_intel", "snd_hda_intel")
    host.config("[plugins.reset_check]\nenabled = false\n")
    for name in ("guest", "other"):
        text = "".join(f"[plugins.{p}]\n" for p in plugins or ("modules", "pci"))
        names = ", ".join(f'"{n}"' for n in unload)
        host.domain(name, text.replace("[plugins.modules]\n", f"[plugins.modules]\nunload = [{names}]\n"))
    return host


def loaded(host: ModuleHost) -> list[str]:
    return [n for n in host.entries("/sys/module") if n.startswith("nvidia")]


def refused(host: ModuleHost) -> str:
    before = host.snapshot()
    result = run_hook(host, "guest", "prepare", xml(GPU))
    assert result.status == 3
    assert host.snapshot() == before
    return result.stderr


@pytest.mark.parametrize("plugins", [("modules", "pci"), ("pci", "modules"), ("modules",)], ids="+".join)
def test_a_stack_goes_and_comes_back(tmp_path: Path, plugins: tuple[str, ...]) -> None:
    host = make(tmp_path, *plugins)
    before = host.snapshot()
    result = run_hook(host, "guest", "prepare", xml(GPU))
    assert result.status == 0, result.stderr
    assert not loaded(host)
    assert host.driver_of(GPU) == ("vfio-pci" if "pci" in plugins else "")
    assert run_hook(host, "guest", "release").status == 0
    assert host.snapshot() == before


def test_libvirt_takes_and_gives_back_the_card_by_itself(tmp_path: Path) -> None:
    host = make(tmp_path, "modules")
    before = host.snapshot()
    assert run_hook(host, "guest", "prepare", xml(GPU)).status == 0
    host.libvirt_detaches(GPU)
    host.libvirt_reattaches(GPU)
    assert run_hook(host, "guest", "release").status == 0
    assert host.snapshot() == before


def test_what_was_not_loaded_is_not_loaded_afterwards(tmp_path: Path) -> None:
    host = make(tmp_path)
    assert host.rmmod("nvidia_uvm") == 0
    before = host.snapshot()
    assert run_hook(host, "guest", "prepare", xml(GPU)).status == 0
    assert run_hook(host, "guest", "release").status == 0
    assert host.snapshot() == before


def test_an_override_of_the_admins_comes_back_before_the_driver(tmp_path: Path) -> None:
    host = make(tmp_path)
    host.write(f"/sys/bus/pci/devices/{GPU}/driver_override", "nvidia")
    before = host.snapshot()
    assert run_hook(host, "guest", "prepare", xml(GPU)).status == 0
    assert host.state(GPU) == ("vfio-pci", "vfio-pci")
    assert run_hook(host, "guest", "release").status == 0
    assert host.snapshot() == before


def test_the_last_of_two_domains_loads_them_again(tmp_path: Path) -> None:
    host = make(tmp_path, unload=("nvidia_drm", "nvidia_modeset", "nvidia_uvm", "nvidia"))
    before = host.snapshot()
    assert run_hook(host, "guest", "prepare", xml(GPU)).status == 0
    host.device(OTHER, "8086:10d3")
    assert run_hook(host, "other", "prepare", xml(OTHER, name="other")).status == 0
    assert run_hook(host, "guest", "release").status == 0
    assert not loaded(host)
    assert host.state(GPU) == ("", "(null)")
    assert run_hook(host, "other", "release").status == 0
    host.unplug(OTHER)
    assert {p: t for p, t in host.snapshot().items() if "/3" not in p} == before


def guest_is_left(root: Path) -> tuple[ModuleHost, dict[str, str]]:
    """Let a module not load again when guest stops; return the host, and what it was like before."""
    host = make(root)
    before = host.snapshot()
    run_hook(host, "guest", "prepare", xml(GPU))
    host.hide("module.nvidia", "")
    assert run_hook(host, "guest", "release").status == 0
    assert "the module nvidia cannot be loaded" in host.journal("guest")
    host.hide("module.nvidia", "nvidia")
    return host, before


@pytest.mark.parametrize("loaded_by_hand", [False, True])
@pytest.mark.parametrize("recovered", [False, True])
def test_what_a_stopped_domain_could_not_load_again_is_not_the_next_ones(
    tmp_path: Path, loaded_by_hand: bool, recovered: bool
) -> None:
    """Unless `recover` finds them wanted out of the kernel: then whoever wants them so loads them."""
    host, before = guest_is_left(tmp_path)
    if loaded_by_hand:
        host.modprobe("nvidia_drm")
    device = GPU if loaded_by_hand else OTHER
    host.device(OTHER, "8086:10d3")
    assert run_hook(host, "other", "prepare", xml(device, name="other")).status == 0
    assert not loaded(host)
    if recovered:
        run_hook(host, "guest", "release")
        assert (loaded(host), host.journal("guest")) == ([], "")
    assert run_hook(host, "other", "release").status == 0
    assert not host.journal("other")
    assert bool(loaded(host)) == (loaded_by_hand or recovered)
    host.unplug(OTHER)
    assert run_hook(host, "guest", "release").status == 0
    assert {p: t for p, t in host.snapshot().items() if "/3" not in p} == before


def test_what_is_left_of_a_module_waits_for_its_devices(tmp_path: Path) -> None:
    """Another domain got the card without its driver, and gives it back so."""
    host, before = guest_is_left(tmp_path)
    host.domain("other", "[plugins.pci]\n")
    assert run_hook(host, "other", "prepare", xml(GPU, name="other")).status == 0
    run_hook(host, "guest", "release")
    assert f"waits for {GPU}" in host.journal("guest")
    for name in ("other", "guest"):
        run_hook(host, name, "release")
        assert not host.journal(name)
    assert {p: t for p, t in host.snapshot().items() if "/domains/" not in p} == {
        p: t for p, t in before.items() if "/domains/" not in p
    }


def test_a_device_that_is_not_back_yet_keeps_its_driver_waiting(tmp_path: Path) -> None:
    """Its driver would come too late for it: recover does both, in order."""
    host = make(tmp_path)
    before = host.snapshot()
    assert run_hook(host, "guest", "prepare", xml(GPU)).status == 0
    pid = host.runs("qemu-system-x86", "/dev/vfio/1", guest="guest")
    assert run_hook(host, "guest", "release").status == 0
    assert "nvidia waits for 0000:01:00.0, which is not back yet" in host.journal("guest")
    host.ends(pid)
    assert run_hook(host, "guest", "release").status == 0
    assert host.snapshot() == before


def test_a_device_that_its_module_found_before_its_own_undo_was_done_is_back(tmp_path: Path) -> None:
    """It is in use at once, and would never be given back if it had to be without a driver first."""
    host = make(tmp_path)
    before = host.snapshot()
    assert run_hook(host, "guest", "prepare", xml(GPU)).status == 0
    host.fail(f"*/{GPU}/power/control", errno.EIO, on="read")
    assert run_hook(host, "guest", "release").status == 0
    assert "Input/output error" in host.journal("guest")
    host.heal().modprobe("nvidia")
    program(host)
    assert run_hook(host, "guest", "release").status == 0
    now = host.snapshot()
    assert {p: now.get(p) for p in before} == before
    assert not host.journal("guest")


def test_a_module_that_cannot_be_loaded_again_is_kept_for_recover(tmp_path: Path) -> None:
    host, before = guest_is_left(tmp_path)
    assert run_hook(host, "guest", "release").status == 0
    assert host.snapshot() == before


def test_nothing_stays_after_a_kill_or_an_error_at_any_write(tmp_path: Path) -> None:
    number = iter(range(10000))

    def small() -> ModuleHost:
        return make(tmp_path / str(next(number)), unload=("nvidia_drm",))

    cases = check_nothing_stays(small, "guest", xml(GPU), stride=8)
    assert all(count > 1 for count in cases.values())


# -- what is refused before anything is touched


def foreign(host: ModuleHost) -> None:
    host.device(TWIN, GPU_ID, "nvidia", kind="030000")


def kernel_uses_it(host: ModuleHost) -> None:
    host.file("/sys/module/nvidia_drm/refcnt", "1", 0o444)


def program(host: ModuleHost) -> None:
    host.hangs_on(GPU, "drm", "card0", "drm/card0").runs("Xorg", "/dev/dri/card0")


def not_on_disk(host: ModuleHost) -> None:
    host.hide("module.nvidia_uvm", "")


def builtin(host: ModuleHost) -> None:
    Path(host.path("/sys/module/nvidia_uvm/initstate")).unlink()


@pytest.mark.parametrize(
    ("happens", "reason"),
    [
        (foreign, f"nvidia drives {TWIN} too, which would have no driver"),
        (kernel_uses_it, "nvidia_drm is in use (1 references besides those of other modules)"),
        (program, f"{GPU} ({GPU_ID}) is in use (/dev/dri/card0) by Xorg"),
        (not_on_disk, "the module nvidia_uvm could not be loaded again: it is not on the disk"),
        (builtin, "nvidia_uvm is built into the kernel, and cannot be unloaded"),
    ],
)
@pytest.mark.parametrize("plugins", [("modules", "pci"), ("modules",)], ids="+".join)
def test_refused(
    tmp_path: Path, happens: Callable[[ModuleHost], None], reason: str, plugins: tuple[str, ...]
) -> None:
    host = make(tmp_path, *plugins)
    happens(host)
    said = refused(host)
    assert reason in said
    assert said.count(reason) == 1


@pytest.mark.parametrize(
    ("unload", "reason", "hint"),
    [
        (("nvidia",), "nvidia is used by nvidia_drm, nvidia_modeset, nvidia_uvm, not unloaded before it", ""),
        (
            ("nvidia-modeset",),
            "nvidia_modeset is used by nvidia_drm, not unloaded before it",
            "virt-usher enable guest modules unload=nvidia_drm,nvidia_modeset",
        ),
        (("nvdia",), "the module nvdia is not on the disk", "modprobe -n -v nvdia"),
        (("../x",), "plugins.modules.unload: '../x' cannot be the name of a module", ""),
        ((), "nothing is to be unloaded", "virt-usher enable guest modules unload=NAME,…"),
    ],
)
def test_a_wrong_list(tmp_path: Path, unload: tuple[str, ...], reason: str, hint: str) -> None:
    plan = ask(make(tmp_path), "modules", xml(GPU), {"unload": unload})
    (problem,) = plan.problems
    assert reason in problem.message
    assert problem.hint.startswith(hint)


@pytest.mark.parametrize(
    ("stack", "good"),
    [(("snd_hda_intel", "snd_hda_codec_generic"), True), (("snd_hda_codec_generic",), False)],
)
def test_a_module_in_use_by_a_device_that_goes_with_its_parent(
    tmp_path: Path, stack: tuple[str, ...], good: bool
) -> None:
    """A codec hangs on the sound card; the driver of the codec is in use as long as that of the card is."""
    host = make(tmp_path).device(AUDIO, AUDIO_ID, "snd_hda_intel", kind="040300", under=PORT)
    host.module("snd_hda_codec_generic").file("/sys/module/snd_hda_codec_generic/refcnt", "1", 0o444)
    codec = f"../../../../devices/pci0000:00/{PORT}/{AUDIO}/hdaudioC0D0"
    host.link_to("/sys/module/snd_hda_codec_generic/drivers/hdaudio:generic/hdaudioC0D0", codec)
    plan = ask(host, "modules", xml(AUDIO), {"unload": stack})
    assert (not plan.problems) == good
    foreign = ask(host, "modules", xml(GPU), {"unload": stack}).problems
    assert any("snd_hda_codec_generic drives hdaudioC0D0 too" in p.message for p in foreign)


# -- and right before it


def test_a_module_whose_use_nobody_saw_refuses_and_all_is_given_back(tmp_path: Path) -> None:
    """The check cannot know what a unit that stops held, so it lets that pass; rmmod does not."""
    host = make(tmp_path, "services", "modules", "pci").file("/usr/bin/systemctl", SYSTEMCTL, 0o755)
    host.file("/run/systemd/system/.keep").file("/units/.system", "running").file("/units/.calls")
    host.file("/units/nvidia-persistenced.service", "active")
    text = host.read("/etc/virt-usher/domains/guest.toml")
    host.domain(
        "guest", text.replace("[plugins.services]", '[plugins.services]\nstop = ["nvidia-persistenced"]')
    )
    host.config("[plugins.reset_check]\nenabled = false\n")
    host.file("/sys/module/nvidia/refcnt", "4", 0o444)
    said = refused(host)
    assert "the module nvidia is in use" in said
    assert loaded(host) == sorted(STACK)


def test_an_error_of_rmmod_is_what_the_refusal_says(tmp_path: Path) -> None:
    host = make(tmp_path)
    host.file(
        "/sbin/rmmod",
        "#!/bin/sh\necho 'rmmod: ERROR: could not remove: Operation not permitted'; exit 1",
        0o755,
    )
    assert "the module nvidia_drm cannot be unloaded: rmmod: ERROR: could not remove" in refused(host)


# -- the fake kernel, as seen on 6.12


def test_the_fake_kernel(tmp_path: Path) -> None:
    host = make(tmp_path)
    assert host.rmmod("nvidia") == 1
    for name in STACK:
        assert host.rmmod(name) == 0
    assert not host.exists("/sys/bus/pci/drivers/nvidia")
    assert host.state(GPU) == ("", "(null)")
    with pytest.raises(FileNotFoundError):
        host.write("/sys/bus/pci/drivers/nvidia/bind", GPU)
    assert host.rmmod("nvidia") == 1
    assert host.modprobe("-n", "nvidia_drm") == 0
    assert not loaded(host)
    host.modprobe("nvidia_drm")
    assert loaded(host) == ["nvidia", "nvidia_drm", "nvidia_modeset"]
    assert host.number("/sys/module/nvidia/refcnt") == 2
    assert host.driver_of(GPU) == "nvidia"
