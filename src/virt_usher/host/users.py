"""Who on the host uses a PCI device: seen from sysfs and /proc, without opening anything of the device.

The kernel itself protects nobody: it unbinds an NVMe disk under a mounted root, and a network card that is
up. So what cannot be read raises OSError: it is no sign that nobody uses it. Imported lazily, by the plugin
and right before an unbind, release included: it imports next to nothing.
"""

from __future__ import annotations

import os
from itertools import pairwise

from virt_usher.host import console, sessions
from virt_usher.host.disks import HOST_NEEDS, Disks
from virt_usher.host.links import Links

TYPE_CHECKING = False  # importing typing would cost release more than all its work
if TYPE_CHECKING:
    from collections.abc import Iterable

    from virt_usher.host import Host

# How bad it is. DATA and GUEST have no waiver: a mounted disk, and a domain that runs with the device.
DATA, GUEST, VFS, USE, DISPLAY = "data", "guest", "vfs", "in-use", "display"
STUBS = ("pci-stub", "xen-pciback")  # drivers that use nothing
_SHOWN = 3
_OTHER_DISPLAY = "systemctl stop display-manager, and use another display for the host"
# The first word of a keyboard's key bitmap: all of KEY_ESC to KEY_S (udev's ID_INPUT_KEYBOARD).
_KEYBOARD = 0xFFFFFFFE


class User:
    """One use of a device: what, of which kind (`problem`), and what would end it.

    `console`: it shows the text console, and ends with that. `units`: for each process that uses it, the
    units whose stop ends the process. `group`: all of its IOMMU group is used with it, and that is told once.
    """

    __slots__ = ("address", "console", "group", "hint", "problem", "units", "what")

    def __init__(
        self,
        address: str,
        problem: str,
        what: str,
        hint: str,
        console: bool = False,
        units: tuple[frozenset[str], ...] = (),
        group: bool = False,
    ) -> None:
        self.address = address
        self.problem = problem
        self.what = what
        self.hint = hint
        self.console = console
        self.units = units
        self.group = group

    def __repr__(self) -> str:
        return f"User({self.address} {self.problem}: {self.what})"


def find(host: Host, addresses: Iterable[str], but: int | None = None, together: bool = True) -> list[User]:
    """Return who uses these devices, the process `but` excepted; at most one walk over all processes.

    `together`: all of them would be taken, so that the last keyboard may be one of several.
    """
    look = _Look(host, list(addresses), but, together)
    return sorted(look.users(), key=lambda u: (u.address, u.problem != DATA))


