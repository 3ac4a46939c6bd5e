"""The process that compresses what is cold for a daemon, while no CPU has anything else to do.

The daemon starts it when there is something to compress, with a socket (transform/packing). It has
nothing else of the mount, and ends when the daemon's end of the socket closes.
"""

from __future__ import annotations

import socket
import sys
from contextlib import suppress

from pmemfs.transform.packing import serve_packing, yield_to_all


def main() -> None:
    """Compress until the daemon wants no more."""
    yield_to_all()
    with socket.socket(fileno=int(sys.argv[1])) as connection, suppress(OSError):
        serve_packing(connection)


if __name__ == "__main__":
    main()
