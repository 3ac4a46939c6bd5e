"""What memory there is for pools here: huge pages, persistent memory, room in /dev/shm."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from pmemfs.mount.transport import number, read_text
from pmemfs.mountinfo import DIRTY_PAGE_LIMITS
from pmemfs.observe.finding import Finding, Process, Setting, State, mounts_below
from pmemfs.observe.requests import soft_limit
from pmemfs.units import KIB, format_size

SHM = "/dev/shm"

_SHMEM_ENABLED = "sys/kernel/mm/transparent_hugepage/shmem_enabled"
_DEFAULT_MEMLOCK_BYTES = 8 << 20
"""The kernel's default since 5.16."""


def memory_findings(root: Path, process: Process) -> Iterator[Finding]:
    """All findings of this module."""
    yield _huge_pages(root)
    yield _dax(root)
    yield _shm(root)
    yield _locked_memory(root, process)
    yield _dirty_pages(root)


def _huge_pages(root: Path) -> Finding:
    """What a file in /dev/shm is made of. `huge=` of its mount decides this, unless shmem_enabled
    is deny or force. `create` reserves the memory, which `advise` leaves in small pages.

    Source: Documentation/admin-guide/mm/transhuge.rst of the kernel; measured on 6.18.44.
    """
    match = re.search(r"\[(\w+)\]", read_text(root / _SHMEM_ENABLED))
    if match is None:
        return Finding(
            "huge pages",
            State.UNKNOWN,
            "the kernel has no huge pages for shared memory",
            "-o huge_pages does nothing in tmpfs",
        )
    policy = _shm_option(root, "huge") or "never"
    found = f"{SHM} has huge={policy}, shmem_enabled is {match[1]}"
    if match[1] == "deny":
        return Finding(
            "huge pages",
            State.COULD_BE_FASTER,
            found,
            "pools in tmpfs have small pages",
            f"echo never > /{_SHMEM_ENABLED}",
        )
    if match[1] == "force" or policy in ("always", "within_size"):
        return Finding("huge pages", State.OK, found, "new pools there are made of huge pages")
    therefore = {
        "advise": "-o huge_pages takes effect slowly, as the kernel finds time to collapse pages"
    }.get(policy, "pools there have small pages, and -o huge_pages does nothing")
    return Finding(
        "huge pages",
        State.COULD_BE_FASTER,
        found,
        therefore,
        f"mount -o remount,huge=within_size {SHM}",
    )


def _dax(root: Path) -> Finding:
    devices = sorted(
        f"/dev/{path.name}"
        for path in (root / "dev").glob("*")
        if re.fullmatch(r"pmem\d+(\.\d+)?|dax\d+\.\d+", path.name)
    )
    file_systems = [
        mount.mountpoint
        for mount in mounts_below(root)
        if {"dax", "dax=always", "dax=inode"} & set(mount.options.split(","))
    ]
    sources = [*devices, *(f"{mountpoint} (DAX)" for mountpoint in file_systems)]
    if sources:
        return Finding("persistent memory", State.OK, ", ".join(sources), "pools there can last")
    return Finding(
        "persistent memory",
        State.MISSING,
        "no /dev/pmem, no /dev/dax, no DAX mount",
        "pools in tmpfs stand in for it, and are lost with the power",
    )


def _shm(root: Path) -> Finding:
    try:
        status = os.statvfs(root / SHM.lstrip("/"))
    except OSError:
        return Finding(
            "room",
            State.MISSING,
            f"there is no {SHM}",
            "pools need another place",
            f"mount -t tmpfs tmpfs {SHM}",
        )
    free = status.f_bavail * status.f_frsize
    available = _available_memory_bytes(root)
    usable = free if available is None else min(free, available)
    found = f"{format_size(free)} free in {SHM}" + (
        "" if available is None else f", {format_size(available)} of memory available"
    )
    if usable == 0:
        return Finding("room", State.MISSING, found, "no pool fits there")
    return Finding("room", State.OK, found, f"a pool of up to {format_size(usable)} fits there")


def _locked_memory(root: Path, process: Process) -> Finding:
    limit = soft_limit(root, "Max locked memory")
    if limit is None:
        return Finding(
            "locked memory", State.UNKNOWN, "no limit can be read", "root is bound by none"
        )
    found = "unlimited" if limit >= 1 << 63 else format_size(limit)
    if process.is_root:
        return Finding("locked memory", State.OK, found, "root's daemons are not bound by it")
    if limit >= _DEFAULT_MEMLOCK_BYTES:
        return Finding("locked memory", State.OK, found, "as much as kernels give by default")
    return Finding(
        "locked memory",
        State.COULD_BE_FASTER,
        found,
        "more of the daemon's own memory may have to come back from swap",
        f"ulimit -l {_DEFAULT_MEMLOCK_BYTES // KIB}",
    )


def _dirty_pages(root: Path) -> Finding:
    """Whether the kernel holds up stores through mappings of a mount; see `mount/making`."""
    for mount in mounts_below(root):
        limit = DIRTY_PAGE_LIMITS.format(device=mount.device) + "/strict_limit"
        if mount.is_ours and read_text(root / limit.lstrip("/")).strip() == "1":
            setting = Setting(limit.lstrip("/"), "0")
            return Finding(
                "dirty pages",
                State.COULD_BE_FASTER,
                f"strictly limited on {mount.mountpoint}",
                "stores through mappings there wait until earlier ones are written back",
                setting.command,
                setting=setting,
            )
    return Finding(
        "dirty pages",
        State.OK,
        "no mount of pmemfs has a strict limit",
        "root's mounts lift it; stores through mappings are as free as on any file system",
    )


def _shm_option(root: Path, name: str) -> str | None:
    """The value of an option of the mount on /dev/shm; of several mounts there, the last counts."""
    there = [m for m in mounts_below(root) if m.mountpoint == SHM]
    words = there[-1].options.split(",") if there else []
    return next((word.partition("=")[2] for word in words if word.startswith(f"{name}=")), None)


def _available_memory_bytes(root: Path) -> int | None:
    match = re.search(r"^MemAvailable:\s+(\d+) kB", read_text(root / "proc/meminfo"), re.MULTILINE)
    return None if match is None else number(match[1], 0) * KIB