class _Look:
    """One look at the host, which reads each list of sysfs once."""

    def __init__(self, host: Host, addresses: list[str], but: int | None, together: bool) -> None:
        self.host = host
        self.together = together
        self.addresses = addresses
        self.but = (os.getpid(), but)
        self.links = Links(host)
        self.pictures: dict[str, list[str]] = {}
        self.hidden = os.geteuid() != 0  # whether there are processes whose files cannot be seen
        self.nodes: dict[str, str] = {}  # what to look for in processes: device node -> address

    def users(self) -> list[User]:
        found: list[User] = []
        for address in self.addresses:
            device = f"/sys/bus/pci/devices/{address}"
            driver = self.host.link(f"{device}/driver")
            self._vfio_nodes(address)
            if not driver:
                found += self._firmware_display(address)
            elif driver not in STUBS and not self._on_vfio(device, driver):
                found += [*self._disks(address), *self._network(address), *self._display(address)]
                found += self._virtual_functions(address)
                self._char_nodes(address, driver)
        return found + self._last_keyboard() + self._processes()

    def _on_vfio(self, device: str, driver: str) -> bool:
        return driver == "vfio-pci" or self.host.exists(f"{device}/vfio-dev")

    # -- disks

    def _disks(self, address: str) -> list[User]:
        """Mounts, swap and whatever is stacked on the device's disks (dm, md, bcache, btrfs, ZFS)."""
        disks = Disks(self.host, self.links, address)
        self.nodes |= {f"/dev/{n}": address for n in disks.blocks}
        if not disks.blocks:
            return []
        pools = disks.pools()
        if places := disks.places():
            needed = places[0] in HOST_NEEDS
            hint = "the host needs it: give the domain another device" if needed else f"umount {places[0]}"
            hint = f"zpool export {pools[0]}" if pools and not needed else hint
            return [User(address, DATA, f"carries what is mounted on {_some(places)}", hint)]
        if pools:
            return [User(address, DATA, f"carries the ZFS pool {_some(pools)}", f"zpool export {pools[0]}")]
        if btrfs := disks.btrfs():
            hint = "umount it: lsns -t mnt shows the mount namespaces, in one of which it is"
            return [User(address, DATA, f"carries what is mounted on a btrfs ({btrfs[0]})", hint)]
        if swaps := disks.swaps():
            return [User(address, DATA, f"carries the swap space {_some(swaps)}", f"swapoff {swaps[0]}")]
        if upper := disks.upper():
            hint = "dmsetup ls --tree and /proc/mdstat show it: stop it first"
            return [User(address, USE, f"carries {_some(upper)}", hint)]
        spare = "may be a cache or a spare of a ZFS pool"
        return [User(address, USE, spare, "zpool status shows the disks in use")] if disks.spare() else []

    # -- network

    def _network(self, address: str) -> list[User]:
        users = []
        for name in self.links.below("/sys/class/net", address):
            above = self._above(name)
            default, routed = self._routes({name, *above})
            up = int(self.host.known(f"/sys/class/net/{name}/flags") or "0", 16) & 1  # IFF_UP
            through = f" through {_some(above)}" if above else ""
            if default:
                hint = "the host would lose its network: give the domain another device"
                users.append(User(address, USE, f"is {name}, the way of the default route{through}", hint))
            elif above:
                hint = f"ip link set {name} nomaster, or remove what is above it"
                users.append(User(address, USE, f"is {name}, a part of {_some(above)}", hint))
            elif up and routed:
                what = f"is {name}, which is up with an address"
                users.append(User(address, USE, what, f"ip link set {name} down"))
        device = f"/sys/bus/pci/devices/{address}"
        inner = [device, *(f"{device}/{n}" for n in self.host.entries(device) if n.startswith("virtio"))]
        # An interface that was moved leaves an empty directory behind: each namespace sees its own.
        if any(self.host.exists(f"{d}/net") and not self.host.entries(f"{d}/net") for d in inner):
            what = "has its network interface in another namespace (a container's, perhaps)"
            users.append(User(address, USE, what, "lsns -t net"))
        return users

    def _above(self, name: str) -> list[str]:
        """Return all that is stacked on a network interface: bridges, bonds, VLANs, macvtaps, PPPoE."""
        pppoe = {
            word for line in self.host.known("/proc/net/pppoe").splitlines() for word in line.split()[2:]
        }
        found: list[str] = []
        todo = [name]
        while todo:
            below = todo.pop()
            base = f"/sys/class/net/{below}"
            uppers = [n[6:] for n in self.host.entries(base) if n.startswith("upper_")]
            uppers += [m] if (m := self.host.link(f"{base}/master")) else []
            uppers += self._ppp() if below in pppoe else []
            fresh = [u for u in dict.fromkeys(uppers) if u not in found]
            found += fresh
            todo += fresh
        return found

    def _ppp(self) -> list[str]:
        """Return all PPP interfaces, by whatever name: the kernel does not say which session each one is."""
        names = self.links.of("/sys/class/net")
        return [n for n in names if self.host.known(f"/sys/class/net/{n}/type") == "512"]  # ARPHRD_PPP

    def _routes(self, names: set[str]) -> tuple[bool, bool]:
        """Return whether a default route leaves through one of these, and whether any has an address."""
        default = routed = False
        for line in self.host.known("/proc/net/route").splitlines()[1:]:
            fields = line.split()
            if len(fields) > 7 and fields[0] in names:
                routed = True
                default = default or fields[1] == fields[7] == "00000000"
        for line in self.host.known("/proc/net/ipv6_route").splitlines():
            fields = line.split()
            if len(fields) > 9 and fields[9] in names:
                rejects = int(fields[8], 16) & 0x200  # RTF_REJECT
                default = default or (fields[0] == "0" * 32 and fields[1] == "00" and not rejects)
        for line in self.host.known("/proc/net/if_inet6").splitlines():
            fields = line.split()
            routed = routed or (len(fields) > 5 and fields[5] in names and fields[3] != "20")  # link-local
        return default, routed

    # -- displays, virtual functions, keyboards

    def _display(self, address: str) -> list[User]:
        primary = self.host.known(f"/sys/bus/pci/devices/{address}/boot_vga") == "1"
        shows = ["the firmware's display (boot_vga)"] if primary else []
        pictures = []
        for name in self.links.below("/sys/class/drm", address):
            base = f"/sys/class/drm/{name}"
            state = (self.host.known(f"{base}/status"), self.host.known(f"{base}/enabled"))
            if state == ("connected", "enabled"):
                pictures.append(f"a picture on {name.partition('-')[2] or name}")
        if console_on := self._console(address):
            shows.append(f"the text console ({console_on})")
        if not shows:
            # It is somebody's while a process has the card. After the last one the kernel shows its own,
            # whether a console is there or not (drm_fb_helper_lastclose).
            self.pictures[address] = pictures
            return []
        what = f"shows {_some(shows + pictures)}"
        return [User(address, DISPLAY, what, _OTHER_DISPLAY, bool(console_on))]

    def _firmware_display(self, address: str) -> list[User]:
        """The picture that firmware left on a graphics card without a driver; binding vfio ends it."""
        name = self._console(address)
        if not name:
            return []
        shown = f"{name}, {self.host.known(f'/sys/class/graphics/{name}/name')}"
        hint = "the host's console would be gone until it reboots"
        return [User(address, DISPLAY, f"shows the text console ({shown})", hint, True)]

    def _console(self, address: str) -> str:
        """Return the framebuffer of a device that shows the text console, or ''."""
        return console.framebuffer(self.host, address) if console.bound(self.host) else ""

    def _virtual_functions(self, address: str) -> list[User]:
        count = int(self.host.known(f"/sys/bus/pci/devices/{address}/sriov_numvfs") or "0")
        hint = f"echo 0 >/sys/bus/pci/devices/{address}/sriov_numvfs"
        return [User(address, VFS, f"has {count} virtual functions", hint)] if count > 0 else []

    def _last_keyboard(self) -> list[User]:
        inputs = {n: t for n, t in self.links.of("/sys/class/input").items() if n.startswith("input")}
        mine: dict[str, str] = {}
        for name, target in inputs.items():
            words = self.host.known(f"/sys/class/input/{name}/capabilities/key").split()
            if not words or int(words[-1], 16) & _KEYBOARD != _KEYBOARD:
                continue
            owner = next((a for a in self.addresses if f"/{a}/" in target), "")
            if owner:
                mine.setdefault(owner, self.host.known(f"/sys/class/input/{name}/name"))
            elif "/devices/virtual/" not in target:
                return []
        if len(mine) > 1 and not self.together:
            return []
        hint = "plug a keyboard into another controller, if you need one here"
        return [User(a, USE, f"has the host's last keyboard ({name})", hint) for a, name in mine.items()]

    # -- processes

    def _vfio_nodes(self, address: str) -> None:
        """Look for QEMUs that have the device's IOMMU group; the node is there if a vfio driver is."""
        group = self.host.link(f"/sys/bus/pci/devices/{address}/iommu_group")
        if group and self.host.exists(f"/dev/vfio/{group}"):
            self.nodes[f"/dev/vfio/{group}"] = address
        members = self.host.entries(f"/sys/kernel/iommu_groups/{group}/devices") if group else []
        for member in members or [address]:
            for name in self.host.entries(f"/sys/bus/pci/devices/{member}/vfio-dev"):
                self.nodes[f"/dev/vfio/devices/{name}"] = address
        for name in self.host.entries(f"/sys/bus/pci/devices/{address}"):
            # A UUID: a part of the device that a guest has (mdev), in a group of its own.
            if len(name) == 36 and name.count("-") == 4:
                part = self.host.link(f"/sys/bus/pci/devices/{address}/{name}/iommu_group")
                self.nodes |= {f"/dev/vfio/{part}": address} if part else {}

    def _char_nodes(self, address: str, driver: str) -> None:
        for number in self.links.below("/sys/dev/char", address):
            # All keyboards and mice are open in every desktop, which loses nothing with one of them.
            target = self.links.of("/sys/dev/char")[number]
            if "/input/" in target or "/hidraw/" in target:
                continue
            for line in self.host.known(f"/sys/dev/char/{number}/uevent").splitlines():
                if line.startswith("DEVNAME="):
                    self.nodes[f"/dev/{line[8:]}"] = address
        gpus = self.host.entries("/proc/driver/nvidia/gpus")
        if address in gpus:
            for line in self.host.known(f"/proc/driver/nvidia/gpus/{address}/information").splitlines():
                if line.startswith("Device Minor:"):
                    self.nodes[f"/dev/nvidia{line.split()[-1]}"] = address
            # These nodes are for all cards of the driver, so they tell of this one if it is alone.
            if len(gpus) == 1:
                self.nodes |= {f"/dev/nvidia{n}": address for n in ("ctl", "-uvm", "-modeset")}
        if driver == "amdgpu":
            siblings = [n for n in self.host.entries("/sys/bus/pci/drivers/amdgpu") if n.count(":") == 2]
            if len(siblings) == 1:
                self.nodes["/dev/kfd"] = address

    def _processes(self) -> list[User]:
        """Walk over the open files of all processes, if there is anything to look for."""
        holders: dict[str, dict[int, str]] = {}
        guests: list[User] = []
        for pid in self.host.entries("/proc") if self.nodes else []:
            if pid.isdigit() and int(pid) not in self.but:
                for node, address in self._held(pid):
                    if group := node.startswith("/dev/vfio/"):
                        what = f"is in use by {self._name(pid)}, with its IOMMU group"
                    elif self._guest(pid):
                        what = f"is in use ({node}) by {self._name(pid)}"
                    else:
                        holders.setdefault(address, {}).setdefault(int(pid), node)
                        continue
                    guests.append(User(address, GUEST, what, "virsh list; virt-usher status", group=group))
        found = guests + [user for a, held in holders.items() for user in self._holders(a, held)]
        # What nobody is seen to show may be shown by somebody who is not seen.
        loose = [(a, p) for a, p in self.pictures.items() if p and a not in holders] if self.hidden else []
        hint = "some processes cannot be looked at; if none of them has the card, waive this"
        return found + [User(a, DISPLAY, f"shows {_some(p)}", hint) for a, p in loose]

    def _held(self, pid: str) -> list[tuple[str, str]]:
        """Return (node, address) for what a process has open of our devices, once for each device."""
        folder = f"/proc/{pid}/fd"
        found: dict[str, str] = {}
        for fd in self.host.entries(folder):
            try:
                node = os.readlink(self.host.path(f"{folder}/{fd}"))
            except (FileNotFoundError, ProcessLookupError):  # it was closed meanwhile, or the process ended
                continue
            except PermissionError:  # not root, or the root of a container, whose devices are not its own
                self.hidden = True
                return []
            address = self._address(pid, fd, node) if node.startswith("/dev/") else ""
            if address and self._is_open(pid, fd):
                found.setdefault(address, node)
        return [(node, address) for address, node in found.items()]

    def _is_open(self, pid: str, fd: str) -> bool:
        """Tell a file that is open from one that is only named (O_PATH), as udev does to set its owner.

        The node of an IOMMU group appears with its first device on vfio: udev has it while the next is bound.
        """
        for line in self.host.known(f"/proc/{pid}/fdinfo/{fd}").splitlines():
            if line.startswith("flags:"):
                return not int(line.split()[1], 8) & os.O_PATH
        return True

    def _address(self, pid: str, fd: str, node: str) -> str:
        if address := self.nodes.get(node):
            return address
        if node.startswith("/dev/dri/"):  # in a container the same device may have another name
            for line in self.host.known(f"/proc/{pid}/fdinfo/{fd}").splitlines():
                if line.startswith("drm-pdev:"):
                    address = line.split()[1]
                    return address if address in self.nodes.values() else ""
        return ""

    def _holders(self, address: str, held: dict[int, str]) -> list[User]:
        """One record for all processes of a device, with what would end them, or the first of them.

        Another for the picture that they show.
        """
        names = [self._name(str(pid)) for pid in held]
        units = tuple(sessions.ending(self.host, str(pid)) for pid in held)
        services = {sessions.system_unit(names) for names in units}
        hint = f"systemctl stop {' '.join(sorted(services))}"
        if "" in services:
            loose = [
                p
                for p, n in zip(held, units, strict=True)
                if not (sessions.system_unit(n) or sessions.kept(n))
            ]
            hint = (
                f"end it: kill {loose[0]}" if loose else "end the session that has it: loginctl list-sessions"
            )
        node = next(iter(held.values()))
        found = [User(address, USE, f"is in use ({node}) by {_some(names)}", hint, units=units)]
        if pictures := self.pictures.get(address):
            found.append(User(address, DISPLAY, f"shows {_some(pictures)}", hint, units=units))
        return found

    def _guest(self, pid: str) -> str:
        """Return the domain whose QEMU a process is, as libvirt starts it, or ''."""
        words = self.host.known(f"/proc/{pid}/cmdline").split("\0")
        named = (w for option, w in pairwise(words) if option == "-name" and w.startswith("guest="))
        return next(named, "")[6:].partition(",")[0]

    def _name(self, pid: str) -> str:
        guest = self._guest(pid)
        comm = self.host.get(f"/proc/{pid}/comm", "?")
        return f"{comm} (pid {pid}, domain {guest!r})" if guest else f"{comm} (pid {pid})"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
