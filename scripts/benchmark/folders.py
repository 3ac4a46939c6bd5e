"""File systems to make files in. To add one: write a class with the methods of `Folder`, list it in
`FOLDERS`.

Invariants: `setup` leaves an empty folder of a file system with room for at least the asked-for
bytes; `teardown` removes whatever `setup` made, however far it came, and may be called again.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from benchmark import backing, host
from benchmark.cells import MIB
from benchmark.errors import SubjectUnavailable
from benchmark.ext4 import MKFS, MountedExt4
from benchmark.peers import INSTALL, START_SECONDS
from benchmark.pmemfsmount import PmemfsMount, Requests
from benchmark.stage import Measured

FOLDER_NAME = "work"
FUSE2FS_OPTIONS = "kernel_cache,attr_timeout=3600,entry_timeout=3600"
# an inode for every 4 KiB: the files are as small
INODES = ("-i", "4096")
# as pmemfs is served where the kernel lets it; libfuse's own choice is /dev/fuse
OVER_RINGS = ("-o", "io_uring")


class Folder(Measured, Protocol):
    """A file system to measure with ``files.c``."""

    @property
    def folder(self) -> Path:
        """Where in it files are made; valid after `setup`."""

    def requests(self) -> Requests | None:
        """What it has been asked so far; None where nobody counts. Raises SubjectFailed."""


class _Mounted:
    """What those have in common that the kernel serves: no processes of their own."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.direct = True

    def memory_bytes(self, size_bytes: int) -> int:
        """Exactly the room offered."""
        return size_bytes

    def daemon_pids(self) -> tuple[int, ...]:
        """None."""
        return ()

    def private_bytes(self) -> int | None:
        """Not of interest."""
        return None

    def requests(self) -> Requests | None:
        """Not counted."""
        return None

    def _look_at(self, folder: Path) -> None:
        """Make the folder, and learn whether files in it can be opened with O_DIRECT."""
        folder.mkdir()
        probe = folder / "probe"
        probe.touch()
        self.direct = backing.opens_direct(probe)
        probe.unlink()


class TmpfsFolder(_Mounted):
    """A folder in /dev/shm."""

    name = "tmpfs"
    description = "a folder in /dev/shm"

    def __init__(self) -> None:
        super().__init__()
        self._folder: Path | None = None

    @property
    def folder(self) -> Path:
        """Where files are made."""
        assert self._folder is not None
        return self._folder / FOLDER_NAME

    def setup(self, size_bytes: int) -> None:
        """Make a folder."""
        self._folder = backing.make_folder()
        self._look_at(self.folder)

    def teardown(self) -> None:
        """Remove it with all that is in it."""
        if self._folder is not None:
            shutil.rmtree(self._folder)
            self._folder = None


class Ext4Folder(_Mounted):
    """ext4 on the kernel's loop device over a file in /dev/shm."""

    name = "ext4"
    description = "ext4 on the kernel's loop device over a file in /dev/shm"

    def __init__(self) -> None:
        super().__init__()
        self._image = backing.MemoryFile(self.name)
        self._ext4 = MountedExt4(self._image.path)

    @property
    def folder(self) -> Path:
        """Where files are made."""
        return self._ext4.mountpoint / FOLDER_NAME

    def setup(self, size_bytes: int) -> None:
        """Allocate the file, attach, make the file system, mount."""
        self._image.create(size_bytes)
        self._ext4.setup(*INODES)
        self.notes.append(f"loop device: {self._ext4.note}")
        self._look_at(self.folder)

    def teardown(self) -> None:
        """Unmount, detach, remove mountpoint and file."""
        try:
            self._ext4.teardown()
        finally:
            self._image.remove()


class _ServedMount:
    """A program that serves a file system at a mountpoint of our own, until `stop`."""

    def __init__(self) -> None:
        self._mountpoint: Path | None = None
        self._server: host.Server | None = None

    @property
    def mountpoint(self) -> Path:
        """Valid after `start`."""
        assert self._mountpoint is not None
        return self._mountpoint

    def start(self, *words: str, options: tuple[str, ...] = ()) -> None:
        """Run ``words`` with the mountpoint and then ``options`` behind; return once it serves.

        Raises SubjectFailed.
        """
        mountpoint = self._mountpoint = backing.make_folder()
        self._server = host.Server([*words, str(mountpoint), *options])
        self._server.await_ready(lambda: host.is_mounted(mountpoint), START_SECONDS)

    def stop(self) -> None:
        """Unmount, see the program end, remove the mountpoint."""
        try:
            if self._mountpoint is not None:
                backing.unmount(self._mountpoint)
                if self._server is not None:
                    self._server.await_end(backing.END_SECONDS)
                self._mountpoint.rmdir()
                self._mountpoint = None
        finally:
            if self._server is not None:
                self._server.stop()
                self._server = None

    def pids(self) -> tuple[int, ...]:
        """The one program."""
        return (self._server.pid,) if self._server is not None else ()


