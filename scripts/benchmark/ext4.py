"""ext4 on a loop device on a subject's file: what the file is worth as a disk.

Invariants: `teardown` removes whatever `setup` made, however far it came, and may be called again;
the file keeps memory behind all of its bytes (nothing is discarded), but not its content.
"""

from pathlib import Path

from benchmark import backing, fio

FILE_NAME = "file"
MKFS = ["mkfs.ext4", "-q", "-F", "-b", "4096", "-m", "0"]
# the file takes one in so many bytes of the file system: the journal, say, must have room too
PART = 2


class MountedExt4:
    """A loop device on ``below``, ext4 on it, mounted."""

    def __init__(self, below: Path) -> None:
        self.note = ""
        self._device = backing.LoopDevice(below)
        self._mountpoint: Path | None = None

    @property
    def mountpoint(self) -> Path:
        """Where it is mounted; valid after `setup`."""
        assert self._mountpoint is not None
        return self._mountpoint

    def setup(self, *options: str) -> None:
        """Make and mount it, with more options of mkfs.

        Raises SubjectUnavailable or SubjectFailed with a sentence.
        """
        backing.require_loop_devices()
        backing.require_program("mkfs.ext4", "install e2fsprogs")
        self.note = self._device.attach(direct_io=True)
        device = str(self._device.path)
        lazy = ["-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0"]
        backing.checked([*MKFS, *options, *lazy, device])
        self._mountpoint = backing.make_folder()
        backing.checked(["mount", "-t", "ext4", device, str(self._mountpoint)])

    def teardown(self) -> None:
        """Unmount, detach, remove the mountpoint."""
        try:
            if self._mountpoint is not None:
                backing.unmount(self._mountpoint)
                self._mountpoint.rmdir()
                self._mountpoint = None
        finally:
            self._device.detach()


class Ext4OnLoop:
    """ext4 on a loop device on ``below``, and one file in there."""

    def __init__(self, below: Path) -> None:
        self._ext4 = MountedExt4(below)

    @property
    def note(self) -> str:
        """What is to be known of the loop device."""
        return self._ext4.note

    def setup(self, size_bytes: int) -> fio.Target:
        """Make it on a file that holds ``size_bytes``; returns what fio shall work on, filled.

        Raises SubjectUnavailable or SubjectFailed with a sentence.
        """
        self._ext4.setup()
        target = fio.Target(self._ext4.mountpoint / FILE_NAME, size_bytes // PART, direct=True)
        backing.allocate(target.path, target.size_bytes)
        fio.prefill(target)
        return target

    def teardown(self) -> None:
        """Unmount, detach, remove the mountpoint."""
        self._ext4.teardown()
