"""Checks frames: that the bitmaps say what is used, and that no frame has two owners."""

from __future__ import annotations

from pmemfs.media.filesystem import GROUP_CHUNKS
from pmemfs.pfn import PAGE_SHIFT
from pmemfs.volume.fs.allocator import Allocator
from pmemfs.volume.fs.census import DAMAGED, FREE, Census
from pmemfs.volume.fs.extents import MappedExtent, Run
from pmemfs.volume.fs.findings import Progress, Remedy, Stage, Verdict, frames_are
from pmemfs.volume.fs.inode import Inode
from pmemfs.volume.fs.masks import FrameSet
from pmemfs.volume.fs.table import InodeTable
from pmemfs.volume.fs.transaction import log_runs


class Owners:
    """Which frames have owners, and which have several: two bits a frame."""

    def __init__(self, first_pfn: int) -> None:
        self.metadata = FrameSet(first_pfn)
        self.data = FrameSet(first_pfn)
        self.shared = FrameSet(first_pfn)

    def add_metadata(self, runs: list[Run]) -> None:
        """Add frames of inodes or of a log."""
        self.shared.add(self.metadata.add(runs))

    def add_data(self, runs: list[Run]) -> None:
        """Add frames of a file."""
        self.shared.add(self.data.add(runs))

    def compare(self) -> None:
        """All frames were added: those that are both data and metadata are shared, too."""
        for chunk, mask in list(self.data.chunks()):
            self.shared.add_mask(chunk, mask & self.metadata.mask(chunk))

    def has_any(self, pfn: int) -> bool:
        """Whether a frame has an owner."""
        run = [Run(pfn, 1)]
        return bool(self.data.meeting(run) or self.metadata.meeting(run))

    def mask(self, chunk: int) -> int:
        """The frames of a chunk that have an owner."""
        return self.metadata.mask(chunk) | self.data.mask(chunk)


