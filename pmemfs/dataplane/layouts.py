"""What lies in the memory that the two planes share: one memfd, declared here and nowhere else.

    header | options of the mount | kept attributes | worker slots | faults | inodes | attributes
    | presence | stretches | extent tables | open files | lookup counts | answers | locks of sets
    | groups of sets | locks of encrypted pages | names | page structures

`structures.pxd`, for the native code, is generated from these lists and from `media/page.py`.
Invariants: all numbers are little-endian and aligned to their size, so a number of up to eight
bytes is read and written whole. Words that two threads write lie in different cache lines, so that
no worker slows down another.
"""

from __future__ import annotations

import enum
import zlib
from functools import lru_cache
from typing import NamedTuple

from pmemfs.media.inode import SLOT_BYTES as INODE_SLOT_BYTES
from pmemfs.media.layout import Layout, stored, structure
from pmemfs.pfn import FRAME_BYTES, PAGE_STRUCTURE_BYTES
from pmemfs.units import MIB, align_up

CHUNK_SHIFT = 21
"""Presence is kept for chunks of 2 MiB of the pool."""
STRETCH_SHIFT = 10
"""Scheme `pmem` gets memory for 1024 page structures at a time."""
SECTION_SHIFT = 15
"""Scheme `on-demand` makes and drops 32768 page structures at a time: 128 MiB in 4 KiB pages."""
FRAME_OF_STRUCTURES_SHIFT = 6
"""64 page structures fill 4 KiB, the smallest piece of memory that can be given back."""
LATENCY_BUCKETS = 120
"""Four for each power of two of ns. The first holds all below 128 ns, the last all above."""
FAULT_RECORDS = 256
INODE_ENTRIES = 8192
INODE_WAYS = 4
"""Entries of a bucket. An inode has its entry in one of two buckets, or has no entry."""
INODE_BUCKETS_SHIFT = 11
INODE_HASH = 0x9E37_79B9_7F4A_7C15
"""2^64 by the golden ratio, odd. Source: Knuth, TAOCP vol. 3, 6.4: multiplicative hashing."""
EXTENT_ARENA_BYTES = 16 * MIB
ATTRIBUTES_SHIFT = 10
"""Each of 1024 places can hold the attributes of one inode."""
OPEN_PLACES_SHIFT = 20
"""A million open files and directories. The first place says how many others were ever used."""
ANSWERS_SHIFT = 12
"""The last 4096 answers of the control plane are kept."""
MOUNT_WORDS_LIMIT = 4096
"""The bytes of the options of a mount: the kernel takes no more of them either."""
KEPT_INODES = 8
"""Attributes can be kept for inodes below this number: mode `block` has two inodes."""
COUNT_BYTES = 8
"""The bytes of one inode's lookup count."""
CACHE_LOCKS_SHIFT = 13
"""Sets of a cache whose numbers are the same modulo 8192 share a lock."""
CACHE_LOCK_BYTES = 8
PAGE_LOCKS_SHIFT = 13
"""Encrypted pages whose frames' numbers are the same modulo 8192 share a lock."""
REDO_LOCKS_SHIFT = 8
"""So do the redo records of files, by the numbers of the files' live lines modulo 256."""
CONTROL_HOLDER = 1 << 32
"""What the control plane writes into a lock that it takes; worker n writes 1 + n."""
HOLD_NOTES_SHIFT = 13
"""So many holds of one request are noted. A listing with attributes of 1 MiB has fewer entries."""
LISTINGS_BYTES = 8 << 20
"""The latest answers that are longer than a record are kept, so many bytes of them."""
MISSES_OPCODE = 0x7FFF_FFFF
"""In the head of a message of `Miss` records. No operation of the kernel's protocol has it."""
HOT_OPCODE = 0x7FFF_FFFE
"""The same for `Hot` records. Nobody replies to them."""
PIECE_ID_SHIFT = 1
PIECE_BYTES_SHIFT = 8
PIECE_CHECKSUM_SHIFT = 32
"""Where the flags of an extent that is a piece have its compression, its length and its
checksum."""
SERVE_AGAIN = 1
"""In place of an error, which is never above 0: the blocks of these reads were brought."""
HAND_AGAIN = 2
"""In place of an error, too: the control plane is a new one, and knows nothing of what its
predecessor was handed and has not answered."""
NAMES_OPCODE = 0x7FFF_FFFE
"""In the head of a message without a body, to which no reply is due: a worker has used up most of a
reserve, or has left work (orphans)."""
NAMES_CHANGES_SHIFT = 12
"""The numbers of the last 4096 inodes that workers have changed are kept."""
NAMES_STACK_SHIFT = 12
"""A stack has room for 4096 slots, frames, handles or orphans."""
NAMES_VERSIONS_SHIFT = 10
"""Inodes whose numbers are the same modulo 1024 share a version of their logs."""
NAMES_POPPED = 16
"""The most frames that one operation takes from the reserve."""
HAVE_SECRETS = 3
"""In place of an error, too: the message has the descriptor of secret memory with it."""

