"""A start: plan it, check it, act; or refuse it with everything as it was.

`make_plan` is pure and serves the CLI's `plan` too, so that what it shows is what the hook does.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from virt_usher import children, config, log
from virt_usher.actions import Action, Note, Problem
from virt_usher.dispatch import Line, close, refusal
from virt_usher.domain import Domain
from virt_usher.errors import UsherError
from virt_usher.event import PLAN, PLAN_STARTED
from virt_usher.guest import Guest
from virt_usher.host import Host
from virt_usher.plugins import Plugins, forbid_libvirt

if TYPE_CHECKING:
    from virt_usher.journal import Journal, Journals

_AFTER = {"prepare": ("start", "started"), "start": ("started",), "started": ()}
_HOOKS = {"prepare": "usher_prepare", "start": "usher_start", "started": "usher_started"}


@dataclass(frozen=True)
class Planned:
    """One thing a plugin wants: an action, or a note about one left out."""

    plugin: str
    item: Action | Note


@dataclass(frozen=True)
class Plan:
    """What a start would do, in order, and the reasons not to start at all."""

    items: tuple[Planned, ...] = ()
    problems: tuple[UsherError, ...] = ()
    waived: tuple[str, ...] = ()
    later: tuple[str, ...] = ()  # the operations at which some plugin wants to be asked again

    @property
    def actions(self) -> list[Action]:
        """The actions alone."""
        return [p.item for p in self.items if isinstance(p.item, Action)]


def make_plan(
    host: Host,
    domain: Domain,
    settings: config.Settings,
    operation: str = "prepare",
    trace: Callable[[str], None] | None = None,
) -> Plan:
    """Ask the domain's plugins what they want and what they object to; nothing is changed.

    `trace` is told of each hook call: arguments, result, duration.
    """
    plugins = Plugins(host, settings.plugins, trace)
    items: list[Planned] = []
    problems: list[UsherError] = [*settings.problems, *plugins.problems]
    waived: list[str] = []
    allowed: list[tuple[str, str, str]] = []
    guest = Guest.of(host, domain) if operation == "started" else None
    for name, answer in plugins.ask(_HOOKS[operation], domain=domain, host=host, guest=guest):
        if isinstance(answer, UsherError):
            problems.append(_named(name, answer))
            continue
        for item in answer:
            if isinstance(item, Action | Note):
                items.append(Planned(name, item))
            else:
                problems.append(UsherError(f"plugin {name} returned {item!r}, which is no action"))
    plan = Plan(tuple(items))
    for name, answer in plugins.ask("usher_check", domain=domain, host=host, plan=plan):
        if isinstance(answer, UsherError):
            problems.append(_named(name, answer))
            continue
        for found in answer:
            if not isinstance(found, Problem):
                problems.append(UsherError(f"plugin {name} returned {found!r}, which is no problem"))
                continue
            waiver = _waiver(found, settings)
            if waiver and found.about:
                allowed.append(found.about)
                waived.append(f"{found.message}; waived: {waiver.reason}")
            else:
                problems.append(UsherError(f"{name}: {found.message}{_void(found, settings)}", found.hint))
    items = [Planned(p.plugin, p.item if isinstance(p.item, Note) else p.item.waive(allowed)) for p in items]
    later: list[str] = []
    for other in _AFTER[operation]:
        try:
            later += [other] if plugins.want(_HOOKS[other], other, domain) else []
        except UsherError as error:
            problems.append(error)
    return Plan(tuple(items), tuple(problems), tuple(waived), tuple(later))


def _named(plugin: str, error: UsherError) -> UsherError:
    told = error.message if plugin in error.message else f"{plugin}: {error.message}"
    return UsherError(told, error.hint)


def _waiver(problem: Problem, settings: config.Settings) -> config.Waiver | None:
    """Return the waiver for a problem; it binds address and vendor:device, so a new card voids it."""
    if problem.about:
        for waiver in settings.waivers:
            if (waiver.address, waiver.device, waiver.problem) == problem.about:
                return waiver
    return None


def _void(problem: Problem, settings: config.Settings) -> str:
    """Name the waivers of a problem's device that are for another card, or another problem, than this."""
    waivers = (w for w in settings.waivers if problem.about and w.address == problem.about[0])
    return "".join(f"; void here: the waiver of {w.problem!r} of {w.device} in {w.file}" for w in waivers)


def run(line: Line, journals: Journals, xml: bytes) -> None:
    """Answer prepare, start or started for a domain; UsherError refuses it."""
    event, host = line.event, journals.host
    forbid_libvirt()
    domain = replace(Domain.from_xml(xml), name=event.name)
    settings = config.settings(host, domain)
    line.set_deadline(settings.start)
    journals.locks.deadline = line.soft_deadline
    with journals.locks.hold(f"domain {event.name}"):
        journal = journals.of(event.name)
        journal.refresh()
        if event.task == PLAN:
            _clear(journals, journal)
            journals.locks.deadline = line.soft_deadline
        with _alarm(line):
            plan = make_plan(host, domain, settings, event.operation, _tracer(journal, settings))
        if event.task == PLAN_STARTED:
            _act_alone(line, journals, journal, plan)
            line.answer()
            return
        errors = [*plan.problems, *_in_doubt(journal, plan)]
        if event.task == PLAN or not journal.exists:
            journal.begin(domain.uuid, host.calling_daemon(), settings.stop)
        errors = errors or _leave(line, journal, plan, xml) or _act(line, journals, journal, plan)
        text = refusal(event.name, errors) if errors else ""
        _finish(line, journals, journal, plan, errors)
        if not line.answer(text) and not errors:
            journals.locks.deadline = time.monotonic() + 600
            close(journals, journal, "the start was given up")


