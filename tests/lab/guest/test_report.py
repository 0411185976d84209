"""A report of this machine unfolds into one with the same devices, groups and verdicts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tests.lab.guest.agent import OUT
from tests.lab.guest.domains import run


@pytest.mark.smoke
@pytest.mark.product
def test_a_report_of_this_machine(tmp_path: Path) -> None:
    report = OUT / "host.report"
    report.unlink(missing_ok=True)
    run("virt-usher", "report", str(report))
    text = report.read_text()
    unfold = "import sys; sys.path[:0] = ['/usr/local/lib/virt-usher/current'];"
    unfold += "from pathlib import Path; from virt_usher.testing import unfold;"
    unfold += "from virt_usher.cli.report import record; from virt_usher.host import Host; import json;"
    unfold += "copy = unfold(Path(sys.argv[1]), Path(sys.argv[2]));"
    unfold += "print(json.dumps(record(Host(str(copy)))))"
    again = json.loads(
        run("/usr/bin/python3", "-I", "-c", unfold, str(report), str(tmp_path / "copy")).stdout
    )
    assert again["links"] == json.loads(text)["links"]
    hostname = Path("/etc/hostname").read_text().strip()
    assert not re.search(rf"\b{re.escape(hostname)}\b", text)