class FrameCheck:
    """The look at all frames, once all inodes were looked at."""

    def __init__(
        self, allocator: Allocator, table: InodeTable, census: Census, owners: Owners,
        verdict: Verdict, progress: Progress,
    ) -> None:  # fmt: skip
        self._allocator = allocator
        self._table = table
        self._geometry = allocator.geometry
        self._census = census
        self._owners = owners
        self._verdict = verdict
        self._progress = progress
        self._unmarked = FrameSet(self._geometry.first_pfn)

    def look_at_bitmaps(self, *, has_unreadable: bool) -> None:
        """Compare what the bitmaps say is used with what is used.

        `has_unreadable` says that some inodes can't be read, so that they may own frames.
        """
        leaked = FrameSet(self._geometry.first_pfn)
        leaked_frames = 0
        for group in range(self._geometry.group_count):
            if group % 16 == 0:
                self._progress("bitmaps", group, self._geometry.group_count)
            self._look_at_marks(group)
            free = self._allocator.group(group).masks
            self._allocator.forget(group)
            for chunk, managed in enumerate(self._allocator.managed(group)):
                number = group * GROUP_CHUNKS + chunk
                owned = self._owners.mask(number)
                self._verdict.used_frames += owned.bit_count()
                self._unmarked.add_mask(number, owned & free[chunk])
                nobodys = managed & ~free[chunk] & ~owned
                leaked.add_mask(number, nobodys)
                leaked_frames += nobodys.bit_count()
        if leaked:
            self._say_leaked(leaked, leaked_frames, has_unreadable)

    def _look_at_marks(self, group: int) -> None:
        frames, kept = self._geometry.frames_of(group), self._geometry.kept_of(group)
        impossible = self._table.marked(group) & ~((1 << frames) - (1 << kept))
        if impossible:
            clear = Remedy(
                Stage.BITMAPS, "they are cleared", lambda m: m.clear_marks(group, impossible)
            )
            why = f"in group {group}, {impossible.bit_count()} bits are of no possible frame"
            self._verdict.error("inode bitmap", why, remedy=clear)

    def _say_leaked(self, leaked: FrameSet, leaked_frames: int, has_unreadable: bool) -> None:
        self._verdict.leaked_frames = leaked_frames
        free = Remedy(
            Stage.LEAKS, "they are freed", lambda m: m.free_frames(leaked),
            needs_force=has_unreadable,
        )  # fmt: skip
        why = f"{frames_are(leaked_frames)} marked as used and not owned"
        if has_unreadable:
            why += " by what can be read"
        self._verdict.leak("bitmap", why, remedy=free)

    def look_at_owners(self) -> None:
        """Say who owns the frames that something is wrong with."""
        if self._unmarked:
            unmarked = self._unmarked
            mark = Remedy(Stage.BITMAPS, "they are marked as used", lambda m: m.mark_used(unmarked))
            count = sum(mask.bit_count() for _, mask in unmarked.chunks())
            why = f"{frames_are(count)} free in it but have an owner; the owners are named with it"
            self._verdict.error("bitmap", why, remedy=mark)
        if not self._unmarked and not self._owners.shared:
            return
        seen = FrameSet(self._geometry.first_pfn)
        frames = [Run(pfn, 1) for pfn in self._census.first]
        self._say_unmarked(0, "a frame of inodes", frames)
        seen.add(self._owners.shared.meeting(frames))
        files = []
        for position, number in enumerate(self._census.numbers()):
            if self._census.types[position] in (FREE, DAMAGED):
                continue
            inode = self._census.read(number)
            assert inode is not None, "it was read before"
            self._say_unmarked(number, "its log", log_runs(inode.log))
            self._look_at_shared_log(inode, seen)
            if inode.data_frames:
                self._say_unmarked(number, "its content", inode.runs())
                if self._owners.shared.meeting(inode.runs()):
                    files.append(number)
        for number in files:
            inode = self._census.read(number)
            assert inode is not None, "it was read before"
            self._look_at_shared_content(inode, seen)

    def _say_unmarked(self, number: int, what: str, runs: list[Run]) -> None:
        found = self._unmarked.meeting(runs)
        if found:
            where = _run_list(found)
            self._verdict.error(
                "inode" if number else "bitmap", f"{what} is in free frames {where}", number
            )

    def _look_at_shared_log(self, inode: Inode, seen: FrameSet) -> None:
        met = seen.add(self._owners.shared.meeting(log_runs(inode.log)))
        if not met:
            return
        number = inode.number
        shared = {run.pfn + at << PAGE_SHIFT for run in met for at in range(run.frame_count)}
        move = Remedy(
            Stage.SHARED, "its log is written anew elsewhere",
            lambda m: m.move_log(number, shared),
        )  # fmt: skip
        why = f"its log is in frames that others own, too: {_run_list(met)}"
        self._verdict.error("inode", why, number, move)

    def _look_at_shared_content(self, inode: Inode, seen: FrameSet) -> None:
        number = inode.number
        lost: list[MappedExtent] = []
        for index, pfn, count in inode.extents:
            for run in self._owners.shared.meeting([Run(pfn, count)]):
                for met in seen.add([run]):
                    lost.append(MappedExtent(index + met.pfn - pfn, met.pfn, met.frame_count))
        if lost:
            copy = Remedy(
                Stage.SHARED, "they are copied, so that both keep what they read",
                lambda m: m.copy_frames(number, lost),
            )  # fmt: skip
            self._say_shared(number, [Run(extent.pfn, extent.frame_count) for extent in lost], copy)
        for index, piece in inode.pieces.items():
            self._look_at_shared_piece(number, index, Run(piece.pfn, piece.stored_frames), seen)

    def _look_at_shared_piece(self, number: int, index: int, run: Run, seen: FrameSet) -> None:
        met = seen.add(self._owners.shared.meeting([run]))
        if met:
            move = Remedy(
                Stage.SHARED, "its compressed piece there is copied, so that both keep what they "
                "read", lambda m: m.copy_piece(number, index),
            )  # fmt: skip
            self._say_shared(number, met, move)

    def _say_shared(self, number: int, runs: list[Run], remedy: Remedy) -> None:
        why = f"its content is in frames that others own, too: {_run_list(runs)}"
        self._verdict.error("inode", why, number, remedy)


def _run_list(runs: list[Run]) -> str:
    """Some of the runs, as page-frame numbers."""
    some = [
        f"{run.pfn:#x}" + (f"-{run.pfn + run.frame_count - 1:#x}" if run.frame_count > 1 else "")
        for run in runs[:4]
    ]
    return ", ".join(some) + (f" and {len(runs) - 4} more runs" if len(runs) > 4 else "")
