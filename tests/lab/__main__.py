"""Run the lab: build a release, boot it, test it, say what came out."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType

from . import boot, machine, rootfs

RELEASES = ("bookworm", "trixie", "forky")
TRIES = 6  # each goes on where the last one stopped
TOOLS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "debootstrap": "debootstrap",
    "iasl": "acpica-tools",
    "mkfs.ext4": "e2fsprogs",
    "setpriv": "util-linux",
    "unshare": "util-linux",
    "git": "git",
}


def arguments(line: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, or another one."""
    parser = argparse.ArgumentParser(prog="tests/lab/run", description=__doc__)
    add = parser.add_argument
    add("--release", nargs="+", default=["trixie"], metavar="NAME", help=f"of {', '.join(RELEASES)}; or all")
    add("--smoke", action="store_true", help="only the tests marked smoke")
    add("--soak", action="store_true", help="the long tests too, which take minutes each")
    add("-k", metavar="EXPR", help="only the tests that match, as pytest's -k")
    add("-x", action="store_true", help="stop at the first failure")
    add("--again", action="store_true", help="what fails may try once more on a fresh machine, and is named")
    add("--shell", action="store_true", help="no tests: a shell on the machine's console")
    add("--run", metavar="COMMAND", help="no tests: what the shell makes of this, in the checkout, as root")
    add("--bare", action="store_true", help="do not install virt-usher: tests of the machine alone")
    add("--cpu", choices=machine.CPU_PROFILES, default="kvm", help="nested KVM or SMT siblings")
    add("--rebuild", action="store_true", help="build the image anew")
    add("--logs", type=Path, metavar="DIR", help="keep all logs there, of good runs too")
    add("--timeout", type=int, metavar="SECONDS", help="for one release (2400; 7200 with --soak)")
    parsed = parser.parse_args(line)
    parsed.timeout = parsed.timeout or (7200 if parsed.soak else 2400)
    if parsed.release == ["all"]:
        parsed.release = list(RELEASES)
    return parsed


def missing() -> list[str]:
    """Return what this machine lacks to run the lab."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    packages = sorted({package for tool, package in TOOLS.items() if not shutil.which(tool, path=path)})
    needs = [f"packages: {' '.join(packages)}"] if packages else []
    return needs + (["root"] if os.geteuid() != 0 else [])


def choose(asked: argparse.Namespace, done: tuple[str, ...] = ()) -> boot.Options:
    """Return what a run of one release is asked to do."""
    marks = [*(["smoke"] if asked.smoke else []), *([] if asked.soak else ["not soak"])]
    return boot.Options(
        cpu=asked.cpu,
        shell=asked.shell,
        run=asked.run or "",
        bare=asked.bare,
        done=done,
        pytest=(
            *(["-m", " and ".join(marks)] if marks else []),
            *(["-k", asked.k] if asked.k else []),
            *(["-x"] if asked.x else []),
        ),
        # A long test says nothing until it is over.
        silent_seconds=3600 if asked.soak else boot.Options.silent_seconds,
        total_seconds=asked.timeout,
    )


def run_release(release: str, asked: argparse.Namespace, done: tuple[str, ...] = ()) -> boot.Outcome:
    """Run one release in a folder of its own, kept only if it failed; `done` are tests to leave out."""
    options = choose(asked, done)
    scratch = Path(tempfile.mkdtemp(prefix=f"virt-usher-lab-{release}-", dir="/var/tmp"))
    started = time.monotonic()
    outcome = boot.Outcome(problem="interrupted")
    try:
        print(f"lab: {release}: image …", flush=True)
        with rootfs.image(release, scratch / "build.log", asked.rebuild) as image:
            print(
                f"lab: {release}: image there after {time.monotonic() - started:.0f} s, booting", flush=True
            )
            outcome = boot.run(image, options, scratch)
    except RuntimeError as error:
        outcome = boot.Outcome(problem=str(error))
    finally:
        failed = bool(outcome.problem) if asked.shell or asked.run else not outcome.good
        keep(scratch, release, asked.logs, failed)
    return outcome


def keep(scratch: Path, release: str, logs: Path | None, failed: bool) -> None:
    """Keep the logs of a failed run, and no disks."""
    for disk in (*scratch.glob("*.img"), *scratch.glob("share/*.tar"), scratch / "monitor"):
        disk.unlink(missing_ok=True)
    if logs:
        shutil.copytree(scratch, logs / release, dirs_exist_ok=True)
        shutil.rmtree(scratch)
        print(f"lab: {release}: logs are in {logs / release}")
    elif failed:
        print(f"lab: {release}: logs are in {scratch}")
    else:
        shutil.rmtree(scratch)


def untripped(release: str, run: Callable[[tuple[str, ...]], boot.Outcome]) -> boot.Outcome:
    """Run, and go on with a fresh machine while the emulator's own fault is all that came out."""
    done: tuple[str, ...] = ()
    outcome = run(done)
    for number in range(2, TRIES + 1):
        if outcome.problem not in boot.EMULATORS:
            break
        done += outcome.done
        left = f"what is left after {len(done)} tests that passed" if done else "all of it"
        left += "".join(f", also {name}, which failed" for name in outcome.failures)
        print(f"{summary(release, outcome)}. ONCE MORE, {left}, try {number} of {TRIES}", flush=True)
        outcome = run(done)
        outcome.passed += len(done)
    return outcome


