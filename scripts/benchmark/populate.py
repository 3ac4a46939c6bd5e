"""Fill a pool of mode fs with empty files: ``python populate.py POOL FILES FILES_PER_DIRECTORY``.

Through the file system's own code, in this process, on the pool's file that nobody has mounted: a
mount would take as many round trips of the kernel as there are files, for the same result. It is
run as a program of its own so that it can be interrupted, and its memory goes with it.
"""

import sys

from pmemfs.media.inode import ROOT
from pmemfs.medium.mapped import MappedMedium
from pmemfs.memmap import open_memmap
from pmemfs.pool import Pool
from pmemfs.volume.base import NewInode
from pmemfs.volume.fs.filesystem import FileSystem

FILES_BETWEEN_TIDYING = 1000


def populate(path: str, file_count: int, files_per_directory: int) -> None:
    """Make the files, and leave the pool clean."""
    medium = MappedMedium.open(path)
    pool = Pool.open(medium)
    pool.begin_mount()
    file_system = FileSystem(pool, open_memmap(pool))
    directory = ROOT
    for number in range(file_count):
        if number % files_per_directory == 0:
            name = b"directory-%06d" % (number // files_per_directory)
            directory = file_system.make(ROOT, name, NewInode(0o40755, 0, 0))
        file_system.make(directory, b"file-%07d.dat" % number, NewInode(0o100644, 0, 0))
        if number % FILES_BETWEEN_TIDYING == 0:
            file_system.tidy()
    file_system.end()
    pool.end_mount()
    medium.close()


if __name__ == "__main__":
    populate(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
