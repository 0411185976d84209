"""Which devices the plugin takes, for which driver, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.plugins import test_services

from virt_usher import BindDriver, Domain
from virt_usher.config import settings
from virt_usher.prepare import Plan, make_plan
from virt_usher.testing import ask, domain_xml, run_hook
from virt_usher.testing.pci import PciHost

GPU, AUDIO, PORT = "0000:01:00.0", "0000:01:00.1", "0000:00:01.0"
GPU_ID, AUDIO_ID = "10de:13c2", "10de:0fbb"
KERNEL = "6.12.0"
ALIASES = """\
alias pci:v00008086d000010D3sv*sd*bc*sc*i* e1000e
alias vfio_pci:v*d*sv*sd*bc*sc*i* vfio_pci
alias vfio_pci:v000010DEd000013C2sv*sd*bc*sc*i* nvgrace_gpu_vfio_pci
alias vfio_pci:v000010DEd*sv*sd*bc*sc*i* wide_vfio_pci
alias vfio_pci:v000015B3d0000101Esv*sd*bc*sc*i* mlx5_vfio_pci
"""


def source(address: str) -> str:
    domain, bus, rest = address.split(":")
    slot, function = rest.split(".")
    where = f"domain='0x{domain}' bus='0x{bus}' slot='0x{slot}' function='0x{function}'"
    return f"<source><address type='pci' {where}/></source>"


def xml(*addresses: str, managed: str = "yes", inner: str = "", name: str = "guest") -> bytes:
    devices = "".join(
        f"<hostdev mode='subsystem' type='pci' managed='{managed}'>{inner}{source(a)}</hostdev>"
        for a in addresses
    )
    return domain_xml(name, f"<devices>{devices}</devices>")


@pytest.fixture
def pc(tmp_path: Path) -> PciHost:
    """A graphics card and its sound in one group with their root port, which stays."""
    host = PciHost(tmp_path)
    for name in ("vfio-pci", "pci-stub"):
        host.driver(name)
    host.file("/proc/sys/kernel/osrelease", KERNEL).file(f"/lib/modules/{KERNEL}/modules.alias", ALIASES)
    host.device(PORT, "8086:0151", "pcieport", kind="060400", group=1)
    host.device(GPU, GPU_ID, "nouveau", kind="030000", under=PORT)
    host.device(AUDIO, AUDIO_ID, "snd_hda_intel", kind="040300", under=PORT)
    host.config("[plugins.reset_check]\nenabled = false\n").domain("guest", "[plugins.pci]\n")
    return host


def binds(plan: Plan) -> dict[str, tuple[str, bool]]:
    return {a.address: (a.driver, a.managed) for a in plan.actions if isinstance(a, BindDriver)}


def refusals(plan: Plan) -> list[str]:
    return [p.message for p in plan.problems]


# -- what is taken, and for whom


def test_managed_devices_go_where_libvirt_wants_them(pc: PciHost) -> None:
    plan = ask(pc, "pci", xml(GPU, AUDIO))
    assert binds(plan) == {GPU: ("vfio-pci", True), AUDIO: ("vfio-pci", True)}
    assert not refusals(plan)


def test_a_driver_that_the_xml_names(pc: PciHost) -> None:
    pc.driver("nvgrace_gpu_vfio_pci")
    named = xml(GPU, AUDIO, inner="<driver name='vfio' model='nvgrace_gpu_vfio_pci'/>")
    assert binds(ask(pc, "pci", named))[GPU] == ("nvgrace_gpu_vfio_pci", True)


@pytest.mark.parametrize("managed", ["no", None])
def test_the_best_vfio_driver_for_what_libvirt_does_not_manage(pc: PciHost, managed: str | None) -> None:
    for name in ("nvgrace_gpu_vfio_pci", "wide_vfio_pci"):
        pc.driver(name)
    unmanaged = xml(GPU, AUDIO, managed="no")
    if managed is None:
        arguments = "".join(
            f"<q:arg value='-device'/><q:arg value='vfio-pci,host=01:00.{n}'/>" for n in (0, 1)
        )
        qemu = "xmlns:q='http://libvirt.org/schemas/domain/qemu/1.0'"
        unmanaged = domain_xml(body=f"<q:commandline {qemu}>{arguments}</q:commandline>")
    plan = ask(pc, "pci", unmanaged)
    assert binds(plan) == {GPU: ("nvgrace_gpu_vfio_pci", False), AUDIO: ("wide_vfio_pci", False)}
    assert not refusals(plan)


def test_a_device_without_a_driver_of_its_own_kind(pc: PciHost) -> None:
    pc.device("0000:05:00.0", "8086:10d3", "e1000e")
    assert binds(ask(pc, "pci", xml("0000:05:00.0", managed="no"))) == {"0000:05:00.0": ("vfio-pci", False)}


def test_another_driver_by_option(pc: PciHost) -> None:
    plan = ask(pc, "pci", xml(GPU, AUDIO, managed="no"), {"driver": "pci-stub"})
    assert binds(plan) == {GPU: ("pci-stub", False), AUDIO: ("pci-stub", False)}
    assert [a.binds for a in plan.actions if isinstance(a, BindDriver)] == [None, None]


def test_the_rest_of_the_group_without_bridges(pc: PciHost) -> None:
    plan = ask(pc, "pci", xml(GPU), {"group": True})
    assert binds(plan) == {GPU: ("vfio-pci", True), AUDIO: ("wide_vfio_pci", False)}
    missing = f"pci: {AUDIO} ({AUDIO_ID}) needs 'wide_vfio_pci', a driver this kernel has not"
    assert refusals(plan) == [missing]


def test_a_whole_domain(pc: PciHost) -> None:
    before = pc.snapshot()
    result = run_hook(pc, "guest", "prepare", xml(GPU, AUDIO))
    assert result.status == 0, result.stderr
    assert (pc.driver_of(GPU), pc.driver_of(AUDIO), pc.driver_of(PORT)) == (
        "vfio-pci",
        "vfio-pci",
        "pcieport",
    )
    assert run_hook(pc, "guest", "start", xml(GPU, AUDIO)).status == 0
    assert run_hook(pc, "guest", "release").status == 0
    assert pc.snapshot() == before


def test_a_twin_card_is_not_touched(pc: PciHost) -> None:
    """Two of the same kind: by address, never by id."""
    pc.device("0000:07:00.0", GPU_ID, "nouveau", kind="030000")
    assert run_hook(pc, "guest", "prepare", xml(GPU, AUDIO)).status == 0
    assert pc.driver_of("0000:07:00.0") == "nouveau"


def test_a_failure_in_the_middle_gives_all_back(pc: PciHost) -> None:
    before = pc.snapshot()
    pc.hide(f"probe.vfio-pci.{AUDIO}", 5)
    result = run_hook(pc, "guest", "prepare", xml(GPU, AUDIO))
    assert f"{AUDIO} cannot be given to vfio-pci: Input/output error (EIO)" in result.stderr
    assert pc.snapshot() == before


# -- what is refused


def test_a_group_that_stays(pc: PciHost) -> None:
    plan = ask(pc, "pci", xml(GPU))
    (problem,) = plan.problems
    what = f"{GPU} ({GPU_ID}) shares IOMMU group 1 with {AUDIO}, which stays with snd_hda_intel"
    assert problem.message == f"pci: {what}"
    waive = f"virt-usher waive guest {GPU} group 'REASON'"
    assert problem.hint == f"virt-usher enable guest pci group=true; or: {waive}"


@pytest.mark.parametrize("driver", ["", "pci-stub", "vfio-pci"])
def test_a_group_partner_that_no_driver_uses_for_the_host(pc: PciHost, driver: str) -> None:
    pc.device("0000:02:00.0", GPU_ID, "nouveau").device("0000:02:00.1", AUDIO_ID, driver)
    assert not refusals(ask(pc, "pci", xml("0000:02:00.0")))


def test_shpchp_on_a_bridge(pc: PciHost) -> None:
    pc.device("0000:05:00.0", "1b36:000e", "shpchp", kind="060400", group=6)
    pc.device("0000:06:01.0", "8086:100e", "e1000", under="0000:05:00.0")
    (problem,) = ask(pc, "pci", xml("0000:06:01.0")).problems
    assert "with 0000:05:00.0, which stays with shpchp" in problem.message
    assert problem.hint.startswith("echo 0000:05:00.0 >/sys/bus/pci/drivers/shpchp/unbind; or: ")


def test_a_part_of_the_chipset(pc: PciHost) -> None:
    pc.device("0000:00:1f.0", "8086:1e49", "lpc_ich", kind="060100", group=9)
    pc.device("0000:00:1f.2", "8086:1e02", "ahci", kind="010601", group=9)
    (problem,) = ask(pc, "pci", xml("0000:00:1f.2"), {"group": True}).problems
    assert problem.hint.startswith("it belongs to the host's chipset: give the domain another device")


def test_a_bridge_and_an_absent_device(pc: PciHost) -> None:
    plan = ask(pc, "pci", xml(PORT, "0000:0b:00.0", GPU, AUDIO))
    assert refusals(plan) == [
        f"pci: {PORT} is a bridge, which no domain can have",
        "pci: 0000:0b:00.0 is not in this host",
    ]
    assert PORT not in binds(plan)


def denylist(pc: PciHost) -> None:
    pc.file(f"{pc.real('0000:05:00.0')}/device", "0x37c9")


def rmrr(pc: PciHost) -> None:
    pc.file(
        "/sys/kernel/iommu_groups/5/reserved_regions",
        f"0x00 0x01 direct-relaxable\n{MSI}\n0x02 0x03 direct\n",
    )


def no_remapping(pc: PciHost) -> None:
    pc.link_to("/sys/class/iommu/dmar0", "../../devices/virtual/iommu/dmar0").file(
        "/sys/devices/virtual/iommu/dmar0/x"
    )
    for number, chip in enumerate(("IO-APIC", "IO-APIC", "XT-PIC")):
        pc.file(f"/sys/kernel/irq/{number}/chip_name", chip)


MSI = "0xfee00000 0xfeefffff msi"
UNSAFE = "allow_unsafe_interrupts"


@dataclass(frozen=True)
class Host:
    """A host where VFIO refuses a device, the refusal, and the file that tells of a way round."""

    what: Callable[[PciHost], None]
    says: str
    file: str = ""
    text: str = ""


HOSTS = [
    Host(denylist, "vfio-pci's list of devices that it refuses (Intel QAT C62x VF)"),
    Host(denylist, "", "/sys/module/vfio_pci/parameters/disable_denylist", "Y"),
    Host(denylist, "vfio-pci's list", "/sys/module/vfio_pci/parameters/disable_denylist", "N"),
    Host(denylist, "", "/etc/modprobe.d/vfio.conf", "options vfio-pci disable_denylist=1"),
    Host(denylist, "", "/proc/cmdline", "quiet vfio_pci.disable_denylist=1"),
    Host(rmrr, "shares memory with the firmware (a 'direct' region of IOMMU group 5, RMRR)"),
    Host(rmrr, "", "/sys/kernel/iommu_groups/5/reserved_regions", f"0x00 0x01 direct-relaxable\n{MSI}"),
    Host(no_remapping, "this host does not remap them"),
    Host(no_remapping, "", "/sys/kernel/irq/0/chip_name", "IR-IO-APIC"),
    Host(no_remapping, "", f"/sys/module/vfio_iommu_type1/parameters/{UNSAFE}", "Y"),
    Host(no_remapping, "this host does not", f"/sys/module/vfio_iommu_type1/parameters/{UNSAFE}", "N"),
    Host(no_remapping, "", "/etc/modprobe.d/x.conf", f"options vfio_iommu_type1 {UNSAFE}=1"),
]


@pytest.mark.parametrize("case", HOSTS, ids=lambda c: f"{c.what.__name__}-{c.file.rpartition('/')[2]}")
def test_what_vfio_would_refuse_is_said_before_anything_is_touched(pc: PciHost, case: Host) -> None:
    pc.device("0000:05:00.0", "8086:10d3", "e1000e")
    case.what(pc)
    if case.file:
        pc.file(case.file, case.text)
    plan = ask(pc, "pci", xml("0000:05:00.0"))
    assert [case.says in p for p in refusals(plan)] == [True] * bool(case.says)
    assert all("virt-usher waive guest 0000:05:00.0 vfio 'REASON'" in p.hint for p in plan.problems)
    assert not refusals(ask(pc, "pci", xml("0000:05:00.0", managed="no"), {"driver": "pci-stub"}))


def test_no_iommu(tmp_path: Path) -> None:
    host = PciHost(tmp_path).driver("vfio-pci").device(GPU, GPU_ID, "nouveau", group=-1)
    no_remapping(host)
    expected = f"pci: {GPU} ({GPU_ID}) has no IOMMU group: the IOMMU is off"
    assert refusals(ask(host, "pci", xml(GPU))) == [expected]


@pytest.mark.parametrize("listed", ["dep", "builtin", ""])
def test_a_driver_that_is_not_loaded_must_be_on_the_disk(tmp_path: Path, listed: str) -> None:
    host = PciHost(tmp_path).device(GPU, GPU_ID, "nouveau").file("/proc/sys/kernel/osrelease", KERNEL)
    if listed:
        text = "kernel/drivers/vfio/pci/vfio-pci.ko.xz: kernel/drivers/vfio/vfio.ko.xz"
        host.file(f"/lib/modules/{KERNEL}/modules.{listed}", text)
    missing = f"pci: {GPU} ({GPU_ID}) needs 'vfio-pci', a driver this kernel has not"
    assert refusals(ask(host, "pci", xml(GPU))) == ([] if listed else [missing])


def test_a_name_that_is_none(pc: PciHost) -> None:
    odd = xml(GPU, AUDIO, inner="<driver model='../../../../tmp/x'/>")
    expected = f"pci: {GPU} ({GPU_ID}) cannot have '../../../../tmp/x', which is no driver's name"
    assert expected in refusals(ask(pc, "pci", odd))


OPTIONS = "virt-usher plugins pci shows its options"
EXPECTED = [
    (f"{GPU}={GPU_ID}", "", ""),
    (f"01:00.0 = {GPU_ID.upper()}", "", ""),
    ("0000:09:00.0=dead:beef", "", ""),  # none of this domain's
    (f"{GPU}=1002:67df", f"{GPU} is {GPU_ID}, and 1002:67df is expected", "lspci -Dnn"),
    (
        f"{GPU}={AUDIO_ID}",
        f"{GPU} is {GPU_ID}, and {AUDIO_ID} is expected",
        f"it is at {AUDIO}: virsh edit guest",
    ),
    ("0000:0b:00.0=10de:1288", "0000:0b:00.0 is not there, and 10de:1288 is expected", "lspci -Dnn"),
    (GPU, f"expect: '{GPU}' is not of the form 0000:01:00.0=10de:1288", OPTIONS),
    ("gpu=10de:1288", "expect: 'gpu=10de:1288' is not of the form", OPTIONS),
]


@pytest.mark.parametrize(("entry", "says", "hint"), EXPECTED)
def test_another_device_than_the_admin_expects(pc: PciHost, entry: str, says: str, hint: str) -> None:
    gone = ("0000:0b:00.0",) if "0b" in entry else ()
    plan = ask(pc, "pci", xml(GPU, AUDIO, *gone), {"expect": [entry]})
    found = [p for p in plan.problems if "expect" in p.message]
    assert [(says in p.message, p.hint) for p in found] == [(True, hint)] * bool(says)


def test_everything_at_once_and_nothing_touched(pc: PciHost) -> None:
    pc.device("0000:03:00.0", "144d:a80a", "nvme", kind="010802")
    pc.hangs_on("0000:03:00.0", "block", "nvme0n1", dev="259:0")
    pc.file("/proc/1/mountinfo", "30 1 259:0 / / rw - ext4 /dev/nvme0n1 rw")
    pc.runs("pipewire", "/dev/snd/controlC1")
    pc.hangs_on(AUDIO, "sound", "controlC1", "sound/card1", node="snd/controlC1")
    before = pc.snapshot()
    result = run_hook(pc, "guest", "prepare", xml(PORT, GPU, AUDIO, "0000:03:00.0"))
    assert result.status == 3
    assert pc.snapshot() == before
    for text in (
        f"{PORT} is a bridge",
        f"{AUDIO} ({AUDIO_ID}) is in use (/dev/snd/controlC1) by pipewire",
        f"virt-usher waive guest {AUDIO} in-use 'REASON'",
        "0000:03:00.0 (144d:a80a) carries what is mounted on /",
    ):
        assert text in result.stderr
    assert len(result.stderr.strip().splitlines()) <= 10


# -- waivers


def waive(address: str, device: str, problem: str) -> str:
    return f'[waive."{address}"]\ndevice = "{device}"\nproblem = "{problem}"\nreason = "a test"\n'


def test_a_use_that_an_admin_waived(pc: PciHost) -> None:
    pc.hangs_on(AUDIO, "sound", "controlC1", "sound/card1", node="snd/controlC1")
    pc.runs("pipewire", "/dev/snd/controlC1")
    assert run_hook(pc, "guest", "prepare", xml(GPU, AUDIO)).status == 3
    pc.domain("guest", "[plugins.pci]\n" + waive(AUDIO, AUDIO_ID, "in-use"))
    result = run_hook(pc, "guest", "prepare", xml(GPU, AUDIO))
    assert result.status == 0, result.stderr
    assert pc.driver_of(AUDIO) == "vfio-pci"


def test_a_mounted_disk_has_no_waiver(pc: PciHost) -> None:
    pc.device("0000:03:00.0", "144d:a80a", "nvme", kind="010802")
    pc.hangs_on("0000:03:00.0", "block", "nvme0n1", dev="259:0")
    pc.file("/proc/1/mountinfo", "30 1 259:0 / /mnt rw - ext4 /dev/nvme0n1 rw")
    for problem, told in (("data", "'data' is no problem that can be waived"), ("in-use", "")):
        pc.domain("guest", "[plugins.pci]\n" + waive("0000:03:00.0", "144d:a80a", problem))
        result = run_hook(pc, "guest", "prepare", xml("0000:03:00.0"))
        assert result.status == 3
        assert "umount /mnt" in result.stderr
        assert told in result.stderr
        assert ("waive" in result.stderr) == bool(told)


def test_virtual_functions_stand_in_the_way(pc: PciHost) -> None:
    pc.device("0000:07:00.0", "1b36:0010", "nvme", vfs=2)
    (problem,) = ask(pc, "pci", xml("0000:07:00.0")).problems
    assert problem.message == "pci: 0000:07:00.0 (1b36:0010) has 2 virtual functions"
    assert problem.hint == "echo 0 >/sys/bus/pci/devices/0000:07:00.0/sriov_numvfs"


# -- plans, and devices that come late


def test_what_a_plan_shows(pc: PciHost) -> None:
    plan = ask(pc, "pci", xml(GPU, AUDIO), {"keep_awake": True})
    assert [a.describe(pc) for a in plan.actions] == [
        f"{GPU}: nouveau → vfio-pci, kept awake",
        f"{AUDIO}: snd_hda_intel → vfio-pci, kept awake",
    ]


def test_a_virtual_function_out_of_a_pool_is_libvirts(pc: PciHost) -> None:
    """It is bound when `start` comes; our own record of its driver would be wrong."""
    network = "<devices><interface type='network'><source network='pool'/></interface></devices>"
    assert run_hook(pc, "guest", "prepare", domain_xml(body=network)).status == 0
    pc.device("0000:07:00.1", "8086:10ed", "ixgbevf")
    pc.libvirt_detaches("0000:07:00.1")
    late = f"<devices><interface type='hostdev' managed='yes'>{source('0000:07:00.1')}</interface></devices>"
    result = run_hook(pc, "guest", "start", domain_xml(body=late))
    assert result.status == 0, result.stderr
    pc.libvirt_reattaches("0000:07:00.1")
    assert run_hook(pc, "guest", "release").status == 0
    assert pc.driver_of("0000:07:00.1") == "ixgbevf"


def test_one_out_of_a_pool_whose_group_stays_is_refused_at_start(pc: PciHost) -> None:
    assert run_hook(pc, "guest", "prepare", domain_xml()).status == 0
    pc.device("0000:07:00.1", "8086:10ed", "vfio-pci").device("0000:07:00.0", "8086:10ed", "ixgbe")
    late = f"<devices><interface type='hostdev' managed='yes'>{source('0000:07:00.1')}</interface></devices>"
    result = run_hook(pc, "guest", "start", domain_xml(body=late))
    assert result.status == 3
    assert "shares IOMMU group 7 with 0000:07:00.0, which stays with ixgbe" in result.stderr


def test_one_out_of_a_pool_that_libvirt_left_where_it_was_is_refused_at_start(pc: PciHost) -> None:
    """libvirt leaves a device with a driver that is just being loaded, since it has no `unbind` yet."""
    assert run_hook(pc, "guest", "prepare", domain_xml()).status == 0
    pc.device("0000:07:00.1", "8086:10ed", "ixgbevf")
    late = f"<devices><interface type='hostdev' managed='yes'>{source('0000:07:00.1')}</interface></devices>"
    result = run_hook(pc, "guest", "start", domain_xml(body=late))
    assert result.status == 3
    assert "libvirt has left 0000:07:00.1 with ixgbevf\n      virsh start guest" in result.stderr


# -- what the plan ends before it takes a device


def with_units(host: PciHost, plugins: str, *, obeys: bool = True) -> int:
    """Let gdm hold the card; systemctl stops it, and ends its process or does not."""
    pid = host.hangs_on(GPU, "drm", "card0", "drm/card0").runs(
        "gdm-x", "/dev/dri/card0", cgroup="/system.slice/gdm.service"
    )
    gone = host.path(f"/proc/{pid}")
    script = test_services.SYSTEMCTL.replace("stop:*)", f"stop:*) rm -r '{gone}';" if obeys else "stop:*)")
    host.file("/usr/bin/systemctl", script, 0o755).file("/run/systemd/system/.keep")
    host.link_to("/etc/systemd/system/display-manager.service", "/lib/systemd/system/gdm3.service")
    host.link_to("/usr/lib/systemd/system/gdm3.service", "gdm.service")
    host.file("/units/.system", "running").file("/units/.calls")
    host.file("/units/gdm.service", "active")
    host.domain("guest", plugins)
    return pid


@pytest.mark.parametrize("unit", ["gdm", "gdm3", "display-manager"])
@pytest.mark.parametrize("session", [False, True])
def test_a_process_whose_unit_the_plan_stops_first(pc: PciHost, unit: str, session: bool) -> None:
    """Debian's gdm has three names; a process of a session ends with the display manager."""
    pid = with_units(pc, f'[plugins.services]\nstop = ["{unit}"]\n[plugins.pci]\n')
    if session:
        pc.file(f"/proc/{pid}/cgroup", "0::/user.slice/user-1000.slice/session-2.scope")
        pc.logs_in(2, GDM)
    result = run_hook(pc, "guest", "prepare", xml(GPU, AUDIO))
    assert result.status == 0, result.stderr
    assert pc.driver_of(GPU) == "vfio-pci"


