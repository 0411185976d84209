"""What libvirt's XML says of a domain, read-only."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from lxml import etree

from virt_usher import cpulist
from virt_usher.errors import UsherError, printable

if TYPE_CHECKING:
    from virt_usher.hostdev import PciHostdev

NAMESPACE = "urn:virt-usher:domain:1"

# libvirt's memory units (virScaleInteger and docs/formatdomain.rst) in bytes.
_UNITS = {"b": 1, "bytes": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12} | {
    unit: 1024**power
    for power, units in enumerate((("k", "kib"), ("m", "mib"), ("g", "gib"), ("t", "tib")), 1)
    for unit in units
}


@dataclass(frozen=True)
class PageRequest:
    """One <page> of <hugepages>: a size in KiB (0 is the host's default) and guest cells (None: all)."""

    size_kib: int
    cells: frozenset[int] | None = None


@dataclass(frozen=True)
class MemoryBlock:
    """A piece of guest memory: a NUMA cell, a memory device, or all of it when there are no cells.

    `pages` is the page size in KiB: 0 the host's default huge page, None no huge pages.
    `nodes` are the host nodes it is bound to (None: any), `mode` is libvirt's numatune mode.
    """

    label: str
    kib: int
    pages: int | None
    nodes: frozenset[int] | None = None
    mode: str = "strict"


@dataclass(frozen=True)
class Domain:
    """A domain as the hook gets it; raises UsherError where the XML makes no sense.

    What is not here as a property can be read from `element`, lxml's <domain>.
    """

    element: etree._Element = field(repr=False, compare=False)
    name: str
    uuid: str

    @classmethod
    def from_xml(cls, xml: bytes) -> Domain:
        """Read libvirt's domain XML; no entity, DTD or network is ever followed."""
        parser = etree.XMLParser(
            resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False, remove_comments=True
        )
        try:
            root = etree.fromstring(xml, parser)
        except (etree.XMLSyntaxError, ValueError) as error:
            raise UsherError(f"the domain's XML cannot be read: {error}") from None
        if root.getroottree().docinfo.internalDTD is not None:
            raise UsherError("the domain's XML has a document type, which libvirt never writes")
        name, uuid = root.findtext("name") or "", root.findtext("uuid") or ""
        if root.tag != "domain" or not name:
            raise UsherError(f"this is no domain XML: <{printable(str(root.tag))}> without a <name>")
        return cls(root, name, uuid)

    # -- CPUs

    @cached_property
    def vcpus(self) -> int:
        """The number of vCPUs the domain may have."""
        return _whole(self.element.findtext("vcpu") or "1", "vcpu")

    @cached_property
    def vcpu_pins(self) -> dict[int, frozenset[int]]:
        """vCPU number -> host CPUs, from <vcpupin>."""
        return {
            _whole(pin.get("vcpu", ""), "vcpupin"): _cpus(pin)
            for pin in self.element.iterfind("cputune/vcpupin")
        }

    @cached_property
    def pinned_cpus(self) -> frozenset[int]:
        """All host CPUs that the domain's threads are pinned to; empty where nothing is pinned.

        vCPUs without a <vcpupin> of their own run on <vcpu cpuset=>, if that is given.
        """
        pins = [
            _cpus(pin)
            for tag in ("vcpupin", "emulatorpin", "iothreadpin")
            for pin in self.element.iterfind(f"cputune/{tag}")
        ]
        pool = self.element.find("vcpu")
        if pool is not None and pool.get("cpuset"):
            pins.append(_cpus(pool))
        return frozenset().union(*pins)

    def pins(self, kind: str) -> frozenset[int]:
        """All host CPUs that the domain's 'vcpu', 'emulator' or 'iothread' threads are pinned to.

        <vcpu cpuset=> counts for those without a pin of their own.
        """
        own = [_cpus(pin) for pin in self.element.iterfind(f"cputune/{kind}pin")]
        pool = self.element.find("vcpu")
        if pool is not None and pool.get("cpuset") and len(own) < (self.vcpus if kind == "vcpu" else 1):
            own.append(_cpus(pool))
        return frozenset().union(*own)

    @cached_property
    def partition(self) -> str:
        """The resource partition it is put in (<resource>); libvirt's default is /machine."""
        return self.element.findtext("resource/partition") or "/machine"

    # -- memory

    @cached_property
    def page_requests(self) -> list[PageRequest] | None:
        """<memoryBacking><hugepages>: its <page>s, one default request without any, or None."""
        hugepages = self.element.find("memoryBacking/hugepages")
        if hugepages is None:
            return None
        found = []
        for page in hugepages.iterfind("page"):
            nodeset = page.get("nodeset")
            cells = cpulist.parse(nodeset) if nodeset else None
            found.append(PageRequest(_kib(page.get("size", ""), page.get("unit", "KiB"), "page size"), cells))
        return found or [PageRequest(0)]

    @cached_property
    def memory_source(self) -> str:
        """<memoryBacking><source type=>: anonymous, file, memfd, or '' where not given."""
        source = self.element.find("memoryBacking/source")
        return source.get("type", "") if source is not None else ""

    @cached_property
    def memory_blocks(self) -> list[MemoryBlock]:
        """All guest memory that QEMU allocates at start, piece by piece.

        As libvirt splits it (qemuBuildMemoryBackendProps): <page nodeset=> counts guest cells, a memory
        device's own <pagesize> and <nodemask> come first, <memnode> before <memory> in <numatune>.
        """
        devices = [d for d in map(self._memory_device, self.element.iterfind("devices/memory")) if d]
        cells = list(self.element.iterfind("cpu/numa/cell"))
        blocks = []
        for index, cell in enumerate(cells):
            number = _whole(cell.get("id", str(index)), "cell")
            size = _kib(cell.get("memory", ""), cell.get("unit", "KiB"), f"memory of cell {number}")
            blocks.append(MemoryBlock(f"cell {number}", size, self._pages(number), *self._nodes(number)))
        if not cells:
            memory = self.element.find("memory")
            if memory is None:
                raise UsherError("the domain has no <memory>")
            # <memory> is the sum with all memory devices, those without a block here included.
            plugged = sum(_size(d.find("target/size")) for d in self.element.iterfind("devices/memory"))
            size = max(0, _size(memory) - plugged)
            blocks.append(MemoryBlock("memory", size, self._pages(None), *self._nodes(None)))
        return blocks + devices

    def _memory_device(self, device: etree._Element) -> MemoryBlock | None:
        """Read one <memory model=>; None for those that are files or take no memory at start."""
        if device.get("model") not in ("dimm", "virtio-mem"):
            return None
        cell = device.findtext("target/node")
        number = _whole(cell, "target node") if cell else None
        size = _size(device.find("target/size"))
        if device.get("model") == "virtio-mem":
            size = _size(device.find("target/requested"))
        pages, own = self._pages(number), device.find("source/pagesize")
        if own is not None:
            pages = _size(own)
        nodes, mode = self._nodes(number)
        mask = device.findtext("source/nodemask")
        if mask:
            nodes, mode = cpulist.parse(mask), "strict"
        return MemoryBlock(str(device.get("model")), size, pages, nodes, mode)

    def _pages(self, cell: int | None) -> int | None:
        """Return the page size of a guest cell: its own <page>, else the one for all."""
        requests = self.page_requests or []
        if cell is None:
            return requests[0].size_kib if requests else None
        own = [r for r in requests if r.cells is not None and cell in r.cells]
        rest = [r for r in requests if r.cells is None]
        chosen = (own or rest)[:1]
        return chosen[0].size_kib if chosen else None

    def _nodes(self, cell: int | None) -> tuple[frozenset[int] | None, str]:
        """Return host nodes and mode of a guest cell, from <memnode> or <memory> of <numatune>."""
        tune = self.element.find("numatune/memory")
        for memnode in self.element.iterfind("numatune/memnode"):
            if cell is not None and memnode.get("cellid") == str(cell):
                tune = memnode
        # placement='auto' asks numad after prepare: the nodes are not known yet.
        if tune is None or not tune.get("nodeset"):
            return None, "strict"
        return cpulist.parse(tune.get("nodeset", "")), tune.get("mode", "strict")

    # -- devices

    @cached_property
    def pci_devices(self) -> tuple[PciHostdev, ...]:
        """The host's PCI devices the domain is given, however it is given them."""
        from virt_usher import hostdev

        return tuple(hostdev.pci_devices(self.element))

    @cached_property
    def networks(self) -> tuple[str, ...]:
        """The libvirt networks its interfaces are on; one may turn out to be a pool of host devices."""
        sources = self.element.iterfind("devices/interface[@type='network']/source")
        return tuple(dict.fromkeys(s.get("network", "") for s in sources))

    # -- for configuration

    @cached_property
    def metadata(self) -> list[etree._Element]:
        """The <plugin> elements of our <metadata>, whatever prefix it uses."""
        return list(self.element.iterfind(f"metadata/{{{NAMESPACE}}}domain/{{{NAMESPACE}}}plugin"))


def _cpus(pin: etree._Element) -> frozenset[int]:
    try:
        return cpulist.parse(pin.get("cpuset", ""))
    except UsherError as error:
        raise UsherError(f"<{pin.tag} cpuset=>: {error.message}") from None


def _whole(text: str, what: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UsherError(f"{what}: {text!r} is not a whole number") from None


def _kib(number: str, unit: str, what: str) -> int:
    scale: int | None = _UNITS.get(unit.lower())
    if scale is None:
        raise UsherError(f"{what}: {unit!r} is not a unit of memory")
    return -(-_whole(number, what) * scale // 1024)


def _size(element: etree._Element | None) -> int:
    """Return an element's size in KiB, 0 where there is none."""
    if element is None:
        return 0
    return _kib((element.text or "").strip(), element.get("unit", "KiB"), f"<{element.tag}>")
