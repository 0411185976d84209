"""Inside the guest: install the checkout, run the tests, power off.

Runs once per boot. Tests that belong to a later boot (see conftest.py) ask
for one by leaving its number in MORE.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

SHARE = Path("/lab")
OUT = SHARE / "out"
STATE = Path("/var/lib/lab")
MORE = STATE / "more"
CHECKOUT = Path("/root/virt-usher")
KEPT = ("/var/log/libvirt", "/var/lib/virt-usher", "/run/virt-usher", "/etc/virt-usher", "/run/libvirt/qemu")


def main() -> None:
    """Do this boot's part."""
    parameters = json.loads((SHARE / "parameters.json").read_text())
    STATE.mkdir(exist_ok=True)
    number = STATE / "boot"
    boot = int(number.read_text()) + 1 if number.exists() else 0
    number.write_text(str(boot))
    # Followed, not saved at the end: a guest that hangs has no end.
    with open(OUT / f"journal-{boot}.log", "w") as journal:
        subprocess.Popen(["journalctl", "--follow", "--no-tail", "--output=short-monotonic"], stdout=journal)
    (OUT / "up").touch()
    subprocess.run(["systemctl", "is-system-running", "--wait"], capture_output=True, check=False)
    with open(OUT / "tests.log", "a", buffering=1) as log:
        problem = install(parameters, log.fileno()) if boot == 0 else ""
        if parameters["shell"]:
            shell(problem)
        elif not problem and parameters["run"]:
            problem = run(str(parameters["run"]), log.fileno())
        elif not problem:
            problem = test(parameters, boot, log.fileno())
    if MORE.exists() and int(MORE.read_text()) > boot and not problem:
        keep_logs(boot)
        subprocess.run(["systemctl", "reboot"], check=False)
        return
    keep_logs(boot)
    end(problem)


def end(problem: str) -> None:
    """Say how it went, and power off."""
    (OUT / "done").write_text(json.dumps({"problem": problem}))
    os.sync()
    subprocess.run(["systemctl", "poweroff", "--force", "--force"], check=False)


def install(parameters: dict[str, object], log: int) -> str:
    """Unpack the checkout and install it as its user would."""
    CHECKOUT.mkdir()
    subprocess.run(["tar", "-xf", str(SHARE / "checkout.tar"), "-C", str(CHECKOUT)], check=True)
    if parameters["bare"]:
        return ""
    installer = CHECKOUT / "install.sh"
    if not installer.exists():
        return "the checkout has no install.sh"
    with open(OUT / "install.log", "w") as output:
        done = subprocess.run(
            [str(installer)],
            cwd=CHECKOUT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            check=False,
        )
    if done.returncode != 0:
        os.write(log, (OUT / "install.log").read_bytes())
        return f"install.sh failed with status {done.returncode}"
    return ""


def run(command: str, log: int) -> str:
    """Run a shell command in the checkout."""
    done = subprocess.run(
        ["sh", "-c", command],
        cwd=CHECKOUT,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env={**os.environ, "LC_ALL": "C.UTF-8", "HOME": "/root", "PYTHONUNBUFFERED": "1"},
        check=False,
    )
    return f"{command}: ended with status {done.returncode}" if done.returncode else ""


def test(parameters: dict[str, object], boot: int, log: int) -> str:
    """Run pytest; it says itself, in its junit file, what came out."""
    guest = CHECKOUT / "tests/lab/guest"
    arguments = parameters["pytest"]
    assert isinstance(arguments, list)
    environment = {
        **os.environ,
        "LAB_BOOT": str(boot),
        "LAB_CPU": str(parameters["cpu"]),
        "LAB_BARE": "1" if parameters["bare"] else "",
        "LAB_DONE": json.dumps(parameters["done"]),
        "LC_ALL": "C.UTF-8",
        "HOME": "/root",
        "COLUMNS": "110",
    }
    command = [
        *(sys.executable, "-B", "-m", "pytest", "-c", str(guest / "pytest.ini"), "--confcutdir", str(guest)),
        *(f"--junitxml={OUT}/junit-{boot}.xml", *arguments, str(guest)),
    ]
    done = subprocess.run(
        command, cwd=guest, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, check=False
    )
    # 1: a test failed; 5: this boot had none. Both are for the junit files to tell.
    return "" if done.returncode in (0, 1, 5) else f"pytest ended with status {done.returncode}"


def keep_logs(boot: int) -> None:
    """Copy what a failed run is looked into with."""
    for source in map(Path, KEPT):
        if source.is_dir():
            target = OUT / f"boot-{boot}" / str(source).strip("/").replace("/", "-")
            target.parent.mkdir(exist_ok=True)
            # Sockets and vanishing files are no reason to lose the rest.
            subprocess.run(
                ["cp", "-rT", "--no-preserve=all", source, target], capture_output=True, check=False
            )
            shutil.rmtree(target / "channel", ignore_errors=True)


def shell(problem: str) -> None:
    """Give the console to a person until they leave."""
    if problem:
        print(problem)
    banner = (
        "echo; echo 'The lab: virt-usher is in /root/virt-usher. Leave with exit; Ctrl-a x pulls the plug.'"
    )
    properties = ["TTYPath=/dev/ttyS0", "TTYReset=yes", "StandardInput=tty-force", "StandardOutput=tty"]
    subprocess.run(
        [
            *(
                "systemd-run",
                "--quiet",
                "--wait",
                "--collect",
                "--unit=lab-shell",
                "--working-directory=/root",
            ),
            *(f"--property={value}" for value in properties),
            *("--setenv=TERM=vt220", "--setenv=HOME=/root"),
            *("sh", "-c", f"{banner}; exec bash -l"),
        ],
        check=False,
    )


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        # Nobody in here would notice, and the runner would wait for a word until it calls it a hang.
        traceback.print_exc()
        end(f"the guest's agent failed: {error!r}")