def test_a_process_that_does_not_end_with_its_unit(pc: PciHost) -> None:
    """It has as long as the start; then that is refused, and the unit is back."""
    pid = with_units(pc, '[plugins.services]\nstop = ["gdm"]\n[plugins.pci]\n', obeys=False)
    pc.config("[plugins.reset_check]\nenabled = false\n[deadlines]\nstart = 4\n")
    before = pc.snapshot()
    result = run_hook(pc, "guest", "prepare", xml(GPU, AUDIO))
    assert result.status == 3
    assert f"is in use (/dev/dri/card0) by gdm-x (pid {pid})" in result.stderr
    assert pc.snapshot() == before
    assert Path(pc.path("/units/gdm.service")).read_text().strip() == "active"


@pytest.mark.parametrize(
    ("plugins", "reason", "hint"),
    [
        (
            '[plugins.pci]\n[plugins.services]\nstop = ["gdm"]\n',
            ", which the plan ends only after it takes the device",
            "in /etc/virt-usher/domains/, put the plugin that ends it before pci",
        ),
        (
            '[plugins.services]\nstop = ["smb"]\n[plugins.pci]\n',
            "by gdm-x",
            "virt-usher enable guest services stop=gdm.service,smb.service; or: virt-usher waive",
        ),
        (
            '[plugins.services]\nstart = ["gdm"]\n[plugins.pci]\n',
            "by gdm-x",
            "enable guest services stop=gdm.service",
        ),
    ],
)
def test_a_process_that_the_plan_does_not_end_in_time(
    pc: PciHost, plugins: str, reason: str, hint: str
) -> None:
    with_units(pc, plugins)
    pc.file("/units/smb.service", "active")
    before = pc.snapshot()
    result = run_hook(pc, "guest", "prepare", xml(GPU, AUDIO))
    assert result.status == 3
    assert reason in result.stderr
    assert hint in result.stderr
    assert pc.snapshot() == before


