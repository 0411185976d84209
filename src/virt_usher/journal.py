"""What a domain holds, and how to undo it: on disk before it is done.

One file per domain, /run/virt-usher/NAME.jnl, JSON lines, append-only. The directory is a tmpfs: what
a journal describes dies with the boot too, so nothing is synced. Release and recover run on this
module alone, which is why it imports so little (a test holds the list).
"""

from __future__ import annotations

import json
import os
import time

from virt_usher import log
from virt_usher.effects import kind_of
from virt_usher.errors import UsherError
from virt_usher.host import LAST_DIR, RUN_DIR, Host, LiveHost
from virt_usher.locks import Locks

TYPE_CHECKING = False  # importing typing would cost release more than all its work
if TYPE_CHECKING:
    from typing import Any

VERSION = 1
SIGNS = {"start": ".sta", "started": ".std"}  # 4 bytes: libvirt takes names of up to 251
LAST_MOST = 200  # files kept in LAST_DIR
_ABOUT_STEPS = ("pool", "got", "ok", "bad", "passed", "undone", "kept")


class Step:
    """One action of one domain, from its announcement to its undo."""

    __slots__ = ("data", "journal", "n", "state")

    def __init__(self, journal: Journal, n: int, data: dict[str, Any]) -> None:
        self.journal = journal
        self.n = n
        self.data = data
        self.state = ""  # '' announced, then ok, bad, undone, kept

    @property
    def domain(self) -> str:
        return self.journal.name

    @property
    def kind(self) -> str:
        return str(self.data.get("kind", ""))

    @property
    def key(self) -> str:
        return str(self.data.get("key", ""))

    @property
    def at(self) -> int:
        """When it was announced, under its key's lock (CLOCK_MONOTONIC ns): the order of claims."""
        return int(self.data.get("at", 0))

    @property
    def done(self) -> bool:
        return "ms" in self.data and not self.failed

    @property
    def failed(self) -> bool:
        return "why" in self.data

    @property
    def left(self) -> bool:
        """Whether it is left over from a domain that has stopped: its undo failed."""
        return "cause" in self.data

    def inherit(self, other: Step, found: bool = True) -> None:
        """Take over the original of one who leaves: he came later, or left behind what we have `found`."""
        if self.data["old"] != other.data["old"] and (other.at > self.at or (other.left and found)):
            self.log("ok", old=other.data["old"])

    def log(self, word: str, **fields: Any) -> None:
        """Append a record about this step to its journal."""
        self.journal.append({word: self.n, **fields})

    def note(self, word: str, record: dict[str, Any]) -> None:
        """Take in a record about this step."""
        fields = {k: v for k, v in record.items() if k != word}
        if word == "pool":
            self.data.setdefault("pool", []).append(fields)
        elif word == "got":
            for change in self.data.get("pool", [])[-1:]:
                change["got"] = fields["by"]
        else:
            self.state = word
            self.data.update(fields)