def _tracer(journal: Journal, settings: config.Settings) -> Callable[[str], None] | None:
    def tell(text: str) -> None:
        log.say(log.INFO, journal.name, journal.start_id, f"trace: {text}")

    return tell if settings.trace else None


@contextmanager
def _alarm(line: Line) -> Iterator[None]:
    """Raise TimeoutError in a plugin that does not come back; nothing is touched yet, so it is safe."""

    def ring(signum: int, frame: object) -> None:
        why = children.libvirt_client(line.host, os.getpid())
        seconds = f"no answer after {time.monotonic() - line.began:.0f} seconds"
        raise TimeoutError(f"{seconds}: {why}" if why else seconds)

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(0.1, line.soft_deadline - time.monotonic()))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _clear(journals: Journals, journal: Journal) -> None:
    """Undo what an earlier start left, now that libvirt says the domain does not run."""
    pid = journals.host.qemu(journal.name, journal.uuid) if journal.exists else None
    if pid is not None:
        raise UsherError(
            f"a QEMU of this domain still runs as pid {pid}, and holds what an earlier start prepared",
            f"look at it: ps -fp {pid}; when it is gone, start again",
        )
    close(journals, journal, "left over")


def _in_doubt(journal: Journal, plan: Plan) -> list[UsherError]:
    """Refuse what would build on something that an earlier start could not give back."""
    left = {s.key: s for s in journal.live() if s.left}
    found = [left[a.key].data for a in plan.actions if a.key in left]
    hint = "put that right, then: virt-usher recover"
    return [UsherError(f"left behind earlier: {d.get('what')}: {d.get('cause')}", hint) for d in found]


def _leave(line: Line, journal: Journal, plan: Plan, xml: bytes) -> list[UsherError]:
    """Leave what later operations need before anything is done: a full /run refuses the start here."""
    try:
        if any(a.needs_xml for a in plan.actions):
            journal.keep_xml(xml)
        for later in plan.later if line.event.task == PLAN else ():
            journal.sign(later)
    except OSError as error:
        return [UsherError(f"{error.filename or journal.path}: {error.strerror}")]
    return []


def _act(line: Line, journals: Journals, journal: Journal, plan: Plan) -> list[UsherError]:
    """Do the plan, each undo on disk before its deed; at the first failure give all back."""
    for planned in plan.items:
        try:
            line.check()
            _one(journals, journal, planned)
        except (OSError, UsherError) as error:
            journals.locks.deadline = time.monotonic() + 60
            journals.roll_back(journal)
            return [_failed(planned.plugin, error)]
    return []


def _act_alone(line: Line, journals: Journals, journal: Journal, plan: Plan) -> None:
    """Do what belongs to a running guest: a failed step is undone alone, the guest stays."""
    for problem in plan.problems:
        _remember(journal, "problem", problem.message)
    for planned in plan.items:
        known = set(journal.steps)
        try:
            line.check()
            _one(journals, journal, planned)
        except (OSError, UsherError) as error:
            _remember(journal, "problem", _failed(planned.plugin, error).message)
            for n in journal.steps.keys() - known:
                journals.undo(journal.steps[n])
    _remember(journal, "op", "started", at=time.time(), ms=_ms(line))


def _one(journals: Journals, journal: Journal, planned: Planned) -> None:
    """Do one planned thing and log it."""
    if isinstance(planned.item, Note):
        _remember(journal, "note", planned.item.text, plugin=planned.plugin)
        text = planned.item.text
    else:
        what = planned.item.describe(journals.host)
        step = journals.do(journal, planned.plugin, what, planned.item.record())
        skipped = f"skipped, {step.data['skipped']}, " if "skipped" in step.data else ""
        text = f"{what} ({skipped}{step.data['ms']} ms)"
    log.say(log.INFO, journal.name, journal.start_id, f"{planned.plugin}: {text}")


def _failed(plugin: str, error: Exception) -> UsherError:
    if isinstance(error, UsherError):
        return UsherError(f"{plugin}: {error.message}", error.hint)
    assert isinstance(error, OSError)
    return UsherError(f"{plugin}: {error.filename or 'the journal'}: {error.strerror}")


def _finish(line: Line, journals: Journals, journal: Journal, plan: Plan, errors: list[UsherError]) -> None:
    """Write down how it ended, for `last`, and leave what later operations need."""
    operation = line.event.operation
    for text in plan.waived:
        _remember(journal, "note", text, plugin="waiver")
    for error in errors:
        _remember(journal, "problem", error.message, hint=error.hint)
        log.say(log.ERROR, journal.name, journal.start_id, f"{operation} refused: {error.message}")
    result = "refused" if errors else "ok"
    _remember(journal, "op", operation, at=time.time(), result=result, ms=_ms(line))
    journal.keep_last()
    if not journal.live() and (errors or not plan.later):
        journal.remove()


def _remember(journal: Journal, word: str, value: str, **fields: object) -> None:
    """Append a record that nobody needs for undoing: a full /run must not turn it into an error."""
    was, journal.giving_back = journal.giving_back, True
    journal.append({word: value, **fields})
    journal.giving_back = was


def _ms(line: Line) -> float:
    return round((time.monotonic() - line.began) * 1000, 1)


def steps_of(plan: Plan, host: Host) -> Iterator[tuple[str, str]]:
    """Yield (plugin, text) for each planned thing, as `plan` shows and `last` remembers it."""
    for planned in plan.items:
        item = planned.item
        yield planned.plugin, item.text if isinstance(item, Note) else item.describe(host)
