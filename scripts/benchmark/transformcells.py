"""What the part `transform` measures."""

from benchmark.cells import CELLS
from benchmark.mountrun import ReadingCell

# the workloads of the part `io` at 1 caller and at 2 x 32 deep, and the sequential ones
CIPHER_SHAPES = tuple(
    cell
    for cell in CELLS
    if cell.place == "subject" and not cell.pinned and (cell.depth == 1 or cell.jobs == 2)
)
PLAIN_SHAPES = tuple(cell for cell in CIPHER_SHAPES if cell.random)
# by name: what it is
CORPORA = {
    "tar": "a tar of a source tree",
    "logs": "JSON logs",
    "database": "a SQLite database",
}
TRANSFORM_CELLS = (
    ReadingCell("encrypted", "encryption", "an encrypted file, over a plain one"),
    ReadingCell("gocryptfs", "encryption", "an encrypted file, over gocryptfs on tmpfs"),
    ReadingCell("at-rest", "compression", "what lies compressed, against zstd -1; small files"),
    ReadingCell("cold", "compression", "1 MiB reads of what is cold, and of what was"),
    ReadingCell("beside", "compression", "plain files while others are compressed"),
)
