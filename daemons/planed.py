"""The process of a data plane: one native function, which ends when the mount ends.

The control plane starts it, with the place of pmemfs, then descriptors and settings as words
NAME=NUMBER, and the place of the mount. It ends with 0, or with the errno of what went wrong. It
loads nothing except that function, because a mount can't answer before this process does.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Serve until the mount ends."""
    root, *words = sys.argv[1:]
    # `site` was left out, because it would load what all packages of the environment want.
    sys.path.append(root)
    from pmemfs.dataplane.native import run

    if "resumes=1" in words and not sys.stdin.buffer.read(1):
        # The daemon has died, and another one will start another data plane.
        return
    settings = dict(word.split("=", 1) for word in words)
    forward_fds = [int(fd) for fd in settings.pop("forward_fds").split(",")]
    place = settings.pop("mountpoint", "")
    mountpoint = place.encode(sys.getfilesystemencoding(), "surrogateescape")
    numbers = {name: int(value) for name, value in settings.items()}
    sys.exit(run(forward_fds=forward_fds, mountpoint=mountpoint, **numbers))


if __name__ == "__main__":
    main()
