"""Processes of a cache's mount that die at any step, and who takes their place.

A `Mount` is what outlives them: the pool, the shared memory, the origin, and the pipe by which the
end of transfers is known. A daemon runs in a child process here, which kills itself at the n-th
call of what it changes things by. A data plane is a child with one worker, which is killed at any
instant. What a program may see afterwards is what `Model` says.
"""

from __future__ import annotations

import mmap
import os
import random
import signal
import socket
import struct
import traceback
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import trio

from kit.caches import opened_pool, punch, read, write
from kit.data_plane import ALL, MAX_WRITE, WRITE, write_in
from pmemfs.dataplane.native import Responder
from pmemfs.dataplane.tables import SharedMemory
from pmemfs.engine.caching import PublishedCache
from pmemfs.engine.native import SharedEngine
from pmemfs.engine.sharing import share_memmap, share_pool
from pmemfs.medium.mapped import MappedMedium
from pmemfs.origin.base import Left
from pmemfs.pool import Pool
from pmemfs.volume.cache.heads import StoredHead
from pmemfs.volume.cache.life import CacheLife, await_transfers
from pmemfs.volume.cache.tagcheck import check_cache
from pmemfs.volume.cache.volume import CacheVolume
from pmemfs.volume.onefile import INODE

BLOCK = 4096
_CALLS = {
    "medium": ("put", "flush", "fence", "store"),
    "memmap": ("get_pages", "put_pages"),
    "places": ("reserve", "publish", "release"),
    "origin": ("write", "flush", "read", "begin_reads", "write_zeroes"),
}
"""What a daemon changes things by."""


@dataclass
class Mount:
    """What outlives each process of a mount."""

    pool: Pool
    shared: SharedMemory
    origin: Path
    stored: dict[str, list[int]] = field(default_factory=dict)

    @property
    def medium(self) -> MappedMedium:
        """The pool's memory."""
        assert isinstance(self.pool.medium, MappedMedium)
        return self.pool.medium

    def keep(self, name: str, fds: Sequence[int], data: bytes) -> None:
        """As the keeper does."""
        self.forget(name)
        self.stored[name] = [os.dup(fd) for fd in fds]

    def forget(self, name: str) -> None:
        """Close what was kept."""
        for fd in self.stored.pop(name, []):
            os.close(fd)

    def daemon(self) -> Daemon:
        """A daemon over what there is."""
        self.pool = Pool.open(self.medium)
        return Daemon(self, SharedMemory(os.dup(self.shared.fd)))

    def worker(self, number: int = 0) -> Responder:
        """A worker of the data plane in this process."""
        return Responder(
            self.shared.fd, self.medium.fileno(), self.medium.map_flags, MAX_WRITE, number=number
        )

    def problems(self) -> list[str]:
        """What `pmemfs check` finds wrong."""
        found = check_cache(self.pool).problems
        return [f"{problem.what}: {problem.sentence}" for problem in found if problem.is_error]


@contextmanager
def a_mount(pool_path: Path, origin: Path, workers: int = 2) -> Iterator[Mount]:
    """A mount that has just begun."""
    with opened_pool(pool_path) as pool:
        count = StoredHead.open(pool).ground.set_count
        shared = share_pool(pool, worker_count=workers, cache_set_count=count)
        shared.set_header_word("answered", ALL)
        made = Mount(pool, shared, origin)
        try:
            yield made
        finally:
            for name in list(made.stored):
                made.forget(name)
            shared.close()


class Daemon:
    """The control plane of a mount, as far as it concerns the cache."""

    def __init__(self, mount: Mount, shared: SharedMemory) -> None:
        self.mount = mount
        self.shared = shared
        self.memmap = share_memmap(mount.pool, mount.medium, shared)
        self.engine = SharedEngine(mount.pool, mount.medium, self.memmap, shared)

    def open(self) -> CacheLife:
        """Make the volume, as `served` does."""
        published = PublishedCache(self.engine)
        volume = CacheVolume(
            self.mount.pool, self.memmap, onlookers=published, gate=published,
            locks=published.locks(), places=partial(published.places, self.mount.medium),
        )  # fmt: skip
        self.engine.holders.append(volume.renew)
        life = CacheLife(volume, self.mount.medium, is_degraded=False)
        life.keep = self.mount.keep
        return life

    def take_over(self, *, is_plane_alive: bool) -> CacheLife:
        """Take the place of a dead daemon; with a live data plane its workers stand still."""
        (transfers,) = self.mount.stored.get("transfers", [None])  # type: ignore[list-item]
        if transfers is not None:
            await_transfers(os.dup(transfers))
        if not is_plane_alive:
            self.shared.forget_workers()
        self.shared.forget_control()
        self.shared.free_control_locks()
        self.engine.renew()
        life = self.open()
        life.left = Left(self.mount.stored.get("origin", ()))
        return life


