"""The kernel and the initramfs that guests are booted from, in a cache.

    CACHE/linux-VERSION/            the kernel's packages, unpacked, and `image`, the kernel itself
    CACHE/kernel -> linux-VERSION   the one in use; there only once the folder is whole
    CACHE/busybox                   the initramfs's only program
    CACHE/initramfs-VERSION-HASH.cpio
    CACHE/accelerator.json          what `--accel auto` found

Holds: whatever has its final name in the cache is whole, and one process at a time makes it. The
hash is of everything the initramfs is made from, so a changed guest script is never missed.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import hashlib
import lzma
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from failures import say, unavailable
from packages import (
    install_missing_packages,
    kernel_packages,
    last_words,
    output_of,
    unpack_package,
)

HERE = Path(__file__).resolve().parent
GUEST_SCRIPTS = (HERE / "init", HERE / "inside")
# Without ext4 and xfs, which the kernel loads at the first mount: together they take a second.
MODULES = (
    *("virtio_pci", "virtio_console", "qemu_fw_cfg", "9pnet_virtio", "9p", "overlay"),
    *("nfit", "libnvdimm", "nd_pmem", "nd_btt", "dax_pmem", "device_dax", "fuse", "loop"),
)


@dataclass(frozen=True)
class Kernel:
    """An unpacked kernel: `tree` holds its packages' boot/ and lib/modules/, and the image."""

    version: str
    tree: Path

    @property
    def image(self) -> Path:
        """What QEMU boots; see uncompressed_kernel()."""
        return self.tree / "image"

    @property
    def compressed_image(self) -> Path:
        return self.tree / "boot" / f"vmlinuz-{self.version}"

    @property
    def modules(self) -> Path:
        return self.tree / "lib" / "modules" / self.version


@dataclass(frozen=True)
class BootFiles:
    """What every guest is booted from."""

    kernel: Kernel
    initramfs: Path


def ensure_boot_files() -> BootFiles:
    """Install, download and build what is missing. Quick when nothing is."""
    install_missing_packages()
    cache = cache_folder()
    with locked(cache):
        try:
            kernel = ensure_kernel(cache)
            return BootFiles(kernel, ensure_initramfs(cache, kernel, ensure_busybox(cache)))
        except subprocess.CalledProcessError as error:
            raise unavailable(f"{error.cmd[0]} failed: {last_words(error)}") from None


def cache_folder() -> Path:
    """The cache; made if it is not there."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "pmemfs" / "guest"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unavailable(f"the cache folder can't be made: {error}") from None
    return folder


@contextlib.contextmanager
def locked(cache: Path) -> Iterator[None]:
    """Wait for other processes that fill the cache: tests may start several guests at once."""
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is never seen half written."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
    partial.rename(path)


def ensure_kernel(cache: Path) -> Kernel:
    """The kernel in the cache, downloaded first if there is none.

    One that is there is kept, even when the distribution has a newer one: removing the cache
    folder is how to ask for that.
    """
    current = cache / "kernel"
    if not current.exists():
        download_kernel(cache)
    return Kernel(version=os.readlink(current).removeprefix("linux-"), tree=current.resolve())


def download_kernel(cache: Path) -> None:
    """Unpack the distribution's kernel into the cache and point `kernel` to it."""
    packages = kernel_packages()
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        tree = Path(folder) / "tree"
        for package in packages:
            unpack_package(package, tree)
        if not (tree / "lib").exists():
            (tree / "lib").symlink_to("usr/lib")
        versions = [path.name for path in (tree / "lib" / "modules").glob("*")]
        if len(versions) != 1 or not Kernel(versions[0], tree).compressed_image.exists():
            raise unavailable(f"the packages hold no whole kernel: {', '.join(packages) or 'none'}")
        output_of("depmod", "-b", str(tree), versions[0])
        kernel = Kernel(versions[0], tree)
        kernel.image.write_bytes(uncompressed_kernel(kernel.compressed_image.read_bytes()))
        target = cache / f"linux-{versions[0]}"
        shutil.rmtree(target, ignore_errors=True)
        tree.rename(target)
    link = cache / "kernel.partial"
    link.unlink(missing_ok=True)
    link.symlink_to(target.name)
    link.rename(cache / "kernel")