class Fuse2fsFolder(_Mounted):
    """fuse2fs, ext4's file system served by a process, over a file in /dev/shm.

    Without a journal, which fuse2fs would not write anyway; and the kernel may keep names and
    attributes, as pmemfs lets it.
    """

    name = "fuse2fs"
    description = f"fuse2fs over a file in /dev/shm, ext4 without a journal, {FUSE2FS_OPTIONS}"

    def __init__(self) -> None:
        super().__init__()
        self._image = backing.MemoryFile(self.name)
        self._mount = _ServedMount()

    @property
    def folder(self) -> Path:
        """Where files are made."""
        return self._mount.mountpoint / FOLDER_NAME

    def setup(self, size_bytes: int) -> None:
        """Allocate the file, make the file system, serve it."""
        backing.require_fuse()
        backing.require_program("mkfs.ext4", "install e2fsprogs")
        backing.require_program("fuse2fs", INSTALL)
        self._image.create(size_bytes)
        image = str(self._image.path)
        options = ["-O", "^has_journal", "-E", "nodiscard,lazy_itable_init=0"]
        backing.checked([*MKFS, *INODES, *options, image])
        self._mount.start("fuse2fs", image, options=("-f", "-o", FUSE2FS_OPTIONS))
        self._look_at(self.folder)

    def teardown(self) -> None:
        """Unmount, see the program end, remove mountpoint and file."""
        try:
            self._mount.stop()
        finally:
            self._image.remove()

    def daemon_pids(self) -> tuple[int, ...]:
        """The one program."""
        return self._mount.pids()


class PassthroughFolder(_Mounted):
    """libfuse's passthrough_hp, which hands all on to a folder in /dev/shm: a server that keeps
    nothing itself, in C++."""

    def __init__(self, name: str, options: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.name = name
        self.description = " ".join(["passthrough_hp", *options, "over a folder in /dev/shm"])
        self._options = options
        self._source: Path | None = None
        self._mount = _ServedMount()

    @property
    def folder(self) -> Path:
        """Where files are made."""
        return self._mount.mountpoint / FOLDER_NAME

    def setup(self, size_bytes: int) -> None:
        """Serve an empty folder."""
        _require_example("passthrough_hp", self._options)
        self._source = backing.make_folder()
        words = ("passthrough_hp", "--foreground", *self._options, str(self._source))
        self._mount.start(*words)
        self._look_at(self.folder)

    def teardown(self) -> None:
        """Unmount, see the program end, remove both folders."""
        self._mount.stop()
        if self._source is not None:
            shutil.rmtree(self._source)
            self._source = None

    def daemon_pids(self) -> tuple[int, ...]:
        """The one program."""
        return self._mount.pids()


class MemfsFolder(_Mounted):
    """libfuse's memfs_ll, which keeps files in its own memory until it ends, in C++."""

    def __init__(self, name: str, options: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.name = name
        self.description = " ".join(["memfs_ll", *options])
        self._options = options
        self._mount = _ServedMount()

    @property
    def folder(self) -> Path:
        """Where files are made."""
        return self._mount.mountpoint / FOLDER_NAME

    def memory_bytes(self, size_bytes: int) -> int:
        """A file that grows is copied now and then to where there is twice the room."""
        return 2 * size_bytes

    def setup(self, size_bytes: int) -> None:
        """Serve."""
        _require_example("memfs_ll", self._options)
        self._mount.start("memfs_ll", "-f", *self._options)
        self._look_at(self.folder)

    def teardown(self) -> None:
        """Unmount and see the program end."""
        self._mount.stop()

    def daemon_pids(self) -> tuple[int, ...]:
        """The one program."""
        return self._mount.pids()


def _require_example(program: str, options: tuple[str, ...]) -> None:
    """Raise SubjectUnavailable where an example of libfuse, or what it shall do, can't be had."""
    backing.require_fuse()
    backing.require_program(program, INSTALL)
    if options != OVER_RINGS:
        return
    if not host.fuse_uring_allowed():
        raise SubjectUnavailable(
            f"this kernel has FUSE over io_uring switched off: {host.FUSE_URING}"
        )
    if "io_uring" not in backing.checked([program, "--help"]):
        raise SubjectUnavailable(f"this {program} was built without io_uring")


class PmemfsFolder(_Mounted):
    """A pool of mode fs in /dev/shm, mounted."""

    name = "fs"

    def __init__(self) -> None:
        super().__init__()
        self._mount = PmemfsMount(self.name, mode="fs")
        self.description = f"pmemfs, {self._mount.description}"

    @property
    def folder(self) -> Path:
        """Where files are made."""
        return self._mount.mountpoint / FOLDER_NAME

    def memory_bytes(self, size_bytes: int) -> int:
        """The room offered, page structures, labels and alignment."""
        return size_bytes + (size_bytes // MIB // 32 + 16) * MIB

    def setup(self, size_bytes: int) -> None:
        """Make the pool and mount it."""
        self._mount.create(self.memory_bytes(size_bytes))
        self._mount.mount()
        self.notes.append(self._mount.served)
        self._look_at(self.folder)

    def teardown(self) -> None:
        """Unmount and remove."""
        self._mount.remove()

    def daemon_pids(self) -> tuple[int, ...]:
        """The daemon and its data plane."""
        return self._mount.daemon_pids()

    def private_bytes(self) -> int | None:
        """Of both."""
        return self._mount.private_bytes()

    def requests(self) -> Requests | None:
        """By its own counts."""
        return self._mount.requests()


FOLDERS: dict[str, Callable[[], Folder]] = {
    "fs": PmemfsFolder,
    "passthrough_hp": lambda: PassthroughFolder("passthrough_hp"),
    "passthrough_hp-uring": lambda: PassthroughFolder("passthrough_hp-uring", OVER_RINGS),
    "memfs_ll": lambda: MemfsFolder("memfs_ll"),
    "memfs_ll-uring": lambda: MemfsFolder("memfs_ll-uring", OVER_RINGS),
    "fuse2fs": Fuse2fsFolder,
    "ext4": Ext4Folder,
    "tmpfs": TmpfsFolder,
}