@asynccontextmanager
async def served(life: CacheLife) -> AsyncIterator[CacheVolume]:
    """Serve a cache, and leave it in order."""
    try:
        await life.begin()
        async with trio.open_nursery() as nursery:
            await nursery.start(life.serve)
            yield life.volume
            nursery.cancel_scope.cancel()
        await life.finish()
    finally:
        with trio.CancelScope(shield=True):
            await life.close()


# What a program does


class Step(NamedTuple):
    """One call of a program."""

    kind: str
    """`write`, `read`, `punch`, `fsync` or `flush`."""
    block: int = 0
    start: int = 0
    length: int = 0
    mark: bytes = b""

    @property
    def data(self) -> bytes:
        """What it writes."""
        return (self.mark * (self.length // len(self.mark) + 1))[: self.length]

    @property
    def offset(self) -> int:
        """Where it begins."""
        return self.block * BLOCK + self.start


def steps_of(seed: int, count: int, blocks: int) -> list[Step]:
    """Some calls, which miss, hit, evict, write back and discard."""
    chance = random.Random(seed)
    steps = []
    for number in range(count):
        kind = chance.choices(
            ("write", "read", "punch", "fsync", "flush"), (50, 30, 5, 5, 10)
        )[0]  # fmt: skip
        block, some = chance.randrange(blocks - 8), chance.randint(1, 8)
        if kind == "write" and chance.random() < 0.4:
            start = chance.randrange(1, 4000)
            steps.append(Step(kind, block, start, chance.randint(1, 3 * BLOCK), b"s%d-" % number))
        elif kind in ("write", "read"):
            steps.append(Step(kind, block, 0, some * BLOCK, b"S%d-" % number))
        elif kind == "punch":
            steps.append(Step(kind, block, 0, some * BLOCK))
        else:
            steps.append(Step(kind))
    return steps


async def do(volume: CacheVolume, step: Step) -> None:
    """Carry a step out."""
    if step.kind == "write":
        assert await write(volume, step.offset, step.data) == step.length
    elif step.kind == "read":
        await read(volume, step.offset, step.length)
    elif step.kind == "punch":
        await punch(volume, step.offset, step.length)
    elif step.kind == "fsync":
        if (waiting := volume.write_back(INODE)) is not None:
            await waiting
    else:
        await volume.write_backs.flush()


class Model:
    """What each block may read as."""

    def __init__(self, origin: bytes) -> None:
        self.content = bytearray(origin)
        self.before = bytes(origin)
        """Before the step that was under way."""

    def carry_out(self, steps: Sequence[Step]) -> None:
        """Some steps, of which the last may not have been answered."""
        for step in steps:
            self.before = bytes(self.content)
            if step.kind == "write":
                self.content[step.offset : step.offset + step.length] = step.data
            elif step.kind == "punch":
                self.content[step.offset : step.offset + step.length] = bytes(step.length)

    def settle(self, found: bytes, *, was_answered: bool) -> None:
        """Take over what was found, block by block: it must be as after the last step, or, if that
        was not answered, as before it."""
        assert len(found) == len(self.content)
        for at in range(0, len(found), BLOCK):
            part = found[at : at + BLOCK]
            is_new = part == self.content[at : at + BLOCK]
            assert is_new or (not was_answered and part == self.before[at : at + BLOCK]), (
                f"block {at // BLOCK} is neither old nor new"
            )
        self.content[:] = found


# Death


class Fuse:
    """Kills this process when it has burnt down."""

    def __init__(self, length: int) -> None:
        self.length = length

    def burn(self) -> None:
        """One call."""
        self.length -= 1
        if not self.length:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, one: Any, name: str) -> Callable[..., Any]:
        """A method of an object, before and after which it burns."""
        method = getattr(one, name)

        @wraps(method)
        def call(*words: Any, **named: Any) -> Any:
            self.burn()
            result = method(*words, **named)
            self.burn()
            return result

        return call


class Burning:
    """An object some of whose methods burn a fuse."""

    def __init__(self, one: Any, fuse: Fuse, names: Sequence[str]) -> None:
        self._one = one
        for name in names:
            setattr(self, name, fuse.around(one, name))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._one, name)