class Journal:
    """The journal of one domain. Reading takes no lock; changing it takes the domain's."""

    def __init__(self, host: Host, name: str) -> None:
        if "/" in name or "\0" in name or not name:
            raise UsherError(f"{name!r} cannot be the name of a domain")
        self.host = host
        self.name = name
        self.path = f"{RUN_DIR}/{name}.jnl"
        self.header: dict[str, Any] = {}
        self.records: list[dict[str, Any]] = []
        self.steps: dict[int, Step] = {}
        self.giving_back = False
        self.reason = "-"  # libvirt's extra argument: since 10.5 why the domain was shut off
        self._read = 0
        self._inode = 0
        self.refresh()

    # -- reading

    def refresh(self) -> None:
        """Read what was appended since the last look; an unfinished last line is not there yet."""
        try:
            fd = os.open(self.host.path(self.path), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            self._forget()
            return
        try:
            status = os.fstat(fd)
            if (status.st_ino, True) != (self._inode, status.st_size >= self._read):
                self._forget()
                self._inode = status.st_ino
            if status.st_size == self._read:
                return
            data = os.pread(fd, status.st_size - self._read, self._read)
        finally:
            os.close(fd)
        whole = data[: data.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue  # torn by a crash, then appended to
            if isinstance(record, dict):
                self._note(record)

    def _forget(self) -> None:
        self.header, self.records, self.steps, self._read, self._inode = {}, [], {}, 0, 0

    def _note(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        if "usher" in record:
            self.header = record
        elif "do" in record:
            self.steps[record["do"]] = Step(self, record["do"], dict(record))
        else:
            word = next(iter(record), "")
            n = record.get(word)
            if word in _ABOUT_STEPS and isinstance(n, int) and n in self.steps:
                self.steps[n].note(word, record)

    @property
    def exists(self) -> bool:
        return self._inode != 0

    @property
    def uuid(self) -> str:
        return str(self.header.get("uuid", ""))

    @property
    def start_id(self) -> str:
        return str(self.header.get("id", "-"))

    @property
    def readable(self) -> bool:
        """Whether this version understands the journal (one without a header holds nothing)."""
        return int(self.header.get("usher", VERSION)) <= VERSION

    def live(self) -> list[Step]:
        """Return the steps that are not undone, oldest first."""
        return [s for s in self.steps.values() if s.state != "undone"]

    # -- writing

    def append(self, record: dict[str, Any]) -> None:
        """Append one record in one write.

        A failure leaves the file as it was and is raised; not while giving back, where the
        record is kept in memory instead: a full /run must not stop an undo.
        """
        try:
            self._write(record)
        except OSError:
            if not self.giving_back:
                raise
            self._note(record)

    def _write(self, record: dict[str, Any]) -> None:
        self.refresh()  # another domain may have settled a pool in here (effects.Pages)
        line = _lines([record])
        # Never created here: a late note must not bring back a journal that was just removed.
        fd = os.open(self.host.path(self.path), os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        try:
            size = os.fstat(fd).st_size
            if size > self._read:  # a torn tail: it must not become a record now that a newline follows
                line = b"#\n" + line
            if os.write(fd, line) != len(line):
                os.ftruncate(fd, size)
                raise OSError(28, "No space left on device", self.path)
        finally:
            os.close(fd)
        self.refresh()  # takes in this record, and any that came in between

    def begin(self, uuid: str, daemon: int, stop: float) -> None:
        """Start the journal of a new start, carrying over what earlier ones left behind.

        `daemon` is the pid of the libvirt daemon that called, `stop` the deadline of its release.
        """
        left = [s.data for s in self.live()]
        header = {
            "usher": VERSION,
            "name": self.name,
            "uuid": uuid,
            "id": os.urandom(4).hex(),
            "hook": [os.getpid(), self.host.started_at(os.getpid())],
            "daemon": [daemon, self.host.started_at(daemon)],
            "at": time.time(),
            "stop": stop,
        }
        self._replace([header, *left])

    def _replace(self, records: list[dict[str, Any]]) -> None:
        real = self.host.path(self.path)
        # Where there is none yet, a torn one holds nothing: no rename, that a kill could leave a spare of.
        spare = real[:-4] + ".tmp" if self.exists else real
        fd = os.open(spare, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            data = _lines(records)
            if os.write(fd, data) != len(data):
                raise OSError(28, "No space left on device", self.path)
        except OSError:
            os.unlink(spare)
            raise
        finally:
            os.close(fd)
        if spare != real:
            os.rename(spare, real)
        self.refresh()

    def sign(self, operation: str) -> None:
        """Leave a sign for the gate that this domain has work at a later operation."""
        real = self.host.path(self.path)[:-4] + SIGNS[operation]
        os.close(os.open(real, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))

    def keep_xml(self, xml: bytes) -> None:
        """Keep the domain's XML beside the journal, for scripts that read it."""
        real = self.host.path(self.path)[:-4] + ".xml"
        with open(os.open(real, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as stream:
            stream.write(xml)  # all of it, or OSError: a full /run takes only a part of one write

    def kept_xml(self) -> bytes:
        """Return the domain's XML that was kept, whatever its size; empty where there is none."""
        try:
            return self.host.read_bytes(self.path[:-4] + ".xml")
        except OSError:
            return b""

    def remove(self) -> None:
        """Delete the journal and its signs: the domain holds nothing any more.

        Where one cannot be deleted the journal stays too, and the next start, release or recover tries again.
        """
        real = self.host.path(self.path)
        for path in (*(real[:-4] + suffix for suffix in (*SIGNS.values(), ".tmp", ".xml")), real):
            try:
                os.unlink(path)
            except FileNotFoundError:
                continue
            except OSError as error:
                text = f"{path}: {error.strerror}: it holds nothing any more, and stays"
                log.say(log.WARNING, self.name, self.start_id, text)
                return
        self._forget()

    def keep_last(self, sync: bool = False) -> None:
        """Copy the journal to LAST_DIR, for `last` and for after a host that hung; never raises."""
        if not isinstance(self.host, LiveHost) or not self.records:
            return
        try:
            folder = self.host.private_dir(LAST_DIR)
            spare = os.path.join(folder, self.name + ".tmp")
            fd = os.open(spare, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                os.write(fd, _lines(self.records))
                if sync:
                    os.fsync(fd)
            finally:
                os.close(fd)
            os.rename(spare, spare[:-4] + ".jnl")
            _prune(folder)
        except OSError as error:
            log.say(log.WARNING, self.name, self.start_id, f"cannot keep the record of this start: {error}")


def _lines(records: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(r, separators=(",", ":")).encode() + b"\n" for r in records)


def _prune(folder: str) -> None:
    """Keep the newest LAST_MOST records."""
    names = os.listdir(folder)
    if len(names) > LAST_MOST:
        paths = sorted((os.path.join(folder, n) for n in names), key=os.path.getmtime)
        for path in paths[: len(names) - LAST_MOST]:
            os.unlink(path)


class Journals:
    """All journals of a host, and with them who holds what: there is no second record of it."""

    def __init__(self, host: LiveHost, locks: Locks) -> None:
        self.host = host
        self.locks = locks
        self._known: dict[str, Journal] = {}

    def of(self, name: str) -> Journal:
        """Return the journal of a domain; always the same object for the same name."""
        if name not in self._known:
            self._known[name] = Journal(self.host, name)
        return self._known[name]

    def names(self) -> list[str]:
        """Return the domains that have a journal."""
        return [n[:-4] for n in self.host.entries(RUN_DIR) if n.endswith(".jnl")]

    def holders(self, key: str) -> list[Step]:
        """Return the live steps of all domains on a key, earliest first."""
        found = []
        for name in self.names():
            journal = self.of(name)
            journal.refresh()
            found += [s for s in journal.live() if s.key == key]
        return sorted(found, key=lambda s: s.at)

    def do(self, journal: Journal, plugin: str, what: str, fields: dict[str, Any]) -> Step:
        """Announce an action and do it. OSError or UsherError say why it could not be done.

        The undo is on disk first, under the key's lock, so that no other domain can take our
        value for the original.
        """
        kind, began = kind_of(fields["kind"]), time.monotonic()
        with self.locks.hold(fields["key"]):
            others = self.holders(fields["key"])
            extra = kind.before(self.host, fields, others)
            n = max(journal.steps, default=0) + 1
            record = {"do": n, "plugin": plugin, "what": what, **fields, **extra}
            journal.append({**record, "at": time.monotonic_ns()})
            step = journal.steps[n]
            try:
                seen = kind.do(self.host, step, others, self.locks.deadline)
            except (OSError, UsherError) as error:
                step.log("bad", why=_cause(error), ms=_ms(began))
                raise
            step.log("ok", ms=_ms(began), **seen)
        return step

    def undo(self, step: Step) -> str:
        """Undo one step; return the cause if it could not be, else ''."""
        began = time.monotonic()
        try:
            with self.locks.hold(step.key):
                others = [s for s in self.holders(step.key) if s is not step]
                remark = kind_of(step.kind).undo(self.host, step, others)
                step.log("undone", undo_ms=_ms(began), **({"remark": remark} if remark else {}))
        except (OSError, UsherError, LookupError) as error:
            step.log("kept", cause=_cause(error))
            log.say(
                log.ERROR,
                step.domain,
                step.journal.start_id,
                f"cannot undo: {step.data.get('what')}: {error}",
            )
            return _cause(error)
        text = f"{step.data.get('plugin')}: given back: {step.data.get('what')}" + (
            f" ({remark})" if remark else ""
        )
        log.say(log.WARNING if remark else log.INFO, step.domain, step.journal.start_id, text)
        return ""

    def roll_back(self, journal: Journal) -> list[Step]:
        """Undo all that a domain holds, latest first; return what could not be undone."""
        journal.giving_back = True
        try:
            return [s for s in reversed(journal.live()) if self.undo(s)]
        finally:
            journal.giving_back = False


def _ms(began: float) -> float:
    return round((time.monotonic() - began) * 1000, 2)


def _cause(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.filename or ''}: {error.strerror}".lstrip(": ")
    return str(error)
