"""Recorded hosts: one line per PCI function in fixtures/, made into a tree of sysfs files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from virt_usher.host import Host

FIXTURES = Path(__file__).parent / "fixtures"
MACHINES = sorted(p.stem for p in FIXTURES.glob("*.txt"))


@dataclass(frozen=True)
class Function:
    """A line of a fixture: a PCI function and the verdicts expected for it."""

    chain: tuple[str, ...]
    id: str
    class_code: str
    driver: str
    group: str
    methods: str
    flags: tuple[str, ...]
    alone: str
    together: str

    @property
    def address(self) -> str:
        return self.chain[-1]

    def flag(self, name: str) -> str:
        """Return what follows 'name=' among the flags; '1' for a bare name, '' without it."""
        return next((f.partition("=")[2] or "1" for f in self.flags if f.partition("=")[0] == name), "")


def read(machine: str) -> list[Function]:
    """Read a fixture."""
    return parse((FIXTURES / f"{machine}.txt").read_text())


def parse(text: str) -> list[Function]:
    """Read lines as fixtures have them."""
    found = []
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            chain, identity, class_code, driver, group, methods, flags, alone, together = line.split()
            steps = tuple(full(a) for a in chain.split("/"))
            marks = tuple(flags.replace("-", "").split(","))
            found.append(
                Function(steps, identity, class_code, driver, group, methods, marks, alone, together)
            )
    return found


def full(address: str) -> str:
    """Return an address with its domain."""
    return address if address.count(":") == 2 else f"0000:{address}"


def build(root: Path, functions: list[Function]) -> Host:
    """Make the files and links that the kernel would show."""
    for function in functions:
        _function(root, function)
    return Host(str(root))


def _function(root: Path, function: Function) -> None:
    steps: list[str] = []
    for address in function.chain:
        bus = address.rpartition(":")[0]
        if not steps or steps[-1].split(":")[0] != address.split(":")[0]:
            steps.append(f"pci{bus}")  # a root bus: the first, or a domain of its own below VMD
        steps.append(address)
    real = root / "sys/devices" / "/".join(steps)
    real.mkdir(parents=True, exist_ok=True)
    link(root / "sys/bus/pci/devices" / function.address, real)
    vendor, device = function.id.split(":")
    files = {
        "vendor": f"0x{vendor}",
        "device": f"0x{device}",
        "class": f"0x{function.class_code}",
        "revision": "0x00",
        "modalias": f"pci:v0000{vendor.upper()}d0000{device.upper()}",
        "driver_override": "(null)",
        "numa_node": function.flag("numa") or "-1",
    }
    if function.methods != "-":
        files["reset"] = ""
    if function.methods not in "-?":
        files["reset_method"] = function.methods.replace("empty", "").replace("+", " ")
    if function.class_code == "030000":
        files["boot_vga"] = function.flag("boot_vga") or "0"
    if function.flag("vfs"):
        files["sriov_numvfs"] = function.flag("vfs")
    for name, text in files.items():
        (real / name).write_text(f"{text}\n")
    config = bytearray(64)
    config[0x0E] = function.class_code.startswith("0604") | (0x80 if function.flag("multifunction") else 0)
    (real / "config").write_bytes(b"\xff" * 64 if function.flag("silent") else bytes(config))
    if function.driver != "-":
        bind(root, function.address, function.driver)
    if function.group != "-":
        group = root / "sys/kernel/iommu_groups" / function.group
        link(group / "devices" / function.address, real)
        link(real / "iommu_group", group)
    if function.flag("vf"):
        link(real / "physfn", real.parent / full(function.flag("vf")))
    if function.flag("pciehp"):
        link(root / f"sys/bus/pci_express/drivers/pciehp/{function.address}:pcie004", real)


def link(path: Path, target: Path) -> None:
    """Make a symbolic link, relative as sysfs has them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    up = "../" * (len(path.parts) - len(_common(path, target)) - 1)
    path.symlink_to(up + "/".join(target.parts[len(_common(path, target)) :]))


def _common(one: Path, other: Path) -> list[str]:
    shared = []
    for a, b in zip(one.parts, other.parts, strict=False):
        if a != b:
            break
        shared.append(a)
    return shared


def bind(root: Path, address: str, driver: str) -> None:
    """Put a function on a driver, or on another one; '' leaves it without."""
    device = (root / "sys/bus/pci/devices" / address).resolve()
    (device / "driver").unlink(missing_ok=True)
    if driver:
        link(device / "driver", root / "sys/bus/pci/drivers" / driver)
