"""The entry of the hook: a deadline keeper, and the one place that decides the exit status.

The parent forks once and only waits; the worker does everything, reads included, because any read
or write of sysfs may sleep in the kernel for as long as it likes. At the deadline libvirt gets
its answer and the worker is left alone: it is never signalled, since the first signal turns a vfio
unbind into unkillable sleep. When it ends, it undoes what it did.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import time

from virt_usher import log
from virt_usher.errors import UsherError, printable, typed
from virt_usher.event import GIVE_BACK, NOTHING, Event
from virt_usher.host import LiveHost
from virt_usher.journal import Journal, Journals
from virt_usher.locks import Locks

TYPE_CHECKING = False  # importing typing would cost release more than all its work
if TYPE_CHECKING:
    from typing import Any, NoReturn

REFUSED = 3  # tells the gate that the reason is on stderr already
DEADLINES = {"start": 120.0, "stop": 15.0}  # seconds; config.toml may say otherwise


class Line:
    """The worker's end of the line to the parent."""

    def __init__(self, host: LiveHost, event: Event, results: int, token: int, began: float) -> None:
        self.host = host
        self.event = event
        self._results = results
        self._token = token
        self._parent = os.getppid()
        self.began = began
        self.deadline = began + DEADLINES["stop" if event.task == GIVE_BACK else "start"]

    def set_deadline(self, seconds: float) -> None:
        """Tell the parent how long to wait, counted from the call of the hook."""
        self.deadline = self.began + seconds
        self._send({"deadline": self.deadline})

    @property
    def soft_deadline(self) -> float:
        """When the worker itself gives up, early enough to undo and to say why."""
        return self.deadline - min(10.0, (self.deadline - self.began) / 4)

    def check(self) -> None:
        """Raise UsherError when it is too late, or nobody waits for this work any more."""
        if time.monotonic() > self.soft_deadline:
            raise UsherError(
                f"not ready after {time.monotonic() - self.began:.0f} seconds",
                "virt-usher last shows which step took long; [deadlines] in config.toml sets the limit",
            )
        if os.getppid() != self._parent:
            raise UsherError("the hook was killed")

    def answer(self, text: str = "") -> bool:
        """Give the answer, a refusal's text or none; tell whether it was still wanted.

        Worker and parent race for one byte: who gets it decides whether this start counts.
        """
        try:
            return bool(os.read(self._token, 1)) and self._send({"text": text})
        except BlockingIOError:
            return False

    def _send(self, message: dict[str, Any]) -> bool:
        try:
            os.write(self._results, json.dumps(message).encode() + b"\n")
        except BrokenPipeError:
            return False
        return True


def main(argv: list[str], host: LiveHost) -> NoReturn:
    """Answer one call of libvirt's qemu hook; never returns."""
    event = Event.from_argv(argv)
    status, text = 0, ""
    if event.task != NOTHING and os.geteuid() == 0:
        status, text = _keep_deadline(event, host)
    if text:
        # One newline first: virsh glues this to "unexpected exit status 1: ".
        os.write(2, f"\n{text}\n".encode("utf-8", "replace"))
    os._exit(status)  # the interpreter's tidying up costs milliseconds


def _keep_deadline(event: Event, host: LiveHost) -> tuple[int, str]:
    """Fork the worker, wait for its answer until the deadline, and turn it into a status."""
    began = time.monotonic()
    results, results_in = os.pipe()
    token, token_in = os.pipe()
    os.write(token_in, b"!")
    os.set_blocking(token, False)
    pid = os.fork()
    if pid == 0:
        os.close(results)
        _work(Line(host, event, results_in, token, began))
    os.close(results_in)
    deadline = began + DEADLINES["stop" if event.task == GIVE_BACK else "start"]
    answer = _listen(results, deadline, pid, event)
    if answer is None:
        try:
            os.read(token, 1)
        except BlockingIOError:  # the worker was first: its answer is on its way
            answer = _listen(results, time.monotonic() + 5, pid, event)
    if answer is None:
        os.close(results)  # so the worker learns that nobody listens any more
        answer = (
            f"virt-usher is still busy with '{printable(event.name)}' and was not ready in time\n"
            f"  {printable(_abandon(event, host, pid))}\n"
            "  it gives back what it took as soon as it can; see: virt-usher status"
        )
    if not event.may_refuse:
        return 0, ""
    return (REFUSED, answer) if answer else (0, "")


def _listen(results: int, deadline: float, pid: int, event: Event) -> str | None:
    """Read the worker's answer: '' or a refusal's text, as its end without one is; None if it is late."""
    buffer = b""
    poller = select.poll()  # select() itself knows no descriptor above 1023
    poller.register(results, select.POLLIN)
    while (left := deadline - time.monotonic()) > 0:
        if not poller.poll(left * 1000):
            return None
        chunk = os.read(results, 65536)
        if not chunk:
            return _obituary(pid, event, deadline)
        *lines, buffer = (buffer + chunk).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "text" in message:
                return str(message["text"])
            deadline = message["deadline"]
    return None


def _obituary(pid: int, event: Event, deadline: float) -> str | None:
    """Say how the worker ended; None if at the deadline it has not: a plugin closed its side of the pipe."""
    while not (end := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.005)
    status = os.waitstatus_to_exitcode(end[1])
    how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
    return (
        f"virt-usher refused to start '{printable(event.name)}': its own process {how}\n"
        "  the release that follows gives back what it changed; more in: journalctl -t virt-usher"
    )


