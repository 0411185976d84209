"""The guests of these tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from uuid import uuid4
from xml.sax.saxutils import escape, quoteattr

NAMESPACE = "http://libvirt.org/schemas/domain/qemu/1.0"
HUGEPAGES = "<memoryBacking><hugepages/></memoryBacking>"


@dataclass(frozen=True)
class Domain:
    """A guest without disk and system: it starts in half a second, and takes its memory at once."""

    name: str
    mib: int = 64
    memory: str = HUGEPAGES
    qemu_args: tuple[str, ...] = ()
    metadata: str = ""
    vcpus: int = 1
    uuid: str = field(default_factory=lambda: str(uuid4()))

    @property
    def pages(self) -> int:
        return self.mib // 2

    @property
    def xml(self) -> str:
        args = "".join(f"<qemu:arg value={quoteattr(arg)}/>" for arg in self.qemu_args)
        return f"""<domain type='qemu' xmlns:qemu='{NAMESPACE}'>
  <name>{escape(self.name)}</name>
  <uuid>{self.uuid}</uuid>
  <metadata>{self.metadata}</metadata>
  <memory unit='MiB'>{self.mib}</memory>
  {self.memory}
  <vcpu>{self.vcpus}</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type></os>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
  </devices>
  <qemu:commandline>{args}</qemu:commandline>
</domain>"""
