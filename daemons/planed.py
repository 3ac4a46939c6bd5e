"""The process of a data plane: one native function, which ends when the mount does.

Started by the control plane of a mount with its descriptors and settings, as one JSON object. Ends
with 0, or with the errno of what went wrong.
"""

from __future__ import annotations

import json
import signal
import sys

from pmemfs.dataplane.native import run

_NOT_OURS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def main() -> None:
    """Serve until the mount ends."""
    # The control plane is who is told to end, and it ends this.
    for number in _NOT_OURS:
        signal.signal(number, signal.SIG_IGN)
    sys.exit(run(**json.loads(sys.argv[1])))


if __name__ == "__main__":
    main()
