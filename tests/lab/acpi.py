"""The ACPI table that gives the emulated CPUs frequencies to choose from."""

from __future__ import annotations

import subprocess
from pathlib import Path

from .machine import CPUFREQ_POLICIES, FREQUENCIES_MHZ

# An I/O port nobody answers at: the driver writes the state there and does not need it read back.
CONTROL_PORT = 0x0C80
ALL_CPUS_TOGETHER = 0xFC

TABLE = """\
DefinitionBlock ("", "SSDT", 2, "LAB", "CPUFREQ", 1)
{{
{cpus}
}}
"""

CPU = """\
    External (\\_SB.CPUS.C{cpu:03X}, DeviceObj)
    Scope (\\_SB.CPUS.C{cpu:03X})
    {{
        Name (_PSS, Package ({count}) {{ {states} }})
        Name (_PCT, Package (2)
        {{
            ResourceTemplate () {{ Register (SystemIO, 8, 0, 0x{control:04X}, ) }},
            ResourceTemplate () {{ Register (SystemIO, 8, 0, 0x{status:04X}, ) }}
        }})
        Name (_PPC, 0)
        Name (_PSD, Package (1) {{ Package (5) {{ 5, 0, {domain}, {coordination}, {members} }} }})
    }}"""


def source() -> str:
    """Return the table as ASL."""
    states = ", ".join(
        f"Package (6) {{ {mhz}, {mhz * 10}, 10, 10, {n}, {n} }}" for n, mhz in enumerate(FREQUENCIES_MHZ)
    )
    cpus = [
        CPU.format(
            cpu=cpu,
            count=len(FREQUENCIES_MHZ),
            states=states,
            control=CONTROL_PORT,
            status=CONTROL_PORT + 1,
            domain=domain,
            coordination=ALL_CPUS_TOGETHER,
            members=len(members),
        )
        for domain, members in enumerate(CPUFREQ_POLICIES)
        for cpu in members
    ]
    return TABLE.format(cpus="\n".join(cpus))


def compile_table(folder: Path) -> Path:
    """Write the compiled table into `folder`."""
    asl = folder / "cpufreq.asl"
    asl.write_text(source())
    command = ["iasl", "-p", str(folder / "cpufreq"), str(asl)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"iasl refused {asl}:\n{done.stdout}{done.stderr}")
    return folder / "cpufreq.aml"
