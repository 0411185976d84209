"""The QEMU that emulates the machine: this host's, or a newer one beside it.

It takes 9.0. Before that TCG has no x2APIC, and a CPU ends an interrupt by
a write to memory; while Linux moves a device's memory about, that write may
get lost, and the CPU never hears its timer again. Before 8.2, QEMU may crash
at the same moments (tcg_commit).

Debian 12's own is 7.2. Its backports have a newer one, which is unpacked
into the lab's cache: what the host has installed stays as it is.
"""

from __future__ import annotations

import fcntl
import re
import subprocess
import tempfile
from pathlib import Path

from .rootfs import cache, mirror

NAME = "qemu-system-x86_64"
SOUND = (9, 0)
PACKAGES = ("qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios")
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


def find() -> list[str]:
    """Return what runs a QEMU that will do; RuntimeError where none is to be had."""
    if version([NAME]) >= SOUND:
        return [NAME]
    folder = cache() / "qemu"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if version(unpacked(folder)) < SOUND:
            try:
                _fetch(folder)
            except (OSError, subprocess.CalledProcessError) as error:
                said = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
                wanted = ".".join(map(str, SOUND))
                raise RuntimeError(
                    f"needs QEMU {wanted}, and could not get it from Debian's backports: {said}"
                ) from error
    return unpacked(folder)


def version(command: list[str]) -> tuple[int, ...]:
    """Return the version that a QEMU names, () if it does not run."""
    try:
        said = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return ()
    found = re.search(r"version (\d+)\.(\d+)", said)
    return tuple(map(int, found.groups())) if found else ()


def unpacked(folder: Path) -> list[str]:
    """Return what runs the QEMU whose packages were unpacked into `folder`."""
    modules = f"{folder}/usr/lib/x86_64-linux-gnu/qemu"
    firmware = [argument for part in ("qemu", "seabios") for argument in ("-L", f"{folder}/usr/share/{part}")]
    return ["env", f"QEMU_MODULE_DIR={modules}", f"{folder}/usr/bin/{NAME}", *firmware]


def _fetch(folder: Path) -> None:
    """Unpack Debian 12's backport into `folder`; apt checks who signed it."""
    site = (mirror() or ["http://deb.debian.org/debian"])[0]
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        room = Path(scratch)
        (room / "lists/partial").mkdir(parents=True)
        (room / "source").write_text(f"deb [signed-by={KEYRING}] {site} bookworm-backports main\n")
        apt = ["apt-get", "-qq"]
        for option in (
            *(f"Dir::Etc::SourceList={room}/source", "Dir::Etc::SourceParts=/dev/null"),
            *(f"Dir::State::Lists={room}/lists", f"Dir::Cache={room}", "APT::Sandbox::User=root"),
            "Acquire::Retries=3",
        ):
            apt += ["-o", option]
        for command in ([*apt, "update"], [*apt, "download", *PACKAGES]):
            subprocess.run(command, cwd=room, check=True, capture_output=True, text=True)
        for package in room.glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", package, folder], check=True, capture_output=True, text=True)
    if version(unpacked(folder)) < SOUND:
        raise OSError("what came does not run here")
