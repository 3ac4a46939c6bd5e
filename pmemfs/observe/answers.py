"""What the daemon of a mount answers, declared once: the daemon makes it and the commands read it.

The commands decode it from JSON (`control.shape`), which may come from another user's program. So
every field has a type that says all that its readers rely on, and nothing here is slow to load.
They are named tuples, because to make a dataclass Python writes and compiles six functions.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from pmemfs.engine.statistics import EngineStatistics
from pmemfs.media.keyreport import KeyReport
from pmemfs.media.pagereport import PageOwner, PageReport, StructureBytes
from pmemfs.media.transformreport import CompressionReport
from pmemfs.volume.fs.space import Space


class PoolInfo(NamedTuple):
    """What the label and the medium say. Sizes and offsets in bytes."""

    path: str
    name: str
    uuid: str
    kind: str
    durability: str
    reserved: bool
    mode: str
    scheme: str
    state: str
    format_version: int
    software: str
    size_bytes: int
    page_size_bytes: int
    page_count: int
    alignment_bytes: int
    generation: int
    mount_count: int
    created: str
    mounted: str
    zones: dict[str, ZoneInfo]
    damaged_labels: list[str]


class ZoneInfo(NamedTuple):
    """Where a zone of a pool lies."""

    offset_bytes: int
    size_bytes: int


class MountStatus(NamedTuple):
    """What the daemon of a mount says of itself."""

    pid: int | None
    """None: the daemon is in another pid namespace than who asks, and has no number there."""
    mountpoint: str
    device: str
    read_only: bool
    options: str
    engine: Literal["native", "python"]
    transport: str
    transport_reason: str
    data_plane_pid: int | None
    """The process that moves the bytes; None if the daemon itself moves them."""
    effective_scheme: str
    uptime_seconds: float
    fault_count: int
    """Requests that met memory which could not be touched; the log names the pages."""
    io: EngineStatistics
    space: Space | None
    """How the frames of a file system are used; None in mode `block`."""
    pool: PoolInfo
    is_detached: bool = False
    """Whether it is mounted nowhere any more, and ends once no program uses it."""
    log: str = ""
    """Where its log goes: a file, or the journal."""
    pool_fd: int | None = None
    """The daemon's descriptor of the pool: its file, whatever name that has by now."""
    structures: StructureBytes | None = None
    """What page structures take now."""
    pins: PinSummary | None = None
    kept: KeptStatus | None = None
    """What the mount outlives; None: it ends with each of its processes."""
    keys: tuple[KeyReport, ...] = ()
    compression: CompressionReport | None = None
    """What is compressed of a file system; None if nothing was ever to be."""
    names: NamesStatus | None = None
    """What the data plane knows of names; None where the daemon serves all of them."""


class NamesStatus(NamedTuple):
    """What the data plane knows of names, to look up, make and remove them by itself."""

    is_on: bool
    """Whether it may do so now."""
    known_inodes: int
    used_bytes: int
    limit_bytes: int
    handed_over_busy: int
    """Requests that it left to the daemon because somebody else was changing names just then."""
    handed_over_short: int
    """Requests that it left to the daemon because what they need to know takes too much memory."""


class KeptStatus(NamedTuple):
    """How a mount outlives its processes."""

    keeper_pid: int | None
    """None: the keeper is gone, so the mount ends with its daemon. 0: it is in another pid
    namespace than who asks, and has no number there."""
    daemon: Deaths
    data_plane: Deaths
    keeper: Deaths
    promise: str
    """What becomes of requests when the data plane dies."""
    since_ns: int = 0
    """When this daemon began to serve, in ns since 1970."""
    is_upgrading: bool = False
    """Whether the data plane is about to be replaced by that of another version."""


class UpgradeBegun(NamedTuple):
    """A mount that another version takes over, as it was before."""

    since_ns: int
    data_plane_pid: int | None
    daemon_deaths: int


class Deaths(NamedTuple):
    """How often processes of one kind have died, and others have taken their place."""

    times: int
    last: str
    """When the last one did, or "never"."""


class PinSummary(NamedTuple):
    """How much clients hold."""

    pin_count: int
    process_count: int
    held_bytes: int
    """Of all pins; what several hold counts as often."""
    resting_bytes: int
    """Held a while longer, because a client is gone whose device may still be writing."""


