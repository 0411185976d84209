"""virt-usher as an admin uses it: its commands and what it leaves."""

from __future__ import annotations

from pathlib import Path

from tests.lab.guest.agent import CHECKOUT
from tests.lab.guest.domains import Domain, run, wait_for

RUN = Path("/run/virt-usher")
CONFIG = Path("/etc/virt-usher")


def enable(domain: Domain, *plugins: str) -> Domain:
    """Define a domain and switch plugins on for it, as `virt-usher enable` does, which takes its time."""
    domain.define()
    (CONFIG / "domains").mkdir(exist_ok=True)
    with (CONFIG / f"domains/{domain.name}.toml").open("a") as file:
        file.writelines(f"[plugins.{plugin}]\n" for plugin in plugins)
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
