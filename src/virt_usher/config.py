"""Which plugins a domain has, with which options: files and the domain's metadata, merged.

config.toml (policy) < every-domain.toml < the domain's <metadata> < domains/NAME.toml, key by key.
All that is wrong is reported at once, as `file: table.key: message`.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from virt_usher.dispatch import DEADLINES
from virt_usher.domain import Domain
from virt_usher.errors import UsherError, nearest, printable
from virt_usher.host import CONFIG_DIR, Host
from virt_usher.vetting import vet as vet

ALWAYS_ON = "reset_check"  # the one plugin that config.toml itself may switch
DEEPEST = 20  # no file of ours needs more than five
_TOP = {
    "config.toml": ("deadlines", "metadata", "plugins", "trace"),
    "every-domain.toml": ("plugins", "waive"),
    "domains": ("plugins", "waive"),
}


@dataclass(frozen=True)
class Enabled:
    """One plugin that is on for a domain, with the options set for it and who set them."""

    name: str
    options: Mapping[str, object] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    home: str = ""  # "module:Class" of a plugin out of a package

    def where(self, key: str) -> str:
        """Name the file that set an option; '' is who switched the plugin on."""
        return self.sources.get(key, "")

    @property
    def from_metadata(self) -> list[str]:
        """The options that the domain's own <metadata> set."""
        return [k for k, source in self.sources.items() if k and source == "<metadata>"]


@dataclass(frozen=True)
class Waiver:
    """An admin's written exception to one problem on one device."""

    address: str
    device: str
    problem: str
    reason: str
    file: str = ""

    def mistakes(self) -> dict[str, str]:
        """Return key -> why it matches nothing, whatever card is there; '' is the address."""
        from virt_usher import ending, hostdev  # here: few domains have a waiver

        found = {}
        if (right := hostdev.canonical(self.address)) != self.address:
            meant = f" (did you mean {right!r}?)" if right else " such as 0000:01:00.0"
            found[""] = f"is not a PCI address in the kernel's spelling{meant}"
        if not re.fullmatch("[0-9a-f]{4}:[0-9a-f]{4}", self.device):
            small = self.device.lower()
            meant = f" (did you mean {small!r}?)" if small != self.device else ""
            found["device"] = f"{self.device!r} is not vendor:device such as 10de:1288{meant}"
        if self.problem not in ending.NAMES:
            near, known = nearest(self.problem, list(ending.NAMES)), ", ".join(ending.NAMES)
            if near or self.problem in ending.NEVER:  # else it may be that of an admin's own plugin
                text = f"is no problem that can be waived{near}: ours are {known}"
                found["problem"] = f"{self.problem!r} {text}"
        return found


@dataclass(frozen=True)
class Settings:
    """All that the configuration says for one domain."""

    start: float = DEADLINES["start"]
    stop: float = DEADLINES["stop"]
    plugins: tuple[Enabled, ...] = ()
    waivers: tuple[Waiver, ...] = ()
    problems: tuple[UsherError, ...] = ()
    trace: bool = False  # log every hook call with its arguments, result and duration


def domain_file(name: str) -> str:
    """Return the path of a domain's own file."""
    return f"{CONFIG_DIR}/domains/{name}.toml"


def parse(text: bytes) -> dict[str, Any]:
    """Read TOML; ValueError says what is wrong with it, nesting that would use up Python's stack too."""
    deep = f"tables and lists are nested deeper than {DEEPEST}"
    try:
        content = tomllib.loads(text.decode())
    except RecursionError:
        raise ValueError(deep) from None
    level: list[Any] = [content]
    for _ in range(DEEPEST):
        level = [inner for each in level for inner in _inside(each)]
    if level:
        raise ValueError(deep)
    return content


def _inside(value: object) -> Iterable[object]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def settings(host: Host, domain: Domain) -> Settings:
    """Merge all that concerns a domain; problems are collected, not raised."""
    return _Merge(host, domain).result()