class Remounted(NamedTuple):
    """How a mount is mounted after a remount."""

    options: str


class Pages(NamedTuple):
    """The states of all pages, and the pages with the most transfers."""

    scheme: str
    page_size_bytes: int
    generation: int
    counts: dict[str, int]
    hottest: tuple[PageReport, ...]


class PageCell(NamedTuple):
    """Some pages side by side, of which at least one was touched. What is not counted is
    uninitialised."""

    cell: int
    """From the first page on; each cell but the last has as many pages."""
    clean: int
    dirty: int
    in_use: int
    reads: int
    writes: int
    owner: int = 0
    """The inode that most touched pages belong to."""


class OwnerShare(NamedTuple):
    """How many touched pages belong to an inode."""

    owner: PageOwner
    page_count: int


class PageMap(NamedTuple):
    """What is known of all pages, in cells."""

    scheme: str
    page_size_bytes: int
    generation: int
    first_pfn: int
    page_count: int
    pages_per_cell: int
    cells: tuple[PageCell, ...]
    """Those in which a page was touched."""
    owners: tuple[OwnerShare, ...] = ()
    """Those of most pages; empty unless they were asked for."""
    other_pages: int = 0
    """Touched pages of other owners, or of none."""


class PageRun(NamedTuple):
    """Pages of a file that lie side by side in the pool, too, and whose structures say the same."""

    offset_bytes: int
    """In the file."""
    pfn: int
    length_bytes: int
    state: Literal["uninitialised", "clean", "dirty"]
    refcount: int = 0
    reads: int = 0
    """Of each page."""
    writes: int = 0
    last_access_ns: int = 0
    """Of the page that was accessed last."""


class FilePages(NamedTuple):
    """The pages of a file from an offset on, as far as an answer goes."""

    inode: int
    scheme: str
    page_size_bytes: int
    size_bytes: int
    runs: tuple[PageRun, ...]
    next_bytes: int | None = None
    """Where to ask for more."""


class PageState(NamedTuple):
    """All that is known of a page."""

    first_pfn: int
    frame_count: int
    scheme: str
    generation: int
    page: int
    """The place of its structure among all structures."""
    pfn_t: int
    """The word that stands for it."""
    state: Literal["uninitialised", "clean", "dirty"]
    is_free: bool | None
    """Whether no file has the frame; None in mode `block`."""
    referenced: bool = False
    refcount: int = 0
    reads: int = 0
    writes: int = 0
    last_access_ns: int = 0
    write_epoch: int = 0
    owner: PageOwner | None = None
    offset_bytes: int = 0
    """Of the page in that inode."""


class PinnedRange(NamedTuple):
    """A range of a file that is pinned."""

    owner: PageOwner
    offset_bytes: int
    length_bytes: int


class HeldPin(NamedTuple):
    """A pin, and who has it."""

    pin: int
    pid: int
    command: str
    since_ns: int
    writable: bool
    is_resting: bool
    """Whether its client is gone, while its pages rest."""
    is_stale: bool
    """Whether a page of it has left its file."""
    page_count: int
    files: tuple[PinnedRange, ...]
    other_files: int = 0
    """So many more ranges have no room here."""


class PagePins(NamedTuple):
    """Who holds which pages; those with most pages first."""

    scheme: str
    page_size_bytes: int
    pins: tuple[HeldPin, ...]
    other_pins: int
    """So many more have no room here."""
    other_pages: int


class ExtentReport(NamedTuple):
    """A run of page frames of a file, or a piece of it that lies compressed in such a run."""

    offset_bytes: int
    """In the file."""
    pfn: int
    length_bytes: int
    is_aligned: bool
    """Whether it consists of whole 2 MiB, aligned in the file and in the pool."""
    stored_bytes: int = 0
    """What it takes of the pool, in whole page frames, if it lies compressed; 0: it is plain."""


class FileExtents(NamedTuple):
    """Extents and compressed pieces of a file from an offset on, including those behind its
    size."""

    inode: int
    size_bytes: int
    extents: tuple[ExtentReport, ...]
    is_complete: bool
    """Whether this is the end of the list."""
