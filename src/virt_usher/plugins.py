"""Find, vet and load plugins, and call their hooks in the order of the configuration."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.machinery import SourceFileLoader
from types import CodeType, ModuleType
from typing import Any, TypeVar

import pluggy

from virt_usher import hookspecs, options
from virt_usher.actions import Note
from virt_usher.config import Enabled
from virt_usher.domain import Domain
from virt_usher.errors import UsherError, nearest
from virt_usher.host import CONFIG_DIR, Host
from virt_usher.vetting import vet, vet_all

NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
HOME = re.compile(r"([A-Za-z_][\w.]*):([A-Za-z_]\w*)")
_WAITS = "libvirt waits for this hook, and a call would wait for libvirt"
_INSTEAD = "`domain` has what libvirt says of the domain, `host` the rest"
Trace = Callable[[str], None]
_T = TypeVar("_T")
ADMIN_DIR = f"{CONFIG_DIR}/plugins"
PACKAGES_DIR = f"{CONFIG_DIR}/packages"  # for pip install --target


def shipped_dir() -> str:
    """Return where the shipped plugins lie: beside the installed package, or in the source tree."""
    package = os.path.dirname(os.path.abspath(__file__))
    beside = os.path.join(os.path.dirname(package), "plugins")
    return (
        beside
        if os.path.isdir(beside)
        else os.path.join(os.path.dirname(os.path.dirname(package)), "plugins")
    )


def installed(host: Host) -> dict[str, str]:
    """Return name -> file of every plugin there is, an admin's own and the shipped."""
    folders = (shipped_dir(), host.path(ADMIN_DIR))
    found: dict[str, str] = {}
    for folder in folders:
        for entry in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
            if entry.endswith(".py") and NAME.fullmatch(entry[:-3]):
                found.setdefault(entry[:-3], os.path.join(folder, entry))
    return found


def find(host: Host, name: str) -> str:
    """Return the file of a plugin; UsherError where there is none, or there are two."""
    if not NAME.fullmatch(name):
        raise UsherError(f"{name!r} cannot be the name of a plugin: small letters, digits and _")
    paths = [os.path.join(d, f"{name}.py") for d in (shipped_dir(), host.path(ADMIN_DIR))]
    paths = [p for p in paths if os.path.exists(p)]
    if not paths:
        hint = "virt-usher plugins lists what is installed"
        raise UsherError(f"there is no plugin {name!r}{nearest(name, list(installed(host)))}", hint)
    if len(paths) > 1:
        raise UsherError(f"two plugins are called {name!r}: {' and '.join(paths)}", "rename your own")
    return paths[0]


