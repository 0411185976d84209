"""A small initrd: load what the root disk needs, and hand over to it."""

from __future__ import annotations

import lzma
import stat
import subprocess
from pathlib import Path

# crc32c is looked up by ext4 at run time; it is a module on older kernels only.
MODULES = ("virtio_pci", "virtio_blk", "crc32c_generic", "ext4")

INIT = """\
#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
for module in /modules/*.ko; do /bin/busybox insmod "$module"; done
tries=0
until /bin/busybox mount -t ext4 -o noatime /dev/vda /root; do
    tries=$((tries + 1))
    [ $tries -lt 100 ] || { echo "lab: no root disk"; /bin/busybox poweroff -f; }
    /bin/busybox usleep 100000
done
/bin/busybox mount --move /dev /root/dev
/bin/busybox umount /proc /sys
exec /bin/busybox switch_root /root /sbin/init
"""


def _entry(name: str, mode: int, data: bytes) -> bytes:
    """Return one member of a "newc" cpio archive."""
    path = name.encode() + b"\0"
    numbers = (0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(path), 0)
    header = b"070701" + b"".join(b"%08X" % number for number in numbers)
    return _pad(header + path) + _pad(data)


def _pad(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)


def _modules(tree: Path, kernel: str) -> list[Path]:
    """Return the module files that MODULES need, in loading order."""
    files: list[Path] = []
    for module in MODULES:
        command = ["chroot", str(tree), "modprobe", "--set-version", kernel, "--show-depends", module]
        listed = subprocess.run(command, capture_output=True, text=True, check=False)
        for line in listed.stdout.splitlines():
            verb, _, path = line.strip().partition(" ")
            file = tree / path.split()[0].lstrip("/")
            if verb == "insmod" and file not in files:
                files.append(file)
    return files


def _plain(module: Path) -> bytes:
    """Return a module uncompressed: busybox loads nothing else."""
    data = module.read_bytes()
    return lzma.decompress(data) if module.suffix == ".xz" else data


def build(tree: Path, kernel: str) -> bytes:
    """Return the initrd for `kernel`, made from what `tree` has installed."""
    folders = ("bin", "dev", "proc", "sys", "root", "modules")
    parts = [_entry(name, stat.S_IFDIR | 0o755, b"") for name in folders]
    parts.append(_entry("init", stat.S_IFREG | 0o755, INIT.encode()))
    parts.append(_entry("bin/busybox", stat.S_IFREG | 0o755, (tree / "bin/busybox").read_bytes()))
    for number, module in enumerate(_modules(tree, kernel)):
        name = f"modules/{number:02}-{module.name.partition('.')[0]}.ko"
        parts.append(_entry(name, stat.S_IFREG | 0o644, _plain(module)))
    parts.append(_entry("TRAILER!!!", 0, b""))
    return b"".join(parts)
