"""The hook's Python side, started by the gate as `python3 -I -B hook.py NAME OPERATION …`."""

import os
import sys

# The real path, not `current`: an upgrade in the middle of this call must not mix two versions.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

try:
    from virt_usher.dispatch import main
    from virt_usher.host import LiveHost
except ImportError as error:
    print(f"\nvirt-usher cannot be loaded: {error}", file=sys.stderr)
    sys.exit(4)

main(sys.argv[1:], LiveHost("/"))