GDM = "/system.slice/gdm.service"
OF_THE_USER = "/user.slice/user-1000.slice/user@1000.service/session.slice/wireplumber.service"


@pytest.mark.parametrize("cgroup", ["/system.slice/systemd-logind.service", "/init.scope", OF_THE_USER])
def test_who_lets_go_of_a_card_with_the_desktop(pc: PciHost, cgroup: str) -> None:
    with_units(pc, '[plugins.services]\nstop = ["display-manager"]\n[plugins.pci]\n')
    pc.logs_in(2, GDM)
    shows = {"status": "connected", "enabled": "enabled"}  # afterwards, too: the console's picture then
    pc.hangs_on(GPU, "drm", "card0-HDMI-A-1", "drm/card0/card0-HDMI-A-1", **shows)
    pid = pc.runs("a-program", "/dev/dri/card0", cgroup=cgroup)
    gone = f"stop:*) rm -r '{pc.path(f'/proc/{pid}')}';"
    systemctl = Path(pc.path("/usr/bin/systemctl"))
    systemctl.write_text(systemctl.read_text().replace("stop:*)", gone))
    result = run_hook(pc, "guest", "prepare", xml(GPU, AUDIO))
    assert result.status == 0, result.stderr
    assert pc.driver_of(GPU) == "vfio-pci"


def test_what_stays_after_the_desktop_since_its_user_is_logged_in_elsewhere(pc: PciHost) -> None:
    """The hint names the user's manager, and a plan that stops it as well passes the check."""
    with_units(pc, "")
    pc.logs_in(2, GDM)
    pc.logs_in(5)
    pc.file("/units/user@1000.service", "active")
    pc.runs("wireplumber", "/dev/dri/card0", cgroup=OF_THE_USER)
    stops = "[plugins.services]\nstop = [{}]\n[plugins.pci]\n"
    pc.domain("guest", stops.format('"display-manager"'))
    result = run_hook(pc, "guest", "prepare", xml(GPU, AUDIO))
    assert result.status == 3
    assert "enable guest services stop=gdm.service,user@1000.service" in result.stderr
    pc.domain("guest", stops.format('"display-manager", "user@1000"'))
    guest = Domain.from_xml(xml(GPU, AUDIO))
    assert not make_plan(pc, guest, settings(pc, guest)).problems
