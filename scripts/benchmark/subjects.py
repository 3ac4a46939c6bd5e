"""The things measured. To add one: write a class with the methods of `Subject`, list it in
`SUBJECTS`.

Invariants: `setup` leaves a file or device at ``path`` that holds at least the asked-for bytes;
`teardown` removes whatever `setup` made, however far it came, and nothing else, and may be called
again.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from benchmark import backing
from benchmark.cells import MIB
from benchmark.errors import SubjectFailed
from benchmark.peers import Nbdfuse, Qsd
from benchmark.pmemfsmount import VOLUME, PmemfsMount
from benchmark.stage import Measured


class Subject(Measured, Protocol):
    """A file or device to measure with fio."""

    @property
    def path(self) -> Path:
        """What fio opens; valid after `setup`."""


class Tmpfs:
    """A file in tmpfs: the memory itself with a file system's system calls, the upper bound."""

    name = "tmpfs"
    description = "a file in /dev/shm"

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.direct = True
        self._file = backing.MemoryFile(self.name)
        self.path = self._file.path

    def memory_bytes(self, size_bytes: int) -> int:
        """Exactly the bytes offered."""
        return size_bytes

    def setup(self, size_bytes: int) -> None:
        """Allocate the file."""
        self._file.create(size_bytes)
        self.direct = backing.opens_direct(self.path)
        if not self.direct:
            self.notes.append("this kernel's tmpfs refuses O_DIRECT: measured with direct=0")

    def teardown(self) -> None:
        """Remove the file."""
        self._file.remove()

    def daemon_pids(self) -> tuple[int, ...]:
        """None: the kernel copies within the caller's own system call."""
        return ()

    def private_bytes(self) -> int | None:
        """No processes, no memory."""
        return None


class Loop:
    """The kernel's loop device over a file in tmpfs: what there is without pmemfs."""

    direct = True

    def __init__(self, name: str, direct_io: bool) -> None:
        self.name = name
        self.description = "the kernel's loop device over a file in /dev/shm"
        self.notes: list[str] = []
        self._direct_io = direct_io
        self._file = backing.MemoryFile(name)
        self._device = backing.LoopDevice(self._file.path)

    @property
    def path(self) -> Path:
        """The block device."""
        return self._device.path

    def memory_bytes(self, size_bytes: int) -> int:
        """Exactly the bytes offered."""
        return size_bytes

    def setup(self, size_bytes: int) -> None:
        """Allocate the file and attach a free loop device to it."""
        backing.require_loop_devices()
        self._file.create(size_bytes)
        self.notes.append(self._device.attach(self._direct_io))
        self.notes.append(
            "pinned cells pin the caller only: the driver's kernel workers can't be pinned"
        )

    def teardown(self) -> None:
        """Detach the device and remove the file."""
        try:
            self._device.detach()
        finally:
            self._file.remove()

    def daemon_pids(self) -> tuple[int, ...]:
        """None: kernel workers, which come and go."""
        return ()

    def private_bytes(self) -> int | None:
        """No processes, no memory."""
        return None


class Pmemfs:
    """A pmemfs pool in /dev/shm, mounted; fio works on the one file of its volume, or on one that
    was written in its file system.
    """

    def __init__(
        self,
        name: str,
        engine: str = "native",
        transport: str = "auto",
        scheme: str = "pmem",
        mode: str = "block",
    ) -> None:
        self.name = name
        self.notes: list[str] = []
        self.direct = True
        self._mode = mode
        self._mount = PmemfsMount(name, engine, transport, scheme, mode)
        self.description = f"pmemfs, {self._mount.description}"

    @property
    def path(self) -> Path:
        """The volume's file, or the one in the file system."""
        return self._mount.mountpoint / VOLUME

    def memory_bytes(self, size_bytes: int) -> int:
        """The bytes offered, their page structures (64 bytes per 4 KiB), labels and alignment; a
        file system's bitmaps and inodes are few."""
        extra_mib = size_bytes // MIB // 32 + 16
        return size_bytes + extra_mib * MIB

    def setup(self, size_bytes: int) -> None:
        """Create the pool, mount it, and learn who serves it."""
        self._mount.create(self.memory_bytes(size_bytes))
        self._mount.mount()
        self.notes.append(self._mount.served)
        if self._mode == "fs":
            backing.write_new(self.path, size_bytes)
        if not self.path.exists():
            raise SubjectFailed(f"the mount has no file {VOLUME!r}")
        self.direct = backing.opens_direct(self.path)
        if not self.direct:
            self.notes.append("O_DIRECT refused: measured with direct=0, through the page cache")

    def teardown(self) -> None:
        """Unmount, by force if need be, see the daemon end, and remove mountpoint and pool."""
        self._mount.remove()

    def daemon_pids(self) -> tuple[int, ...]:
        """The daemon and all processes it started (a native data plane is one of them)."""
        return self._mount.daemon_pids()

    def private_bytes(self) -> int | None:
        """Of the daemon and its data plane together, without the pool and the memfd they map."""
        return self._mount.private_bytes()


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "tmpfs": Tmpfs,
    "loop": lambda: Loop("loop", direct_io=True),
    "loop-buffered": lambda: Loop("loop-buffered", direct_io=False),
    "pmemfs": lambda: Pmemfs("pmemfs"),
    "pmemfs-uring": lambda: Pmemfs("pmemfs-uring", transport="uring"),
    "pmemfs-fd": lambda: Pmemfs("pmemfs-fd", transport="fd"),
    "fs": lambda: Pmemfs("fs", mode="fs"),
    "none": lambda: Pmemfs("none", scheme="none"),
    "python": lambda: Pmemfs("python", engine="python"),
    "nbdfuse": Nbdfuse,
    "qsd": lambda: Qsd("qsd", "cache.direct=on,aio=native"),
    "qsd-buffered": lambda: Qsd("qsd-buffered", "cache.direct=off,aio=io_uring"),
}

# the loop device with direct-io=off is there to check that "on" does not put it at a disadvantage,
# one transport by itself to see what auto is worth
DEFAULT_SUBJECTS = (
    *("tmpfs", "loop", "pmemfs", "fs", "none", "python"),
    *("nbdfuse", "qsd", "qsd-buffered"),
)
