"""A plugin's options: the fields of its dataclass, declared once.

From a field come the TOML key, its check, its help and its default.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass
from typing import Any

from virt_usher.errors import UsherError, nearest


@dataclass(frozen=True)
class OptionInfo:
    """What a plugin's field says of an option."""

    name: str
    type: Any
    default: Any
    help: str
    choices: tuple[Any, ...]
    harmless: bool
    check: Callable[[Any], object] | None = None

    def problem(self, value: object) -> str:
        """Say what is wrong with a value, or ''."""
        origin, inner = typing.get_origin(self.type), typing.get_args(self.type)
        if origin in (tuple, list):
            good = isinstance(value, list | tuple) and all(isinstance(v, inner[0]) for v in value)
        else:
            # bool is an int in Python, and 1 is no sensible 'true'
            good = isinstance(value, self.type) and (self.type is bool or not isinstance(value, bool))
        if not good:
            return f"{value!r} is not {_NAMES.get(origin or self.type, 'right')}"
        each = value if origin in (tuple, list) and isinstance(value, list | tuple) else [value]
        for one in each if self.choices else ():
            if one not in self.choices:
                names = [str(c) for c in self.choices]
                return f"{one!r} is none of {', '.join(names)}{nearest(str(one), names)}"
        try:
            if self.check:
                self.check(value)
        except UsherError as error:
            return error.message
        return ""

    def parse(self, text: str) -> object:
        """Read a value from text, as on the command line and in metadata; ValueError if it is none."""
        if self.type is bool:
            return {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}[
                text.lower()
            ]
        if self.type in (int, float):
            return self.type(text)
        if typing.get_origin(self.type) in (tuple, list):
            return [t for t in text.split(",") if t]
        return text


_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    tuple: "a list",
    list: "a list",
}


def option(
    default: Any,
    help: str,  # noqa: A002  # what a reader of a plugin expects, and dataclasses call it so too
    choices: tuple[Any, ...] = (),
    harmless: bool = False,
    check: Callable[[Any], object] | None = None,
) -> Any:
    """Declare an option of a plugin: a field of its dataclass.

    `choices` are those of a value, or of each in a list. `check` is given a value of the right type, and
    raises UsherError where it makes no sense.

    `harmless` options may be set in the domain's own <metadata>, by whoever may define domains: nothing
    that weakens a refusal or names a path or a command may be.
    """
    return dataclasses.field(
        default=default, metadata={"help": help, "choices": choices, "harmless": harmless, "check": check}
    )


def options_of(plugin: type[Any]) -> dict[str, OptionInfo]:
    """Return the options a plugin declares."""
    types = typing.get_type_hints(plugin)
    found = {}
    for f in dataclasses.fields(plugin):
        default = f.default if f.default is not MISSING else None
        found[f.name] = OptionInfo(
            f.name,
            types[f.name],
            default,
            f.metadata.get("help", ""),
            f.metadata.get("choices", ()),
            f.metadata.get("harmless", False),
            f.metadata.get("check"),
        )
    return found


def misfits(plugin: type[Any]) -> list[str]:
    """Say which options a plugin itself declares wrong: a type nobody can set, a default of another."""
    found = []
    for option in options_of(plugin).values():
        if (typing.get_origin(option.type) or option.type) not in _NAMES:
            found.append(
                f"option {option.name} has the type {option.type!r}; bool, int, float, str, list[str] can be"
            )
        elif option.default is not None and (text := option.problem(option.default)):
            found.append(f"the default of {option.name}: {text}")
    return found


def problems(plugin: type[Any], values: Mapping[str, object]) -> dict[str, str]:
    """Return option -> what is wrong, for each value that the plugin cannot take."""
    known = options_of(plugin)
    found = {}
    for key, value in values.items():
        if key not in known:
            found[key] = f"no such option{nearest(key, list(known))}; it has: {', '.join(known) or 'none'}"
        elif text := known[key].problem(value):
            found[key] = text
    return found
