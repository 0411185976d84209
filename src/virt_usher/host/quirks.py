"""What sysfs does not tell about single devices: a table, shipped beside this file.

Columns, tab-separated: id, kind, name, source, note. An id is vendor:device in hex; the device may be a
range or '*', and '/class=0300' or '/rev=01' narrow it. /etc/virt-usher/reset-quirks.tsv adds an admin's own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from virt_usher.errors import UsherError, nearest
from virt_usher.host import CONFIG_DIR

if TYPE_CHECKING:
    from virt_usher.host import Host
    from virt_usher.host.pci import Device

KINDS = (
    "no_bus_reset",  # PCI_DEV_FLAGS_NO_BUS_RESET: no bus, slot or hot reset of it or next to it
    "no_flr",  # function level reset does not work; kernels that know do not list it
    "amd_reset_bug",  # every reset reports success and leaves it dead, but for the module vendor-reset
    "known_bad",  # an admin's own: no reset is to be trusted
    "vfio_denylist",  # vfio-pci does not bind it unless it is told to
    # In the table for completeness: kernels show these themselves, as reset_method.
    "no_pm_reset",
    "device_specific",
)
OWN = f"{CONFIG_DIR}/reset-quirks.tsv"
_ID = re.compile(
    r"([0-9a-f]{4}):(?:([0-9a-f]{4})(?:-([0-9a-f]{4}))?|\*)(?:/class=([0-9a-f]{2,6}))?(?:/rev=([0-9a-f]{2}))?"
)


@dataclass(frozen=True)
class Quirk:
    """One row: which devices, what about them, and how we know."""

    vendor: str
    first: str
    last: str
    class_code: str
    revision: str
    kind: str
    name: str
    source: str
    note: str

    def fits(self, device: Device) -> bool:
        """Tell whether a device is meant; its vendor is known to fit."""
        return (
            self.first <= device.id[5:] <= self.last
            and device.class_code.startswith(self.class_code)
            and (not self.revision or self.revision == device.revision)
        )


@dataclass(frozen=True)
class Quirks:
    """The shipped rows and an admin's own."""

    host: Host

    def of(self, device: Device, kind: str) -> Quirk | None:
        """Return the first row of a kind about a device; an admin's own come first."""
        for row in self._rows.get((device.id[:4], kind), ()):
            if row.fits(device):
                return row
        return None

    @cached_property
    def _rows(self) -> dict[tuple[str, str], list[Quirk]]:
        rows: dict[tuple[str, str], list[Quirk]] = {}
        for row in self._read():
            rows.setdefault((row.vendor, row.kind), []).append(row)
        return rows

    def _read(self) -> Iterator[Quirk]:
        if self.host.exists(OWN):
            from virt_usher.vetting import vet

            vet(self.host, OWN)
            yield from parse(self.host.read(OWN), OWN)
        shipped = os.path.join(os.path.dirname(__file__), "reset-quirks.tsv")
        with open(shipped, encoding="utf-8") as stream:
            yield from parse(stream.read(), shipped)


def parse(text: str, file: str) -> Iterator[Quirk]:
    """Yield a table's rows; UsherError names file and line of one that makes no sense."""
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith(("#", "id\t")):
            continue
        which, kind, name, source, note, *_ = [*line.split("\t"), "", "", "", ""]
        match = _ID.fullmatch(which.strip().lower())
        if match is None:
            raise UsherError(f"{file}:{number}: {which!r} is no vendor:device such as 10de:1288")
        if kind not in KINDS:
            raise UsherError(
                f"{file}:{number}: {kind!r} is none of {', '.join(KINDS)}{nearest(kind, [*KINDS])}"
            )
        vendor, first, last, class_code, revision = (part or "" for part in match.groups())
        yield Quirk(
            vendor,
            first or "0000",
            last or first or "ffff",
            class_code,
            revision,
            kind,
            name,
            source,
            note,
        )
