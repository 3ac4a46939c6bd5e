"""Mounts of mode `fs` for long random tests: killed, mounted again, checked, made anew."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kit.commands import pmemfs, pmemfs_here, run_command
from kit.keys import add_key, encrypted
from kit.mounts import UNKEPT, Mounted, PoolMaker, may_pass
from kit.processes import end_process, is_running, wait_until
from pmemfs.mountinfo import mount_at


@dataclass
class FsMount:
    """A pool of mode `fs` on its mountpoint, which stays the same for as long as the test runs. It
    ends with each of its processes."""

    pools: PoolMaker
    size: str
    mounted: Mounted
    count: int = 0
    key: Path | None = None
    """What unlocks the directory of the files, if that is encrypted."""

    @classmethod
    @contextmanager
    def made(cls, pools: PoolMaker, size: str, *, is_encrypted: bool = False) -> Iterator[FsMount]:
        """A new pool, mounted."""
        made = cls(pools, size, mount_fs(pools, create_fs(pools, "fs0", size), *UNKEPT))
        if is_encrypted:
            made.encrypt()
        yield made

    @property
    def directory(self) -> Path:
        """Where the files are."""
        return self.mounted.mountpoint / "private" if self.key else self.mounted.mountpoint

    def encrypt(self) -> None:
        """Let the directory of the files be an encrypted one."""
        self.key = add_key(self.mounted)
        encrypted(self.mounted).chmod(0o777)

    def remount(self) -> None:
        """Unmount, which leaves a clean pool, and mount."""
        self.pools.umount(self.mounted)
        self.mount_again()

    def restart(self, how: str) -> None:
        """`remount`, `kill daemon` or `kill data plane`; mounted again in the end."""
        if how == "remount":
            self.remount()
            return
        {"kill daemon": self.kill_daemon, "kill data plane": self.kill_data_plane}[how]()
        self.mount_again()

    def kill_daemon(self) -> None:
        """kill -9 of the process that decides."""
        self._kill(self.mounted.pid)

    def kill_data_plane(self) -> None:
        """kill -9 of the process that moves the bytes; the daemon does so in the python engine."""
        native = self.pools.engine.name == "native"
        self._kill(self.mounted.data_plane_pid if native else self.mounted.pid)

    def _kill(self, pid: int) -> None:
        """Both processes end with either."""
        pids = {self.mounted.pid, pid}
        if self.pools.engine.name == "native":
            pids.add(self.mounted.data_plane_pid)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not any(map(is_running, pids)), f"the processes {pids} have ended")

    def mount_again(self) -> None:
        """Mount, over a dead mount if there is one."""
        self.mounted = mount_fs(self.pools, self.mounted.pool, *UNKEPT)
        if self.key:
            pmemfs_here("unlock", self.directory, "--key-file", self.key)

    def check(self) -> None:
        """Unmount and look for errors; `pmemfs check` must find none. Mounts again."""
        self.pools.umount(self.mounted)
        result = pmemfs("check", self.mounted.pool)
        assert result.code == 0, f"{result.out}\n{result.err}"
        self.mount_again()

    def renew(self) -> None:
        """Leave everything as it is after a failure and start with another pool."""
        if mount_at(str(self.mounted.mountpoint)) is not None:
            run_command("umount", "--lazy", self.mounted.mountpoint)
        self.count += 1
        old = self.mounted.pool
        for pid in self.pools._daemons():
            end_process(pid, seconds=2)
        old.unlink(missing_ok=True)
        self.mounted = mount_fs(self.pools, create_fs(self.pools, old.name, self.size), *UNKEPT)
        if self.key:
            self.encrypt()


def create_fs(pools: PoolMaker, name: str, size: str) -> Path:
    """A pool that has a file system."""
    return pools.create(name, size, "--mode", "fs")


def mount_fs(pools: PoolMaker, pool: Path, *options: str) -> Mounted:
    """Mount for all users."""
    may_pass(pools)
    return pools.mount(pool, "-o", "allow_other", *options)