_WORD = (1 << 64) - 1


class Operation(enum.IntEnum):
    """The kinds of requests that are counted apart."""

    READ = 0
    WRITE = 1
    FSYNC = 2
    SEEK = 3
    TRIM = 4
    OTHER = 5


class MemmapPlace(enum.IntEnum):
    """Where page structures lie."""

    NOWHERE = 0
    POOL = 1
    SHARED = 2


class Presence(enum.IntEnum):
    """Whether a chunk of the pool has memory behind each of its bytes."""

    DEFAULT = 0
    """What `reserved` in the header says, because nobody has looked at this chunk."""
    WHOLE = 1
    HOLEY = 2
    WRITTEN = 3
    """It had holes when last looked at, and was written to since: it may have become whole."""


class SectionState(enum.IntEnum):
    """A section of page structures of the scheme `on-demand`, or a stretch of the scheme `pmem`."""

    ABSENT = 0
    LIVE = 1
    DROPPING = 2
    """The control plane wants to drop it, but a worker that touches it makes it LIVE again."""
    GOING = 3
    """Its memory is being given back: wait until it is ABSENT."""


class HandedTo(enum.IntEnum):
    """Who replies to a request that is pending in an entry of a ring."""

    CONTROL = 1
    """The control plane, which was sent the request."""
    MISSES = 2
    """The control plane, which was told what is to be read; see `Miss`."""
    SYNC = 3
    """The thread that syncs."""


class ExtentFlags(enum.IntFlag):
    """What an extent of a table is, other than a run of plain bytes."""

    FORWARDED = 1
    """Data that only the control plane can read or change, as compressed pieces are."""


class HandleKind(enum.IntEnum):
    """What kind of object a handle stands for."""

    FILE = 1
    DIRECTORY = 2


