"""Whether this process can mount here: the kernel, /dev/fuse, the right to mount, libfuse."""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from pathlib import Path

from pmemfs.mount.transport import Offer, known_problem, parse_release, read_text
from pmemfs.observe.finding import Finding, Process, State

_PROGRAM_DIRECTORIES = ("usr/local/bin", "usr/bin", "bin", "run/wrappers/bin")
_LIBRARY_PATTERNS = (
    "usr/local/lib",
    "usr/local/lib/*",
    "usr/lib",
    "usr/lib64",
    "usr/lib/*",
    "lib64",
)


def mounting_findings(root: Path, process: Process, offer: Offer) -> Iterator[Finding]:
    """All findings of this module."""
    yield _kernel(offer)
    yield _fuse_module(offer)
    yield _fuse_device(root, process)
    yield _right_to_mount(root, process)
    yield _libfuse(root)
    yield _allow_other(root, process)


def _kernel(offer: Offer) -> Finding:
    release = offer.kernel_release
    if parse_release(release) is None:
        return Finding(
            "kernel",
            State.UNKNOWN,
            release or "/proc does not say",
            "pmemfs relies on nothing that only some kernels can do",
        )
    problem = known_problem(release)
    if problem and offer.uring_parameter is not None:
        return Finding("kernel", State.COULD_BE_FASTER, release, problem)
    return Finding("kernel", State.OK, release, "no problem of this kernel is known")


def _fuse_module(offer: Offer) -> Finding:
    if offer.has_fuse:
        return Finding("fuse", State.OK, "the kernel has FUSE", "pools can be mounted")
    return Finding(
        "fuse",
        State.MISSING,
        "the kernel has no FUSE, or its module is not loaded",
        "nothing can be mounted",
        "modprobe fuse",
        is_needed=True,
    )


def _fuse_device(root: Path, process: Process) -> Finding:
    name = "/dev/fuse"
    try:
        status = (root / "dev/fuse").stat()
    except OSError as error:
        return Finding(
            name,
            State.MISSING,
            (error.strerror or "unreadable").lower(),
            "nothing can be mounted",
            "mknod -m 666 /dev/fuse c 10 229",
            is_needed=True,
        )
    found = f"{stat.filemode(status.st_mode)}, owner {status.st_uid}:{status.st_gid}"
    is_for_all = status.st_mode & 0o006 == 0o006
    if process.is_root:
        others = "" if is_for_all else "; ordinary users can't (chmod 666 /dev/fuse)"
        return Finding(name, State.OK, found, f"root can mount{others}")
    if _may_use(status.st_mode, status.st_uid, status.st_gid, process):
        return Finding(name, State.OK, found, "this user can mount")
    return Finding(
        name, State.MISSING, found, "only root can mount", "chmod 666 /dev/fuse", is_needed=True
    )


def _may_use(mode: int, owner: int, group: int, process: Process) -> bool:
    """Whether the permissions let a process that is not root read and write."""
    shift = 6 if owner == process.uid else 3 if group in process.groups else 0
    return mode >> shift & 0o6 == 0o6


def _right_to_mount(root: Path, process: Process) -> Finding:
    name = "right to mount"
    if process.may_mount:
        return Finding(name, State.OK, "CAP_SYS_ADMIN", "the daemon mounts by itself")
    if process.is_root:
        return Finding(
            name,
            State.MISSING,
            "root without CAP_SYS_ADMIN, as in a container",
            "the kernel refuses to mount",
            is_needed=True,
        )
    places = [root / directory / "fusermount3" for directory in _PROGRAM_DIRECTORIES]
    program = next((place for place in places if place.is_file()), None)
    if program is None:
        return Finding(
            name,
            State.MISSING,
            "no fusermount3",
            "only root can mount",
            "apt-get install fuse3",
            is_needed=True,
        )
    shown = f"/{program.relative_to(root)}"
    if not program.stat().st_mode & stat.S_ISUID:
        return Finding(
            name,
            State.MISSING,
            f"{shown} is not set-user-ID",
            "only root can mount",
            f"chmod u+s {shown}",
            is_needed=True,
        )
    if not process.may_gain_rights:
        return Finding(
            name,
            State.MISSING,
            f"{shown}, but this process has no_new_privs set",
            "fusermount3 can't become root, so this process can't mount",
            is_needed=True,
        )
    return Finding(name, State.OK, f"{shown}, set-user-ID", "fusermount3 mounts for this user")


def _libfuse(root: Path) -> Finding:
    versions = {
        match[1]
        for pattern in _LIBRARY_PATTERNS
        for path in root.glob(f"{pattern}/libfuse3.so.*")
        if (match := re.fullmatch(r"libfuse3\.so\.(3\.\d+\.\d+)", path.name))
    }
    if versions:
        found = " and ".join(sorted(versions))
        return Finding("libfuse", State.OK, found, "pyfuse3 talks to the kernel through it")
    return Finding(
        "libfuse",
        State.UNKNOWN,
        "libfuse3 is not where libraries usually are",
        "a mount fails unless pyfuse3 finds it",
        "apt-get install libfuse3-3",
    )


def _allow_other(root: Path, process: Process) -> Finding:
    lines = read_text(root / "etc/fuse.conf").splitlines()
    if "user_allow_other" in (line.strip() for line in lines):
        return Finding("allow_other", State.OK, "user_allow_other", "every user may mount with it")
    found = "/etc/fuse.conf has no user_allow_other"
    if process.is_root:
        return Finding("allow_other", State.OK, found, "only root may mount with -o allow_other")
    return Finding(
        "allow_other",
        State.MISSING,
        found,
        "-o allow_other is refused",
        "echo user_allow_other >> /etc/fuse.conf",
    )