def _abandon(event: Event, host: LiveHost, pid: int) -> str:
    """Leave a note in the journal that the worker goes on alone; what it holds stays claimed.

    Returns what the worker is doing.
    """
    journal = Journal(host, event.name)
    with contextlib.suppress(OSError):  # no journal, or a full /run: the log has it as well
        journal.append({"abandoned": [pid, host.started_at(pid)], "at": time.time()})
    where = host.waits_in(pid)
    doing = f"pid {pid} " + (f"waits in the kernel in {where}" if where else "runs")
    # A stop that is late mostly waits for the lock of the start before it, whose step this would be.
    steps = [] if event.task == GIVE_BACK else journal.live()
    step = next((s for s in reversed(steps) if not s.state), None)
    doing += f", at: {step.data.get('plugin')}: {step.data.get('what')}" if step else ""
    text = f"{event.operation}: not ready in time: {doing}: left alone"
    _log_apart(event.name, journal.start_id, text)
    return doing


def _log_apart(name: str, start_id: str, text: str) -> None:
    """Log an error from a process that nobody waits for.

    syslog() blocks while journald is stuck and its queue is full, and so would libvirt.
    """
    with contextlib.suppress(OSError):  # no process to be had: the journal has it as well
        if os.fork() == 0:
            try:
                _silence()
                log.say(log.ERROR, name, start_id, text)
            finally:
                os._exit(0)


def _work(line: Line) -> NoReturn:
    """Do the work of one operation, in the worker. Anything that goes wrong is an answer."""
    status = 0
    try:
        os.setsid()
        os.umask(0o077)
        xml = _take_stdin() if line.event.task != GIVE_BACK else b""
        _silence()
        locks = Locks(line.host, line.deadline)
        journals = Journals(line.host, locks)
        if line.event.task == GIVE_BACK:
            give_back(line, journals)
        else:
            from virt_usher import prepare

            prepare.run(line, journals, xml)
    except UsherError as error:
        line.answer(refusal(line.event.name, [error]))
    except Exception as error:  # an unknown bug must be an answer too, and its trace goes to the log
        line.answer(refusal(line.event.name, [_bug(line, error)]))
        status = 1
    os._exit(status)


def _take_stdin() -> bytes:
    """Read the whole of stdin: libvirt's XML."""
    with open(0, "rb", closefd=False) as stdin:
        return stdin.read()


def _silence() -> None:
    """Let go of libvirt's pipes: it reads them to the end, whoever holds them."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)


def _bug(line: Line, error: Exception) -> UsherError:
    import traceback

    for text in traceback.format_exception(error):
        log.say(log.ERROR, line.event.name, "-", text.rstrip())
    if isinstance(error, OSError):
        return UsherError(str(error))
    if isinstance(error, ImportError):
        return UsherError(
            f"Python cannot load {error.name}: {error}", "install it again, or see: virt-usher doctor"
        )
    return UsherError(
        f"an error in virt-usher: {type(error).__name__}: {error}", "journalctl -t virt-usher has the trace"
    )


def refusal(name: str, errors: list[UsherError]) -> str:
    """Write why a start is refused, for virsh: at most ten lines, the next step last."""
    shown = printable(name)
    lines = [f"virt-usher refused to start '{shown}':"]
    for error in errors[:4]:
        lines.append(f"  - {printable(error.message)}")
        if error.hint:
            lines.append(f"      {printable(error.hint)}")
    if len(errors) > 4:
        lines.append(f"  and {len(errors) - 4} more; all of them: virt-usher plan {typed(name)}")
    return "\n".join(lines)


def give_back(line: Line, journals: Journals) -> None:
    """Release: undo what the domain's journal says, and answer.

    Past the deadline the parent has answered libvirt already, and this goes on alone.
    """
    journal = journals.of(line.event.name)
    line.set_deadline(float(journal.header.get("stop", DEADLINES["stop"])))
    start_id = journal.start_id
    journals.locks.deadline = time.monotonic() + 3600  # rather late than never
    with journals.locks.hold(f"domain {line.event.name}"):
        journal.refresh()
        journal.reason = line.event.extra
        if journal.start_id == start_id:  # else a new start came first, and undid the old one
            close(journals, journal, line.event.extra)
    line.answer()


def close(journals: Journals, journal: Journal, reason: str) -> list[str]:
    """Give back all that a journal holds; return what is left. The domain's lock is held.

    Used by release, by recover, and by a prepare that finds the journal of a start gone wrong.
    """
    if not journal.exists:
        return []
    if not journal.readable:
        raise UsherError(
            f"{journal.path} was written by a newer virt-usher",
            "install that version again and run: virt-usher recover",
        )
    pid = journals.host.qemu(journal.name, journal.uuid)
    if pid is not None:
        log.say(
            log.ERROR, journal.name, journal.start_id, f"QEMU still runs as pid {pid}: nothing is given back"
        )
        return [f"QEMU still runs as pid {pid}"]
    began = time.monotonic()
    left = journals.roll_back(journal)
    end = {
        "op": "release",
        "at": time.time(),
        "reason": reason,
        "ms": round((time.monotonic() - began) * 1000, 2),
    }
    journal.giving_back = True
    journal.append({**end, "left": len(left)})
    journal.giving_back = False
    journal.keep_last()
    if not left:
        journal.remove()
    return [str(s.data.get("cause", "")) for s in left]
