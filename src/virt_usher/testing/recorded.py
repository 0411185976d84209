"""Make a recorded host into a tree: the file that `virt-usher report` writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from virt_usher.errors import UsherError


def unfold(report: Path, root: Path) -> Path:
    """Make the files and links of a report below a directory, which must not exist yet; return it."""
    recorded: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    if recorded.get("report") != 1:
        raise UsherError(f"{report} is no report of this version", "virt-usher report FILE writes one")
    for path, text in recorded["files"].items():
        _make(root, path).write_text(f"{text}\n", encoding="utf-8", errors="surrogateescape")
    for path, digits in recorded["bytes"].items():
        _make(root, path).write_bytes(bytes.fromhex(digits))
    for path, target in sorted(recorded["links"].items()):  # 'driver' before what lies below it
        link = _make(root, path)
        aim = (link.parent / target).resolve()
        if not aim.is_relative_to(root.resolve()):
            raise UsherError(f"{path!r} in a report leads outside")
        aim.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():  # two devices may have one driver, and that one module
            link.symlink_to(target)
    return root


def _make(root: Path, path: str) -> Path:
    """Return where a path of the machine lies below the root, its folder made; never outside."""
    if ".." in Path(path).parts or not path.startswith("/"):
        raise UsherError(f"{path!r} in a report leads outside")
    real = root / path[1:]
    real.parent.mkdir(parents=True, exist_ok=True)
    return real
