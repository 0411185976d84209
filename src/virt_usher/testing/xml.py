"""Domain XML as libvirt hands it to the hook, in short."""

from __future__ import annotations

from xml.sax.saxutils import escape

from virt_usher.testing.fake import UUID


def domain_xml(
    name: str = "guest",
    body: str = "",
    memory_kib: int = 1 << 20,
    hugepages: bool | str = False,
    uuid: str = UUID,
    metadata: str = "",
) -> bytes:
    """Write a domain: its memory, what is in <hugepages> (True: nothing), and whatever else belongs in it.

    `metadata` is what is within our own element of <metadata>.
    """
    backing = hugepages if isinstance(hugepages, str) else ""
    parts = [
        f"<domain type='kvm' id='1'><name>{escape(name)}</name><uuid>{uuid}</uuid>",
        f"<metadata><u:domain xmlns:u='urn:virt-usher:domain:1'>{metadata}</u:domain></metadata>"
        * bool(metadata),
        f"<memory unit='KiB'>{memory_kib}</memory>",
        f"<memoryBacking><hugepages>{backing}</hugepages></memoryBacking>" * (hugepages is not False),
        body,
        "</domain>",
    ]
    return "".join(parts).encode()
