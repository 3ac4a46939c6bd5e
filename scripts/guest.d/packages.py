"""Packages through apt: installed where programs are missing, unpacked where files will do.

Holds: nothing is installed that is there already, and what is done is said before it is done.
Packages are named exactly, because apt takes a pattern for all that match it.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from failures import say, unavailable

PACKAGE_OF_PROGRAM = {
    "qemu-system-x86_64": "qemu-system-x86",
    "depmod": "kmod",
    "cpio": "cpio",
    "zstd": "zstd",
    # These run in the guest, from the host's root.
    "ndctl": "ndctl",
    "mkfs.ext4": "e2fsprogs",
    "mkfs.xfs": "xfsprogs",
}
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

KERNEL_METAPACKAGES = {"debian": "linux-image-amd64", "ubuntu": "linux-image-generic"}
# Of all that a kernel's packages depend on, these hold its image and its modules.
KERNEL_PART = re.compile(r"linux-(image|modules|modules-extra|binary)-\d[\w.+-]*")


def find_program(name: str) -> str | None:
    """Look in the sbin folders too, which an ordinary user's PATH lacks."""
    return shutil.which(name, path=SYSTEM_PATH)


def output_of(*command: str, cwd: Path | None = None) -> str:
    """Run a program, return its stdout; CalledProcessError holds what it said."""
    environment = {
        **os.environ,
        "DEBIAN_FRONTEND": "noninteractive",
        "LC_ALL": "C.UTF-8",
        "PATH": f"{SYSTEM_PATH}:{os.environ.get('PATH', '')}",
    }
    result = subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=cwd, env=environment
    )
    return result.stdout


def last_words(error: subprocess.CalledProcessError) -> str:
    """The last line a failed program printed, which with apt is the reason."""
    lines = str(error.stderr or error.stdout or "").strip().splitlines()
    return lines[-1] if lines else f"it exited with status {error.returncode}"


def with_fresh_lists(purpose: str, action: Callable[[], str]) -> str:
    """Do something with apt; if it fails, once more after `apt-get update`.

    A fresh machine has no package lists yet, and an old one has lists of packages that are gone.
    """
    if find_program("apt-get") is None:
        raise unavailable(f"can't {purpose}: there is no apt here")
    try:
        return action()
    except subprocess.CalledProcessError as error:
        if os.geteuid() != 0:
            raise unavailable(f"can't {purpose}, not being root: {last_words(error)}") from None
    say("updating the lists of packages (apt-get update)")
    try:
        output_of("apt-get", "update")
        return action()
    except subprocess.CalledProcessError as error:
        raise unavailable(f"can't {purpose}: {last_words(error)}") from None


def install_missing_packages() -> None:
    """Install what PACKAGE_OF_PROGRAM says is missing."""
    if platform.machine() != "x86_64":
        raise unavailable(f"guests run on x86-64 only, and this is {platform.machine()}")
    missing = {PACKAGE_OF_PROGRAM[name] for name in PACKAGE_OF_PROGRAM if not find_program(name)}
    if not missing:
        return
    packages = " ".join(sorted(missing))
    if os.geteuid() != 0:
        raise unavailable(f"missing here, and installing takes root: apt install {packages}")
    say(f"installing {packages}")
    # Waits, because another apt may be at work.
    options = ("--yes", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=300")
    with_fresh_lists(
        f"install {packages}",
        lambda: output_of("apt-get", "install", *options, *sorted(missing)),
    )


def unpack_package(package: str, into: Path) -> None:
    """Download a package and unpack it, without installing it."""
    say(f"downloading {package}")
    with tempfile.TemporaryDirectory(dir=into.parent) as folder:
        with_fresh_lists(
            f"download {package}",
            lambda: output_of("apt-get", "download", package, cwd=Path(folder)),
        )
        (archive,) = Path(folder).iterdir()
        output_of("dpkg", "-x", str(archive), str(into))


def kernel_packages() -> list[str]:
    """The packages that hold the image and the modules of the distribution's kernel."""
    release = platform.freedesktop_os_release()
    for name in (release.get("ID", ""), *release.get("ID_LIKE", "").split()):
        if name in KERNEL_METAPACKAGES:
            return list(dict.fromkeys(kernel_parts(KERNEL_METAPACKAGES[name])))
    raise unavailable(f"kernels are known for Debian and Ubuntu, and this is {release.get('NAME')}")


def kernel_parts(package: str) -> list[str]:
    """The package, if it is part of a kernel, and the parts it depends on; some may come twice.

    Debian's metapackage names one image, which holds everything. Ubuntu's names the image and the
    extra modules, both of which name the modules. Of alternatives (`a | b`) the first is taken.
    """
    fields = with_fresh_lists(
        f"find the package {package}",
        lambda: output_of("apt-cache", "show", "--no-all-versions", package),
    )
    parts = [package] if KERNEL_PART.fullmatch(package) else []
    depends = re.search(r"^Depends: (.*)$", fields, re.MULTILINE)
    for clause in depends[1].split(",") if depends else ():
        name = clause.split()[0]
        if KERNEL_PART.fullmatch(name):
            parts += kernel_parts(name)
    return parts
