"""What the part `cache` measures."""

from benchmark.cells import CELLS, KIB, Cell
from benchmark.mountrun import ReadingCell

# the workloads of the part `io`, but for the file systems on a subject
HIT_SHAPES = tuple(cell for cell in CELLS if cell.place == "subject")
# by name: what it is, and whether it is slow
MISS_ORIGINS = {
    "slow": ("NBD of 1 ms", True),
    "ceph": ("one-node Ceph", True),
    "file": ("a file on a disk", False),
    "prompt": ("NBD without delay", False),
}
_CACHE = ("cache",)
CACHE_CELLS = (
    ReadingCell("hits", "cache", "hits, against mode block", _CACHE),
    ReadingCell("zipf", "cache", "zipf 1.1, cache of 10 %, origin of 1 ms", _CACHE),
    *(
        ReadingCell(f"misses-{name}", "cache", f"misses alone: {what}", _CACHE)
        for name, (what, _) in MISS_ORIGINS.items()
    ),
    ReadingCell("writes", "cache", "writes, origin of 20 ms", _CACHE),
    ReadingCell("peers", "cache", "other caches before the same origin", _CACHE),
    ReadingCell("attach", "cache", "mount after kill -9, 1 TiB against 1 GiB", _CACHE),
)


def _shape(name: str, direction: str, depth: int) -> Cell:
    assert direction in ("read", "write")
    return Cell(
        name=name,
        group=name,
        caption=f"{depth} deep",
        direction="read" if direction == "read" else "write",
        random=True,
        block_bytes=4 * KIB,
        depth=depth,
    )


READS_64 = _shape("misses", "read", 64)
READS_32 = _shape("reads", "read", 32)
WRITES_32 = _shape("writes", "write", 32)
