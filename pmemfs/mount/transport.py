"""How the native data plane talks to the kernel: `uring` or `fd`. Loads no pyfuse3.

`uring` is FUSE over io_uring: Linux 6.14 and later, where the module parameter `enable_uring` is Y.
`fd` is reading and writing /dev/fuse, which every kernel has.

Invariants:
- a choice depends on the offer and on what was wanted, and on nothing else;
- `auto` never fails, and never takes a kernel whose FUSE over io_uring is known to be bad;
- whoever asks for `uring` gets it or a sentence saying why not, never `fd` in its place;
- a release that we can't read is never believed to have a fix.

Sources: Documentation/filesystems/fuse/fuse-io-uring.rst of the kernel; for the bad kernels, the
CVE records that each entry of `KNOWN_BAD` names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from pmemfs.errors import TransportUnavailable

Release = tuple[int, int, int]
Wanted = Literal["auto", "uring", "fd"]

ENABLE_URING = "sys/module/fuse/parameters/enable_uring"
"""The module parameter, below the root. Read by the kernel when a connection is made."""
ENABLE_COMMAND = f"echo Y > /{ENABLE_URING}"
ALLOW_COMMAND = "sysctl -w kernel.io_uring_disabled=0"

FIRST_WITH_URING: Release = (6, 14, 0)
FIRST_WITH_RESEND: Release = (6, 9, 0)
"""With FUSE_NOTIFY_RESEND a data plane gets what a dead one has read and not answered."""

WHY_URING = "faster than fd, except for one caller on the same CPU as its worker"
"""Why `auto` prefers `uring` where it is sound; the figures are in docs/performance.md."""


class BadKernels(NamedTuple):
    """Releases whose FUSE over io_uring must not be trusted: from `first`, before `fixed`."""

    first: Release
    fixed: Release
    what: str
    source: str


KNOWN_BAD = (
    BadKernels(
        (6, 14, 0),
        (6, 18, 39),
        "use after free when requests are committed and when a mount ends",
        "CVE-2026-64259, CVE-2026-64260, CVE-2026-64261, CVE-2026-64588",
    ),
    BadKernels(
        (6, 19, 0),
        (7, 1, 4),
        "use after free when requests are committed and when a mount ends",
        "CVE-2026-64259, CVE-2026-64260, CVE-2026-64261, CVE-2026-64588",
    ),
)
"""Nothing before 6.18.39 got the fixes: 6.14 to 6.17 had ended. A distribution may have put them
into an older kernel without a trace in the release; that one is held to be bad all the same."""


@dataclass(frozen=True)
class Offer:
    """What this kernel offers to this process."""

    kernel_release: str
    has_fuse: bool
    """Whether the kernel has FUSE now. Opening /dev/fuse loads a module that isn't loaded yet."""
    uring_parameter: bool | None
    """`enable_uring` of the fuse module; None: the parameter does not exist."""
    io_uring_disabled: int
    """kernel.io_uring_disabled. 0: for all, or no such sysctl; 1: for root and a group; 2: off."""
    is_root: bool
    in_io_uring_group: bool = False
    """Whether this process is in the group that kernel.io_uring_group names."""


class Choice(NamedTuple):
    """A transport, and one line on why it is this one and not the other."""

    transport: Literal["uring", "fd"]
    sentence: str


def read_offer(root: Path = Path("/")) -> Offer:
    """What /proc and /sys below `root` say. Whatever can't be read counts as not offered."""
    file_systems = read_text(root / "proc/filesystems").split()
    parameter = read_text(root / ENABLE_URING).strip()
    status = process_status(root)
    return Offer(
        kernel_release=read_text(root / "proc/sys/kernel/osrelease").strip(),
        has_fuse="fuse" in file_systems,
        uring_parameter=parameter in ("Y", "y", "1") if parameter else None,
        io_uring_disabled=number(read_text(root / "proc/sys/kernel/io_uring_disabled"), 0),
        is_root=status.get("Uid", [])[1:2] == ["0"],
        in_io_uring_group=read_text(root / "proc/sys/kernel/io_uring_group").strip()
        in (*status.get("Gid", [])[1:2], *status.get("Groups", [])),
    )