@structure
class Header:
    """What both planes must know, and a process that takes the place of one of them.

    Most of it is constant. The last lines change all the time. What a growing pool changes
    (memmap_offset, page_count, pool_bytes) changes while workers are paused or before anything in
    the new part is published. The generation changes while workers are paused, or while there is no
    data plane. What the mount and its INIT say is stored once. A remount may change read_only and
    access_times at any time.
    """

    signature: int = stored("<u8", "of these declarations; see `SIGNATURE`")
    worker_count: int = stored("<u8", "slots that exist")
    slots_offset: int = stored("<u8", "of the worker slots", unit="bytes")
    faults_offset: int = stored("<u8", "of the fault records", unit="bytes")
    inodes_offset: int = stored("<u8", "of the inode entries", unit="bytes")
    presence_offset: int = stored("<u8", "of the presence bytes, one a chunk", unit="bytes")
    sections_offset: int = stored("<u8", "of the states of sections or stretches", unit="bytes")
    memmap_place: int = stored("<u8", "0 no page structures, 1 in the pool, 2 in this memory")
    memmap_offset: int = stored("<u8", "of the page structures, in pool or memory", unit="bytes")
    page_order: int = stored("<u8", "a page is 2^order frames")
    page_count: int = stored("<u8", "pages that have a structure")
    first_pfn: int = stored("<u8", "of the first page")
    generation: int = stored("<u8", "of page structures that count")
    pool_bytes: int = stored("<u8", "size of the pool", unit="bytes")
    durability: int = stored("<u8", "0 volatile, 1 cache lines, 2 msync")
    reserved: int = stored("<u8", "1: all of the pool had memory when it was opened")
    read_only: int = stored("<u8", "1: writes are refused")
    section_shift: int = stored("<u8", "structures in a section or stretch, as a power of two")
    has_files: int = stored("<u8", "1: mode fs; what is not published may be any file")
    reach_bytes: int = stored(
        "<u8", "how large the pool may grow; it is mapped so far", unit="bytes"
    )
    attributes_offset: int = stored("<u8", "of the published attributes", unit="bytes")
    access_times: int = stored("<u8", "of files: 0 never noted, 1 as with relatime, 2 always")
    answered: int = stored("<u8", "bit n: the control plane answers opcode n of the protocol")
    opens_offset: int = stored("<u8", "of the open files", unit="bytes")
    counts_offset: int = stored("<u8", "of the lookup counts", unit="bytes")
    inode_numbers: int = stored("<u8", "all inodes below it have a lookup count")
    queue_count: int = stored("<u8", "rings; 0: the transport fd")
    depth: int = stored("<u8", "entries of a ring")
    reader_count: int = stored("<u8", "workers after those of rings, which read /dev/fuse")
    device: int = stored("<u8", "number of the mount's device, as st_dev has it; 0: not mounted")
    minor: int = stored("<u8", "version of the protocol, agreed on by INIT; 0: not yet")
    flags: int = stored("<u8", "agreed on by INIT")
    max_write: int = stored("<u8", "agreed on by INIT", unit="bytes")
    max_readahead: int = stored("<u8", "agreed on by INIT", unit="bytes")
    max_background: int = stored("<u8", "agreed on by INIT")
    cache_set_count: int = stored("<u8", "sets of a cache; 0: another mode", unit="sets")
    cache_locks_offset: int = stored("<u8", "of the locks of sets, here", unit="bytes")
    cache_groups_offset: int = stored(
        "<u8", "of a byte a group, here; 1: its sets may get dirty blocks", unit="bytes"
    )
    cache_tags_offset: int = stored("<u8", "of the tags in the pool", unit="bytes")
    cache_blocks_offset: int = stored("<u8", "of the first place in the pool", unit="bytes")
    cache_seed: int = stored("<u8", "mixed into the choice of sets and into check bits")
    cache_block_shift: int = stored("<u8", "a block is 2^cache_block_shift bytes")
    cache_writes: int = stored("<u8", "1: the data plane may answer writes to a cache")
    cache_fsyncs: int = stored("<u8", "1: it may answer an fsync of a cache")
    cache_misses: int = stored(
        "<u8", "1: the control plane brings blocks that are not there, many with one message"
    )
    mount_identity: int = stored("<u8", "random, so it tells this mount from all others")
    greeted: int = stored("<u8", "1: the kernel has the answer to its INIT")
    entries_address: int = stored(
        "<u8", "where every data plane maps the memory of rings; 0: no data plane has yet"
    )
    write_epoch: int = stored("<u8", "the epoch of what is written now", default=1)
    persisted_epoch: int = stored("<u8", "all that was written in it or before is durable")
    lost_errno: int = stored("<u8", "of the first write-back that failed; 0: none")
    fault_count: int = stored("<u8", "faults since the mount; the latest are in the records")
    ends: int = stored("<u8", "1: workers end as soon as they notice")
    ended: int = stored(
        "<u8", "1 + errno that the data plane ended with by itself; 0: it runs, or was killed"
    )
    damaged: int = stored("<u8", "1: the control plane has met damage, and writes nothing any more")
    page_locks_offset: int = stored("<u8", "of the locks of encrypted pages, here", unit="bytes")
    replied: int = stored("<u8", "replies of the control plane that went through no worker")
    plane_deaths: int = stored("<u8", "data planes of this mount that died")
    plane_died_ns: int = stored("<u8", "when the last one did", unit="ns since 1970")
    daemon_deaths: int = stored("<u8", "daemons of this mount that died")
    daemon_died_ns: int = stored("<u8", "when the last one did", unit="ns since 1970")
    keeper_deaths: int = stored("<u8", "keepers of this mount that died")
    keeper_died_ns: int = stored("<u8", "when the last one did", unit="ns since 1970")
    dead_plane: int = stored("<u8", "pid of the data plane whose death was counted last")
    names_offset: int = stored(
        "<u8", "of what is shared about names, here; 0: another mode", unit="bytes"
    )
    rest: bytes = stored("V56", "zero", default=bytes(56))


@structure
class MountWords:
    """The options that the user asked for."""

    options: str = stored("S4096", "as `mount -o` has them, UTF-8, NUL-filled", default="")


@structure
class KeptAttributes:
    """What was set of an inode of mode `block`, which lasts as long as the mount."""

    inode: int = stored("<u8", "number of the inode; 0: nothing is set")
    mode: int = stored("<u4", "type and permissions")
    uid: int = stored("<u4", "owner")
    gid: int = stored("<u4", "group")
    unused: int = stored("<u4", "zero")
    atime_ns: int = stored("<i8", "last access", unit="ns since 1970")
    mtime_ns: int = stored("<i8", "last modification", unit="ns since 1970")
    ctime_ns: int = stored("<i8", "last change", unit="ns since 1970")
    rest: int = stored("V16", "zero", default=bytes(16))


