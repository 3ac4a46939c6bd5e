"""What a mount serves, depending on its mode: a volume, its engine, its handlers.

A session makes the mount and the planes. Of what it serves it knows only this.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from pmemfs.clock import AccessTimes
from pmemfs.dataplane.held import OpenPlaces
from pmemfs.engine.base import Engine
from pmemfs.engine.native import PublishedDevice, SharedEngine, page_locks
from pmemfs.engine.trimming import Trimmer
from pmemfs.errors import NoPageStructures
from pmemfs.fuse.handlers.handlers import Handlers
from pmemfs.fuse.once import Once
from pmemfs.fuse.published import PublishedTables, Publisher
from pmemfs.fuse.sharednames import SharedNames
from pmemfs.media.label import Mode
from pmemfs.medium.base import Durability
from pmemfs.medium.mapped import MappedMedium
from pmemfs.medium.source import alignment_of
from pmemfs.memmap import Memmap
from pmemfs.mount.options import MountOptions
from pmemfs.pool import Pool
from pmemfs.transform.keyring import Keyring
from pmemfs.transform.secrets import SLOT_COUNT, create_secrets
from pmemfs.volume.base import Volume
from pmemfs.volume.block import BlockVolume, DeviceOnlookers
from pmemfs.volume.coming import Bring
from pmemfs.volume.fs.commits import Commits
from pmemfs.volume.fs.encryptedio import Cipher
from pmemfs.volume.fs.filesystem import FileSystem
from pmemfs.volume.fs.publication import NoTables
from pmemfs.volume.fs.sealing import Sealing

if TYPE_CHECKING:
    from pmemfs.volume.cache.life import CacheLife
    from pmemfs.volume.cache.volume import CacheVolume


class Keys:
    """The secret memory of a mount, which is made for its first key.

    A machine on which any process has secret memory can't hibernate, so other mounts have none.
    """

    def __init__(self, fd: int = -1) -> None:
        """`fd` is what an earlier daemon of this mount has left."""
        self._fd = fd

    @property
    def may_be_there(self) -> bool:
        """Whether there may be keys."""
        return self._fd >= 0

    def fd(self) -> int:
        """The memory. Raises OSError if it has to be made, and can't be."""
        if self._fd < 0:
            self._fd = create_secrets()
        return self._fd

    def close(self) -> None:
        """Let go of the memory, if there is any."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@dataclass(frozen=True)
class Served:
    """What one mount serves."""

    volume: Volume
    engine: Engine
    trimmer: Trimmer
    handlers: Handlers
    tables: PublishedTables | None = None
    """What a data plane is shown of files, where there are both."""
    bring: Bring | None = None
    """Brings blocks of a cache, so that a data plane finds them."""
    names: SharedNames | None = None
    """What lets workers of a data plane change names."""
    keyring: Keyring | None = None
    """The keys of a file system that are unlocked."""
    life: CacheLife | None = None
    """What has to be awaited before, while and after a cache is served."""

    @property
    def fs(self) -> FileSystem | None:
        """The volume of mode `fs`; None in the others."""
        return self.volume if isinstance(self.volume, FileSystem) else None

    @property
    def cache(self) -> CacheVolume | None:
        """The volume of mode `cache`; None in the others."""
        return self.life.volume if self.life else None

    def obey(self, options: MountOptions) -> None:
        """Note accesses and write through as options say that may change while it is served."""
        self.engine.note_options(options.as_text())
        # Of each write the kernel says whether it is to be durable; pyfuse3 does not show that.
        self.handlers.files.is_synchronous = "sync" in options.kernel
        fs = self.fs
        if fs is not None:
            fs.frames.packed.cold_seconds = options.cold_seconds
            if self.names:
                self.names.set_memory(options.names_memory)
                self.names.set_hang_timeout(options.hang_timeout)
                self.names.note_directories(not options.nodiratime)
            fs.note_accesses(options.access_times, of_directories=not options.nodiratime)
            self.note_no_reads() if fs.read_only else self._note_reads(options.access_times)

    def note_no_reads(self) -> None:
        """Have a data plane store nothing when files are read."""
        self._note_reads(AccessTimes.NEVER)

    def _note_reads(self, access_times: AccessTimes) -> None:
        if self.tables:
            self.tables.note_reads(access_times)


def serve_pool(
    pool: Pool, medium: MappedMedium, memmap: Memmap, engine: Engine, options: MountOptions,
    commits: Commits | None = None, keys: Keys | None = None,
) -> Served:  # fmt: skip
    """What a pool serves through an engine. If the engine has a data plane, that is shown what it
    may answer. `commits` is told what carries operations out. Raises PmemfsError."""
    if pool.label.mode == Mode.FS:
        served = _files(pool, medium, memmap, engine, options, commits, keys)
    else:
        serve = {Mode.BLOCK: _device, Mode.CACHE: _cache}[Mode(pool.label.mode)]
        served = serve(pool, medium, memmap, engine, options)
    served.obey(options)
    return served


def _device(
    pool: Pool, medium: MappedMedium, memmap: Memmap, engine: Engine, options: MountOptions
) -> Served:
    onlookers = (
        PublishedDevice(engine, medium) if isinstance(engine, SharedEngine) else DeviceOnlookers()
    )
    volume = BlockVolume(
        pool, memmap, uid=options.uid, gid=options.gid, mode=options.mode,
        onlookers=onlookers,
    )  # fmt: skip
    trimmer = Trimmer(pool, medium, engine, None)
    return Served(volume, engine, trimmer, Handlers(volume, engine, trimmer, opens=_opens(engine)))


def _cache(
    pool: Pool, medium: MappedMedium, memmap: Memmap, engine: Engine, options: MountOptions
) -> Served:
    if not memmap.has_pages:
        raise NoPageStructures(what="mode cache")
    # Imported here, because the other modes do without it.
    from pmemfs.engine.caching import PublishedCache
    from pmemfs.volume.cache.life import CacheLife
    from pmemfs.volume.cache.volume import CacheVolume

    published = PublishedCache(engine) if isinstance(engine, SharedEngine) else None
    # Where fences are msync, no worker changes a tag, and locks are held while a thread fences.
    has_locks = published is not None and medium.durability is not Durability.MSYNC
    volume = CacheVolume(
        pool, memmap, uid=options.uid, gid=options.gid, mode=options.mode, onlookers=published,
        locks=published.locks() if published and has_locks else None, gate=published,
        places=partial(published.places, medium) if published and has_locks else None,
    )  # fmt: skip
    if isinstance(engine, SharedEngine):
        engine.holders.append(volume.renew)
    trimmer = Trimmer(pool, medium, engine, None)
    handlers = Handlers(volume, engine, trimmer, opens=_opens(engine))
    life = CacheLife(volume, medium, is_degraded=options.degraded)
    bring = None
    if published and volume.quick is not None:
        published.allow_misses()
        bring = volume.bring
    return Served(volume, engine, trimmer, handlers, bring=bring, life=life)


def _files(
    pool: Pool, medium: MappedMedium, memmap: Memmap, engine: Engine, options: MountOptions,
    commits: Commits | None, keys: Keys | None,
) -> Served:  # fmt: skip
    tables = PublishedTables(engine.shared) if isinstance(engine, SharedEngine) else None
    keyring = (
        Keyring(keys.fd, tables or NoTables(), may_have_keys=keys.may_be_there) if keys else None
    )
    holds = engine.shared.lookup_counts if isinstance(engine, SharedEngine) else None
    sealing = _sealing(keys, keyring, medium, engine)
    fs = FileSystem(pool, memmap, tables, holds, commits, sealing)
    if isinstance(engine, SharedEngine):
        share_damage(fs, engine)
    trimmer = Trimmer(pool, medium, engine, fs)
    names = _names(fs, medium, engine, options, commits)
    handlers = Handlers(
        fs, engine, trimmer, publisher=Publisher(fs, tables) if tables else None,
        published=tables.attributes if tables else None, cached=options.cached,
        opens=names.open_places() if names else _opens(engine),
    )  # fmt: skip
    if names:
        handlers.directories.names_after = names.names_after
        trimmer.gather.insert(0, names.free_orphans)
        trimmer.removal_counts.append(names.count_removals)
    return Served(fs, engine, trimmer, handlers, tables, names=names, keyring=keyring)


def _names(
    fs: FileSystem, medium: MappedMedium, engine: Engine, options: MountOptions,
    commits: Commits | None,
) -> SharedNames | None:  # fmt: skip
    """What lets workers change names; None where they don't."""
    # No worker may wait for an msync while it has the lock. What the kernel caches needs answers
    # that only the handlers give.
    is_left_to_daemon = medium.read_only or medium.durability is Durability.MSYNC or options.cached
    if not isinstance(engine, SharedEngine) or not isinstance(commits, Once) or is_left_to_daemon:
        return None
    shared = engine.shared
    assert shared.names is not None
    names = SharedNames(shared, shared.names, fs, commits.answers)
    names.set_unit(alignment_of(medium.source))
    return names


