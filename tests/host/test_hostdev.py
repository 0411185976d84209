"""Which host devices a domain is given, however the XML spells it."""

from __future__ import annotations

import pytest

from virt_usher.domain import Domain
from virt_usher.errors import UsherError
from virt_usher.hostdev import PciHostdev, canonical

GUEST = "<address type='pci' domain='0x0000' bus='0x05' slot='0x00' function='0x0'/>"


def devices(body: str) -> list[PciHostdev]:
    xml = f"<domain xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><name>g</name>{body}</domain>"
    return list(Domain.from_xml(xml.encode()).pci_devices)


def hostdev(source: str, managed: str = "managed='yes'") -> str:
    element = f"<source><address {source}/></source>{GUEST}"
    return f"<devices><hostdev mode='subsystem' type='pci' {managed}>{element}</hostdev></devices>"


def commandline(*arguments: str) -> str:
    # a quote in an argument would end the attribute
    values = (a.replace("&", "&amp;").replace('"', "&quot;") for a in arguments)
    return "<qemu:commandline>" + "".join(f'<qemu:arg value="{v}"/>' for v in values) + "</qemu:commandline>"


@pytest.mark.parametrize(
    ("source", "address"),
    [
        ("domain='0x0000' bus='0x06' slot='0x02' function='0x1'", "0000:06:02.1"),
        ("domain='0x0000' bus='0x0A' slot='0x1F' function='0x7'", "0000:0a:1f.7"),
        ("domain='0X0000' bus='0X0a' slot='0x0' function='0x0'", "0000:0a:00.0"),
        ("bus='0x08' slot='0x00'", "0000:08:00.0"),
        ("domain='0' bus='8' slot='31' function='0'", "0000:08:1f.0"),
        ("domain='0' bus='010' slot='0' function='0'", "0000:08:00.0"),  # C's octal, as libvirt reads it
        ("domain='0x10000' bus='0xe1' slot='0x00' function='0x0'", "10000:e1:00.0"),
        ("domain='65536' bus='0xe1' slot='0x00' function='0x0'", "10000:e1:00.0"),
    ],
)
def test_a_hostdev_is_named_as_the_kernel_names_it(source: str, address: str) -> None:
    assert devices(hostdev(source)) == [PciHostdev(address, True, "hostdev")]


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("bus='08'", "<address bus='08'> of a host device is no number"),
        ("bus='six'", "<address bus='six'> of a host device is no number"),
        ("bus='0x100'", "is no PCI address"),
        ("slot='0x20'", "is no PCI address"),
        ("function='8'", "is no PCI address"),
        ("bus='-1'", "is no PCI address"),
    ],
)
def test_an_address_that_libvirt_would_not_take_is_refused(source: str, told: str) -> None:
    with pytest.raises(UsherError, match=told):
        devices(hostdev(source))


@pytest.mark.parametrize(
    ("attribute", "managed"), [("managed='yes'", True), ("managed='no'", False), ("", False)]
)
def test_managed_is_what_the_xml_says(attribute: str, managed: bool) -> None:
    assert [d.managed for d in devices(hostdev("bus='1'", attribute))] == [managed]


SOURCE = "<source><address type='pci' domain='0x0000' bus='0x07' slot='0x10' function='0x2'/></source>"
TEAMING = "<teaming type='transient' persistent='ua-net0'/>"


@pytest.mark.parametrize(
    "element",
    [
        f"<interface type='hostdev' managed='yes'>{SOURCE}{GUEST}</interface>",
        f"<interface type='hostdev' managed='yes'><driver name='vfio'/>{SOURCE}{TEAMING}{GUEST}</interface>",
        f"<hostdev mode='subsystem' type='pci' managed='yes'>{SOURCE}{TEAMING}{GUEST}</hostdev>",
    ],
)
def test_a_network_card_is_found_in_each_of_its_forms(element: str) -> None:
    found = devices(f"<devices>{element}</devices>")
    assert [(d.address, d.managed) for d in found] == [("0000:07:10.2", True)]


def test_an_nvme_disk_that_qemu_drives_itself_is_a_host_device() -> None:
    nvme = "<source type='pci' managed='no' namespace='1'><address bus='2' slot='0' function='0'/></source>"
    backing = nvme.replace("bus='2'", "bus='3'")
    body = f"<disk type='nvme'>{nvme}<backingStore type='nvme'>{backing}</backingStore>{GUEST}</disk>"
    assert devices(f"<devices>{body}</devices>") == [
        PciHostdev("0000:02:00.0", False, "disk"),
        PciHostdev("0000:03:00.0", False, "disk"),
    ]