@structure
class SlotHead:
    """The head of a slot, which only its worker writes, except `paused`; counters follow."""

    section: int = stored("<u8", "odd while a request is served: what it reads must stay")
    sleeps: int = stored("<u8", "times that the worker slept for want of requests")
    spins: int = stored("<u8", "times that waiting awake found a request")
    thread_id: int = stored("<u8", "of the worker, as the system counts; 0: not running")
    paused: int = stored("<u8", "1: begin no section; written by the control plane")
    handed_over: int = stored("<u8", "requests that it handed to the control plane for a reply")
    replied: int = stored("<u8", "replies of the control plane that the worker has passed on")
    busy: int = stored("<u8", "0: it sleeps, and has no request that it was given by /dev/fuse")


@structure
class OperationCounts:
    """Counters of one operation in one slot; buckets of latencies follow."""

    answered: int = stored("<u8", "requests that this worker answered")
    forwarded: int = stored("<u8", "requests that it handed to the control plane")
    failed: int = stored("<u8", "answered with an error")
    moved_bytes: int = stored("<u8", "read or written", unit="bytes")
    total_ns: int = stored("<u8", "time from taking requests to answering them", unit="ns")
    unused: int = stored("V24", "zero", default=bytes(24))


@structure
class CacheCounts:
    """What a worker has done to a cache, in blocks; behind all operations in its slot."""

    read_hits: int = stored("<u8", "read where they lie", unit="blocks")
    write_hits: int = stored("<u8", "written that were there", unit="blocks")
    inserted: int = stored("<u8", "written that were not there", unit="blocks")
    evicted: int = stored("<u8", "clean, gone to make room", unit="blocks")
    dirtied: int = stored("<u8", "dirty now, and were clean or not there", unit="blocks")
    unused: int = stored("V24", "zero", default=bytes(24))


@structure
class InodeEntry:
    """An inode whose extents are published. An entry with `inode` 0 is free, or soon will be."""

    inode: int = stored("<u8", "number of the inode; 0: free")
    table: int = stored("<u8", "offset of its extent table here; 0: not published", unit="bytes")
    last_write_ns: int = stored(
        "<u8", "of the data plane, to a device; 0: none yet", unit="ns since 1970"
    )
    changed_ns: int = stored(
        "<u8", "of a file, the last change that its log has", unit="ns since 1970"
    )
    unused: int = stored("V32", "zero", default=bytes(32))


@structure
class AttributesEntry:
    """The answer to GETATTR of an inode, until something in it changes; see `tables`."""

    sequence: int = stored("<u8", "odd while the rest is being written")
    inode: int = stored("<u8", "number of the inode; 0: none")
    answer: bytes = stored("V104", "struct fuse_attr_out", default=bytes(104))
    unused: int = stored("V8", "zero", default=bytes(8))


@structure
class OpenPlace:
    """A place for an open file or directory. Only the control plane writes and reads it."""

    handle: int = stored("<u8", "the kernel's word for it; of a free place, its last one")
    flags: int = stored("<u4", "of open(2)")
    kind: int = stored("<u4", "1 a file, 2 a directory")
    uid: int = stored("<u4", "of the process that opened it")
    gid: int = stored("<u4", "of the process that opened it")
    pid: int = stored("<u4", "of that process, in the daemon's PID namespace; 0: not there")
    unused: int = stored("<u4", "zero")
    number: int = stored("<u8", "of the request that opened or closes it, without bit 63")
    inode: int = stored("<u8", "number of the inode; 0: free. Stored last, cleared first")
    owner: int = stored("<u8", "0 the control plane, 1 a worker: see names.pxd")
    rest: int = stored("V8", "zero", default=bytes(8))


@structure
class Decision:
    """The word in the pool that says whether a request was carried out which has no answer yet.
    Only the control plane writes and reads it; see `answers`."""

    number: int = stored("<u8", "of the request; 0: no request is in doubt. Stored last")
    opcode: int = stored("<u8", "of the request")
    offset: int = stored("<u8", "of the word in the pool", unit="bytes")
    value: int = stored("<u8", "that the word has once the request is carried out")
    rest: int = stored("V32", "zero", default=bytes(32))


@structure
class AnswerRecord:
    """What became of a request that must not be carried out twice. Only the control plane writes
    and reads it; see `answers`."""

    number: int = stored("<u8", "of the request; 0: no record. Stored last, cleared first")
    sequence: int = stored("<u8", "the newest record has the highest")
    state: int = stored("<u4", "1 answered, 2 carried out")
    error: int = stored("<u4", "errno that is answered; 0: none")
    opcode: int = stored("<u4", "of the request")
    length: int = stored("<u4", "of the answer", unit="bytes")
    offset: int = stored("<u8", "of the word that decided; 0: answered", unit="bytes")
    answer: bytes = stored("V152", "what follows the head of the reply", default=bytes(152))


