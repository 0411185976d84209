"""Is the hook there, is it ours and safe, and can the Python behind it load?"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator

from virt_usher.cli.checks import Check, ok, problem, warning
from virt_usher.config import vet
from virt_usher.errors import UsherError
from virt_usher.host import Host

HOOKS = "/etc/libvirt/hooks"
_REINSTALL = "install virt-usher again: ./install.sh"
# What the hook's worker loads, from the same folder and with the same switches as the gate does.
_PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import lxml.etree, pluggy, virt_usher.prepare
print(sys.version.split()[0])
"""


def ours(host: Host) -> list[str]:
    """Return the hook files that are virt-usher's: they say so in a line of their own."""
    dropped = [f"{HOOKS}/qemu.d/{n}" for n in host.entries(f"{HOOKS}/qemu.d")]
    return [p for p in (f"{HOOKS}/qemu", *dropped) if "\n# virt-usher's " in _text(host, p)]


def _text(host: Host, path: str) -> str:
    return host.get(path) if os.path.isfile(host.path(path)) else ""


def check(host: Host) -> Iterator[Check]:
    """Look at the hook file, and at the interpreter and the package that it names."""
    paths = ours(host)
    if not paths:
        yield problem("hook", f"no virt-usher in {HOOKS}/qemu or {HOOKS}/qemu.d", _REINSTALL)
        return
    if len(paths) > 1:
        yield problem("hook", f"libvirt calls virt-usher {len(paths)} times: {', '.join(paths)}", "keep one")
    for path in paths:
        yield _file(host, path)
    if "/qemu.d/" in paths[0]:
        yield ok("hook", "in qemu.d, which libvirt reads from version 6.5 on")
    gate = host.get(paths[0])
    python, package = _assigned(gate, "python"), _assigned(gate, "lib")
    if not (python and package):
        yield problem("hook", f"{paths[0]} does not say what it would run", _REINSTALL)
        return
    yield from _trusted(host, "package", f"{package}/virt_usher/hook.py")
    yield from _trusted(host, "interpreter", python)
    yield _loads(host, python, package)
    if os.path.dirname(python) not in ("/usr/bin", "/bin"):
        text = f"{python} is not in /usr/bin: AppArmor's libvirtd profile would not let the hook run it"
        yield warning("interpreter", text, "have the gate use /usr/bin/python3")


def _file(host: Host, path: str) -> Check:
    try:
        vet(host, path)
    except UsherError as error:
        return problem("hook", error.message, error.hint)
    if not os.stat(host.path(path)).st_mode & 0o111:
        return problem("hook", f"{path} is not executable: libvirt skips it silently", f"chmod 755 {path}")
    return ok("hook", f"{path} is ours, executable, and only root can change it")


def _assigned(gate: str, name: str) -> str:
    """Return the value that the gate gives to one of its variables."""
    match = re.search(rf"(?:^|\s){name}=(/\S+)", gate)
    return match[1] if match else ""


def _trusted(host: Host, about: str, path: str) -> Iterator[Check]:
    try:
        vet(host, path)
        yield ok(about, f"{path} is there, and only root can change it")
    except UsherError as error:
        yield problem(about, error.message, error.hint)
    except OSError as error:
        yield problem(about, f"{path}: {error.strerror}", _REINSTALL)


def _loads(host: Host, python: str, package: str) -> Check:
    """Start the interpreter as the gate does, and load all that a start needs."""
    command = [host.path(python), "-I", "-B", "-c", _PROGRAM, host.path(package)]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return problem("interpreter", f"{python} cannot be run: {error}", "apt install --reinstall python3")
    if run.returncode:
        last = (run.stderr.strip().splitlines() or ["no word why"])[-1]
        text = f"{python} ended with status {run.returncode}: {last}"
        return problem("interpreter", text, "apt install python3-lxml python3-pluggy; ./install.sh")
    return ok("interpreter", f"{python} is Python {run.stdout.strip()}, and loads all that the hook needs")
