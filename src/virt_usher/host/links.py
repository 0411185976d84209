"""Folders of links in sysfs, each read once: what there is of a class, and on which device it hangs."""

from __future__ import annotations

TYPE_CHECKING = False  # importing typing would cost release more than all its work
if TYPE_CHECKING:
    from virt_usher.host import Host


class Links:
    """What folders of links say now; for one look at the host."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._folders: dict[str, dict[str, str]] = {}

    def of(self, folder: str) -> dict[str, str]:
        """Return what a folder has: name -> where its link points."""
        if folder not in self._folders:
            names = self._host.entries(folder)
            self._folders[folder] = {n: self._host.target(f"{folder}/{n}") for n in names}
        return self._folders[folder]

    def below(self, folder: str, address: str) -> list[str]:
        """Return what of a folder hangs on a PCI device, through any number of steps."""
        return [n for n, target in self.of(folder).items() if f"/{address}/" in target]