def pools(host: Host, domain: Domain) -> list[str]:
    """Return those of a domain's networks that hand out virtual functions, by libvirt's own files.

    Only for domains whose hook runs anyway: the gate starts Python at `start`, where the XML has them.
    """
    folders = ("/etc/libvirt/qemu/networks", "/run/libvirt/network")
    return [n for n in domain.networks if any("mode='hostdev'" in host.get(f"{f}/{n}.xml") for f in folders)]


class _Merge:
    """One merge: reads the four layers in turn, collecting problems."""

    def __init__(self, host: Host, domain: Domain) -> None:
        self.host = host
        self.problems: list[UsherError] = []
        self.on: dict[str, bool] = {}
        self.options: dict[str, dict[str, object]] = {}
        self.sources: dict[str, dict[str, str]] = {}
        self.homes: dict[str, str] = {}
        self.waivers: dict[tuple[str, str], Waiver] = {}
        policy = self.read(f"{CONFIG_DIR}/config.toml", "config.toml")
        self.deadlines = {**DEADLINES, **self.read_deadlines(policy.get("deadlines", {}))}
        self.metadata_may = self.choice(policy, "metadata", ("off", "switch", "options"), "options")
        if self.gives_devices(domain):
            self.on[ALWAYS_ON] = True
            self.take(ALWAYS_ON, {}, "shipped default")
        self.trace = policy.get("trace", False) is True
        if not isinstance(policy.get("trace", False), bool):
            self.wrong(f"{CONFIG_DIR}/config.toml", "trace", f"{policy['trace']!r} is not true or false")
        self.layer(policy, f"{CONFIG_DIR}/config.toml", policy=True)
        self.layer(
            self.read(f"{CONFIG_DIR}/every-domain.toml", "every-domain.toml"),
            f"{CONFIG_DIR}/every-domain.toml",
        )
        if self.metadata_may != "off":
            self.read_metadata(domain)
        own = domain_file(domain.name)
        self.layer(self.read(own, "domains"), own)

    def result(self) -> Settings:
        enabled = tuple(
            Enabled(name, self.options[name], self.sources[name], self.homes.get(name, ""))
            for name, on in self.on.items()
            if on
        )
        return Settings(
            self.deadlines["start"],
            self.deadlines["stop"],
            enabled,
            tuple(self.waivers.values()),
            tuple(self.problems),
            self.trace,
        )

    def gives_devices(self, domain: Domain) -> bool:
        """Tell whether a domain is given PCI devices, or may be out of a network's pool at `start`."""
        try:
            return bool(domain.pci_devices) or bool(pools(self.host, domain))
        except UsherError as error:
            self.problems.append(error)
            return False

    def wrong(self, file: str, key: str, text: str, hint: str = "") -> None:
        self.problems.append(UsherError(f"{file}: {key}: {text}" if key else f"{file}: {text}", hint))

    def read(self, file: str, kind: str) -> dict[str, Any]:
        """Read and vet one TOML file; {} where there is none."""
        try:
            with open(self.host.path(file), "rb") as stream:
                vet(self.host, file)
                content = parse(stream.read())
        except FileNotFoundError:
            return {}
        except UsherError as error:
            self.problems.append(error)
            return {}
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            if isinstance(error, OSError) and error.errno == 36:  # ENAMETOOLONG: nobody could have made it
                return {}
            self.wrong(printable(file), "", str(reason), "mend the file; virt-usher plan shows the result")
            return {}
        for key in content.keys() - set(_TOP[kind]):
            self.wrong(file, key, f"unknown key{nearest(key, list(_TOP[kind]))}")
        return content

    def read_deadlines(self, table: Any) -> dict[str, float]:
        file, good = f"{CONFIG_DIR}/config.toml", {}
        if not isinstance(table, dict):
            self.wrong(file, "deadlines", "is no table")
            return {}
        for key, value in table.items():
            if key not in DEADLINES:
                self.wrong(file, f"deadlines.{key}", f"unknown key{nearest(key, list(DEADLINES))}")
            elif isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value <= 3600:
                self.wrong(file, f"deadlines.{key}", f"{value!r} is not a number of seconds from 1 to 3600")
            else:
                good[key] = float(value)
        return good

    def choice(self, table: dict[str, Any], key: str, choices: tuple[str, ...], default: str) -> str:
        value = table.get(key, default)
        if value in choices:
            return str(value)
        self.wrong(
            f"{CONFIG_DIR}/config.toml",
            key,
            f"{value!r} is none of {', '.join(choices)}{nearest(str(value), list(choices))}",
        )
        return default

    def layer(self, content: dict[str, Any], file: str, policy: bool = False) -> None:
        """Take in one file: its [plugins.NAME] tables and its waivers."""
        plugins = content.get("plugins", {})
        if not isinstance(plugins, dict) or not all(isinstance(t, dict) for t in plugins.values()):
            self.wrong(file, "plugins", "must hold tables: [plugins.NAME]")
            return
        for name, table in plugins.items():
            values = dict(table)
            switch = values.pop("enabled", not policy)
            if (home := values.pop("from", "")) and isinstance(home, str):
                self.homes[name] = home
            elif home:
                self.wrong(file, f"plugins.{name}.from", f"{home!r} is not a text such as 'module:Class'")
            if not isinstance(switch, bool):
                self.wrong(file, f"plugins.{name}.enabled", f"{switch!r} is not true or false")
            elif policy and "enabled" in table and name != ALWAYS_ON:
                hint = f"put it into {CONFIG_DIR}/every-domain.toml"
                self.wrong(file, f"plugins.{name}.enabled", "config.toml switches nothing on", hint)
            elif not policy or (name in self.on and "enabled" in table):
                self.on[name] = switch  # policy switches off what is on by itself, and no more
            self.take(name, values, file)
        self.read_waivers(content.get("waive", {}), file)

    def take(self, name: str, values: Mapping[str, object], source: str) -> None:
        self.options.setdefault(name, {}).update(values)
        self.sources.setdefault(name, {}).update(dict.fromkeys(values, source))

    def read_waivers(self, table: Any, file: str) -> None:
        """Take in [waive."ADDRESS"], or [[waive."ADDRESS"]] for several problems of one device."""
        named = table.items() if isinstance(table, dict) else [("", None)]
        for address, entry in ((a, e) for a, es in named for e in (es if isinstance(es, list) else [es])):
            known = {"device", "problem", "reason"}
            entry = entry if isinstance(entry, dict) else {}
            given = {k: v for k, v in entry.items() if isinstance(v, str) and v}
            if set(given) != known or set(entry) != known:
                self.wrong(
                    file,
                    f'waive."{address}"',
                    "needs device, problem and reason, each a text, and nothing else",
                )
                continue
            waiver = Waiver(address, file=file, **given)
            if wrong := waiver.mistakes():
                for key, text in wrong.items():
                    self.wrong(
                        file, f'waive."{address}"{key and "."}{key}', text, "virt-usher waive writes one"
                    )
                continue
            self.waivers[address, waiver.problem] = waiver

    def read_metadata(self, domain: Domain) -> None:
        """Take in the domain's own wishes. They may switch on, never off: see docs/design.md."""
        from virt_usher import options, plugins

        for element in domain.metadata:
            attributes = {str(k): str(v) for k, v in element.attrib.items()}
            name = attributes.pop("name", "")
            if attributes and self.metadata_may != "options":
                self.wrong(
                    "<metadata>", name, "config.toml lets metadata switch plugins on, but set no options"
                )
                continue
            try:
                plugin = plugins.load(self.host, name, self.homes.get(name, ""))
                if getattr(plugin, "FILES_ONLY", False):
                    hint = f"virt-usher enable DOMAIN {name}, and take it out of the domain's XML"
                    raise UsherError(f"{name} can be switched on by root's files only", hint)
                known = options.options_of(plugin)
                values = {k: known[k].parse(v) if k in known else v for k, v in attributes.items()}
            except UsherError as error:
                self.problems.append(UsherError(f"<metadata>: {error.message}", error.hint))
                continue
            except (ValueError, LookupError):
                self.wrong("<metadata>", name, f"cannot read the values of {', '.join(attributes)}")
                continue
            self.on[name] = True
            self.take(name, values, "<metadata>")