def _sealing(
    keys: Keys | None, keyring: Keyring | None, medium: MappedMedium, engine: Engine
) -> Sealing | None:
    """What encrypts and decrypts for a file system."""
    if keys is None or keyring is None:
        return None
    if not isinstance(engine, SharedEngine):
        return Sealing(keyring, lambda: _reference(keys.fd()))
    # Nothing is stored into a pool that is read-only, so nobody has to be kept from it.
    return Sealing(keyring, locks=None if medium.read_only else page_locks(engine.shared, medium))


def _reference(fd: int) -> Cipher:
    # Imported here, because it takes long to load, and most mounts have no encrypted file.
    from pmemfs.transform.reference import ReferenceCipher

    return ReferenceCipher(fd, SLOT_COUNT)


def share_damage(fs: FileSystem, engine: SharedEngine) -> None:
    """What one daemon of a mount has found damaged, the next one must not write to either."""
    if engine.is_damaged:
        fs.store.become_read_only("damage was met before the daemon of this mount died")
    fs.store.ground.when_damaged = engine.note_damage
    if fs.damage:
        engine.note_damage()


def _opens(engine: Engine) -> OpenPlaces | None:
    """The places of open files in the shared memory, which outlives this process; None without."""
    return OpenPlaces(engine.shared.opens) if isinstance(engine, SharedEngine) else None
