"""virt-usher as an admin uses it: its commands and what it leaves."""

from __future__ import annotations

from pathlib import Path

from tests.lab.guest.agent import CHECKOUT
from tests.lab.guest.libvirt import Domain, run, wait_for

RUN = Path("/run/virt-usher")
CONFIG = Path("/etc/virt-usher")


def enable(domain: Domain, *plugins: str) -> Domain:
    """Define a domain and switch plugins on for it."""
    domain.define()
    for plugin in plugins:
        run("virt-usher", "enable", domain.name, plugin)
    return domain


def journal(domain: Domain) -> Path:
    """Return where the domain's journal is while it holds something."""
    return RUN / f"{domain.name}.jnl"


def given_back(domain: Domain) -> None:
    """Wait until a domain that stopped holds nothing any more."""
    wait_for(f"no journal of {domain.name}", lambda: not journal(domain).exists())


def install(*arguments: str, check: bool = True) -> str:
    """Run the checkout's install.sh; return what it said."""
    done = run(str(CHECKOUT / "install.sh"), *arguments, check=check)
    return done.stdout + done.stderr
