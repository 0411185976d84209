"""Could anybody but root have written a file, or swapped it?

Apart from the configuration, because release asks it too, before it runs a script.
"""

from __future__ import annotations

import errno
import os
import stat

from virt_usher.errors import UsherError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from virt_usher.host import Host

MOST_LINKS = 40  # as the kernel's own (MAXSYMLINKS)


def vet(host: Host, path: str) -> None:
    """Raise UsherError unless root alone could have written a file, or swapped it.

    Goes the kernel's way to it, link by link, and looks at every directory and every link's owner; a sticky
    directory such as /tmp is safe. OSError if there is no such file, or its links go in a circle.
    """
    here, names, links = host.root or "/", path.split("/")[::-1], 0
    while names:
        if (name := names.pop()) in ("", "."):
            continue
        if name == "..":
            here = os.path.dirname(here)
            continue
        step = os.path.join(here, name)
        status = os.lstat(step)
        link = stat.S_ISLNK(status.st_mode)
        # A link's own mode says nothing: its directory says who may change it.
        others = not link and status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX
        if status.st_uid not in (0, os.geteuid()) or others:
            raise UsherError(
                f"{step} could be written by somebody else than root, so it is not used",
                f"chown -h root:root {step}" if link else f"chown root:root {step}; chmod go-w {step}",
            )
        if not link:
            here = step
            continue
        if (links := links + 1) > MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), step)
        target = os.readlink(step)
        names += target.split("/")[::-1]
        here = "/" if target.startswith("/") else here