def load(host: Host, name: str, home: str = "") -> type[Any]:
    """Load a plugin and return its class; UsherError says what is wrong with it.

    `home` is "module:Class" for a plugin out of a package in PACKAGES_DIR; otherwise it is a file.
    """
    if home:
        return _load_packaged(host, name, home)
    path = find(host, name)
    if path.startswith(host.path(ADMIN_DIR)):
        vet(host, f"{ADMIN_DIR}/{name}.py")
    module_name = f"virt_usher_plugin_{name}"
    spec = importlib.util.spec_from_file_location(module_name, path, loader=_Source(module_name, path))
    if spec is None or spec.loader is None:
        raise UsherError(f"{path} cannot be loaded as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up there
    with guard(f"{path} cannot be loaded"):
        spec.loader.exec_module(module)
    if any(isinstance(v, ModuleType) and v.__name__ == "libvirt" for v in vars(module).values()):
        raise UsherError(f"{path} imports libvirt: {_WAITS}", _INSTEAD)
    plugin = getattr(module, "Plugin", None)
    if not (isinstance(plugin, type) and dataclasses.is_dataclass(plugin)):
        raise UsherError(f"{path} has no dataclass called Plugin", "docs/plugins.md shows one")
    return plugin


class _Source(SourceFileLoader):
    """Compiles a plugin's file each time, and neither reads nor writes a __pycache__ beside it.

    Python would run what lies there in the file's place, whoever wrote it, and the file alone is vetted. For
    half a millisecond, which is all that it saves, nobody wants to vet that, too.
    """

    def get_code(self, fullname: str) -> CodeType:
        code: CodeType = self.source_to_code(self.get_data(self.path), self.path)
        return code


def _load_packaged(host: Host, name: str, home: str) -> type[Any]:
    """Import a plugin from PACKAGES_DIR, where the admin named it by `from = "module:Class"`."""
    match = HOME.fullmatch(home)
    if not match:
        raise UsherError(f"plugins.{name}.from: {home!r} is not like 'module:Class'")
    module_name, class_name = match.groups()
    top = f"{PACKAGES_DIR}/{module_name.partition('.')[0]}"
    hint = f"pip install --no-deps --target {PACKAGES_DIR} PACKAGE, or disable it"
    if not (host.exists(top) or host.exists(f"{top}.py")):
        raise UsherError(f"plugin {name}: there is no {module_name} in {PACKAGES_DIR}", hint)
    if (packages := host.path(PACKAGES_DIR)) not in sys.path:
        vet_all(host, PACKAGES_DIR)  # not only its own files: from here on any of them can be imported
        sys.path.append(packages)  # last: a package must not stand in for Python's own or a distribution's
    with guard(f"plugin {name}, from {home}"):
        plugin = getattr(importlib.import_module(module_name), class_name, None)
    if not (isinstance(plugin, type) and dataclasses.is_dataclass(plugin)):
        raise UsherError(f"plugin {name}: {module_name} has no dataclass called {class_name}", hint)
    return plugin


def forbid_libvirt() -> None:
    """Refuse any import of libvirt's module from now on in this process, which is a hook's."""
    sys.modules.pop("libvirt", None)
    sys.meta_path.insert(0, _NoLibvirt)


class _NoLibvirt:
    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name in ("libvirt", "libvirtmod"):
            raise UsherError(f"the plugin imports libvirt: {_WAITS}", _INSTEAD)


class guard:
    """Turn whatever a plugin's code raises into an UsherError that names the place.

    SystemExit too: a plugin that calls sys.exit() must not look like a success.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.pid = os.getpid()

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if os.getpid() != self.pid:
            os._exit(0)  # the plugin forked, and this is the child: it must not go on with our work
        if error is None or isinstance(error, UsherError):
            return
        if isinstance(error, Exception | SystemExit):
            while trace.tb_next:
                trace = trace.tb_next
            place = f"{os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno}"
            text = f"{self.what}: {type(error).__name__}: {error} ({place})"
            raise UsherError(text, "mend or disable the plugin") from error


class Plugins:
    """The plugins of one domain, ready to be asked."""

    def __init__(self, host: Host, enabled: tuple[Enabled, ...], trace: Trace | None = None) -> None:
        self.problems: list[UsherError] = []
        self._trace = trace
        self._manager = pluggy.PluginManager("virt_usher")
        self._manager.add_hookspecs(hookspecs)
        # pluggy calls the last registered first; the configuration's first shall be first.
        for one in reversed(enabled):
            try:
                self._register(one, load(host, one.name, one.home))
            except UsherError as error:
                self.problems.append(error)
        self.problems.reverse()

    def _register(self, one: Enabled, plugin: type[Any]) -> None:
        with guard(f"plugin {one.name}, its options"):
            wrong = options.problems(plugin, one.options)
            misfits = options.misfits(plugin)
        if misfits:
            raise UsherError(f"plugin {one.name}: {'; '.join(misfits)}", "mend the plugin")
        if wrong:
            lines = [f"{one.where(key)}: plugins.{one.name}.{key}: {text}" for key, text in wrong.items()]
            raise UsherError("; ".join(lines), f"virt-usher plugins {one.name} shows its options")
        refused = [k for k in one.from_metadata if not options.options_of(plugin)[k].harmless]
        if refused:
            raise UsherError(
                f"<metadata> may not set {', '.join(refused)} of {one.name}",
                f"set it in {CONFIG_DIR}/domains/ instead",
            )
        if bare := [n for n in _methods(plugin) if not hasattr(getattr(plugin, n), "virt_usher_impl")]:
            raise UsherError(f"plugin {one.name}: {bare[0]} is not marked", "put @hookimpl above it")
        unknown = [n for n in _methods(plugin) if not hasattr(hookspecs, n)]
        if unknown:
            near = nearest(unknown[0], [n for n in dir(hookspecs) if n.startswith("usher_")])
            raise UsherError(f"plugin {one.name}: unknown hook {unknown[0]!r}{near}", "mend the plugin")
        with guard(f"plugin {one.name}"):
            try:
                self._manager.register(plugin(**one.options), one.name)
                self._manager.check_pending()
            except pluggy.PluginValidationError as error:
                self._manager.unregister(name=one.name)
                raise UsherError(
                    f"plugin {one.name} does not fit: {error}",
                    "docs/plugins.md has the hooks and their arguments",
                ) from None

    def want(self, hook: str, operation: str, domain: Domain) -> bool:
        """Whether any of these plugins has this hook, and something to do in it for this domain."""
        able = {i.plugin_name for i in getattr(self._manager.hook, hook).get_hookimpls()}
        for implementation in self._manager.hook.usher_wants.get_hookimpls():
            if not self._call(implementation, bool, {"domain": domain, "operation": operation}):
                able.discard(implementation.plugin_name)
        return bool(able)

    def ask(self, hook: str, **arguments: Any) -> Iterator[tuple[str, list[Any] | UsherError]]:
        """Call a hook of each plugin in turn; yield its name and what it returned or raised.

        One by one rather than through pluggy's call, which drops the names and stops at the first
        exception: a refusal must give all reasons at once.
        """
        for implementation in reversed(getattr(self._manager.hook, hook).get_hookimpls()):
            answer: list[Any] | UsherError
            try:
                if "guest" in implementation.argnames and arguments["guest"] is None:
                    answer = [Note("it needs the running guest, and there is none now")]
                else:
                    answer = self._call(implementation, _listed, arguments)
            except UsherError as error:
                answer = error
            yield implementation.plugin_name, answer

    def _call(self, implementation: Any, read: Callable[[Any], _T], arguments: dict[str, Any]) -> _T:
        """Call one plugin's hook and read its answer; UsherError is whatever it raised."""
        name, hook = implementation.plugin_name, implementation.function.__name__
        values = [arguments[a] for a in implementation.argnames]
        answer: object = None
        began = time.monotonic()
        try:
            with guard(f"plugin {name}, {hook}"):
                answer = result = read(implementation.function(*values))
            return result
        except UsherError as error:
            answer = error
            raise
        finally:
            if self._trace:
                told = ", ".join(f"{a}={v!r}" for a, v in zip(implementation.argnames, values, strict=True))
                took = (time.monotonic() - began) * 1000
                self._trace(f"{name}: {hook}({told}) = {answer!r} in {took:.1f} ms")


def _methods(plugin: type[Any]) -> list[str]:
    return [n for n in dir(plugin) if n.startswith("usher_")]


def _listed(answer: Any) -> list[Any]:
    """Run through what a hook returned; a generator works, and fails, only now."""
    if not isinstance(answer, Iterable | None):
        raise UsherError(f"returned {answer!r}, and not a list of such", "yield it, or return it in a list")
    return list(answer or ())
