"""Could anybody but root have written a file, or swapped it?

Apart from the configuration, because release asks it too, before it runs a script.
"""

from __future__ import annotations

import os
import stat

from virt_usher.errors import UsherError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from virt_usher.host import Host


def vet(host: Host, path: str) -> None:
    """Raise UsherError unless root alone could have written a file, or swapped it.

    Looks at every directory on the way, links included; a sticky one such as /tmp is safe.
    """
    steps: set[str] = set()
    for start in (host.path(path), os.path.realpath(host.path(path))):
        while len(start) > len(host.root) and start != "/":
            steps.add(start)
            start = os.path.dirname(start)
    for step in sorted(steps):
        status = os.lstat(step)
        if stat.S_ISLNK(status.st_mode):
            continue  # its directory says who may change it
        others = status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX
        if status.st_uid not in (0, os.geteuid()) or others:
            raise UsherError(
                f"{step} could be written by somebody else than root, so it is not used",
                f"chown root:root {step}; chmod go-w {step}",
            )
