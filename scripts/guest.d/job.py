"""The job: the piece of shell that tells guest.d/inside what to do and with which environment."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from packages import SYSTEM_PATH

CHECKOUT = Path(__file__).resolve().parent.parent.parent


def command_environment(mode: str, accelerator: str) -> dict[str, str]:
    """The command's environment, to which `inside` adds PMEMFS_GUEST_NAMESPACE.

    The caller's own stays outside, so that a run depends on nothing but the checkout.
    """
    virtual_environment = Path(os.environ.get("VIRTUAL_ENV") or CHECKOUT / ".venv")
    return {
        "PATH": f"{virtual_environment / 'bin'}:{SYSTEM_PATH}",
        "HOME": "/root",
        "USER": "root",
        "LANG": "C.UTF-8",
        "TERM": os.environ.get("TERM", "dumb"),
        # The command's stdout is a pipe, but its lines shall be seen at once.
        "PYTHONUNBUFFERED": "1",
        # There is no udev in the guest for libraries to wait for.
        "DM_DISABLE_UDEV": "1",
        "PMEMFS_GUEST": "1",
        "PMEMFS_GUEST_MODE": mode,
        "PMEMFS_GUEST_ACCEL": accelerator,
    }


def job_script(
    variables: Mapping[str, str], environment: Mapping[str, str], command: Sequence[str]
) -> bytes:
    """Sets the variables, exports the environment, leaves the command in "$@"."""
    lines = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    lines.append(f"set -- {shlex.join(command)}")
    return os.fsencode("\n".join(lines) + "\n")


def memory_file(content: bytes) -> BinaryIO:
    """A file without a path, for QEMU to open as /dev/fd/N: nothing to clean up."""
    file = os.fdopen(os.memfd_create("guest-job"), "w+b")
    file.write(content)
    file.flush()
    return file
