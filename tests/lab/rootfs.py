"""The guest's disk, kernel and initrd: built once, kept in the cache.

Needs root and debootstrap. Every command that enters the tree runs in a
mount namespace of its own, so nothing stays mounted whatever happens.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from . import initrd

DISK = "3G"
UNUSED_DAYS = 14
BASE = "systemd-sysv,udev,dbus,kmod,eatmydata"
PACKAGES = (
    *("linux-image-amd64", "busybox-static", "apparmor", "systemd-container"),
    *("libvirt-daemon-system", "libvirt-clients", "libvirt-daemon-driver-qemu", "qemu-system-x86"),
    *("python3-lxml", "python3-pluggy", "python3-click", "python3-rich", "python3-psutil"),
    *("python3-libvirt", "python3-pyudev", "python3-tomlkit", "python3-pytest"),
    *("iproute2", "pciutils", "procps", "psmisc", "less", "e2fsprogs", "strace"),
    *("irqbalance", "rt-tests", "greetd", "login", "libpam-systemd", "libseat1"),
)

# What costs boot time and proves nothing. libvirt-guests would wait five minutes for guests without a system.
MASKED = (
    *("apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer"),
    *("e2scrub_reap.service", "fstrim.timer", "logrotate.timer", "man-db.timer", "getty@tty1.service"),
    *("serial-getty@ttyS0.service", "systemd-timesyncd.service", "systemd-pcrphase.service"),
    *("libvirt-guests.service", "networking.service", "systemd-networkd-wait-online.service"),
    *("systemd-tpm2-setup.service", "systemd-tpm2-setup-early.service", "ldconfig.service"),
)

FILES = {
    "etc/hostname": "lab\n",
    "etc/hosts": "127.0.0.1 localhost lab\n",
    "etc/fstab": "",
    "etc/machine-id": "6c6162000000000000000000000000ab\n",
    "etc/systemd/journald.conf.d/lab.conf": "[Journal]\nStorage=volatile\nRateLimitBurst=0\n",
    # All that happens next comes with the share, so that it can change without a new disk.
    "etc/systemd/system/lab.service": """\
[Unit]
Description=Run what the lab's share says
[Service]
# The channel may appear after the module that looks for it.
ExecStart=/bin/sh -c 'mkdir -p /lab; for try in $(seq 100); do \\
    mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144 lab /lab && exec python3 -B /lab/agent.py; \\
    sleep 0.5; done'
KillMode=process
[Install]
WantedBy=multi-user.target
""",
}

SETUP = f"""\
set -e
export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8 HOME=/root
printf '#!/bin/sh\\nexit 101\\n' >/usr/sbin/policy-rc.d
chmod 755 /usr/sbin/policy-rc.d
# The lab brings its own initrd.
for tool in update-initramfs dracut; do
    dpkg-divert --quiet --local --rename --add "/usr/sbin/$tool"
    ln -sf /bin/true "/usr/sbin/$tool"
