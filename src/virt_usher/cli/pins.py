"""virt-usher pins: which CPUs a domain would best be pinned to, on this machine."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import click
from lxml import etree

from virt_usher import cpulist
from virt_usher.cli import base
from virt_usher.domain import Domain
from virt_usher.errors import UsherError, printable
from virt_usher.host import Host
from virt_usher.host.topology import Topology, propose
from virt_usher.isolate import claims

_Cores = list[tuple[int, ...]]
_AFTER = {  # what must come before an element, in libvirt's order of <domain>'s children
    "vcpu": ("currentMemory", "maxMemory", "memory"),
    "cputune": ("vcpus", "vcpu", "iothreadids", "iothreads"),
    "numatune": ("cputune", "vcpus", "vcpu"),
    "cpu": ("features", "os"),
}


@click.command(name="pins")
@base.domain_argument(required=True)
@click.option("--vcpus", type=click.IntRange(1), metavar="N", help="So many vCPUs; not given, as it has now.")
@click.option("--threads", type=click.IntRange(1), metavar="N", help="Use so many threads of each core.")
@click.option("--apply", is_flag=True, help="Write it into the domain, after showing the difference.")
@click.option("--yes", is_flag=True, help="With --apply: do not ask.")
@base.json_option
@click.pass_obj
def command(
    usher: base.Usher,
    domain: str,
    vcpus: int | None,
    threads: int | None,
    apply: bool,
    yes: bool,
    as_json: bool,
) -> int:
    """Propose CPUs to pin a domain to, as XML.

    Whole cores with their threads together, on one last-level cache or one node if that can be, near the PCI
    devices it is given. The host keeps its first core; other domains' CPUs are left to them.
    """
    from virt_usher.cli.guests import Guests

    guests = Guests(usher.uri)
    others = [n for n in guests.names() if n != domain]
    xml = guests.xml(domain)
    if xml is None:
        raise UsherError(f"there is no domain {domain!r}", "virsh list --all")
    guest = Domain.from_xml(xml)
    topology = Topology(usher.host)
    taken = _taken(usher.host, domain, [Domain.from_xml(x) for n in others if (x := guests.xml(n))])
    cores = propose(topology, vcpus or guest.vcpus, threads or 0, taken, _node(usher.host, guest))
    parts = _elements(topology, cores, taken, guest)
    for part in parts:
        etree.indent(part)
    if as_json:
        base.say_json({"cores": cores, "xml": [etree.tostring(p, encoding="unicode") for p in parts]})
    elif not apply:
        for part in parts:
            click.echo(etree.tostring(part, encoding="unicode"))
        base.say("They would be written into the domain with --apply, for its next start.")
    return _apply(usher, domain, parts, yes) if apply and not as_json else base.finish(False)


def _taken(host: Host, name: str, others: Iterable[Domain]) -> frozenset[int]:
    """Return the CPUs of other domains: isolated for them now, or pinned to by their vCPUs one by one."""
    isolated = [cpus for owner, cpus in claims(host).items() if owner != name]
    pinned = [cpus for other in others for cpus in other.vcpu_pins.values()]
    return frozenset().union(*isolated, *pinned)


def _node(host: Host, guest: Domain) -> int | None:
    """Return the node that the domain's PCI devices are at, if they are all at one."""
    nodes = {host.number(f"/sys/bus/pci/devices/{d.address}/numa_node", -1) for d in guest.pci_devices} - {-1}
    return nodes.pop() if len(nodes) == 1 else None


def _elements(
    topology: Topology, cores: _Cores, taken: frozenset[int], guest: Domain
) -> list[etree._Element]:
    """Return <vcpu>, <cputune>, <numatune> (on machines with several nodes) and <cpu> with a <topology>."""
    used = [cpu for core in cores for cpu in core]
    nodes = {topology.cpus[cpu].node for cpu in used}
    rest = topology.online - taken - topology.whole_cores(used)
    near = frozenset(cpu for cpu in rest if topology.cpus[cpu].node in nodes)
    host = cpulist.show(near or rest)
    vcpu = etree.Element("vcpu", placement="static")
    vcpu.text = str(len(used))
    tune = etree.Element("cputune")
    for number, cpu in enumerate(used):
        etree.SubElement(tune, "vcpupin", vcpu=str(number), cpuset=str(cpu))
    etree.SubElement(tune, "emulatorpin", cpuset=host)
    for number in range(1, int(guest.element.findtext("iothreads") or 0) + 1):
        etree.SubElement(tune, "iothreadpin", iothread=str(number), cpuset=host)
    numa = etree.Element("numatune")
    etree.SubElement(numa, "memory", mode="strict", nodeset=cpulist.show(nodes))
    model = etree.Element("cpu")
    shape = {"sockets": "1", "dies": "1", "cores": str(len(cores)), "threads": str(len(cores[0]))}
    etree.SubElement(model, "topology", attrib=shape)
    several = len({c.node for c in topology.cpus.values()}) > 1
    return [vcpu, tune, *([numa] if several else []), model]


def _apply(usher: base.Usher, name: str, parts: list[etree._Element], yes: bool) -> int:
    """Show what would change in a domain, ask, and have libvirt write it."""
    import libvirt

    try:
        connection = libvirt.open(usher.uri)
        # With its secrets: what is defined without them has none any more.
        flags = libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE
        root = etree.fromstring(connection.lookupByName(name).XMLDesc(flags))
        before = _lines(root)
        for part in parts:
            merge(root, part)
        after = _lines(root)
        for line in difflib.unified_diff(before, after, "now", "then", lineterm="", n=1):
            click.secho(printable(line), fg={"+": "green", "-": "red"}.get(line[0]))
        if before == after:
            base.say("The domain is pinned like this already.")
        elif yes or click.confirm("Write this into the domain?"):
            connection.defineXMLFlags("\n".join(after), libvirt.VIR_DOMAIN_DEFINE_VALIDATE)
            base.say("Written. It holds from the domain's next start.")
    except libvirt.libvirtError as error:
        raise UsherError(f"libvirt would not have it: {error}") from None
    return base.finish(False)


def _lines(root: etree._Element) -> list[str]:
    etree.indent(root)
    return etree.tostring(root, encoding="unicode").splitlines()


def merge(root: etree._Element, part: etree._Element) -> None:
    """Put a part into a domain; what it does not speak of (shares, cachetune, a CPU's model) stays."""
    old = root.find(str(part.tag))
    if old is None:
        places = [i for i, child in enumerate(root) if child.tag in _AFTER[str(part.tag)]]
        root.insert(max(places, default=-1) + 1, part)
    elif part.tag == "vcpu":
        old.text = part.text
        old.set("placement", "static")  # 'auto' would have numad choose
        for name in ("cpuset", "current"):
            if name in old.attrib:
                del old.attrib[name]
    else:
        place = 0
        for name in dict.fromkeys(str(child.tag) for child in part):
            gone, new = old.findall(name), part.findall(name)
            place = old.index(gone[0]) if gone else place
            for one in gone:
                old.remove(one)
            for number, child in enumerate(new):
                old.insert(place + number, _like(gone[number], child) if number < len(gone) else child)
            place += len(new)


def _like(was: etree._Element, child: etree._Element) -> etree._Element:
    """Return an element with its attributes as ordered in the one it replaces, or all would look changed.

    Newer versions of libvirt know more levels of a topology (dies, clusters); each that it has is 1.
    """
    known = [str(name) for name in was.attrib if name in child.attrib or child.tag == "topology"]
    new = {str(name): str(value) for name, value in child.attrib.items()}
    return etree.Element(str(child.tag), attrib={**dict.fromkeys(known, "1"), **new})