def again(outcome: boot.Outcome) -> str:
    """Return what selects the tests that failed, '' for all where it was not only tests that failed."""
    # Those of a reboot build on each other.
    names = ["test_reboot" if "test_reboot" in f else f.rpartition("::")[2] for f in outcome.failures]
    return "" if outcome.problem else " or ".join(dict.fromkeys(names))


def both(first: boot.Outcome, second: boot.Outcome) -> boot.Outcome:
    """Return what came out in the end of a run and what was tried once more."""
    if first.problem or not second.good:
        return second
    first.passed += first.failed
    first.failures = [f"{f}: failed, and passed on a fresh machine" for f in first.failures]
    first.failed = 0
    return first


def summary(release: str, outcome: boot.Outcome) -> str:
    """Return the line that says how a release went."""
    counts = f"{outcome.passed} passed, {outcome.failed} failed, {outcome.skipped} skipped"
    times = f"up after {outcome.up_after:.0f} s, off after {outcome.seconds:.0f} s"
    problem = f"; FAILED: {outcome.problem}" if outcome.problem else ""
    return f"lab: {release}: {counts} ({times}){problem}"


def main() -> int:
    """Run what was asked for; 0 only if every release ran tests and all passed."""
    asked = arguments()
    needs = missing()
    if needs:
        print(f"lab: CANNOT RUN HERE, nothing was tested. Needs {'; '.join(needs)}", file=sys.stderr)
        return 2

    def stop(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    outcomes = {}
    for release in asked.release:
        first = outcomes[release] = untripped(release, partial(run_release, release, asked))
        if asked.again and not asked.run and not first.good and first.problem not in boot.EMULATORS:
            print(f"{summary(release, first)}. Once more: {again(first) or 'all of it'}", flush=True)
            narrower = argparse.Namespace(**{**vars(asked), "k": again(first) or asked.k})
            second = untripped(release, partial(run_release, release, narrower))
            outcomes[release] = both(first, second)
    if asked.shell or asked.run:
        print(*(outcome.problem.rstrip() for outcome in outcomes.values() if outcome.problem), sep="\n")
        return int(any(outcome.problem for outcome in outcomes.values()))
    print()
    for release, outcome in outcomes.items():
        print(summary(release, outcome))
        for failure in outcome.failures:
            print(f"    {failure}")
    passed, failed, skipped = (
        sum(getattr(outcome, count) for outcome in outcomes.values())
        for count in ("passed", "failed", "skipped")
    )
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 0 if all(outcome.good for outcome in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
