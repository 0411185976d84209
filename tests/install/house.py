"""A house of its own for each test: folders to install into, from a copy of the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
PARTS = ("install.sh", "pyproject.toml", "src", "plugins", "hooks.d", "data", "demo", "docs", "completions")

Result = subprocess.CompletedProcess[str]


def copy_checkout(target: Path) -> Path:
    """Copy what is installed: others may be editing the real one."""
    target.mkdir()
    for part in PARTS:
        path = CHECKOUT / part
        if path.is_dir():
            shutil.copytree(path, target / part, ignore=shutil.ignore_patterns("__pycache__"))
        elif path.exists():
            shutil.copy(path, target)
    return target


@dataclass
class House:
    """Where one test installs: below a DESTDIR, or for real into folders of the test's own."""

    root: Path
    source: Path
    live: bool = False
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def prefix(self) -> Path:
        return self.root / ("usr/local" if self.live else "dest/usr/local")

    @property
    def lib(self) -> Path:
        return self.prefix / "lib/virt-usher"

    @property
    def command(self) -> Path:
        return self.prefix / "bin/virt-usher"

    @property
    def etc(self) -> Path:
        return self.root / ("etc/virt-usher" if self.live else "dest/etc/virt-usher")

    @property
    def hooks(self) -> Path:
        return self.root / ("etc/libvirt/hooks" if self.live else "dest/etc/libvirt/hooks")

    @property
    def gate(self) -> Path:
        return self.hooks / "qemu"

    @property
    def run_dir(self) -> Path:
        """What the installer and the hook take for /run."""
        return self.root / "run"

    def own_source(self) -> Path:
        """Let this test change what it installs."""
        if not self.source.is_relative_to(self.root):
            self.source = shutil.copytree(self.source, self.root / "source")
        return self.source

    def run(self, *command: str | Path, input_: str = "") -> Result:
        """Run a command as this test's environment has it; for a live one with a /run of its own."""
        environment = {"PATH": os.environ["PATH"], "HOME": "/root", **self.environment}
        if self.live:
            self.run_dir.mkdir(exist_ok=True)
            environment |= {
                "PREFIX": str(self.prefix),
                "SYSCONFDIR": str(self.root / "etc"),
                "HOOKS_DIR": str(self.hooks),
            }
            mount = f'mount --bind {self.run_dir} /run && exec "$@"'
            command = ("unshare", "--mount", "sh", "-c", mount, "sh", *command)
        else:
            environment["DESTDIR"] = str(self.root / "dest")
        return subprocess.run(
            command, input=input_, env={**environment, **self.environment}, capture_output=True, text=True
        )

    def installer(self, *options: str) -> Result:
        return self.run("sh", self.source / "install.sh", *options)

    def install(self) -> Result:
        result = self.installer()
        assert result.returncode == 0, result.stdout + result.stderr
        return result

    def change_source(self, text: str) -> None:
        """Make the next install a new version."""
        with (self.own_source() / "src/virt_usher/errors.py").open("a") as file:
            file.write(f"\n# {text}\n")

    def releases(self) -> set[str]:
        return {path.name for path in (self.lib / "releases").iterdir()}

    def current(self) -> str:
        return os.path.basename(os.readlink(self.lib / "current"))

    def files(self, but: str = ".pyc") -> dict[str, tuple[int, int, str]]:
        """Return what is there: mode, time of change and content or target, by path."""
        found = {}
        for top in ("dest", "usr", "etc"):
            for path in sorted((self.root / top).rglob("*")):
                if path.name.endswith(but):
                    continue
                status = path.lstat()
                content = os.readlink(path) if path.is_symlink() else ""
                if path.is_file() and not path.is_symlink():
                    content = path.read_bytes().hex()
                # Folders change their time when something in them is made and removed.
                when = 0 if path.is_dir() else status.st_mtime_ns
                found[str(path.relative_to(self.root))] = (status.st_mode, when, content)
        return found
