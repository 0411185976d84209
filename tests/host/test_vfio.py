"""What files tell of VFIO; what the plugin makes of it is in tests/plugins/test_pci.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from virt_usher.host import vfio
from virt_usher.testing import FakeHost
from virt_usher.testing.pci import PciHost

UNSAFE = "allow_unsafe_interrupts"
# The IOMMU's name, the chips of the first interrupts (as seen with intremap on and off), the answer.
CHIPS = [
    ("dmar0", ("IO-APIC", "IO-APIC", "XT-PIC"), False),
    ("dmar0", ("IR-IO-APIC", "IR-IO-APIC", "XT-PIC"), True),
    ("ivhd0", ("XT-PIC", "IR-IO-APIC"), True),
    ("ivhd0", ("XT-PIC",), None),
    ("smmu3.0x000000002b400000", ("GICv3", "IO-APIC"), None),
    ("", ("IO-APIC",), None),  # no IOMMU at all is another refusal's
]


@pytest.mark.parametrize(("iommu", "chips", "expected"), CHIPS)
def test_whether_interrupts_are_remapped(
    tmp_path: Path, iommu: str, chips: tuple[str, ...], expected: bool | None
) -> None:
    host = FakeHost(tmp_path)
    if iommu:
        host.file(f"/sys/class/iommu/{iommu}/x")
    for number, chip in enumerate(chips):
        host.file(f"/sys/kernel/irq/{number}/chip_name", chip)
    assert vfio.remaps_interrupts(host) is expected


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("/proc/cmdline", "quiet", False),
        ("/proc/cmdline", f"vfio_iommu_type1.{UNSAFE}=1", True),
        ("/etc/modprobe.d/a.conf", f"options vfio_iommu_type1 {UNSAFE}=1", True),
        (f"/sys/module/vfio_iommu_type1/parameters/{UNSAFE}", "N", False),
        (f"/sys/module/vfio_iommu_type1/parameters/{UNSAFE}", "Y", True),
        (f"/sys/module/iommufd/parameters/{UNSAFE}", "Y", True),
    ],
)
def test_whether_an_admin_lets_vfio_do_without(tmp_path: Path, file: str, text: str, expected: bool) -> None:
    assert vfio.allows_unsafe_interrupts(FakeHost(tmp_path).file(file, text)) is expected


def test_the_driver_for_a_device_is_found_at_the_end_of_a_long_list(tmp_path: Path) -> None:
    """Debian's modules.alias has 1.4 MB."""
    host = PciHost(tmp_path).device("0000:01:00.0", "15b3:101e")
    line = "alias pci:v00008086d00001572sv*sd*bc*sc*i* i40e\n"
    text = line * 40_000 + "alias vfio_pci:v000015B3d0000101Esv*sd*bc*sc*i* mlx5_vfio_pci\n"
    host.file("/proc/sys/kernel/osrelease", "6.1").file("/lib/modules/6.1/modules.alias", text)
    assert vfio.best_driver(host, host.pci.device("0000:01:00.0")) == "mlx5_vfio_pci"