done
cat >/etc/apt/apt.conf.d/90lab <<'END'
Acquire::Check-Valid-Until "false";
Acquire::Languages "none";
APT::Install-Recommends "false";
Dpkg::Options {{ "--force-unsafe-io"; }};
Dpkg::Options {{ "--path-exclude=/usr/share/doc/*"; "--path-exclude=/usr/share/locale/*"; }};
END
eatmydata apt-get -qq update
eatmydata apt-get -qq -y install {" ".join(PACKAGES)} </dev/null
apt-get clean
rm -rf /var/lib/apt/lists/* /usr/sbin/policy-rc.d
# Linux is given these anew at each boot; only libvirt's are looked at.
find /etc/apparmor.d -maxdepth 1 -type f ! -name '*libvirt*' -delete
# At each start libvirt asks QEMU for 350 features of the guest's CPU, one by one, which takes most of the
# start here. This has it ask in the older way, for two words.
echo 'capability_filters = [ "cpu-unavailable-features" ]' >>/etc/libvirt/qemu.conf
systemctl -q enable lab.service
# Only the tests that are about it start it.
systemctl -q disable irqbalance.service greetd.service
systemctl -q mask {" ".join(MASKED)}
"""


@dataclass(frozen=True)
class Image:
    """A built release: a folder with root.ext4, vmlinuz and initrd."""

    release: str
    folder: Path


def recipe_hash() -> str:
    """Return what changes when an image has to be built anew."""
    recipe = repr((BASE, SETUP, FILES, DISK, Path(initrd.__file__).read_text()))
    return hashlib.sha256(recipe.encode()).hexdigest()[:12]


def cache() -> Path:
    """Return the folder that keeps built images."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "/var/cache") / "virt-usher-lab"


@contextmanager
def image(release: str, log: Path, rebuild: bool = False) -> Iterator[Image]:
    """Yield the image of `release`, built if need be, held while in use."""
    folder = cache() / f"{release}-{recipe_hash()}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        if rebuild or not folder.exists():
            # Not atomic: another run may build between the two, hence the second look.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if rebuild or not folder.exists():
                _build(release, folder, log)
                _forget_old(release, folder)
        os.utime(folder)
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield Image(release, folder)


def mirror() -> list[str]:
    """Return this machine's Debian mirror, or nothing for the default."""
    fields = ["apt-get", "indextargets", "--format", "$(LABEL)\t$(SITE)"]
    try:
        lines = subprocess.run(fields, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return []
    return [site for label, _, site in (line.partition("\t") for line in lines) if label == "Debian"][:1]


def _build(release: str, folder: Path, log: Path) -> None:
    """Build into a folder beside the final one, and rename it at the end."""
    scratch = folder.with_suffix(".new")
    shutil.rmtree(scratch, ignore_errors=True)
    tree = scratch / "tree"
    tree.mkdir(parents=True)
    try:
        _fill(release, tree, scratch, log)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    shutil.rmtree(tree)
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)


def _fill(release: str, tree: Path, scratch: Path, log: Path) -> None:
    with log.open("w") as output:
        _debootstrap(release, tree, output)
        for name, content in FILES.items():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_text(content)
        _run(["chroot", str(tree), "sh", "-c", SETUP], output, proc=tree / "proc")
        kernel = max((tree / "lib/modules").iterdir()).name
        shutil.copy(tree / f"boot/vmlinuz-{kernel}", scratch / "vmlinuz")
        (scratch / "initrd").write_bytes(initrd.build(tree, kernel))
        disk = str(scratch / "root.ext4")
        # A reboot inside the lab is clean, and a lost disk costs nothing: no journal.
        options = ["-q", "-F", "-O", "^has_journal", "-E", "lazy_itable_init=1", "-L", "lab"]
        _run(["mkfs.ext4", *options, "-d", str(tree), disk, DISK], output)


def _debootstrap(release: str, tree: Path, output: IO[str]) -> None:
    command = ["debootstrap", "--variant=minbase", f"--include={BASE}", release, str(tree), *mirror()]
    if not Path("/usr/share/debootstrap/scripts", release).exists():
        # It knows no release younger than itself, but they all go like this one.
        if not mirror():
            raise SystemExit(f"lab: debootstrap does not know {release}, and apt names no Debian mirror")
        command.append("/usr/share/debootstrap/scripts/sid")
    _run(command, output)


def _run(command: list[str], output: IO[str], proc: Path | None = None) -> None:
    """Run a build step where its mounts and daemons end with it."""
    if proc:
        command = ["sh", "-c", f"mount -t proc proc {shlex.quote(str(proc))} && exec {shlex.join(command)}"]
    command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", *command]
    output.write(f"+ {shlex.join(command)}\n")
    output.flush()
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{command[6] if proc is None else 'chroot'} failed, see {output.name}")


def _forget_old(release: str, current: Path) -> None:
    """Remove images of other recipes that nobody used for a while."""
    for folder in current.parent.glob(f"{release}-*"):
        if not folder.is_dir() or folder == current:
            continue
        if time.time() - folder.stat().st_mtime < UNUSED_DAYS * 86400:
            continue
        with open(f"{folder}.lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
            shutil.rmtree(folder, ignore_errors=True)
