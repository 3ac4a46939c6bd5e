# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The native code of the data plane: one unit of compilation, so that hot code is inlined.

These are its rooms, from the ground up. C lies in headers beside them, and `.pxd` files declare the
structures that rooms share.


    words       reads and writes words that another process may be writing
    pages       page structures
    plane       the shared memory as the data plane reads it
    content     READ, WRITE and LSEEK
    crypt       READ and WRITE of encrypted files
    packed      READ of compressed pieces
    cache       the same in mode `cache`
    filling     places that the control plane fills from an origin
    durability  FSYNC
    route       finds which of these answers a request, or who else has to
    entries     entries of rings, and what a data plane finds in them
    transport   what both transports have in common, and the way to the control plane
    classic     the transport fd
    uring       the transport uring
    process     the threads of a data plane
    responder   a worker without a kernel, to study or test
"""

include "words.pxi"
include "pages.pxi"
include "plane.pxi"
include "content.pxi"
include "crypt.pxi"
include "packed.pxi"
include "cache.pxi"
include "filling.pxi"
include "durability.pxi"
include "route.pxi"
include "transport.pxi"
include "classic.pxi"
include "entries.pxi"
include "uring.pxi"
include "process.pxi"
include "responder.pxi"
