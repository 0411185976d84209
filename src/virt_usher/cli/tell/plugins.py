"""What is to be told of a plugin, as data."""

from __future__ import annotations

import sys
from typing import Any

from virt_usher import options
from virt_usher.cli.edit import EVERY
from virt_usher.config import ALWAYS_ON, parse
from virt_usher.errors import UsherError
from virt_usher.host import CONFIG_DIR, Host
from virt_usher.plugins import PACKAGES_DIR, installed, load


def switches_of(host: Host) -> dict[str, dict[str, bool]]:
    """Return domain ('' is every one) -> plugin -> on, from the files alone."""
    folder = f"{CONFIG_DIR}/domains"
    names = [f[:-5] for f in host.entries(folder) if f.endswith(".toml")]
    found = {name: _switches(host, f"{folder}/{name}.toml") for name in names}
    policy = {p: on for p, on in _switches(host, f"{CONFIG_DIR}/config.toml").items() if p == ALWAYS_ON}
    return {"": policy | _switches(host, EVERY), **found}


def _switches(host: Host, path: str) -> dict[str, bool]:
    """Return plugin -> on from one file; doctor and plan tell of one that cannot be read."""
    try:
        tables = parse(host.get(path).encode("utf-8", "surrogateescape")).get("plugins", {})
        return {plugin: bool(table.get("enabled", True)) for plugin, table in tables.items()}
    except (ValueError, AttributeError):
        return {}


def tell(host: Host, name: str, switches: dict[str, dict[str, bool]], home: str = "") -> dict[str, Any]:
    """Tell all about one plugin, as data; `home` is "module:Class" for one out of a package."""
    told: dict[str, Any] = {
        "name": name,
        "file": PACKAGES_DIR if home else installed(host)[name],
        "from": home,
        "summary": "",
        "options": [],
        "files_only": False,
        "every_domain": switches.get("", {}).get(name, False),
        "on": [d for d, plugins in switches.items() if d and plugins.get(name) is True],
        "off": [d for d, plugins in switches.items() if d and plugins.get(name) is False],
        "error": "",
    }
    try:
        plugin = load(host, name, home)
        told["summary"] = (sys.modules[plugin.__module__].__doc__ or plugin.__doc__ or "").split("\n")[0]
        told["files_only"] = bool(getattr(plugin, "FILES_ONLY", False))
        told["options"] = [_option(o, told["files_only"]) for o in options.options_of(plugin).values()]
    except UsherError as error:
        told["error"] = error.message
    return told


def _option(info: options.OptionInfo, files_only: bool) -> dict[str, Any]:
    return {
        "name": info.name,
        "type": getattr(info.type, "__name__", str(info.type)),
        "default": info.default,
        "help": info.help,
        "choices": list(info.choices),
        "metadata": info.harmless and not files_only,
    }
