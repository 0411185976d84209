"""libvirt's domains, for the command line alone: a hook may never ask libvirt."""

from __future__ import annotations

from typing import Any

from virt_usher.cli.base import check_name
from virt_usher.errors import UsherError


class Guests:
    """A connection to libvirt; UsherError with the next step where there is none."""

    def __init__(self, uri: str) -> None:
        try:
            import libvirt
        except ImportError:
            raise UsherError(
                "libvirt cannot be asked: Python's libvirt module is missing", "apt install python3-libvirt"
            ) from None
        self._libvirt = libvirt
        libvirt.registerErrorHandler(lambda _, error: None, None)  # it prints to stderr by itself
        try:
            self._connection = libvirt.openReadOnly(uri)
        except libvirt.libvirtError as error:
            raise UsherError(
                f"libvirt cannot be asked: {error}",
                "systemctl start libvirtd (or virtqemud), or give a file: virt-usher plan --xml FILE",
            ) from None

    def names(self) -> list[str]:
        """Return the names of all domains, running or not."""
        return sorted(d.name() for d in self._connection.listAllDomains())

    def xml(self, name: str) -> bytes | None:
        """Return the XML that the next start of a domain would use; None where there is no such domain."""
        domain = self._find(name)
        if domain is None:
            return None
        flags = self._libvirt.VIR_DOMAIN_XML_INACTIVE if domain.isPersistent() else 0
        return str(domain.XMLDesc(flags)).encode()

    def active(self, name: str) -> bool:
        """Tell whether libvirt holds a domain for running; UsherError where it cannot say."""
        domain = self._find(name)
        return domain is not None and bool(domain.isActive())

    def _find(self, name: str) -> Any:
        check_name(name)
        try:
            return self._connection.lookupByName(name)
        except self._libvirt.libvirtError as error:
            if error.get_error_code() == self._libvirt.VIR_ERR_NO_DOMAIN:
                return None
            raise UsherError(f"libvirt cannot be asked about {name!r}: {error}") from None
