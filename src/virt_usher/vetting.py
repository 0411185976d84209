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
        # Only of a directory does the sticky bit keep others from something: from swapping what is in it.
        sticky = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
        others = not link and status.st_mode & 0o022 and not sticky
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


def vet_all(host: Host, path: str) -> None:
    """Vet a folder with all that can be reached below it, folders and what lies behind links too."""
    vet(host, path)
    here = host.path(path)
    folders, seen = [here], set[str]()
    try:
        while folders:
            folder = folders.pop()
            if (real := os.path.realpath(folder)) in seen:  # links can lead back up
                continue
            seen.add(real)
            for entry in os.scandir(folder):
                vet(host, (here := entry.path)[len(host.root) :])
                if entry.is_dir():
                    folders.append(here)
    except UsherError as error:
        rest = f"all of it at once: chown -hR root:root {path}; chmod -R go-w {path}"
        raise UsherError(error.message, f"{error.hint}; {rest}") from None
    except OSError as error:  # a link that leads nowhere yet: whoever makes its target decides what is loaded
        what = f"{here}: {error.strerror}, so nothing in {path} is used"
        raise UsherError(what, f"take out of {path} what does not belong there") from None