def parse_release(text: str) -> Release | None:
    """The three numbers that a kernel release begins with, or None. "7.1-rc2" is (7, 1, 0)."""
    match = re.match(r"(\d{1,4})\.(\d{1,4})(?!\d)(?:\.(\d{1,6})(?!\d))?", text, re.ASCII)
    return (int(match[1]), int(match[2]), int(match[3] or 0)) if match else None


def known_problem(kernel_release: str) -> str | None:
    """Why FUSE over io_uring of this kernel must not be trusted; None where nothing is known."""
    release = parse_release(kernel_release)
    if release is None:
        return f"{kernel_release!r} does not say whether this kernel has the fixes of 6.18.39"
    if release < FIRST_WITH_URING:
        return f"nothing is known of FUSE over io_uring in a kernel as old as {kernel_release}"
    for bad in KNOWN_BAD:
        if bad.first <= release < bad.fixed:
            first, fixed = (".".join(map(str, end)) for end in (bad.first, bad.fixed))
            return (
                f"known bad: kernels from {first} and before {fixed}, such as this one "
                f"({kernel_release}), have bugs in FUSE over io_uring: {bad.what} ({bad.source})"
            )
    return None


def choose_transport(wanted: Wanted, offer: Offer) -> Choice:
    """The transport to use. Raises TransportUnavailable where `uring` is wanted and can't be."""
    if wanted == "fd":
        return Choice("fd", "transport fd; it was asked for")
    missing, switched_off = _missing(offer), _switched_off(offer)
    problem = known_problem(offer.kernel_release)
    if wanted == "auto":
        # A kernel that is known to be bad is no reason to switch anything on.
        why_not = missing or problem or switched_off
        if why_not:
            return Choice("fd", f"transport fd; {why_not}")
        return Choice("uring", f"transport uring; {WHY_URING}")
    obstacle = missing or switched_off
    if obstacle:
        raise TransportUnavailable(transport="uring", why=obstacle)
    # Whoever names it may have a kernel whose fixes its release does not tell.
    return Choice("uring", f"transport uring; {problem or 'it was asked for'}")


def promise(transport: str, kernel_release: str) -> str:
    """What becomes of requests when the data plane of a mount with a keeper dies."""
    release = parse_release(kernel_release)
    if release is None or release < FIRST_WITH_RESEND:
        return "the mount ends with its data plane, because this kernel is older than 6.9"
    if transport == "fd":
        return "the mount outlives its processes, and no request is lost"
    return (
        "the mount outlives its processes; a request under way to a data plane that dies may fail "
        "with ECANCELED, which was never seen on Linux 6.18"
    )


def _missing(offer: Offer) -> str | None:
    """What this kernel lacks for FUSE over io_uring; None where it has all of it."""
    if not offer.has_fuse:
        return "the kernel's fuse module is not loaded: modprobe fuse"
    if offer.uring_parameter is not None:
        return None
    release = parse_release(offer.kernel_release)
    if release is None:
        return "io_uring is not offered: the fuse module has no parameter enable_uring"
    if release < FIRST_WITH_URING:
        return (
            f"this kernel ({offer.kernel_release}) is too old for FUSE over io_uring, "
            f"which came with 6.14"
        )
    return "io_uring is not offered: this kernel was built without CONFIG_FUSE_IO_URING"


def _switched_off(offer: Offer) -> str | None:
    """What somebody would have to switch on first; None where everything is on."""
    if offer.io_uring_disabled >= 2:
        return f"io_uring is disabled for all processes: {ALLOW_COMMAND}"
    if offer.io_uring_disabled == 1 and not (offer.is_root or offer.in_io_uring_group):
        return f"io_uring is disabled for ordinary users: {ALLOW_COMMAND}"
    if not offer.uring_parameter:
        return f"io_uring is disabled: {ENABLE_COMMAND}"
    return None


def read_text(path: Path) -> str:
    """A file of /proc or /sys; empty where it is not there or not for us."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def number(text: str, otherwise: int) -> int:
    """The number that a file of one number holds."""
    try:
        return int(text)
    except ValueError:
        return otherwise


def process_status(root: Path) -> dict[str, list[str]]:
    """What /proc/self/status says, as the words behind each name. Source: proc_pid_status(5)."""
    lines = (line.partition(":") for line in read_text(root / "proc/self/status").splitlines())
    return {name: rest.split() for name, _, rest in lines}