@structure
class TableHead:
    """The head of an extent table, which never changes once it is published; extents follow."""

    size_bytes: int = stored("<u8", "of a device; of a file, when published", unit="bytes")
    limit_bytes: int = stored("<u8", "the table knows nothing beyond it", unit="bytes")
    live_offset: int = stored("<u8", "of the live line in the pool; 0: a device", unit="bytes")
    extent_count: int = stored("<u4", "extents that follow, by ascending index, disjoint")
    key_slot: int = stored("<u4", "1 + the slot of the file's key in secret memory; 0: plain")


@structure
class Extent:
    """A run of frames of a file. What no extent covers is a hole.

    A forwarded extent has data but no run: workers forward each WRITE that touches it. They forward
    each READ, too, unless it is a compressed piece that they can decompress.
    """

    index: int = stored("<u8", "of the first frame in the file", unit="frames")
    pfn: int = stored("<u8", "of the first frame in the pool; 0 in a forwarded extent that "
                      "is no piece")  # fmt: skip
    frame_count: int = stored("<u8", "frames", unit="frames")
    flags: int = stored("<u8", "bit 0: forwarded; of a piece, too: bits 1 to 7 its compression, "
                        "8 to 31 its stored bytes, 32 to 63 their checksum")  # fmt: skip


@structure
class FaultRecord:
    """Memory that could not be touched, and what that has cost."""

    pool_offset: int = stored("<u8", "of the address that faulted", unit="bytes")
    inode: int = stored("<u8", "of the request")
    error: int = stored("<u8", "errno that the request was answered with")
    time_ns: int = stored("<u8", "when", unit="ns since 1970")


@structure
class Miss:
    """A read of blocks that are not there, in a message of many from a worker."""

    unique: int = stored("<u8", "number of the request")
    offset_bytes: int = stored("<u8", "where the read begins", unit="bytes")
    length_bytes: int = stored("<u4", "of the read", unit="bytes")
    pid: int = stored("<u4", "of the caller")


@structure
class HoldNotesHead:
    """The request that raises holds now. A word for each of these inodes follows, and the count
    that it had."""

    number: int = stored("<u8", "of the request; 0: none")
    count: int = stored("<u8", "notes that follow")
    rest: bytes = stored("V48", "zero", default=bytes(48))


@structure
class HoldNote:
    """An inode that a request holds once more, which no caller was told of yet."""

    inode: int = stored("<u8", "number of the inode")
    before: int = stored("<u8", "how often it was held before")


@structure
class Hot:
    """A piece that a worker has found hot, in a message of many."""

    inode: int = stored("<u8", "its number")
    index: int = stored("<u8", "of the first frame of the piece in the file", unit="frames")


@structure
class PageLock:
    """A lock of encrypted pages, and the sequence by which readers do without it; see crypt.pxi."""

    holder: int = stored("<u8", "0: free; as of the locks of a cache's sets")
    sequence: int = stored("<u8", "odd while a page is being stored")


@structure
class RedoLock:
    """A lock of the redo records of files; see crypt.pxi."""

    holder: int = stored("<u8", "0: free; as of the locks of a cache's sets")
    live_offset: int = stored("<u8", "in the pool, of the line that its holder uses", unit="bytes")


