"""What the commands for transformations share: the file that is meant, and words for people."""

from __future__ import annotations

import os

from pmemfs.errors import NoSuchSource, NotMounted
from pmemfs.media.transformreport import TransformReport
from pmemfs.medium.source import check_path
from pmemfs.mountinfo import Mount, mount_of_device
from pmemfs.units import format_size


def find_inode(path: str) -> tuple[Mount, int]:
    """The mount that a file or directory is of, and its inode. Raises PmemfsError."""
    check_path(path)
    try:
        status = os.lstat(path)
    except OSError as error:
        raise NoSuchSource(path=path, why=(error.strerror or str(error)).lower()) from None
    mount = mount_of_device(status.st_dev)
    if mount is None or not mount.is_ours:
        raise NotMounted(path=path, what="in a pmemfs mount: it is on another file system")
    return mount, status.st_ino


def sayable(path: str) -> str:
    """A path as text that JSON has; of what is no text, something like it."""
    return path.encode("utf-8", "replace").decode()


def transform_facts(path: str, report: TransformReport) -> list[tuple[str, object]]:
    """Names and values, for people."""
    facts: list[tuple[str, object]] = [
        ("path", path),
        ("encrypted", "yes" if report.is_encrypted else "no"),
        ("compression", report.compression),
    ]
    if report.packed_bytes:
        ratio = report.packed_bytes / report.stored_bytes
        facts.append(
            (
                "compressed",
                f"{format_size(report.packed_bytes)} in {format_size(report.stored_bytes)}, "
                f"{ratio:.2f} times",
            )
        )
    if report.plain_bytes:
        facts.append(("plain", format_size(report.plain_bytes)))
    return facts
