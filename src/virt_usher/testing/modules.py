"""Kernel modules on the fake PCI bus, with rmmod and modprobe as kmod has them.

host = ModuleHost(tmp_path).module("nvidia", "nvidia").module("nvidia_drm", uses=["nvidia"])
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from virt_usher.testing.pci import BUS, PciHost

_TOOL = f"""#!{sys.executable} -I
import sys, types
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
package = sys.modules["virt_usher.testing"] = types.ModuleType("virt_usher.testing")
package.__path__ = [{str(Path(__file__).parent)!r}]  # what its __init__ imports takes long
from virt_usher.testing.modules import ModuleHost
root, _, tool = sys.argv[0].rpartition("/sbin/")
raise SystemExit(getattr(ModuleHost(root), tool.partition(".")[0])(*sys.argv[1:]))
"""


class ModuleHost(PciHost):
    """A host whose drivers are in modules."""

    def module(self, name: str, driver: str = "", uses: Iterable[str] = (), loaded: bool = True) -> Self:
        """Add a module that is on the disk, with its PCI driver, which was added before."""
        self.hide(f"module.{name}", driver or "-")
        self.hide(f"uses.{name}", " ".join(uses) or "-")
        for tool in ("rmmod", "modprobe"):
            self.file(f"/sbin/{tool}", _TOOL, 0o755)
        if loaded:
            self._insert(name)
        return self

    # -- what the tools do

    def modprobe(self, *words: str) -> int:
        """Load a module and what it uses; -n: only say whether that could be."""
        name = words[-1]
        for module in (name, *self._uses(name)):
            if not self.hidden(f"module.{module}"):
                return _error("modprobe: FATAL: Module {} not found in directory /lib/modules", module)
        if "-n" not in words and not self.exists(f"/sys/module/{name}"):
            self._insert(name)
        return 0

    def rmmod(self, *words: str) -> int:
        """Unload a module that nobody uses. Its drivers' devices are without one then, in use or not."""
        name, base = words[-1], f"/sys/module/{words[-1]}"
        if not self.exists(base):
            return _error("rmmod: ERROR: Module {} is not currently loaded", name)
        if not self.exists(f"{base}/initstate"):
            return _error("rmmod: ERROR: Module {} is builtin.", name)
        if holders := self.entries(f"{base}/holders"):
            return _error("rmmod: ERROR: Module {} is in use by: {}", name, " ".join(holders))
        if self.number(f"{base}/refcnt"):
            return _error("rmmod: ERROR: Module {} is in use", name)
        with self.step():
            for driver in self.entries(f"{base}/drivers"):
                folder = f"{BUS}/drivers/{driver.partition(':')[2]}"
                for address in (n for n in self.entries(folder) if n.count(":") == 2):
                    self._detach(address)
                shutil.rmtree(self.path(folder))
        with self.step():
            for used in self._uses(name):
                self._remove(f"/sys/module/{used}/holders/{name}")
                self.put(f"/sys/module/{used}/refcnt", self.number(f"/sys/module/{used}/refcnt") - 1)
            shutil.rmtree(self.path(base))
        return 0

    def _insert(self, name: str) -> None:
        base, driver = f"/sys/module/{name}", self.hidden(f"module.{name}")
        for used in self._uses(name):
            if not self.exists(f"/sys/module/{used}"):
                self._insert(used)
        with self.step():
            self.file(f"{base}/refcnt", "0", 0o444).file(f"{base}/initstate", "live", 0o444)
            self._folder(f"{base}/holders")
            for used in self._uses(name):
                self._link(f"/sys/module/{used}/holders/{name}", f"../../{name}")
                self.put(f"/sys/module/{used}/refcnt", self.number(f"/sys/module/{used}/refcnt") + 1)
            if driver == "-":
                return
            for file in ("bind", "unbind"):
                if not self.exists(f"{BUS}/drivers/{driver}/{file}"):
                    self.file(f"{BUS}/drivers/{driver}/{file}", mode=0o200)
            self.link_to(f"{BUS}/drivers/{driver}/module", f"../../../../module/{name}")
            self.link_to(f"{base}/drivers/pci:{driver}", f"../../../bus/pci/drivers/{driver}")
        for address in self.entries(f"{BUS}/devices"):
            if not self.driver_of(address) and self._matches(driver, address):
                with self.step():
                    self._attach(address, driver)

    def _uses(self, name: str) -> list[str]:
        return [n for n in self.hidden(f"uses.{name}").split() if n != "-"]


def _error(text: str, *names: str) -> int:
    os.write(2, f"{text.format(*names)}\n".encode())
    return 1
