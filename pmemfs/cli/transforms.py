"""What the commands for transformations share: the file that is meant, and words for people."""

from __future__ import annotations

from typing import Any

from pmemfs.cli.find import Report
from pmemfs.cli.place import ask_of_files, find_place
from pmemfs.errors import NoTransformsHere
from pmemfs.media.keyreport import KeyReport
from pmemfs.media.transformreport import TransformReport
from pmemfs.mountinfo import Mount
from pmemfs.units import format_size
from pmemfs.unsaid import json_values


def find_inode(path: str) -> tuple[Mount, int]:
    """The mount of a file or directory, and its inode. Raises PmemfsError."""
    mount, status = find_place(path, follows=False)
    return mount, status.st_ino


def ask_about_inode(
    mount: Mount, method: str, shape: type[Report], inode: int, path: str, **params: Any
) -> Report:
    """Ask the daemon of a mount about a file or directory. Raises NoTransformsHere."""
    return ask_of_files(
        mount, NoTransformsHere, method, shape, inode=inode, path=sayable(path), **params
    )


def sayable(path: str) -> str:
    """A path as text that JSON has; of what is no text, something like it."""
    return path.encode("utf-8", "replace").decode()


def find_key_of(mount: Mount, inode: int, path: str) -> KeyReport:
    """The key that an encrypted file or directory needs."""
    return ask_about_inode(mount, "key-find", KeyReport, inode, path)


def transform_values(report: TransformReport, key: KeyReport | None) -> dict[str, Any]:
    """The report as JSON values."""
    return report._asdict() | {"key": key and json_values(key)}


def transform_facts(
    path: str, report: TransformReport, key: KeyReport | None = None
) -> list[tuple[str, object]]:
    """Names and values, for people."""
    facts: list[tuple[str, object]] = [
        ("path", path),
        ("encrypted", f"yes, {_key_words(key)}" if key else "no"),
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


def _key_words(key: KeyReport) -> str:
    which = f"with the key '{key.name}'" if key.name else f"with the key {key.key_id}, lost"
    return f"{which}, which is {'unlocked' if key.is_unlocked else 'locked'}"
