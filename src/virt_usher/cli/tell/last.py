"""The last start and stop of a domain, as data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from virt_usher.errors import UsherError
from virt_usher.host import LAST_DIR, LiveHost
from virt_usher.journal import Journal


def record_of(host: LiveHost, name: str) -> Journal:
    """Read what is held now, or else the copy that outlives release and reboot."""
    journal = Journal(host, name)
    if not journal.exists:
        journal.path = f"{LAST_DIR}/{name}.jnl"
        journal.refresh()
    if not journal.exists:
        hint = "virt-usher plan shows what a start would do"
        raise UsherError(f"no start of {name!r} is on record that virt-usher had to do with", hint)
    return journal


def operations(journal: Journal) -> Iterator[dict[str, Any]]:
    """Yield each operation with its steps: what was recorded up to the line that ends it."""
    steps: list[dict[str, Any]] = []
    problems: list[dict[str, str]] = []
    for record in journal.records:
        if step := _step(journal, record):
            steps.append(step)
        elif "problem" in record:
            problems.append({"message": record["problem"], "hint": record.get("hint", "")})
        elif "abandoned" in record:
            message = f"not ready in time: pid {record['abandoned'][0]} was left to go on alone"
            problems.append({"message": message, "hint": ""})
        elif "op" in record:
            yield _operation(record, steps, problems)
            steps, problems = [], []
    if steps or problems:
        yield _operation({"op": "", "result": "unfinished"}, steps, problems)


def _operation(
    record: dict[str, Any], steps: list[dict[str, Any]], problems: list[dict[str, str]]
) -> dict[str, Any]:
    failed = any(s["result"] in ("failed", "left behind") for s in steps)
    bad = bool(failed or problems or record.get("left") or record.get("result", "ok") != "ok")
    return {**record, "steps": steps, "problems": problems, "bad": bad}


def _step(journal: Journal, record: dict[str, Any]) -> dict[str, Any] | None:
    """Tell of one record about a step; None for a record of another sort."""
    if "note" in record:
        return {"plugin": record.get("plugin"), "what": record["note"], "result": "left out", "why": ""}
    word = next((w for w in ("do", "undone", "kept") if w in record), "")
    step = journal.steps.get(record[word]) if word else None
    if step is None:
        return None
    told = {"plugin": step.data.get("plugin"), "what": step.data.get("what")}
    if word == "undone":
        return told | {"result": "given back", "ms": record.get("undo_ms"), "why": record.get("remark", "")}
    if word == "kept" or "cause" in record:  # the latter: carried over from an earlier start
        return told | {"result": "left behind", "why": record.get("cause", "")}
    result = "failed" if step.failed else "done" if step.done else "unfinished"
    ruled = step.data.get("ruled")
    why = step.data.get("why") or (f"the earlier claim of {ruled} rules" if ruled else "")
    return told | {"result": result, "ms": step.data.get("ms"), "why": why}
