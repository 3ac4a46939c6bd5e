"""The process of a data plane: one native function, which ends when the mount does.

Started by the control plane of a mount with where pmemfs is, then its descriptors and settings, as
words NAME=NUMBER. Ends with 0, or with the errno of what went wrong. Loads nothing but that
function: a mount can't answer before this process does.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Serve until the mount ends."""
    root, *words = sys.argv[1:]
    # Without `site`, which would load what all packages of the environment want.
    sys.path.append(root)
    from pmemfs.dataplane.native import run

    settings = dict(word.split("=") for word in words)
    forward_fds = [int(fd) for fd in settings.pop("forward_fds").split(",")]
    numbers = {name: int(value) for name, value in settings.items()}
    sys.exit(run(forward_fds=forward_fds, **numbers))


if __name__ == "__main__":
    main()