@structure
class NamesHead:
    """What both planes know of names; see names.pxd. Stacks, changes, versions and decisions
    follow."""

    holder: int = stored("<u8", "of the lock of names; 0: free; as of the locks of a cache's sets")
    seed_0: int = stored("<u8", "mixed into the hashes of names, so it is secret; 0: none yet")
    seed_1: int = stored("<u8", "as `seed_0`")
    short: int = stored("<u8", "requests handed over because what they need to know takes too much "
                        "memory")  # fmt: skip
    scattered: int = stored("<u8", "1: a write was handed over because frames on the stack lie in "
                            "too many pieces")  # fmt: skip
    removals: int = stored("<u8", "names that workers have taken from inodes")
    unused: bytes = stored("V16", "zero", default=bytes(16))
    on: int = stored("<u8", "1: workers may carry out operations on names")
    changes: int = stored("<u8", "inodes that workers have changed, one after the other")
    open_flags: int = stored("<u8", "FOPEN_* flags in the answers to OPEN and CREATE")
    pins: int = stored("<u8", "1: a program has mapped pages, so what leaves files is told it")
    first_pfn: int = stored("<u8", "of the data zone")
    frame_count: int = stored("<u8", "of the data zone", unit="frames")
    journal_offset: int = stored("<u8", "of the journal in the pool", unit="bytes")
    log_frames: int = stored("<u8", "of the longest log: a longer one is not made here",
                             unit="frames")  # fmt: skip
    memory_bytes: int = stored("<u8", "that workers may use for what they know", unit="bytes")
    used_bytes: int = stored("<u8", "that they use", unit="bytes")
    known_inodes: int = stored("<u8", "inodes that they know")
    slot_count: int = stored("<u8", "free slots on their stack")
    frame_stack_count: int = stored("<u8", "free frames on their stack")
    handle_count: int = stored("<u8", "free open places on their stack")
    orphan_count: int = stored("<u8", "inodes that the control plane has to free")
    failed: int = stored("<u8", "1: a worker's commit failed, so nothing may be written any more")
    last_time_ns: int = stored("<u8", "the latest time that was given to a change",
                               unit="ns since 1970")  # fmt: skip
    was_woken: int = stored("<u8", "1: the control plane was told to look at the reserves")
    busy: int = stored("<u8", "requests handed over because the lock was not free")
    slots_low: int = stored("<u8", "with fewer slots, the control plane is told")
    frames_low: int = stored("<u8", "with fewer frames, the control plane is told")
    handles_low: int = stored("<u8", "with fewer open places, the control plane is told")
    notes_directories: int = stored("<u8", "1: the time of access of directories is kept, too")
    in_one_piece: int = stored("<u8", "1: a file that is written here lies in one piece, because "
                               "memory is mapped in large units")  # fmt: skip


@structure
class NamesListed:
    """What a worker's latest READDIRPLUS has counted as looked up. If that was not answered, it is
    taken back when the request comes again."""

    number: int = stored("<u8", "of the request; 0: none")
    count: int = stored("<u8", "how many inodes were counted")
    value: int = stored("<u8", "the count that the next of them has once it is counted")
    rest: bytes = stored("V8", "zero", default=bytes(8))
    inodes: bytes = stored("V2016", "their numbers, 8 bytes each, and 0 behind the last one",
                           default=bytes(2016))  # fmt: skip


@structure
class NamesDecision:
    """What a worker is about to do to names, so that it is done once; see names.pxd."""

    number: int = stored("<u8", "of the request; 0: none")
    state: int = stored("<u8", "0 none, 1 begun, 2 carried out")
    opcode: int = stored("<u8", "of the request")
    offset: int = stored("<u8", "of the word in the pool that decides; 0: nothing is stored there",
                         unit="bytes")  # fmt: skip
    value: int = stored(
        "<u8",
        "that the word has once the operation is carried out; of LOOKUP and "
        "OPEN, how often the inode was held before",
    )
    inode: int = stored("<u8", "number of the inode that it makes or holds; 0: none")
    slot: int = stored("<u8", "the slot taken from the reserve; 0: none", unit="bytes")
    handle: int = stored("<u8", "the open place taken from the reserve; 0: none")
    popped_count: int = stored("<u8", "frames taken from the reserve")
    error: int = stored("<u4", "errno that is answered; 0: none")
    length: int = stored("<u4", "of the answer", unit="bytes")
    popped: bytes = stored("V128", "the pfns of these frames, 8 bytes each", default=bytes(128))
    answer: bytes = stored("V152", "what follows the head of the reply", default=bytes(152))
    rest: bytes = stored("V24", "zero", default=bytes(24))


@structure
class EntryState:
    """What became of the request in an entry of a ring; see entries.pxi. It lies with the entries,
    in a memory of their own."""

    pending: int = stored("<u8", "number of the request that somebody else replies to; 0: none")
    answered: int = stored("<u8", "number of the latest request whose reply is prepared")
    saved: int = stored("<u8", "number of the request whose payload was saved or lost; 0: none")
    error: int = stored("<u4", "errno of the reply")
    answer_bytes: int = stored("<u4", "of the reply, without its head", unit="bytes")
    is_aside: int = stored("<u4", "1: the reply lies in `aside`, 0: in the payload")
    handed_to: int = stored("<u4", "who replies to what is pending")
    saved_bytes: int = stored("<u4", "of the payload in `aside`; 0: it was lost", unit="bytes")
    unused: int = stored("V20", "zero", default=bytes(20))


