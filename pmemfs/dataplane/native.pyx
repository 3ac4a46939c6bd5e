# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The native code of the data plane: one unit of compilation, so that hot code is inlined.

These are its rooms, from the ground up. C lies in headers beside them, and `.pxd` files declare the
structures that rooms share.


    words       reads and writes words that another process may be writing
    pages       page structures
    plane       the shared memory as the data plane reads it
    known       the memory of what workers know of inodes
    directories the names of directories, as workers know them
    replay      inodes of the records of their logs
    logs        reads logs, and keeps what is known up to date
    content     READ, WRITE and LSEEK
    crypt       READ and WRITE of encrypted files
    packed      READ of compressed pieces
    cache       the same in mode `cache`
    filling     places that the control plane fills from an origin
    durability  FSYNC
    state       what a known inode is for whoever asks
    records     records that logs get
    commit      how a worker changes what is stored of names
    lock        operations on names: the lock, decisions, reserves
    names       LOOKUP, CREATE, MKDIR, UNLINK, RMDIR
    renames     RENAME
    attributes  GETATTR, SETATTR, GETXATTR
    inodes      handles and holds of inodes
    listings    OPENDIR, READDIR, READDIRPLUS, RELEASEDIR
    smallfiles  READ, WRITE, LSEEK and FSYNC of small files without a table
    route       finds which of these answers a request, or who else has to
    entries     entries of rings, and what a data plane finds in them
    transport   what both transports have in common, and the way to the control plane
    classic     the transport fd
    uring       the transport uring
    process     the threads of a data plane
    responder   a worker without a kernel, to study or test
    names_control  the lock of names, and what it guards, for the control plane
"""

include "words.pxi"
include "pages.pxi"
include "plane.pxi"
include "known.pxi"
include "directories.pxi"
include "replay.pxi"
include "logs.pxi"
include "content.pxi"
include "crypt.pxi"
include "packed.pxi"
include "cache.pxi"
include "filling.pxi"
include "durability.pxi"
include "state.pxi"
include "records.pxi"
include "commit.pxi"
include "lock.pxi"
include "names.pxi"
include "renames.pxi"
include "attributes.pxi"
include "inodes.pxi"
include "listings.pxi"
include "smallfiles.pxi"
include "route.pxi"
include "transport.pxi"
include "classic.pxi"
include "entries.pxi"
include "uring.pxi"
include "process.pxi"
include "responder.pxi"
include "names_control.pxi"