def set_fire(life: CacheLife, fuse: Fuse) -> None:
    """Let everything burn by which a daemon changes things."""
    volume = life.volume
    burning = ((volume._medium, "medium"), (volume.index._memmap, "memmap"),
               (volume.origin_link.origin, "origin"))  # fmt: skip
    for one, kind in burning:
        for name in _CALLS[kind]:
            setattr(one, name, fuse.around(one, name))
    assert volume.quick is not None
    places: Any = Burning(volume.quick._places, fuse, _CALLS["places"])
    volume.quick._places = places


@dataclass
class Lived:
    """What a daemon has done before it died."""

    begun: int
    ended: int
    was_killed: bool


def live(
    mount: Mount, steps: Sequence[Step], fuse_length: int, *, takes_over: bool = False
) -> Lived:  # fmt: skip
    """Let a daemon in a child process carry out steps, until it has done all or dies.

    With `takes_over` another one has died before it, and the fuse burns from the beginning.
    """
    progress = mmap.mmap(-1, mmap.PAGESIZE)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = os.fork()
    if not child:
        _in_child(partial(_serve, mount, steps, Fuse(fuse_length), progress, theirs, takes_over))
    theirs.close()
    _, status = os.waitpid(child, 0)
    with ours:
        while (kept := socket.recv_fds(ours, 64, 4))[0]:
            mount.forget(kept[0].decode())
            mount.stored[kept[0].decode()] = list(kept[1])
    begun, ended = struct.unpack_from("<QQ", progress)
    was_killed = os.WIFSIGNALED(status)
    assert was_killed or os.WEXITSTATUS(status) == 0
    return Lived(begun, ended, was_killed)


def _in_child(work: Callable[[], object]) -> NoReturn:
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _serve(
    mount: Mount, steps: Sequence[Step], fuse: Fuse, progress: mmap.mmap,
    keeper: socket.socket, takes_over: bool,
) -> None:  # fmt: skip
    def keep(name: str, fds: Sequence[int], data: bytes) -> None:
        socket.send_fds(keeper, [name.encode()], fds)

    daemon = mount.daemon()
    if takes_over:
        for name in _CALLS["medium"]:
            setattr(mount.medium, name, fuse.around(mount.medium, name))
    life = daemon.take_over(is_plane_alive=True) if takes_over else daemon.open()
    life.keep = keep

    async def carry_out() -> None:
        await life.begin()
        async with trio.open_nursery() as nursery:
            await nursery.start(life.serve)
            while life.volume.origin_link.origin is None:  # noqa: ASYNC110
                await trio.sleep(0.001)
            if not takes_over:
                set_fire(life, fuse)
            for number, step in enumerate(steps):
                struct.pack_into("<Q", progress, 0, number + 1)
                await do(life.volume, step)
                struct.pack_into("<Q", progress, 8, number + 1)
            os._exit(0)

    trio.run(carry_out)


# The data plane


def write_always(mount: Mount, writes: Sequence[tuple[int, bytes]]) -> int:
    """Let a worker in a child process carry out these writes again and again; its pid."""
    child = os.fork()
    if not child:
        _in_child(partial(_write, mount, writes))
    return child


def _write(mount: Mount, writes: Sequence[tuple[int, bytes]]) -> None:
    worker = mount.worker()
    operations = [write_in(offset, len(data)) for offset, data in writes]
    while True:
        worker.answer_series(operations, opcode=WRITE, inode=INODE,
                             payloads=[data for _, data in writes], turns=1)  # fmt: skip


def kill(child: int) -> None:
    """Kill such a process, and wait for its end."""
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
