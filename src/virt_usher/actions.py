"""The few action types: changes of the host, as data.

An action says what it is about (`key`: what claims are counted on), what a reader should know
(`describe`) and what the journal needs (`fields`). What it does and how it is undone belongs to its kind, in
`effects`: the release side must work without this module, without plugins and without dataclasses. A type
whose kind is unknown there cannot be defined, so no action can exist without an undo.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from virt_usher import cpulist
from virt_usher.effects import ELSEWHERE, KINDS, chosen
from virt_usher.errors import UsherError

if TYPE_CHECKING:
    from virt_usher.host import Host
    from virt_usher.host.users import User


@dataclass(frozen=True)
class Action(ABC):
    """One change of the host and, through its kind, the inverse."""

    kind: ClassVar[str]
    needs_xml: ClassVar[bool] = False  # whether the domain's XML must lie beside the journal

    def __init_subclass__(cls) -> None:
        if getattr(cls, "kind", None) not in (*KINDS, *ELSEWHERE):
            raise TypeError(f"{cls.__name__} needs a `kind` that effects.KINDS or ELSEWHERE can undo")

    @property
    @abstractmethod
    def key(self) -> str:
        """What this action changes: two domains with the same key share it."""

    @abstractmethod
    def fields(self) -> dict[str, Any]:
        """Return what the kind needs, as JSON can hold it."""

    @abstractmethod
    def describe(self, host: Host) -> str:
        """Say in one line what would change: current → new."""

    def waive(self, problems: Collection[tuple[str, str, str]]) -> Action:
        """Return this action with what an admin waived: (address, vendor:device, problem)."""
        return self

    def record(self) -> dict[str, Any]:
        """Return this action as the journal has it."""
        return {"kind": self.kind, "key": self.key, **self.fields()}


@dataclass(frozen=True)
class Write(Action):
    """Set a value in sysfs or /proc while the domain runs.

    Domains may share it: the earliest claim that is left rules, and the last one to go restores the
    original. A value that somebody else changed meanwhile is left alone.
    """

    path: str
    value: str
    label: str = ""

    kind: ClassVar[str] = "knob"

    def __post_init__(self) -> None:
        _check_text(self.path, self.value)

    @property
    def key(self) -> str:
        return self.path

    def fields(self) -> dict[str, Any]:
        return {"path": self.path, "new": self.value}

    def describe(self, host: Host) -> str:
        try:
            now = chosen(host, self.path)
        except OSError:
            now = "?"
        return f"{self.label or self.path}: {now}" + (
            f" → {self.value}" if now != self.value else " (as it is)"
        )


@dataclass(frozen=True)
class OneWay(Action):
    """Write a value that cannot be taken back, with the reason why that is all right."""

    path: str
    value: str
    reason: str

    kind: ClassVar[str] = "oneway"

    def __post_init__(self) -> None:
        _check_text(self.path, self.value)

    @property
    def key(self) -> str:
        return self.path

    def fields(self) -> dict[str, Any]:
        return {"path": self.path, "new": self.value}

    def describe(self, host: Host) -> str:
        return f"{self.path}: write {self.value} ({self.reason})"


@dataclass(frozen=True)
class AddPages(Action):
    """See that a number of huge pages is free for the domain, on one of these NUMA nodes.

    `size_kib` is the page size in KiB; nodes are tried in order. Only what is missing is added to
    the pools, and just that is given back.
    """

    size_kib: int
    pages: int
    nodes: tuple[int, ...]
    drop_caches: bool = False

    kind: ClassVar[str] = "pages"

    @property
    def key(self) -> str:
        return f"hugepages-{self.size_kib}kB"

    def fields(self) -> dict[str, Any]:
        return {
            "size": self.size_kib,
            "pages": self.pages,
            "nodes": list(self.nodes),
            "drop_caches": self.drop_caches,
        }

    def describe(self, host: Host) -> str:
        free = sum(host.memory.pool(self.size_kib, n).free for n in self.nodes)
        where = "node " + " or ".join(map(str, self.nodes))
        return f"{self.pages} pages of {size(self.size_kib)} on {where}: {free} free now"


@dataclass(frozen=True)
class KeepUnit(Action):
    """Keep a systemd unit active, or inactive, while the domain runs, and put it back as it was."""

    unit: str
    active: bool

    kind: ClassVar[str] = "unit"

    @property
    def key(self) -> str:
        return f"unit {self.unit}"

    def fields(self) -> dict[str, Any]:
        return {"unit": self.unit, "want": "active" if self.active else "inactive"}

    def describe(self, host: Host) -> str:
        from virt_usher import units

        want = self.fields()["want"]
        try:
            now = units.state(host, self.unit)
        except UsherError as error:
            now = error.message
        return f"{self.unit}: {now}" + (f" → {want}" if now != want else " (as it is)")


@dataclass(frozen=True)
class RunScripts(Action):
    """Run the executables of one operation, and at the end those of the operations back.

    `roots` are the folders that hold DOMAIN/OPERATION/SUB-OPERATION/*.
    """

    domain: str
    operation: str
    roots: tuple[str, ...]
    scripts: tuple[str, ...]
    back: tuple[str, ...] = ()

    kind: ClassVar[str] = "scripts"
    needs_xml: ClassVar[bool] = True

    @property
    def key(self) -> str:
        return f"scripts {self.domain} {self.operation}"

    def fields(self) -> dict[str, Any]:
        lists = {"roots": list(self.roots), "scripts": list(self.scripts), "back": list(self.back)}
        return {"operation": self.operation, **lists}

    def describe(self, host: Host) -> str:
        return f"{self.operation}: run {', '.join(self.scripts) or 'nothing'}" + (
            f"; at the end those of {', '.join(self.back)}" if self.back else ""
        )


@dataclass(frozen=True)
class BindDriver(Action):
    """Give a PCI device to another driver while the domain runs; no other domain may have it meanwhile.

    `managed`: libvirt reattaches the device itself. `users` is who uses it now (host.users.find), for the
    plugin's check to report. Whoever uses it right before the unbind refuses the start, unless an admin
    waived that. `awake` keeps the device from sleeping.
    """

    address: str
    driver: str
    managed: bool = False
    awake: bool = False
    users: tuple[User, ...] = ()
    waived: tuple[str, ...] = ()

    kind: ClassVar[str] = "driver"

    @property
    def key(self) -> str:
        from virt_usher.host.pci import claim_key

        return claim_key(self.address)

    @property
    def binds(self) -> str | None:
        """The address, if the device will be on a vfio driver."""
        return self.address if "vfio" in self.driver else None

    def waive(self, problems: Collection[tuple[str, str, str]]) -> BindDriver:
        return replace(self, waived=tuple(sorted(p for a, _, p in problems if a == self.address)))

    def fields(self) -> dict[str, Any]:
        return {
            "address": self.address,
            "to": self.driver,
            "managed": self.managed,
            "awake": self.awake,
            "waived": list(self.waived),
        }

    def describe(self, host: Host) -> str:
        now = host.pci.device(self.address).driver or "no driver"
        change = " (as it is)" if now == self.driver else f" → {self.driver}"
        return f"{self.address}: {now}{change}{', kept awake' if self.awake else ''}"


@dataclass(frozen=True)
class UnloadModule(Action):
    """Unload a kernel module while the domain runs, and load it again at the end if it was loaded.

    `devices` are the PCI devices that may lose their driver by that; one with another refuses the start, as
    does anybody who uses one of them or the module. Any claim will do: the last domain to go reloads.
    """

    module: str
    devices: tuple[str, ...] = ()
    waived: tuple[tuple[str, str], ...] = ()

    kind: ClassVar[str] = "module"

    @property
    def key(self) -> str:
        return f"module {self.module}"

    def waive(self, problems: Collection[tuple[str, str, str]]) -> UnloadModule:
        return replace(self, waived=tuple(sorted((a, p) for a, _, p in problems if a in self.devices)))

    def fields(self) -> dict[str, Any]:
        return {"module": self.module, "devices": list(self.devices), "waived": [*map(list, self.waived)]}

    def describe(self, host: Host) -> str:
        loaded = host.exists(f"/sys/module/{self.module}/initstate")
        return f"module {self.module}: " + ("loaded → unloaded" if loaded else "not loaded (as it is)")


@dataclass(frozen=True)
class Isolate(Action):
    """Keep one part of the host (units, irqs, workqueues or irqbalance) off some CPUs.

    Several domains may do so: the host keeps what none of them isolates. `spare` are slices that guests
    run in, which are never confined. Without `share` no two of them may isolate the same CPU.
    """

    part: str
    cpus: frozenset[int]
    spare: frozenset[str] = frozenset()
    share: bool = True

    kind: ClassVar[str] = "isolation"

    @property
    def key(self) -> str:
        return "isolated CPUs"

    def fields(self) -> dict[str, Any]:
        own = {"part": self.part, "cpus": cpulist.show(self.cpus), "share": self.share}
        return {**own, "spare": sorted(self.spare)}

    def describe(self, host: Host) -> str:
        from virt_usher.isolate import preview

        moves = preview(host, self.part, self.cpus, self.spare)
        told = [
            f"{', '.join(names) if len(names) < 5 else len(names)} {cpulist.show(now)} → {cpulist.show(new)}"
            for (now, new), names in moves.items()
        ]
        what = f"{self.part} off CPUs {cpulist.show(self.cpus)}: "
        return what + ("; ".join(told) or "as they are")


@dataclass(frozen=True)
class Note:
    """A line for `plan`, `last` and the log: what is left out, and why. No action."""

    text: str


@dataclass(frozen=True)
class Problem:
    """A reason to refuse the start: the cause, what to do, and what a waiver of it would name.

    `about` is (address, vendor:device, problem) for problems that an admin may waive.
    """

    message: str
    hint: str = ""
    about: tuple[str, str, str] | None = None


def _check_text(path: object, value: object) -> None:
    """Stop what would come to light only in the middle of a start."""
    if not isinstance(path, str) or not path.startswith("/"):
        raise UsherError(f"{path!r} is not a whole path", "begin with /sys or /proc")
    if not isinstance(value, str):
        raise UsherError(f"{path}: the value {value!r} is not a text", f"write {str(value)!r}")


def size(kib: int) -> str:
    """Write a size the way people do: 2 MiB, 1 GiB, 1.5 GiB."""
    for unit, scale in (("TiB", 1 << 30), ("GiB", 1 << 20), ("MiB", 1 << 10)):
        if kib >= scale:
            return f"{round(kib / scale, 1):g} {unit}"
    return f"{kib} KiB"
