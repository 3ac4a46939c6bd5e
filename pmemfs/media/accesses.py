"""What the page structures know of files, as the daemon says it to programs that choose among them.

It is made for many files at once, so each member is a column: the value of the first file, of the
second one, and so on.
"""

from __future__ import annotations

from typing import NamedTuple


class Accesses(NamedTuple):
    """When and how often the pages of files were accessed; of what is no file (any more) nothing.

    A large file is known by some of its pages.
    """

    mount_identity: int
    """Tells this mount from all others."""
    last_access_ns: list[int]
    """The latest access to a page of the file, in ns since 1970; 0: there was none since the
    mount."""
    reads: list[int]
    """Transfers out of the page with the most of them."""
    is_pinned: list[bool]
    """Whether a program has pages of the file, or they rest because it died."""