@pytest.mark.parametrize(
    "element",
    [
        f"<interface type='network'><source network='default'/>{GUEST}</interface>",
        f"<interface type='hostdev'><source><address type='usb' bus='1'/></source>{GUEST}</interface>",
        f"<hostdev mode='subsystem' type='usb'><source><address bus='1'/></source>{GUEST}</hostdev>",
        f"<hostdev type='mdev'><source><address uuid='83c32df7'/></source>{GUEST}</hostdev>",
        f"<controller type='pci' index='1' model='pcie-root-port'>{GUEST}</controller>",
        f"<disk type='file'><source file='/x'/>{GUEST}</disk>",
        f"<video><model type='vga'/>{GUEST}</video>",
        f"<hostdev mode='subsystem' type='pci'>{GUEST}</hostdev>",
    ],
)
def test_an_address_of_the_guest_is_never_taken_for_the_hosts(element: str) -> None:
    assert devices(f"<devices>{element}</devices>") == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("-device", "vfio-pci,host=02:00.0,multifunction=on,x-vga=on"),
        ("-device", "vfio-pci,host=0000:02:00.0"),
        ("--device", "vfio-pci,id=gpu,host=0000:02:00.0"),
        ("-device", "driver=vfio-pci,host=02:00.0"),
        ("-device", "id=gpu,host=02:00.0,driver=vfio-pci"),
        ("-device", "vfio-pci-nohotplug,host=02:00.0"),
        ("-device", "vfio-pci,romfile=/a,,host=09:00.0,host=02:00.0"),
        ("-device", "vfio-pci,sysfsdev=/sys/bus/pci/devices/0000:02:00.0"),
        ("-device", "vfio-pci,sysfsdev=/sys/devices/pci0000:00/0000:00:01.0/0000:02:00.0/"),
        ("-device vfio-pci,host=02:00.0",),
        ("-device=vfio-pci,host=02:00.0",),
        ("-device", '{"driver":"vfio-pci","host":"0000:02:00.0","id":"gpu"}'),
        ("-device", ' {"id": "gpu", "host": "02:00.0", "driver": "vfio-pci", "x-vga": true}'),
        ("-device", "{'driver':'vfio-pci','host':'02:00.0'}"),
        ("-cpu", "host", "-device", "vfio-pci,host=2:0.0", "-snapshot"),
    ],
)
def test_a_device_on_qemus_command_line_is_found_in_each_spelling(arguments: tuple[str, ...]) -> None:
    assert devices(commandline(*arguments)) == [PciHostdev("0000:02:00.0", False, "commandline")]


@pytest.mark.parametrize(
    "arguments",
    [
        ("-device", "ioh3420,bus=pcie.0,addr=1c.0,multifunction=on"),
        ("-device", "vfio-pci,sysfsdev=/sys/bus/mdev/devices/83c32df7-d52e-4ec1-9668-1f3c7e4df107"),
        ("-device", "vfio-pci,fd=3"),
        ("-device",),
        ("-netdev", "user,id=vfio-pci,host=02:00.0"),
        ("-device", "{broken"),
        ("-name", "-device vfio-pci"),
    ],
)
def test_other_arguments_are_no_devices(arguments: tuple[str, ...]) -> None:
    assert devices(commandline(*arguments)) == []


def test_upper_case_and_long_domains_on_the_command_line() -> None:
    found = devices(
        commandline("-device", "vfio-pci,host=0000:0A:1F.0", "-device", "vfio-pci,host=10000:E1:00.0")
    )
    assert [d.address for d in found] == ["0000:0a:1f.0", "10000:e1:00.0"]


def test_a_domain_without_devices_has_none() -> None:
    assert devices("") == devices("<devices/>") == devices(commandline()) == []


def test_a_device_given_twice_counts_once_and_the_order_is_the_xmls() -> None:
    body = hostdev("bus='2'") + commandline(
        "-device", "vfio-pci,host=02:00.0", "-device", "vfio-pci,host=01:00.0"
    )
    assert [(d.address, d.given) for d in devices(body)] == [
        ("0000:02:00.0", "hostdev"),
        ("0000:01:00.0", "commandline"),
    ]


@pytest.mark.parametrize(
    "text", ["", "x", "2", "02:00.8", "02:20.0", "0000:02:00.0.0", "02:00.0 rm", "0x02:0.0"]
)
def test_what_is_no_address_stays_none(text: str) -> None:
    assert canonical(text) == ""