HEADER = Layout(Header, 576)
MOUNT_WORDS = Layout(MountWords, MOUNT_WORDS_LIMIT)
KEPT_ATTRIBUTES = Layout(KeptAttributes, 64)
SLOT_HEAD = Layout(SlotHead, 64)
OPERATION_COUNTS = Layout(OperationCounts, 64)
CACHE_COUNTS = Layout(CacheCounts, 64)
INODE_ENTRY = Layout(InodeEntry, 64)
ATTRIBUTES_ENTRY = Layout(AttributesEntry, 128)
TABLE_HEAD = Layout(TableHead, 32)
EXTENT = Layout(Extent, 32)
FAULT_RECORD = Layout(FaultRecord, 32)
MISS = Layout(Miss, 24)
HOT = Layout(Hot, 16)
PAGE_LOCK = Layout(PageLock, 16)
REDO_LOCK = Layout(RedoLock, 16)
NAMES_HEAD = Layout(NamesHead, 256)
NAMES_DECISION = Layout(NamesDecision, 384)
NAMES_LISTED = Layout(NamesListed, 2048)
ENTRY_STATE = Layout(EntryState, 64)
OPEN_PLACE = Layout(OpenPlace, 64)
DECISION = Layout(Decision, 64)
ANSWER_RECORD = Layout(AnswerRecord, 192)
HOLD_NOTES = Layout(HoldNotesHead, 64)
HOLD_NOTE = Layout(HoldNote, 16)

SIGNATURE = zlib.crc32(
    repr([
        [tuple(field) for field in layout.fields]
        for layout in (HEADER, MOUNT_WORDS, KEPT_ATTRIBUTES, SLOT_HEAD, OPERATION_COUNTS,
                       CACHE_COUNTS, INODE_ENTRY, ATTRIBUTES_ENTRY, TABLE_HEAD, EXTENT,
                       FAULT_RECORD, OPEN_PLACE, DECISION, ANSWER_RECORD, HOLD_NOTES, HOLD_NOTE,
                       MISS, HOT,
                       PAGE_LOCK, REDO_LOCK, NAMES_HEAD, NAMES_DECISION, NAMES_LISTED,
                       ENTRY_STATE)
    ]).encode()
) >> 1  # fmt: skip
"""Tells this memory from that of a version which declares it otherwise. A constant in C has 31
bits everywhere."""

assert INODE_ENTRIES == INODE_WAYS << INODE_BUCKETS_SHIFT

OPERATION_BYTES = OPERATION_COUNTS.size_bytes + LATENCY_BUCKETS * 8
ENTRY_ASIDE_AT = 2048
ENTRY_ASIDE_BYTES = 2048
"""Behind the header of an entry there is room for a short reply or payload."""
ENTRY_PAYLOAD_AT = 4096
PAGE_LOCKS_BYTES = (PAGE_LOCK.size_bytes << PAGE_LOCKS_SHIFT) + (
    REDO_LOCK.size_bytes << REDO_LOCKS_SHIFT
)
"""The locks of redo records lie behind those of pages."""
HOLD_NOTES_AT = DECISION.size_bytes + (ANSWER_RECORD.size_bytes << ANSWERS_SHIFT)
"""Behind the records of answers; long answers come last."""
HOLD_NOTES_BYTES = HOLD_NOTES.size_bytes + (HOLD_NOTE.size_bytes << HOLD_NOTES_SHIFT)
NAMES_SLOTS_AT = NAMES_HEAD.size_bytes
NAMES_FRAMES_AT = NAMES_SLOTS_AT + (8 << NAMES_STACK_SHIFT)
NAMES_HANDLES_AT = NAMES_FRAMES_AT + (8 << NAMES_STACK_SHIFT)
NAMES_ORPHANS_AT = NAMES_HANDLES_AT + (8 << NAMES_STACK_SHIFT)
NAMES_CHANGES_AT = NAMES_ORPHANS_AT + (8 << NAMES_STACK_SHIFT)
NAMES_VERSIONS_AT = NAMES_CHANGES_AT + (8 << NAMES_CHANGES_SHIFT)
NAMES_DECISIONS_AT = NAMES_VERSIONS_AT + (8 << NAMES_VERSIONS_SHIFT)
"""Behind the head of names, in bytes; a decision for each worker comes last, and then what each has
listed."""
CACHE_COUNTS_AT = SLOT_HEAD.size_bytes + len(Operation) * OPERATION_BYTES
SLOT_BYTES = align_up(CACHE_COUNTS_AT + CACHE_COUNTS.size_bytes, FRAME_BYTES)


def entries_bytes(queue_count: int, depth: int, max_write: int) -> int:
    """The memory of all rings. `entries_bytes_of` in entries.pxi computes the same."""
    states_bytes = align_up(depth * ENTRY_STATE.size_bytes, FRAME_BYTES)
    return queue_count * (states_bytes + depth * (ENTRY_PAYLOAD_AT + max_write))


