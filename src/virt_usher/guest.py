"""The running guest: the process of its QEMU, and the threads in it.

libvirt gives QEMU -name …,debug-threads=on, so that threads carry names (qemuBuildNameCommandLine):
'CPU 0/KVM' or 'CPU 0/TCG', and 'IO iothread1' after the alias. The kernel keeps 15 bytes of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from virt_usher.domain import Domain
from virt_usher.host import Host

_VCPU = re.compile(r"CPU (\d+)/[A-Z]+")
_IOTHREAD = re.compile(r"IO iothread(\d+)")


@dataclass(frozen=True)
class Guest:
    """A guest that runs: the pid of its QEMU, whose first thread is the emulator, and thread ids.

    `vcpus` and `iothreads` are by libvirt's numbers (vCPUs from 0, iothreads from 1); `others` are the
    remaining threads with their names, workers that come and go. All are threads of now.
    """

    pid: int
    vcpus: dict[int, int]
    iothreads: dict[int, int]
    others: dict[int, str]

    @classmethod
    def of(cls, host: Host, domain: Domain) -> Guest | None:
        """Read the threads of a domain's QEMU; None where it does not run."""
        pid = host.qemu(domain.name, domain.uuid)
        if pid is None:
            return None
        guest = cls(pid, {}, {}, {})
        for tid in sorted(map(int, host.entries(f"/proc/{pid}/task"))):
            name = host.get(f"/proc/{pid}/task/{tid}/comm")
            if vcpu := _VCPU.fullmatch(name):
                guest.vcpus[int(vcpu[1])] = tid
            elif iothread := _IOTHREAD.fullmatch(name):
                guest.iothreads[int(iothread[1])] = tid
            elif name and tid != pid:  # one without a name has just ended
                guest.others[tid] = name
        return guest
