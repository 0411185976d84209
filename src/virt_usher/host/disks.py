"""What the host has on a PCI device's disks: mounts, swap, and whatever is stacked on them.

Read from sysfs, /proc and udev's notes: no disk is opened. What cannot be read raises OSError.
"""

from __future__ import annotations

TYPE_CHECKING = False  # importing typing would cost release more than all its work
if TYPE_CHECKING:
    from virt_usher.host import Host
    from virt_usher.host.links import Links

HOST_NEEDS = ("/", "/boot", "/boot/efi", "/usr", "/var", "/home", "/nix", "/etc")
_BLOCK = "/sys/class/block"
_POOLS = "/proc/spl/kstat/zfs"


class Disks:
    """The disks of one device, and `blocks`: with their partitions and all that is built upon them."""

    def __init__(self, host: Host, links: Links, address: str) -> None:
        self._host = host
        self._links = links
        self._own = self._paths(address)
        self.blocks = self._with_above(self._own)
        # What a mount or a swap may call them: dm devices have two names.
        mapped = {host.known(f"{_BLOCK}/{n}/dm/name") for n in self.blocks} - {""}
        self._names = {*self.blocks, *mapped}

    def places(self) -> list[str]:
        """Return what is mounted from them, what the host needs first."""
        numbers = {self._host.known(f"{_BLOCK}/{n}/dev") for n in self.blocks} - {""}
        found, pools = [], self._zfs()
        for line in self._host.known("/proc/1/mountinfo").splitlines():
            left, _, right = line.partition(" - ")
            fields, (kind, source, options, *_) = left.split(" "), [*right.split(" "), "", "", ""]
            pool = source.partition("/")[0] if kind == "zfs" else ""
            known = pool in pools or not self._names.isdisjoint(self._named(kind, source, options))
            if len(fields) > 4 and (known or fields[2] in numbers):
                found.append(fields[4])
        return sorted(dict.fromkeys(found), key=lambda p: (p not in HOST_NEEDS, len(p), p))

    def _named(self, kind: str, source: str, options: str) -> list[str]:
        """Return the devices that a mount names: its number is that of one of them at best.

        btrfs, bcachefs and ZFS have numbers of their own; XFS may keep its log and more on other disks.
        """
        devices = source.split(":") if kind == "bcachefs" else [source]
        more = [o.partition("=")[2] for o in options.split(",") if o.startswith(("logdev=", "rtdev="))]
        # A 9p's tag, or the end of an NFS's path, may be called as a disk is.
        nodes = [d for d in (*devices, *more) if d.startswith("/dev/")]
        # mount(8) resolves the source, but not these: /dev/VG/LV, /dev/disk/by-id/….
        return [n.rpartition("/")[2] for n in nodes] + [self._host.link(d) for d in more]

    def swaps(self) -> list[str]:
        """Return the swap spaces on them."""
        lines = self._host.known("/proc/swaps").splitlines()[1:]
        files = [line.split()[0] for line in lines if line.strip()]
        return [f for f in files if f.startswith("/dev/") and f.rpartition("/")[2] in self._names]

    def upper(self) -> list[str]:
        """Return what is stacked on them."""
        found = [n for n in self.blocks if n not in self._own]
        return found + [f"bcache on {n}" for n in self.blocks if self._host.exists(f"{_BLOCK}/{n}/bcache")]

    def spare(self) -> bool:
        """Tell whether one may serve a pool of the host: the label of a cache or a spare names none."""
        return any(not name for name, _ in self._members()) and bool(self._imported())

    def _paths(self, address: str) -> list[str]:
        """Return the device's own disks and partitions."""
        found = self._links.below(_BLOCK, address)
        for subsystem in self._host.entries("/sys/class/nvme-subsystem"):
            # With native multipath the disk hangs on the subsystem, and the controller's own path is hidden.
            base = f"/sys/class/nvme-subsystem/{subsystem}"
            if any(f"/{address}/" in self._host.target(f"{base}/{n}") for n in self._host.entries(base)):
                found += [n for n, t in self._links.of(_BLOCK).items() if f"/{subsystem}/" in t]
        return found

    def _with_above(self, disks: list[str]) -> list[str]:
        """Return disks and partitions with all that is built upon them, through any depth."""
        todo, found = list(disks), list[str]()
        loops = self._loops() if disks else {}
        while todo:
            name = todo.pop()
            if name not in found:
                found.append(name)
                todo += self._host.entries(f"{_BLOCK}/{name}/holders")
                todo += [n for n, t in self._links.of(_BLOCK).items() if f"/{name}/" in t]
                todo += loops.get(f"/dev/{name}", ())
        return sorted(found)

    def _loops(self) -> dict[str, list[str]]:
        """Return what loop devices are set up on, which has no holders: file or device -> loop devices."""
        found: dict[str, list[str]] = {}
        for name in self._links.of(_BLOCK):
            if name.startswith("loop"):
                found.setdefault(self._host.known(f"{_BLOCK}/{name}/loop/backing_file"), []).append(name)
        return found

    def pools(self) -> list[str]:
        """Return the ZFS pools that the host has, and has from them."""
        theirs = self._zfs()
        return [p for p in self._imported() if p in theirs]

    def _zfs(self) -> set[str]:
        """Return the pools that the host may have from them, by guid: names are for a guest to choose, too.

        Where one of the two guids is not known (older ZFS has no such file), or is no number as both write
        it, the name decides.
        """
        said = {p: self._host.known(f"{_POOLS}/{p}/guid") for p in self._imported()}
        guids = {p: g for p, g in said.items() if g.isdecimal()}
        found = set()
        for name, guid in self._members():
            found |= {p for p, g in guids.items() if g == guid}
            if name and not (guid.isdecimal() and name in guids):
                found.add(name)
        return found

    def _imported(self) -> list[str]:
        """Return the ZFS pools that the host has; there are files beside their folders."""
        return [n for n in self._host.entries(_POOLS) if self._host.entries(f"{_POOLS}/{n}")]

    def _members(self) -> list[tuple[str, str]]:
        """Return name and guid of the pool of each disk that has one, '' where its label does not say."""
        members = [n for n in self.blocks if self._udev(n, "ID_FS_TYPE") == "zfs_member"]
        return [(self._udev(n, "ID_FS_LABEL"), self._udev(n, "ID_FS_UUID")) for n in members]

    def btrfs(self) -> list[str]:
        """Return the mounted btrfs that have one of them, by UUID."""
        base = "/sys/fs/btrfs"
        uuids = self._host.entries(base)
        return [u for u in uuids if any(n in self.blocks for n in self._host.entries(f"{base}/{u}/devices"))]

    def _udev(self, block: str, key: str) -> str:
        """Return what udev found on a disk; it has looked already, and nobody need open it again."""
        number = self._host.known(f"{_BLOCK}/{block}/dev")
        for line in self._host.known(f"/run/udev/data/b{number}").splitlines():
            if line.startswith(f"E:{key}="):
                return line.partition("=")[2]
        return ""