def ensure_busybox(cache: Path) -> Path:
    """A static busybox. Never installed: the package would replace an ordinary busybox."""
    busybox = cache / "busybox"
    if not busybox.exists():
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            tree = Path(folder) / "tree"
            unpack_package("busybox-static", tree)
            in_usr = tree / "usr" / "bin" / "busybox"
            (in_usr if in_usr.exists() else tree / "bin" / "busybox").rename(busybox)
    return busybox


def ensure_initramfs(cache: Path, kernel: Kernel, busybox: Path) -> Path:
    """The initramfs for this kernel and these guest scripts, built if it is not in the cache."""
    ingredients = [path.read_bytes() for path in (*GUEST_SCRIPTS, busybox)]
    ingredients.append(" ".join(MODULES).encode())
    key = hashlib.sha256(b"\0".join(ingredients)).hexdigest()[:16]
    initramfs = cache / f"initramfs-{kernel.version}-{key}.cpio"
    if not initramfs.exists():
        say(f"building the initramfs for Linux {kernel.version}")
        write_whole(initramfs, build_initramfs(kernel, busybox))
    return initramfs


def build_initramfs(kernel: Kernel, busybox: Path) -> bytes:
    """A cpio archive, uncompressed: an emulated guest would take longer to unpack it."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in ("bin", "dev", "modules", "proc", "sys"):
            (root / name).mkdir()
        shutil.copy(busybox, root / "bin" / "busybox")
        for script in GUEST_SCRIPTS:
            shutil.copy(script, root / script.name)
        order = []
        for module in modules_in_loading_order(kernel):
            order.append(f"{module.name.partition('.')[0]}.ko")
            (root / "modules" / order[-1]).write_bytes(decompressed(module))
        (root / "modules" / "order").write_text("\n".join(order) + "\n")
        names = "\0".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
        command = ["cpio", "--quiet", "--null", "-o", "-H", "newc", "-R", "0:0"]
        archive = subprocess.run(
            command, cwd=root, input=names.encode(), check=True, capture_output=True
        )
        return archive.stdout


def modules_in_loading_order(kernel: Kernel) -> list[Path]:
    """The files of MODULES and of what they need, each after its needs, none twice.

    An empty folder stands in for the host's modprobe.d: ndctl's hides libnvdimm.
    """
    with tempfile.TemporaryDirectory() as empty:
        listing = output_of(
            *("modprobe", "-d", str(kernel.tree), "-S", kernel.version, "-C", empty),
            *("--show-depends", "--all", *MODULES),
        )
    files = [
        line.split(maxsplit=1)[1].strip()
        for line in listing.splitlines()
        if line.startswith("insmod ")
    ]
    return [Path(file) for file in dict.fromkeys(files)]


def decompressed(module: Path) -> bytes:
    """A module's bytes; busybox loads plain ones only."""
    content = module.read_bytes()
    match module.suffix:
        case ".xz":
            return lzma.decompress(content)
        case ".gz":
            return gzip.decompress(content)
        case ".zst":
            return zstd_decompressed(content)
    return content


def zstd_decompressed(content: bytes) -> bytes:
    """Python's own library has no zstd yet."""
    return subprocess.run(["zstd", "-dc"], input=content, check=True, capture_output=True).stdout


def uncompressed_kernel(image: bytes) -> bytes:
    """The ELF file within a bzImage, which QEMU boots too; else the bzImage as it is.

    Unpacking takes an emulated guest four seconds, half of its boot. The fields are those of the
    kernel's x86 boot protocol (Documentation/arch/x86/boot.rst): the number of 512-byte sectors
    before the 32-bit code, and the payload's offset in that code and length.
    """
    setup_sectors = image[0x1F1] or 4
    offset_bytes, length_bytes = struct.unpack_from("<II", image, 0x248)
    start = (setup_sectors + 1) * 512 + offset_bytes
    payload = image[start : start + length_bytes]
    elf = b""
    if payload.startswith(b"\xfd7zXZ\0"):
        elf = lzma.LZMADecompressor().decompress(payload)
    elif payload.startswith(b"\x28\xb5\x2f\xfd"):
        # The kernel's build appends the size, 4 bytes, that zstd would take for another frame.
        elf = zstd_decompressed(payload[:-4])
    return elf if elf.startswith(b"\x7fELF") else image