class Areas(NamedTuple):
    """Where everything lies in the memfd. Each area starts on a frame of its own."""

    words: int
    kept: int
    slots: int
    faults: int
    inodes: int
    attributes: int
    presence: int
    sections: int
    tables: int
    opens: int
    counts: int
    answers: int
    locks: int
    groups: int
    page_locks: int
    names: int
    memmap: int
    total: int


def compute_areas(
    *, worker_count: int, pool_bytes: int, page_count: int, section_shift: int, has_files: bool,
    memmap_here: bool, cache_set_count: int = 0,
) -> Areas:  # fmt: skip
    """The areas for a pool of at most these sizes. All except the first are sparse, so what is not
    used takes no memory."""
    sizes_bytes = (
        HEADER.size_bytes,
        MOUNT_WORDS.size_bytes,
        KEPT_INODES * KEPT_ATTRIBUTES.size_bytes,
        worker_count * SLOT_BYTES,
        FAULT_RECORDS * FAULT_RECORD.size_bytes,
        INODE_ENTRIES * INODE_ENTRY.size_bytes,
        ATTRIBUTES_ENTRY.size_bytes << ATTRIBUTES_SHIFT,
        (pool_bytes >> CHUNK_SHIFT) + 1,
        (page_count >> section_shift) + 1,
        EXTENT_ARENA_BYTES,
        OPEN_PLACE.size_bytes << OPEN_PLACES_SHIFT,
        inode_numbers(pool_bytes) * COUNT_BYTES if has_files else 0,
        HOLD_NOTES_AT + HOLD_NOTES_BYTES + LISTINGS_BYTES,
        CACHE_LOCK_BYTES << CACHE_LOCKS_SHIFT if cache_set_count else 0,
        group_count_of(cache_set_count),
        PAGE_LOCKS_BYTES if has_files else 0,
        names_bytes(worker_count) if has_files else 0,
        page_count * PAGE_STRUCTURE_BYTES if memmap_here else 0,
    )
    offsets = []
    end = 0
    for size in sizes_bytes:
        offsets.append(end)
        end = align_up(end + size, FRAME_BYTES)
    areas = [*offsets[1:], end]
    return Areas(*areas)


def names_bytes(worker_count: int) -> int:
    """What is shared about names."""
    return names_listed_at(worker_count) + worker_count * NAMES_LISTED.size_bytes


def names_listed_at(worker_count: int) -> int:
    """Where it lies, from the head of names on, what workers have listed. `listed_of` in
    listings.pxi computes the same."""
    return NAMES_DECISIONS_AT + worker_count * NAMES_DECISION.size_bytes


def group_count_of(cache_set_count: int) -> int:
    """How many groups the sets of a cache make."""
    if not cache_set_count:
        # The daemons of other modes start sooner without the declarations of a cache.
        return 0
    from pmemfs.media.cache import GROUP_SHIFT

    return -(-cache_set_count >> GROUP_SHIFT)


def may_have_sets(pool_bytes: int, cache_set_count: int) -> bool:
    """Whether a pool is large enough for the sets of a cache."""
    if not cache_set_count:
        return True
    from pmemfs.media.cache import SET_BYTES

    return cache_set_count <= pool_bytes // SET_BYTES


def inode_numbers(pool_bytes: int) -> int:
    """All inodes of a pool have lower numbers, since a number says which slot of the pool it is."""
    return pool_bytes // INODE_SLOT_BYTES


def buckets_of(inode: int) -> tuple[int, int]:
    """The two buckets that an inode's entry may be in. `find_inode` in plane.pxi has it, too."""
    mixed = inode * INODE_HASH & _WORD
    mask = (1 << INODE_BUCKETS_SHIFT) - 1
    return mixed >> (64 - INODE_BUCKETS_SHIFT), mixed >> (64 - 2 * INODE_BUCKETS_SHIFT) & mask


@lru_cache(1 << ATTRIBUTES_SHIFT)
def attributes_place_of(inode: int) -> int:
    """The only place for an inode's attributes. `read_attributes` in plane.pxi computes the
    same."""
    return (inode * INODE_HASH & _WORD) >> (64 - ATTRIBUTES_SHIFT)


def bucket_start_ns(bucket: int) -> int:
    """The shortest latency that a bucket counts. `bucket_of` in plane.pxi computes the same."""
    if bucket == 0:
        return 0
    power, quarter = divmod(bucket - 1, 4)
    return (4 + quarter) << (power + 5)
